"""Members of a ranking in mixed precision (I7) and compiled by XLA (I8): the same training, in fewer bits or faster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.errors import ConfigError
from fusion.training.precision import precision_scope
from fusion.types import RunOptions
from recsys.collaborative.content import share_encoders
from recsys.collaborative.pairs import HistoryPairs, NegativePairs, Pairs, in_batch_softmax, pairwise
from recsys.collaborative.user_rows import UserRows, softmax_of_rows
from recsys.joint import JointTraining, train_jointly
from recsys.settings import parse_experiment
from worlds import World, fitted, member_part, ndcg, random_ndcg

TEXT = {"encoder": {"kind": "text_tfidf", "dimensions": 16}, "columns": ["text"], "dimensions": 16}
TRAINING = {"epochs": 3, "batch_size": 128, "learning_rate": 0.02}
STEADY = {"epochs": 1, "batch_size": 128, "optimizer": "sgd", "learning_rate": 0.1}
"""Plain steps: Adam makes as much of a gradient that is only rounding as of any other."""
LATENT: dict[str, Any] = {"kind": "matrix_factorization", "factors": 8, "dropout": 0.0}
WORDS: dict[str, Any] = {"kind": "content", **TEXT, "dropout": 0.0}
TOWERS: dict[str, Any] = {
    "kind": "two_tower",
    "features": {"content": {"text": TEXT}, "categories": ["text"], "separator": " "},
    "dimensions": 8,
    "hidden": [8],
    "dropout": 0.0,
    "id_dropout": 0.0,
}
DCN: dict[str, Any] = {
    "kind": "dcn",
    "towers": {name: value for name, value in TOWERS.items() if name != "kind"} | {"training": TRAINING},
    "shortlist": 20,
    "hidden": [8],
    "dropout": 0.0,
}
ENCODED: dict[str, Any] = {
    "kind": "content",
    "encoder": {"kind": "text_convolution", "word_dimensions": 6, "filters": 4, "dropout": 0.0},
    "columns": ["text"],
    "dimensions": 8,
    "dropout": 0.0,
}
COMPILED = {
    "bpr": LATENT | {"loss": "bpr"},
    "warp": LATENT | {"loss": "warp"},
    "rows": LATENT | {"together": 8},
    "words": WORDS,
    "dcn": DCN,
    "node2vec": {"kind": "node2vec", "factors": 8},
    "mult_vae": {"kind": "mult_vae", "hidden": 8, "latent": 4, "dropout": 0.0, "variational": False},
}


@pytest.fixture(scope="module")
def world() -> World:
    return World.planted(users=200, items=80)


def options(folder: Path) -> RunOptions:
    return RunOptions(3, folder, quiet=True)


def furthest(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest difference between the numbers of two states."""
    names = [name for name, array in theirs.items() if array.dtype.kind == "f" and array.size]
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in names)


# ---- what is reckoned in which type --------------------------------------------------------------------------


def types_of(loss: Callable[[dict[str, tf.Tensor]], tf.Tensor], batch: dict[str, np.ndarray]) -> dict[str, set[Any]]:
    """The types of what goes into the products, exponentials and logarithms of a loss and of its functions."""
    graph = tf.function(loss).get_concrete_function({n: tf.constant(a) for n, a in batch.items()}).graph
    found: dict[str, set[Any]] = {"product": set(), "softmax": set()}
    inner = [function.graph.get_operations() for function in graph._functions.values() if hasattr(function, "graph")]
    for operation in [*graph.get_operations(), *(operation for operations in inner for operation in operations)]:
        kinds = {tensor.dtype for tensor in operation.inputs if tensor.dtype.is_floating}
        if operation.type in ("MatMul", "BatchMatMulV2"):
            found["product"] |= kinds
        if "Softmax" in operation.type or operation.type in ("Exp", "Log", "Log1p", "Softplus", "Rsqrt", "Sum"):
            found["softmax"] |= kinds
    return found


@pytest.mark.parametrize("settings", [LATENT, WORDS, TOWERS], ids=["latent", "words", "towers"])
def test_products_are_in_16_bits_and_nothing_else_is(settings: dict[str, Any], world: World, tmp_path: Path) -> None:
    """I7: layers and scores multiply in 16 bits; sums, norms, softmax, losses and weights are float32."""
    low = tf.float16 if settings is LATENT else tf.bfloat16
    member, data = member_part(settings).make(3), world.training(tmp_path)
    towers = member.towers(data, options(tmp_path), f"mixed_{low.name}")
    pairs = Pairs(data.matrix) if settings is WORDS else HistoryPairs(data.matrix, 16, 0)
    batch = pairs.gather(np.arange(32))
    pooled = {tf.float32} if settings is TOWERS else set()  # a sum over the history, as a product with its weights
    types = types_of(in_batch_softmax(towers.model, 0.1), batch)
    assert types == {"product": {low} | pooled, "softmax": {tf.float32}}
    assert {variable.dtype for variable in towers.model.trainable_variables} == {tf.float32}
    dense = [layer for layer in towers.model.layers if isinstance(layer, keras.layers.Dense)]
    assert all(layer.compute_dtype == low.name for layer in dense) and bool(dense) == (settings is not LATENT)
    towers.finish()
    kept = [array for name, array in member.state().items() if not name.startswith("encoder/")]
    assert {array.dtype.name for array in kept} == {"float32", "bool"}
    assert keras.mixed_precision.global_policy().name == "float32", "what is built later is not touched"


def test_other_losses_of_the_factorisation_multiply_in_16_bits(world: World, tmp_path: Path) -> None:
    """I7: pairs with negatives of their own, and several pairs of a user at once."""
    data, low = world.training(tmp_path), tf.bfloat16
    member = member_part(LATENT | {"loss": "warp", "negatives": 4}).make(3)
    model = member.towers(data, options(tmp_path), "mixed_bfloat16").model
    batch = NegativePairs(data.matrix, 16, 0, 4, "uniform").gather(np.arange(32))
    assert types_of(pairwise(model, "warp", 80), batch) == {"product": {low}, "softmax": {tf.float32}}

    items = keras.Input((8,), dtype=tf.int32, name="items")
    with precision_scope("mixed_bfloat16"):
        table = keras.layers.Embedding(80, 4)(tf.maximum(items, 0))
        model = keras.Model({"items": items}, {"user": table[:, :4], "item": table})
    batch = UserRows(data.matrix, 8, 0).gather(np.arange(16))
    assert types_of(softmax_of_rows(model, 0.1), batch) == {"product": {low}, "softmax": {tf.float32}}


# ---- what is learned in them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [TOWERS, pytest.param(DCN, marks=pytest.mark.slow)], ids=["towers", "dcn"])
def test_mixed_precision_learns_what_float32_learns(settings: dict[str, Any], world: World, tmp_path: Path) -> None:
    """I7: the planted world is ranked about as well, by tables that were made in float32."""
    found = {}
    for precision in ("float32", "mixed_bfloat16"):
        training = {**TRAINING, "precision": precision}
        found[precision] = fitted({**settings, "training": training}, world.training(tmp_path), tmp_path / precision)
    plain, mixed = (ndcg(member, world.asked()) for member in found.values())
    assert plain > 1.5 * np.mean([random_ndcg(world.asked(), seed) for seed in range(5)])
    assert mixed == pytest.approx(plain, rel=0.2)
    member = found["mixed_bfloat16"]
    layer = member.model.get_layer("deep_0" if settings is DCN else "user_0")
    assert layer.compute_dtype == "bfloat16" and layer.kernel.dtype == tf.float32
    assert 0 < furthest(found["float32"].state(), member.state())
    if settings is not DCN:  # a table that was made in 16 bits would hold few different numbers
        table = member.state()["item_table"]
        assert (table != tf.cast(tf.cast(table, tf.bfloat16), tf.float32).numpy()).mean() > 0.9


def test_members_learn_together_in_float16(world: World, tmp_path: Path) -> None:
    """I7, G1: the fused scores of joint training come out about the same, with scaled losses."""
    losses = {}
    for precision in ("float32", "mixed_float16"):
        members = {name: member_part(part).make(3) for name, part in (("latent", LATENT), ("words", WORDS))}
        joint = JointTraining(mode="joint", epochs=1, batch_size=128, member_dropout=0.0, precision=precision)
        history, _ = train_jointly(members, joint, world.training(tmp_path), options(tmp_path / precision))
        losses[precision] = [row["train_loss"] for row in history.epochs]
    assert losses["mixed_float16"] != losses["float32"]
    np.testing.assert_allclose(losses["mixed_float16"], losses["float32"], rtol=0.01)


def test_an_encoder_is_trained_in_16_bits_and_kept_in_float32(world: World, tmp_path: Path) -> None:
    """I7, E2: a copy is trained; the encoder takes its weights over, and makes the table. Sharers train one copy."""
    data = world.training(tmp_path)
    tuning = {"training": {"epochs": 1, "batch_size": 32, "learning_rate": 0.01, "precision": "mixed_bfloat16"}}
    member = member_part({**ENCODED, "scorer": "cosine", "fine_tuning": {**tuning, "pairs": 128}}).make(3)
    member.fit(data, options(tmp_path / "alone"))
    encoder, (copied,) = member.encoder.encoder(), member.copies.values()
    assert "bfloat16" in {layer.compute_dtype for layer in copied.encoder().layers}
    assert "bfloat16" not in {layer.compute_dtype for layer in encoder.layers}
    for ours, theirs in zip(encoder.get_weights(), copied.encoder().get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    start = member_part(ENCODED).make(3).encoder
    start.load_state(member.encoder.state())
    assert furthest(dict(enumerate(encoder.get_weights())), dict(enumerate(start.encoder().get_weights()))) > 1e-3
    texts = data.catalogue["text"].tolist()
    vectors = member.encoder.encode(member.encoder.prepare(texts))
    table = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(member.state()["embeddings"], table, atol=1e-5)

    sharing = {name: member_part({**ENCODED, "share": "words"}).make(seed) for seed, name in enumerate("ab")}
    share_encoders(sharing, data)
    towers = [m.towers(data, options(tmp_path / name), "mixed_bfloat16") for name, m in sharing.items()]
    trained = [{id(variable) for variable in tower.groups[-1].variables} for tower in towers]
    assert trained[0] == trained[1] and trained[0]


# ---- compiled ------------------------------------------------------------------------------------------------


def check_compiled(settings: dict[str, Any], world: World, folder: Path) -> None:
    states = []
    for xla in (False, True):
        part = {**settings, "training": {**STEADY, "xla": xla}}
        states.append(fitted(part, world.training(folder), folder / str(xla)).state())
    assert 0 < furthest(states[1], states[0]) < 1e-4  # compiled, sums are made in another order


def test_xla_gives_towers_the_same_weights(world: World, tmp_path: Path) -> None:
    """I8: to 1e-4; the softmax of TensorFlow Recommenders is compiled with them."""
    check_compiled(TOWERS | {"interests": 2}, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COMPILED))
def test_xla_gives_every_member_the_same_weights(name: str, world: World, tmp_path: Path) -> None:
    """I8: every other loss that is compiled."""
    check_compiled(COMPILED[name], world, tmp_path)


@pytest.mark.slow
def test_xla_gives_members_that_learn_together_the_same_weights(world: World, tmp_path: Path) -> None:
    """I8, G1: to 1e-4; an encoder that is trained with them looks its batch over for repeated items."""
    found = []
    for xla in (False, True):
        parts = {"latent": LATENT | {"training": STEADY}, "encoded": ENCODED | {"training": STEADY}}
        parts["encoded"] |= {"fine_tuning": {"training": STEADY}}
        members = {name: member_part(part).make(3) for name, part in parts.items()}
        joint = JointTraining(mode="joint", epochs=1, batch_size=128, member_dropout=0.0, xla=xla)
        train_jointly(members, joint, world.training(tmp_path), options(tmp_path / str(xla)))
        found.append({f"{n}/{key}": array for n, m in members.items() for key, array in m.state().items()})
    assert 0 < furthest(found[1], found[0]) < 1e-4


# ---- what cannot be done -------------------------------------------------------------------------------------

BASE: dict[str, Any] = {"name": "x", "data": {"kind": "planted"}, "rules": {"mean": {"kind": "average"}}}
GRAPH, ORDER = {"kind": "light_gcn"}, {"kind": "sasrec"}


@pytest.mark.parametrize(
    ("members", "more", "message"),
    [
        (
            {"graph": GRAPH | {"training": {"precision": "mixed_bfloat16"}}},
            {},
            "members.graph: training.precision must be left as it is here, where none",
        ),
        ({"graph": GRAPH | {"training": {"xla": True}}}, {}, "members.graph: training.xla must be left"),
        ({"order": ORDER | {"training": {"xla": True}}}, {}, "members.order: training.xla must be left"),
        (
            {"order": ORDER | {"training": {"precision": "mixed_float16"}}},
            {},
            "members.order: training.precision must be left",
        ),
        (
            {"deep": {"kind": "dcn", "towers": {"training": {"accumulate": 2}}}},
            {},
            "members.deep: training.accumulate must be left as it is here, where precision and xla can be set",
        ),
        (
            {"latent": LATENT, "graph": GRAPH},
            {"training": {"mode": "joint", "precision": "mixed_bfloat16"}},
            "training.mode joint with members.graph, of kind light_gcn: training.precision must be left",
        ),
        (
            {"latent": LATENT, "towers": {"kind": "two_tower"}, "near": {"kind": "item_knn"}},
            {"training": {"mode": "joint", "xla": True, "constants": ["near"]}},
            "training.xla must be left out with training.constants, .*; received near",
        ),
        (
            {"latent": LATENT | {"training": {"precision": "mixed_bfloat16"}}},
            {"strategy": {"kind": "parameter_server"}},
            "members.latent: training.precision must be float32 with strategy.kind parameter_server where items",
        ),
        (
            {"latent": LATENT},
            {"compress": {"small": {"student": {"training": {"precision": "mixed_bfloat16"}}}}},
            "compress.small: student: training.precision must be float32 in a recipe, .*; received mixed_bfloat16",
        ),
        (
            {"latent": LATENT},
            {"compress": {"small": {"steps": [{"kind": "prune", "training": {"precision": "mixed_float16"}}]}}},
            "compress.small: prune: training.precision must be float32 in a recipe",
        ),
        (
            {"latent": LATENT},
            {"compress": {"small": {"steps": [{"kind": "gaussian", "repair": {"precision": "mixed_float16"}}]}}},
            "compress.small: gaussian: repair.precision must be float32 in a recipe",
        ),
        (
            {"latent": LATENT | {"training": {"xla": True}}},
            {"strategy": {"kind": "mirrored", "devices": ["CPU:0"]}},
            "members.latent: training.xla must go with strategy.kind default",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(
    members: dict[str, Any], more: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I7, I8: by the member and the key, from the config alone."""
    cluster = '{"cluster": {"chief": ["a:1"], "ps": ["b:1"], "worker": ["c:1"]}, "task": {"type": "chief", "index": 0}}'
    monkeypatch.setenv("TF_CONFIG", cluster)
    with pytest.raises(ConfigError, match=message):
        parse_experiment({**BASE, "members": members, **more})


def test_joint_training_takes_what_its_members_take() -> None:
    """I7, I8: other members keep their own precision."""
    joint = {"mode": "joint", "precision": "mixed_bfloat16", "xla": True}
    members = {"latent": LATENT, "words": WORDS, "near": {"kind": "item_knn"}, "order": ORDER}
    assert parse_experiment({**BASE, "members": members, "training": joint}).training.xla
