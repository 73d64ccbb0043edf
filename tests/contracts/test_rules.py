"""What every fusion rule promises (H8), driven by the registry: registering a rule tests it.

A rule whose settings need more than their defaults adds rows to `VARIANTS`.
"""

from __future__ import annotations

import json
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.errors import ConfigError, DataError
from fusion.rules import RULES
from fusion.rules.base import Rule
from fusion.types import Over

MEMBERS = ("image", "text", "taste")
SHAPE = (2, 3, 7)

VARIANTS: dict[str, list[tuple[Over, dict[str, Any]]]] = {
    "average": [
        *[(over, {"mean": mean}) for over in ("classes", "candidates") for mean in ("geometric", "rank")],
        ("candidates", {"mean": "rank", "top_n": 4}),
        ("candidates", {"doubt": 1.0}),
        ("candidates", {"guard": True}),
        *[("classes", {"calibration": method}) for method in ("none", "platt", "isotonic")],
    ],
    "vote": [("candidates", {"method": "borda", "top_n": 4}), ("classes", {"calibration": "platt"})],
    "probability": [
        *[("candidates", {"normalisation": kind, "top_n": 4}) for kind in ("rank", "softmax", "none")],
        ("classes", {"weights": {"image": 0.2, "text": 0.3, "taste": 0.5}}),
    ],
    "learned": [
        ("classes", {"per_class": True, "segments": {"words": 2}}),
        ("classes", {"guard": True}),
        ("candidates", {"segments": {"history_length": 3, "popularity": 2}}),
    ],
    "gate": [
        ("classes", {"context": (), "confidence": False}),
        ("candidates", {"context": (), "hidden": 4, "normalisation": "standardise"}),
    ],
    "greedy": [("candidates", {"normalisation": kind, "top_n": 4}) for kind in ("log_rank", "none")],
    "stacker": [
        ("classes", {"per_class": True}),
        ("classes", {"calibration": "isotonic"}),
        ("candidates", {"features": ("rank",), "top_n": 4}),
        ("candidates", {"guard": True}),
    ],
    "stacker_mlp": [
        ("candidates", {"guard": True}),
        ("candidates", {"passthrough": ("history_length", "popularity"), "top_n": 4}),
    ],
    "stacker_gbdt": [("classes", {"passthrough": ("words",)})],
}

CASES = [
    pytest.param(name, over, options, id="-".join([name, over, *map(str, options.values())][:4]))
    for name in RULES
    for over, options in [("classes", {}), ("candidates", {}), *VARIANTS.get(name, [])]
]


def make(name: str, over: Over, options: dict[str, Any], members: tuple[str, ...] = MEMBERS) -> Rule:
    kind = RULES[name]
    if "weights" in options:
        chosen = {member: options["weights"][member] for member in members}
        options = {**options, "weights": {m: w / sum(chosen.values()) for m, w in chosen.items()}}
    rule: Rule = kind(kind.Config(**options), members, over)
    if options.get("guard"):  # so strict that it silences a member of nearly every row on which three speak
        weighed = options.get("weights", dict.fromkeys(members, 1.0))
        normal = [0.01 if weighed[member] else 0.0 for member in members]
        rule.load_state({**rule.state(), "guard": np.array(normal, np.float32)})
    return rule


def random_scores(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def context_for(rule: Rule, shape: tuple[int, ...]) -> dict[str, np.ndarray] | None:
    """What the rule reads beside scores `[B, S, C]`; the first number is of rows, the others are of candidates."""
    names = rule.reads(rule.config)
    if not names:
        return None
    random, (rows, _, wide) = np.random.default_rng(20), shape
    found = {name: random.normal(size=(rows, 1)).astype(np.float32) for name in names}
    if rule.over == "candidates":
        found |= {name: random.normal(size=(1, wide)).astype(np.float32) for name in names[1:]}
    return found


def fuse(rule: Rule, scores: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    return rule(scores, mask=mask, context=context_for(rule, scores.shape)).numpy()


def silenced(scores: np.ndarray, over: Over) -> np.ndarray:
    """Scores with holes: whole rows of classes, single candidates of candidates."""
    scores = scores.copy()
    if over == "classes":
        scores[0, 1, 2] = np.nan  # one class that is not finite silences the row of this member
        scores[1, 0] = -np.inf
    else:
        scores[0, 1, 2], scores[1, 0, :3], scores[1, 2, 5] = np.nan, np.inf, -np.inf
        scores[0, 2] = 4.25  # constant: a member that knows nothing
    return scores


@pytest.mark.parametrize(("name", "over", "options"), CASES)
class TestRule:
    def test_contributions_sum_to_the_fused_score(self, name: str, over: Over, options: dict[str, Any]) -> None:
        rule = make(name, over, options)
        for scores in (random_scores(), silenced(random_scores(1), over)):
            fused = fuse(rule, scores)
            terms, bias = rule.contributions(scores, context=context_for(rule, scores.shape))
            assert fused.shape == (2, 7) and terms.shape == SHAPE and fused.dtype == np.float32
            np.testing.assert_allclose(terms.numpy().sum(axis=1) + bias.numpy(), fused, rtol=1e-6, atol=1e-6)
            assert np.isfinite(terms.numpy()).all() and np.isfinite(fused).all()

    def test_every_subset_is_the_rule_over_the_subset(self, name: str, over: Over, options: dict[str, Any]) -> None:
        """H8: the fused score is defined for any non-empty subset and equals renormalised weights."""
        scores, whole = random_scores(2), make(name, over, options)
        for size in (1, 2):
            for kept in combinations(range(3), size):
                alone = make(name, over, options, tuple(MEMBERS[s] for s in kept))
                expected = fuse(alone, scores[:, list(kept)])
                mask = np.isin(np.arange(3), kept)[None, :].repeat(2, axis=0)
                np.testing.assert_allclose(fuse(whole, scores, mask), expected, rtol=1e-5, atol=1e-5)
                missing = np.where(mask[:, :, None], scores, np.nan).astype(np.float32)
                np.testing.assert_allclose(fuse(whole, missing), expected, rtol=1e-5, atol=1e-5)
                terms = whole.contributions(missing, context=context_for(whole, SHAPE))[0].numpy()
                assert (terms[~mask] == 0).all()

    def test_a_mask_and_a_score_that_is_not_finite_are_the_same_silence(
        self, name: str, over: Over, options: dict[str, Any]
    ) -> None:
        """H8: NaN, infinities and False in the mask are one thing, whatever stands below the mask."""
        rule, scores = make(name, over, options), random_scores(3)
        holes = silenced(scores, over)
        mask = np.isfinite(holes)
        filled = np.where(mask, holes, np.float32(1e9)).astype(np.float32)
        np.testing.assert_allclose(fuse(rule, filled, mask), fuse(rule, holes), rtol=1e-6, atol=1e-6)
        assert not np.allclose(fuse(rule, scores), fuse(rule, holes))

    def test_the_order_of_members_does_not_matter(self, name: str, over: Over, options: dict[str, Any]) -> None:
        scores = silenced(random_scores(4), over)
        expected = fuse(make(name, over, options), scores)
        for order in permutations(range(3)):
            permuted = make(name, over, options, tuple(MEMBERS[s] for s in order))
            fused = fuse(permuted, scores[:, list(order)])
            np.testing.assert_allclose(fused, expected, rtol=1e-5, atol=1e-5)

    def test_weight_zero_is_leaving_the_member_out(self, name: str, over: Over, options: dict[str, Any]) -> None:
        if "weights" not in RULES[name].Config.model_fields:
            pytest.skip("takes no weights; tests/fusion/test_rules.py shows it on learned ones")
        scores = silenced(random_scores(5), over)
        weighted = {**options, "weights": {"image": 0.25, "text": 0.0, "taste": 0.75}}
        expected = fuse(make(name, over, weighted, ("image", "taste")), scores[:, [0, 2]])
        np.testing.assert_allclose(fuse(make(name, over, weighted), scores), expected, rtol=1e-5, atol=1e-5)

    def test_members_without_influence_can_be_left_out(self, name: str, over: Over, options: dict[str, Any]) -> None:
        """H9: the rule over the members that it uses is the whole rule with the others silent."""
        scores, rule = random_scores(13), make(name, over, options)
        assert rule.used() == MEMBERS and rule.restricted(MEMBERS) is rule
        with pytest.raises(ConfigError, match="did you mean 'text'"):
            rule.restricted(["txt"])
        weights = {"image": 0.25, "text": 0.0, "taste": 0.75}
        if "weights" in RULES[name].Config.model_fields:
            rule = make(name, over, {**options, "weights": weights})
        elif rule.state().get("weights", np.zeros(0)).shape == (3,):
            rule.load_state({**rule.state(), "weights": np.array([*weights.values()], np.float32)})
        else:
            return  # all its members always count
        used = rule.restricted(rule.used())
        assert rule.used() == used.members == ("image", "taste") and used.over == over
        mask = np.array([[True, False, True]] * 2)
        expected, terms = fuse(rule, scores, mask), rule.contributions(scores, mask)[0].numpy()
        np.testing.assert_allclose(fuse(used, scores[:, [0, 2]]), expected, rtol=1e-5, atol=1e-6)
        found = used.contributions(scores[:, [0, 2]])[0].numpy()
        np.testing.assert_allclose(found, terms[:, [0, 2]], rtol=1e-5, atol=1e-6)

    def test_no_voice_at_all(self, name: str, over: Over, options: dict[str, Any]) -> None:
        """H8: candidates without a voice are sorted last, classes without one are uniform."""
        rule, scores = make(name, over, options), random_scores(6)
        if over == "candidates":
            scores[0, :, 4] = np.nan
            fused = fuse(rule, scores)
            assert fused[0, 4] == -np.inf and np.isfinite(np.delete(fused[0], 4)).all()
            constant = fuse(rule, np.ones(SHAPE, np.float32))
            assert (constant == -np.inf).all()
        else:
            scores[1] = np.nan
            probabilities = rule.probabilities(fuse(rule, scores)).numpy()
            np.testing.assert_allclose(probabilities[1], np.full(7, 1 / 7), rtol=1e-5)
            assert probabilities[0].std() > 1e-3

    def test_probabilities_are_probabilities(self, name: str, over: Over, options: dict[str, Any]) -> None:
        rule = make(name, over, options)
        fused = fuse(rule, silenced(random_scores(7), over))
        if over == "candidates":
            with pytest.raises(ValueError, match="over classes"):
                rule.probabilities(fused)
            return
        probabilities = rule.probabilities(fused).numpy()
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
        assert (probabilities >= 0).all()
        np.testing.assert_array_equal(probabilities.argmax(axis=1), fused.argmax(axis=1))

    def test_batch_is_single(self, name: str, over: Over, options: dict[str, Any]) -> None:
        rule, scores = make(name, over, options), silenced(random_scores(8), over)
        context = context_for(rule, scores.shape)
        single = []
        for at in range(len(scores)):
            own = context and {k: v[at : at + 1] if len(v) > 1 else v for k, v in context.items()}
            single.append(rule(scores[at : at + 1], context=own).numpy())
        np.testing.assert_allclose(fuse(rule, scores), np.concatenate(single), rtol=1e-6, atol=1e-6)

    def test_a_part_of_normalised_candidates_is_fused_as_in_the_whole(
        self, name: str, over: Over, options: dict[str, Any]
    ) -> None:
        if over == "classes":
            pytest.skip("classes are never cut")
        rule, scores = make(name, over, options), silenced(random_scores(9), over)
        features = rule.normalise(scores).numpy()[:, :, [5, 1, 2]]
        assert features.shape == (2, 3 * rule.features_per_member, 3)
        expected = fuse(rule, scores)[:, [5, 1, 2]]
        context = context_for(rule, scores.shape)
        own = context and {k: v[:, [5, 1, 2]] if v.shape[1] > 1 else v for k, v in context.items()}
        np.testing.assert_allclose(rule.fuse(features, context=own).numpy(), expected, rtol=1e-5, atol=1e-6)

    def test_large_scores_and_their_masks_are_safe(self, name: str, over: Over, options: dict[str, Any]) -> None:
        rule, scores = make(name, over, options), random_scores(10)
        lowest = np.where(np.arange(7) == 3, np.finfo(np.float32).min, scores).astype(np.float32)
        if over == "candidates":  # the mask of other people's models
            assert (fuse(rule, lowest)[:, 3] == -np.inf).all()
        assert np.isfinite(fuse(rule, scores * np.float32(1e25))).all()

    def test_keras_makes_the_layer_again(self, name: str, over: Over, options: dict[str, Any]) -> None:
        rule, scores = make(name, over, options), random_scores(11)
        config = json.loads(json.dumps(keras.layers.serialize(rule)))
        again = keras.layers.deserialize(config)
        assert again.config == rule.config and again.members == MEMBERS
        if "guard" in rule.state():
            again.load_state(rule.state())
        np.testing.assert_array_equal(fuse(again, scores), fuse(rule, scores))

    def test_learned_numbers_survive_a_round_trip(self, name: str, over: Over, options: dict[str, Any]) -> None:
        """State is numbers only, and refuses what is not its own."""
        rule, scores = make(name, over, options), random_scores(12, (60, 3, 7))
        labels = np.random.default_rng(0).integers(0, 7, 60)
        if over == "candidates":
            labels = np.eye(7, dtype=bool)[labels]
        if not rule.learned:
            with pytest.raises(TypeError, match="nothing to learn"):
                rule.fit(rule.normalise(scores).numpy(), None, labels)
        else:
            given = scores if over == "classes" else rule.normalise(scores).numpy()
            context = context_for(rule, scores.shape)
            if context and over == "candidates":
                context = {key: np.broadcast_to(value, labels.shape) for key, value in context.items()}
            report = rule.fit(given, None, labels, context=context)
            assert {"loss_before", "loss_after", "iterations", "rows"} <= set(report)
            assert np.isfinite([report["loss_before"], report["loss_after"]]).all()
            json.dumps(report)
            with pytest.raises(DataError, match="axis 1"):
                rule.fit(given[:, :2], None, labels, context=context)
            if context:
                with pytest.raises(DataError, match="is not given"):
                    rule.fit(given, None, labels)
        state = rule.state()
        assert all(value.dtype.kind == "f" for value in state.values())
        again = make(name, over, options)
        again.load_state(state)
        np.testing.assert_array_equal(fuse(again, scores), fuse(rule, scores))
        with pytest.raises(DataError, match="must hold"):
            again.load_state({**state, "other": np.zeros(3)})
        for key, value in state.items():
            with pytest.raises(DataError, match=key):
                again.load_state({**state, key: np.full_like(value, np.nan)})

    def test_exported_graphs_give_the_same_numbers(
        self, name: str, over: Over, options: dict[str, Any], tmp_path: Path
    ) -> None:
        """Keras = SavedModel = LiteRT with builtin operations only."""
        rule = make(name, over, options)
        scores = random_scores(13, (1, 3, 50))
        scores[0, 1, 7] = scores[0, 1, 9]  # a tie
        mask = np.ones((1, 3, 50), bool)
        mask[0, 0, 20:30] = False
        mask[0, :, 25] = over == "classes"
        scores[0, 2, 40] = np.nan if over == "candidates" else 0.0
        context = context_for(rule, scores.shape) or {}
        expected = [
            rule(scores, mask=mask, context=context).numpy(),
            rule.contributions(scores, mask, context)[0].numpy(),
        ]

        tf.saved_model.save(Exported(rule), str(tmp_path))
        saved = tf.saved_model.load(str(tmp_path))
        given = {"scores": scores, "mask": mask, **{f"context_{name}": values for name, values in context.items()}}
        loaded = saved.signatures["serving_default"](**{name: tf.constant(array) for name, array in given.items()})
        converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        lite = run_litert(converter.convert(), **given)
        for result in (loaded, lite):
            np.testing.assert_allclose(result["fused"], expected[0], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(result["terms"], expected[1], rtol=1e-5, atol=1e-5)


class Exported(tf.Module):
    """A rule as the exporter wraps it, at a fixed shape."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        context = context_for(rule, (1, 3, 50)) or {}
        specs = [
            tf.TensorSpec([1, 3, 50], tf.float32, "scores"),
            tf.TensorSpec([1, 3, 50], tf.bool, "mask"),
            *[tf.TensorSpec(values.shape, tf.float32, f"context_{name}") for name, values in context.items()],
        ]
        self.names = tuple(context)
        self.serve = tf.function(self._serve, input_signature=specs)

    def _serve(self, scores: Any, mask: Any, *values: Any) -> dict[str, Any]:
        context = dict(zip(self.names, values, strict=True))
        return {
            "fused": self.rule(scores, mask=mask, context=context),
            "terms": self.rule.contributions(scores, mask, context)[0],
        }


def run_litert(model: bytes, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_content=model).get_signature_runner()
    return runner(**inputs)


@pytest.mark.parametrize("name", list(RULES))
def test_members_are_checked_before_any_data_is_read(name: str) -> None:
    kind = RULES[name]
    with pytest.raises(ConfigError, match="'text' twice"):
        kind.check(kind.Config(), ["text", "text"])
    with pytest.raises(ConfigError, match="received none"):
        kind.check(kind.Config(), [])
    if "weights" in kind.Config.model_fields:
        with pytest.raises(ConfigError, match="'txt': did you mean 'text'"):
            kind.check(kind.Config(weights={"txt": 1.0}), ["text", "image"])
        with pytest.raises(ConfigError, match="'image' is missing"):
            kind(kind.Config(weights={"text": 1.0}), ["text", "image"], "classes")
        with pytest.raises(ConfigError, match="above 0"):
            kind.check(kind.Config(weights={"text": 0.0, "image": 0.0}), ["text", "image"])
