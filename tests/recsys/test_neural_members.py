"""Neural members over histories: a recurrent one, a self-attentive one, and an autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fusion.compat import tf
from fusion.errors import ConfigError, DataError
from fusion.types import RunOptions
from recsys.collaborative.base import PADDING, TrainingData
from recsys.collaborative.mult_vae import AnnealedWeight, annealed, evidence_bound, kl_to_standard_normal
from recsys.collaborative.sequences import Windows, latest_items, next_item_softmax
from worlds import World, fitted, member_part, ndcg

LOOP = {"epochs": 12, "batch_size": 32, "learning_rate": 0.02}
SMALL = {"dimensions": 16, "max_history": 6, "dropout": 0.1, "training": LOOP}
KINDS = ("gru4rec", "sasrec")
ITEMS, LENGTH = 30, 8
COLD = ITEMS
"""An item of the catalogue that nobody took."""


def of_matrix(matrix: sparse.csr_matrix, cache: Path) -> TrainingData:
    return TrainingData(matrix, pd.DataFrame(index=range(matrix.shape[1])), cache)


def ordered(*histories: list[int], items: int) -> sparse.csr_matrix:
    """Histories in their order: the columns of a row are not sorted."""
    stops = np.cumsum([0, *map(len, histories)])
    columns = np.concatenate(histories).astype(np.int32)
    return sparse.csr_matrix((np.ones(len(columns), np.float32), columns, stops), shape=(len(histories), items))


def rounds(users: int, seed: int) -> np.ndarray:
    """Walks around a circle of items, int32 `[users, LENGTH]`: n is always followed by n + 1, from anywhere."""
    starts = np.random.default_rng(seed).integers(0, ITEMS, users)
    return ((starts[:, None] + np.arange(LENGTH)) % ITEMS).astype(np.int32)


def follower_found(member: Any, histories: np.ndarray, follower: np.ndarray) -> float:
    """Share of histories whose best unseen item is the one that follows."""
    scores = member.scorer()(tf.constant(histories)).numpy().copy()
    np.put_along_axis(scores, histories, -np.inf, axis=1)
    return float((scores.argmax(axis=1) == follower).mean())


@pytest.fixture(scope="module", params=KINDS)
def walker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A member of sequences that was trained on the circle."""
    folder = tmp_path_factory.mktemp("walker")
    data = of_matrix(ordered(*rounds(200, 0).tolist(), items=ITEMS + 1), folder)
    return fitted({"kind": request.param, **SMALL}, data, folder)


class TestSequences:
    def test_the_order_is_learned(self, walker: Any, tmp_path: Path) -> None:
        """D4m, D5m: what follows is known from the order alone, since all items are equally popular."""
        asked = rounds(100, 1)
        histories, follower = asked[:, :-1], asked[:, -1]
        assert follower_found(walker, histories, follower) > 0.8
        assert follower_found(walker, np.ascontiguousarray(histories[:, -2:]), follower) > 0.8
        data = of_matrix(ordered(*rounds(200, 0).tolist(), items=ITEMS), tmp_path)
        assert follower_found(fitted({"kind": "popularity"}, data, tmp_path), histories, follower) < 0.1

    def test_padding_is_masked(self, walker: Any) -> None:
        """D4m: any amount, anywhere, changes no bit."""
        score = walker.scorer()
        expected = score(tf.constant([[3, 4, 5]])).numpy()
        for padded in ([3, 4, 5, *[PADDING] * 200], [PADDING] * 200 + [3, 4, 5], [PADDING, 3, PADDING, 4, 5, PADDING]):
            np.testing.assert_array_equal(score(tf.constant([padded])).numpy(), expected)

    def test_no_state_is_carried_over(self, walker: Any) -> None:
        """D4m: rows do not hear of each other, nor a call of the one before."""
        score = walker.scorer()
        histories = rounds(7, 2)
        first, backward = score(tf.constant(histories)).numpy(), score(tf.constant(histories[::-1].copy())).numpy()
        np.testing.assert_allclose(backward[::-1], first, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(score(tf.constant(histories)).numpy(), first)

    def test_a_state_knows_nothing_of_later_items(self, walker: Any) -> None:
        """D5m: attention is causal, or training would be shown its targets."""
        one = np.array([[PADDING, 1, 2, 3, 4, 5]], np.int32)
        other = np.array([[PADDING, 1, 2, 3, 9, 7]], np.int32)
        states, others = (walker.encoder(history).numpy()[0] for history in (one, other))
        np.testing.assert_array_equal(states[1:4], others[1:4])  # the first is padding, whose state nobody reads
        assert np.abs(states[4:] - others[4:]).max(axis=1).min() > 0.01

    def test_the_latest_items_are_read(self, walker: Any) -> None:
        score = walker.scorer()
        long, same_end = [20, 21, 22, 1, 2, 3, 4, 5, 6], [25, 1, 2, 3, 4, 5, 6]
        np.testing.assert_array_equal(score(tf.constant([long])), score(tf.constant([same_end])))

    def test_what_training_never_saw_is_passed_over(self, walker: Any) -> None:
        """Its vector is still what chance made it."""
        score = walker.scorer()
        assert not walker.speaks[COLD]
        np.testing.assert_array_equal(score(tf.constant([[3, 4, COLD, 5, COLD]])), score(tf.constant([[3, 4, 5]])))

    def test_without_two_items_in_any_history_there_is_nothing_to_learn(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="at least one row"):
            fitted({"kind": "gru4rec", **SMALL}, of_matrix(ordered([0], [1], items=3), tmp_path), tmp_path)

    def test_heads_divide_dimensions(self) -> None:
        with pytest.raises(ConfigError, match="heads must divide dimensions; received 3 heads and 16"):
            member_part({"kind": "sasrec", "dimensions": 16, "heads": 3})


def test_latest_items_by_hand() -> None:
    history = tf.constant([[-1, 4, -1, 7, 8], [-1, -1, -1, -1, -1], [1, 2, 3, 4, 5]])
    assert latest_items(history, 3).numpy().tolist() == [[4, 7, 8], [-1, -1, -1], [3, 4, 5]]
    assert latest_items(history[:, :2], 3).numpy().tolist() == [[-1, -1, 4], [-1, -1, -1], [-1, 1, 2]]
    assert latest_items(history[:, :0], 1).numpy().tolist() == [[-1]] * 3


class TestWindows:
    MATRIX = ordered([5, 3, 4, 0, 2], [1], [], [3, 1], items=7)

    def windows(self, **settings: Any) -> Windows:
        part = member_part({"kind": "gru4rec", **SMALL, **settings})
        return Windows(self.MATRIX, 3, part.config, seed=0)

    def test_cut_from_the_end(self) -> None:
        """The first user's items 5 3 4 0 have the targets 3 4 0 2, in two windows; a single item has none."""
        windows = self.windows()
        assert len(windows) == 3 and windows.targets == 5 / 3
        batch = windows.gather(np.array([0, 1, 2]))
        assert batch["history"].tolist() == [[3, 4, 0], [-1, -1, 5], [-1, -1, 3]]
        assert batch["target"].tolist() == [[4, 0, 2], [-1, -1, 3], [-1, -1, 1]]
        assert "negative" not in batch and windows.items.tolist() == [0, 1, 2, 3, 4, 5]

    def test_negatives_are_drawn_as_often_as_said(self) -> None:
        """Half by popularity and half uniformly, among the items of training: 1 and 3 were taken twice of 8 times."""
        windows = self.windows(negatives=4, training={**LOOP, "batch_size": 2})
        expected = np.array([1, 2, 1, 2, 1, 1, 0]) / 8 / 2 + np.array([1, 1, 1, 1, 1, 1, 0]) / 6 / 2
        np.testing.assert_allclose(windows.probability, expected, rtol=1e-6)
        batch = windows.gather(np.array([0, 1]))["negative"]
        assert batch.shape == (2, 2)
        np.testing.assert_array_equal(batch, windows.gather(np.array([0, 1]))["negative"])
        drawn = windows.gather(np.zeros(20_000, np.int64))["negative"]
        share = np.bincount(drawn.ravel(), minlength=7) / drawn.size
        np.testing.assert_allclose(share, expected, atol=0.01)


@pytest.mark.parametrize("negatives", [100, 12], ids=["all items", "drawn"])
def test_the_loss_by_a_slow_version(negatives: int) -> None:
    """The importance-sampled softmax of each target, without items of the window, summed over the window."""
    random = np.random.default_rng(0)
    matrix = ordered(*(random.permutation(20)[:length].tolist() for length in (4, 3, 9, 2, 9)), items=20)
    settings = {**SMALL, "negatives": negatives, "training": {**LOOP, "batch_size": 2}}
    windows = Windows(matrix, 3, member_part({"kind": "gru4rec", **settings}).config, seed=0)
    batch = windows.gather(np.array([1, 2]))
    states = random.normal(size=(2, 3, 4)).astype(np.float32)
    items, bias = random.normal(size=(20, 4)).astype(np.float32), random.normal(size=(20, 1)).astype(np.float32)

    def model(inputs: dict[str, tf.Tensor], training: bool) -> dict[str, tf.Tensor]:
        candidate = inputs["candidate"]
        return {"state": tf.constant(states), "item": tf.gather(items, candidate), "bias": tf.gather(bias, candidate)}

    drawn = batch["negative"].ravel() if negatives == 12 else windows.items
    often = len(drawn) * windows.probability if negatives == 12 else np.ones(20)
    expected = np.zeros(2)
    for row in range(2):
        others = [item for item in drawn if item not in batch["history"][row]]
        for state, target in zip(states[row], batch["target"][row], strict=True):
            if target != PADDING:
                scores = items @ state + bias[:, 0]
                rest = sum(np.exp(scores[item]) / often[item] for item in others if item != target)
                expected[row] += np.log(np.exp(scores[target]) + rest) - scores[target]
    assert (expected > 0.1).all()
    found = next_item_softmax(model, windows)({name: tf.constant(array) for name, array in batch.items()})
    np.testing.assert_allclose(found, expected / windows.targets, rtol=1e-4)


class _PowerCut(Exception):
    """Ends a training in its middle."""


@pytest.mark.parametrize("kind", [pytest.param("sasrec", marks=pytest.mark.slow), "mult_vae"])
def test_an_interrupted_training_ends_with_the_same_numbers(kind: str, tmp_path: Path) -> None:
    """Dropout, noise, drawn negatives and the weight of the KL term continue where they stopped."""
    world = World.planted()
    settings: dict[str, Any] = {"kind": kind, "training": {"epochs": 2, "batch_size": 32}, "dropout": 0.3}
    if kind == "sasrec":
        settings |= {"max_history": 4, "dimensions": 8, "negatives": 20}
    data = world.training(tmp_path, validate=True)
    whole = fitted(settings, data, tmp_path / "whole").state()
    calls = iter(range(10))

    def validate(scorer: Any) -> dict[str, float]:
        if next(calls) == 1:
            raise _PowerCut
        assert data.validate is not None
        return data.validate(scorer)

    cut = TrainingData(data.matrix, data.catalogue, data.cache, validate)
    with pytest.raises(_PowerCut):
        fitted(settings, cut, tmp_path / "cut")
    resumed = fitted(settings, cut, tmp_path / "cut").state()
    assert sorted(resumed) == sorted(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)


class TestMultVAE:
    SETTINGS = {"kind": "mult_vae", "hidden": 16, "latent": 8, "anneal_epochs": 5}  # noqa: RUF012

    def test_the_annealing_by_hand(self) -> None:
        """Linear to its height at step 4, and constant after it; at once where there are no steps to rise over."""
        weights = [float(annealed(tf.constant(step), 0.2, 4)) for step in (0.0, 1.0, 2.0, 4.0, 400.0)]
        np.testing.assert_allclose(weights, [0.0, 0.05, 0.1, 0.2, 0.2], rtol=1e-6)
        assert float(annealed(tf.constant(0.0), 0.2, 0)) == pytest.approx(0.2)

    def test_only_training_counts_as_a_step(self) -> None:
        layer, one = AnnealedWeight(1.0, 4), tf.ones([1])
        found = [float(layer(one, training=training)[0]) for training in (True, False, True, True, False)]
        np.testing.assert_allclose(found, [0.0, 0.25, 0.25, 0.5, 0.75])

    def test_the_divergence_by_hand(self) -> None:
        """KL(N(m, v) || N(0, 1)) = (v + m^2 - 1 - log v) / 2, summed over dimensions."""
        mean, log_variance = tf.constant([[0.0, 0.0], [1.0, 0.0]]), tf.constant([[0.0, 0.0], [0.0, np.log(4.0)]])
        expected = [0.0, 0.5 + (4 - 1 - np.log(4)) / 2]
        np.testing.assert_allclose(kl_to_standard_normal(mean, log_variance), expected, rtol=1e-6)

    def test_the_loss_by_a_slow_version(self) -> None:
        logits = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
        log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        taken = np.array([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
        loss = evidence_bound(
            lambda batch, training: {"logits": tf.constant(logits), "penalty": tf.constant([0.5, 2.0])}
        )
        found = loss({"history": tf.constant([[1, 2, -1], [0, -1, -1]])})
        np.testing.assert_allclose(found, -(taken * log_softmax).sum(axis=1) + [0.5, 2.0], rtol=1e-5)

    @pytest.mark.parametrize("variational", [True, False])
    def test_an_answer_by_a_slow_version(self, variational: bool, tmp_path: Path) -> None:
        """The scaled multi-hot history through four plain matrix products; the trained graph says the same."""
        member: Any = member_part({**self.SETTINGS, "variational": variational, "training": LOOP | {"epochs": 2}}).make(
            0
        )
        world = World.planted()
        member.fit(world.training(tmp_path), RunOptions(0, tmp_path / "run", quiet=True))
        taken = world.warm[[3, 1, 7]]
        history = np.array([[*taken, PADDING]], np.int32)
        multi_hot = np.zeros((1, world.data.shape[1]))
        multi_hot[0, taken] = 1
        weights = member.state()
        layer = lambda name, x: x @ weights[f"{name}_kernel"] + weights[f"{name}_bias"]  # noqa: E731
        latent = layer("latent", np.tanh(layer("encoder", multi_hot / np.sqrt(3))))
        expected = layer("logits", np.tanh(layer("decoder", latent if variational else np.tanh(latent))))
        found = member.scorer()(tf.constant(history)).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        in_training = member.model({"history": tf.constant(history)}, training=False)["logits"]
        np.testing.assert_allclose(found, in_training, rtol=1e-4, atol=1e-5)

    def test_taste_is_learned_without_labels(self, tmp_path: Path) -> None:
        """B14, D3m: reconstructing histories is enough to rank what comes next better than popularity does."""
        world = World.planted()
        data = world.training(tmp_path, validate=True)
        member = member_part({**self.SETTINGS, "training": LOOP | {"epochs": 20}}).make(0)
        history = member.fit(data, RunOptions(0, tmp_path / "run", quiet=True))
        popular = fitted({"kind": "popularity"}, data, tmp_path)
        asked = world.asked(among=popular.speaks)
        assert ndcg(member, asked) > 1.5 * ndcg(popular, asked)
        losses = [epoch["train_loss"] for epoch in history.epochs]
        assert losses[-1] < 0.95 * losses[0]

    @pytest.mark.slow
    def test_the_divergence_pulls_the_latents_together(self, tmp_path: Path) -> None:
        """With a great beta the code of every history comes close to the standard normal's mean."""
        data = World.planted().training(tmp_path)
        spread = []
        for beta in (0.0, 5.0):
            settings = {**self.SETTINGS, "beta": beta, "anneal_epochs": 0, "training": LOOP | {"epochs": 10}}
            weights = fitted(settings, data, tmp_path / str(beta)).state()
            code = np.tanh(weights["encoder_kernel"] + weights["encoder_bias"]) @ weights["latent_kernel"]
            spread.append(float(np.square(code + weights["latent_bias"]).mean()))
        assert spread[1] < 0.2 * spread[0]
