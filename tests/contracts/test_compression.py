"""What every compression method of the registry must do; a new line in the table is tested by being there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compression_world import digits, digits_data, trained_digits_model, with_dead_units, with_swish
from fusion.compression import METHODS
from fusion.compression.base import Compressed, answer_of, input_names
from fusion.compression.recipe import compress
from fusion.config import parse_part
from fusion.errors import ConfigError, DataError, GateError

pytestmark = pytest.mark.usefixtures("short_clocks")

SETTINGS = {
    "binary": {"training": {"epochs": 6, "batch_size": 32, "learning_rate": 0.005}},
    "channels": {"ratio": 0.25, "training": {"epochs": 4, "batch_size": 32, "learning_rate": 0.005}},
    "distil": {
        "student": {"kind": "cnn", "widths": [12, 32]},
        "features": {"block1_relu": "block1_relu"},
        "training": {"epochs": 12, "batch_size": 40, "learning_rate": 0.01},
    },
    "gaussian": {"training": {"epochs": 4, "batch_size": 32, "learning_rate": 0.003}},
    "l0": {"training": {"epochs": 6, "batch_size": 32, "learning_rate": 0.003}},
    "prune": {"training": {"epochs": 4, "batch_size": 32, "learning_rate": 0.003}},
    "ternary": {"training": {"epochs": 6, "batch_size": 32, "learning_rate": 0.005}},
}
"""Settings by kind where the defaults are too much for a small model, or train for too long for a test."""

LEAST = {
    "binary": 0.9,
    "distil": 0.91,
}
"""The least accuracy by kind, where it is not that of the model less .03: what is a baseline, or very coarse."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return trained_digits_model(tmp_path_factory.mktemp("digits"))


SLOWLY = {"binary", "cluster", "distil", "gaussian", "l0", "prune_by_sensitivity", "ternary"}
"""Methods that train for seconds; tests of their own hold them in the default run."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOWLY else []) for kind in METHODS],
)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def subject(kind, model):
    """What the method is applied to: trimming needs units that say nothing, which a trained model seldom has, and
    simple activations something to replace."""
    made = {"trim": with_dead_units, "simple_activations": with_swish}
    return made[kind](model) if kind in made else model


@pytest.fixture(scope="module")
def outcome(kind, subject, tmp_path_factory):
    part = parse_part(METHODS, {"kind": kind, **SETTINGS.get(kind, {})}, kind)
    weights = [weight.copy() for weight in subject.get_weights()]
    found = compress(subject, [part], digits_data(tmp_path_factory.mktemp(kind)))
    for before, after in zip(weights, subject.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after, err_msg=f"{kind} changed the model that it was given")
    return found


def test_inputs_and_outputs_stay(outcome, model):
    """The result reads what the model reads and gives the same number of logits."""
    assert input_names(outcome.compressed.model) == input_names(model)
    images, _ = digits()
    answer = answer_of(outcome.compressed.model)({"image": images[:7]})
    assert answer.shape == (7, 10)
    assert np.isfinite(answer).all()


def test_quality_is_what_is_promised(outcome, kind, subject, tmp_path):
    """K10: quality is measured before and after, with the `.tflite` that is shipped, and the method keeps it."""
    before = digits_data(tmp_path).quality(answer_of(subject))
    assert outcome.before.quality == pytest.approx(before, abs=0.004)
    assert outcome.after.quality >= LEAST.get(kind, before - 0.03)
    assert outcome.drop == pytest.approx(outcome.before.quality - outcome.after.quality)


def test_layers_are_done_or_told(outcome, model):
    """Every layer that is left alone has a reason, and is a layer of the model."""
    names = {layer.name for layer in model.layers}
    for step in outcome.steps:
        assert set(step.applied.left_alone) <= names
        assert all(reason.strip() for reason in step.applied.left_alone.values())


def test_unknown_layers_are_refused(kind, model, tmp_path):
    """A recipe for a layer that does not exist is answered with the nearest one that does."""
    if "layers" not in METHODS[kind].Config.model_fields:
        pytest.skip(f"{kind} works on the model as a whole")
    part = parse_part(METHODS, {"kind": kind, **SETTINGS.get(kind, {}), "layers": ["block1_konv"]}, kind)
    with pytest.raises(ConfigError, match=r"block1_konv.*block1_conv"):
        part.make().apply(Compressed(model), digits_data(tmp_path))


def test_loops_that_would_have_to_validate_are_refused():
    """A step validates nothing, so that patience and a target would be settings without effect."""
    refused = set()
    for kind in METHODS:
        student = {key: value for key, value in SETTINGS.get(kind, {}).items() if key == "student"}
        for loop in {"training", "repair"} & METHODS[kind].Config.model_fields.keys():
            for asked in ({"patience": 2}, {"target": 0.5}, {"patience": 2, "target": 0.5}):
                message = rf"{kind}\.{loop}: a step does all of its epochs.*leave out {' and '.join(asked)}\."
                with pytest.raises(ConfigError, match=message):
                    parse_part(METHODS, {"kind": kind, **student, loop: asked}, kind)
            refused.add((kind, loop))
    assert {("prune", "training"), ("gaussian", "repair"), ("distil", "training")} <= refused


def test_empty_and_undefined_samples_are_refused(model, tmp_path):
    """A representative set that is empty, or holds a number that is none, is refused before anything is done."""
    data = digits_data(tmp_path)
    part = parse_part(METHODS, {"kind": next(iter(METHODS))}, "step")
    rows = data.representative["image"]
    with pytest.raises(DataError, match="representative set must hold training rows"):
        compress(model, [part], replace(data, representative={"image": rows[:0]}))
    for number in (np.nan, np.inf):
        undefined = rows.astype(np.float32)
        undefined[7, 0, 0, 0] = number
        with pytest.raises(DataError, match=r"must hold finite numbers; input 'image' has NaN or infinity in row 7\. "):
            compress(model, [part], replace(data, representative={"image": undefined}))


def test_a_recipe_without_steps_is_refused(model, tmp_path):
    """There must be something to do."""
    with pytest.raises(ConfigError, match="at least one step"):
        compress(model, [], digits_data(tmp_path))


def test_a_step_trains_anew_for_other_settings(model, tmp_path):
    """A finished training is taken again for the same settings and weights alone."""
    data = digits_data(tmp_path)
    parts = [parse_part(METHODS, {"kind": "gaussian", "deviation": width}, "step") for width in (0.5, 0.6)]
    folders = {data.for_step(0, part, model).options.directory for part in (*parts, parts[0])}
    assert len(folders) == 2


def test_what_changes_nothing_is_refused(model, tmp_path):
    """A method that leaves the model as it is raises, in place of looking like a success."""

    class Idle:
        def apply(self, subject, data):
            from fusion.compression.base import Applied

            return subject, Applied({"logits": "has only 320 weights"})

    class Part:
        kind = "idle"

        def dump(self):
            return {"kind": self.kind}

        def make(self):
            return Idle()

    with pytest.raises(GateError, match=r"changed nothing.*logits has only 320 weights"):
        compress(model, [Part()], digits_data(tmp_path))
