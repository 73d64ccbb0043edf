"""What every member of a ranking promises (D1m, D2m, D3m), driven by the registry: registering a member tests it.

A new kind adds its tiny settings to `TINY`. What is special about one kind stands at the end of the file.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fusion.compat import tf
from fusion.errors import ConfigError, DataError, MachineError
from fusion.export import savedmodel, tflite
from fusion.export.manifest import Manifest, write_manifest
from fusion.files import load_arrays, save_arrays
from fusion.types import RunOptions
from leaks import State, assert_fitted_on_train_only
from recsys.collaborative import MEMBERS, ials
from recsys.collaborative.base import PADDING, Member, TrainingData, largest_by_row, padded_numbers
from recsys.collaborative.ials import ImplicitALS, Solver, batches, conjugate_gradients, ridge
from recsys.collaborative.pairs import HistoryPairs, in_batch_softmax
from recsys.collaborative.tables import pack
from recsys.core import HISTORY_SPEC, MemberScores
from recsys.evaluation import question
from recsys.schema import TEST, Interactions
from worlds import World, fitted, member_part, ndcg, random_ndcg, training_data

TOWERS = {"epochs": 5, "batch_size": 128, "learning_rate": 0.02}
TOWER_FEATURES = {
    "content": {"text": {"encoder": {"kind": "text_tfidf", "dimensions": 16}, "columns": ["text"], "dimensions": 16}}
}
TINY: dict[str, list[dict[str, Any]]] = {
    "popularity": [{}],
    "category_popularity": [{"column": "text", "separator": " "}],
    "random_order": [{}],
    "item_knn": [{"neighbours": 20, "shrinkage": 1.0}],
    "user_knn": [{"neighbours": 20, "shrinkage": 1.0, "users_per_item": 40}],
    "rp3beta": [{"neighbours": 20}],
    "pure_svd": [{"rank": 8}],
    "spectral_filter": [{"neighbours": 20, "rank": 8}],
    "ease": [{"l2": 20.0, "neighbours": 40}, {"l2": 20.0, "neighbours": 40, "solver": "sparse", "candidates": 40}],
    "slim": [{"l1": 0.5, "l2": 5.0, "candidates": 40, "neighbours": 40}],
    "ials": [{"factors": 8, "epochs": 5}],
    "sequential_rules": [{"neighbours": 30, "shrinkage": 1.0}],
    "matrix_factorization": [
        {"factors": 8, "training": TOWERS},
        {"factors": 8, "training": TOWERS, "loss": "warp", "init": "svd"},
    ],
    "light_gcn": [{"factors": 8, "training": TOWERS}],
    "node2vec": [{"factors": 8, "walks": 4, "training": {**TOWERS, "batch_size": 512}}],
    "mult_vae": [
        {"hidden": 32, "latent": 16, "anneal_epochs": 5, "training": {**TOWERS, "epochs": 20}},
        {"hidden": 32, "latent": 16, "variational": False, "training": {**TOWERS, "epochs": 20}},
    ],
    "gru4rec": [{"dimensions": 16, "max_history": 5, "training": {**TOWERS, "epochs": 20}}],
    "sasrec": [{"dimensions": 16, "max_history": 5, "training": {**TOWERS, "epochs": 20}}],
    "content": [
        {"columns": ["text"], "encoder": {"kind": "text_tfidf", "dimensions": 16}, "dimensions": 8, "training": TOWERS},
        {
            "encoder": {"kind": "image_cnn", "image_size": 16, "widths": [8, 16]},
            "dimensions": 8,
            "training": TOWERS,
            "fine_tuning": {"pairs": 1024, "training": {"epochs": 2, "batch_size": 32, "learning_rate": 0.01}},
        },
    ],
    "content_regression": [
        {
            "base": {"kind": "ials", "factors": 8, "epochs": 5},
            "content": {"text": {"columns": ["text"], "encoder": {"kind": "text_tfidf", "dimensions": 16}}},
        }
    ],
    "two_tower": [
        {"features": TOWER_FEATURES, "dimensions": 16, "hidden": [16], "interests": 2, "training": TOWERS},
    ],
    "dcn": [
        {
            "towers": {"features": TOWER_FEATURES, "dimensions": 16, "hidden": [], "training": {**TOWERS, "epochs": 3}},
            "shortlist": 30,
            "rank": 8,
            "hidden": [16],
            "training": {**TOWERS, "epochs": 2, "learning_rate": 0.003},
        }
    ],
}
"""Settings of each kind that fit in about a second; several where a kind has several ways to be built."""

READS_ORDER = {"sequential_rules", "gru4rec", "sasrec"}
"""Members to which the order of a history matters whatever their `decay`."""


def cases() -> list[dict[str, Any]]:
    missing = sorted(set(MEMBERS) - set(TINY))
    assert not missing, f"registered members without tiny settings: give {', '.join(missing)} an entry in TINY"
    return [{"kind": kind, **settings} for kind in MEMBERS for settings in TINY[kind]]


def case_id(settings: dict[str, Any]) -> str:
    return "-".join([settings["kind"], *([settings["encoder"]["kind"]] if "encoder" in settings else [])])


every_kind = pytest.mark.parametrize("settings", cases(), ids=case_id)
NETWORKS = {"mult_vae", "gru4rec", "sasrec", "two_tower", "dcn"}
"""Members whose three fits take ten seconds, most of them to trace graphs."""
every_kind_networks_slowly = pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, marks=[pytest.mark.slow] if settings["kind"] in NETWORKS else [], id=case_id(settings))
        for settings in cases()
    ],
)


@functools.cache
def world(**settings: Any) -> World:
    return World.planted(**settings)


@dataclass(frozen=True)
class Fitted:
    member: Member
    world: World

    def scores(self, *histories: list[int]) -> np.ndarray:
        """Scores `[B, I]` of histories, padded to a common length."""
        return score(self.member, pad(histories))


def pad(histories: tuple[list[int], ...], length: int = 1) -> np.ndarray:
    length = max(length, *(len(history) for history in histories))
    return np.array([[*history, *[PADDING] * (length - len(history))] for history in histories], np.int32)


def score(member: Member, histories: np.ndarray) -> np.ndarray:
    return member.scorer()(tf.constant(histories)).numpy()


@pytest.fixture(scope="module", params=cases(), ids=case_id)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Each member, fitted once for the whole module."""
    folder = tmp_path_factory.mktemp("member")
    data = world().training(folder / "cache", validate=True)
    return Fitted(fitted(request.param, data, folder), world())


class TestEveryMember:
    def test_state_is_numbers_and_text_and_survives_a_file(self, case: Fitted, tmp_path: Path) -> None:
        """D0: parameters are saved and reused; arrays only, so that no pickle is ever needed."""
        state = case.member.state()
        assert state and all(np.asarray(array).dtype.kind in "fiubU" for array in state.values())
        assert all(np.isfinite(array).all() for array in state.values() if np.asarray(array).dtype.kind == "f")
        save_arrays(tmp_path / "state.npz", state)
        again = type(case.member)(case.member.config, seed=99)
        again.load_state(load_arrays(tmp_path / "state.npz"))
        assert again.parameters == case.member.parameters > 0
        np.testing.assert_array_equal(again.speaks, case.member.speaks)
        histories = pad(([0, 5, 9], [7], []))
        np.testing.assert_array_equal(score(again, histories), score(case.member, histories))

    def test_batch_is_single(self, case: Fitted) -> None:
        histories = [[int(n) for n in case.world.warm[start : start + 1 + start % 4]] for start in range(9)]
        together = case.scores(*histories)
        assert together.shape == (9, case.world.data.shape[1]) and together.dtype == np.float32
        alone = np.concatenate([case.scores(history) for history in histories])
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)

    def test_padding_does_not_matter(self, case: Fitted) -> None:
        """Neither how much of it there is, nor where it stands."""
        a, b, c = case.world.warm[[1, 4, 8]]
        expected = score(case.member, np.array([[a, b, c]], np.int32))
        for padded in ([a, b, c, *[-1] * 30], [-1, -1, a, b, c], [a, -1, b, -1, -1, c]):
            np.testing.assert_allclose(score(case.member, np.array([padded], np.int32)), expected, rtol=1e-4, atol=1e-5)

    def test_only_members_of_sequences_read_the_order(self, case: Fitted) -> None:
        a, b, c = (int(n) for n in case.world.warm[[1, 4, 8]])
        same = np.allclose(*case.scores([a, b, c], [c, b, a]), rtol=1e-4, atol=1e-5)
        assert same == (kind_of(case.member) not in READS_ORDER)

    def test_an_unknown_visitor_gets_personal_answers(self, case: Fitted) -> None:
        """A visitor with three liked items is answered by the same code as a user of the training data."""
        one, other = case.scores([int(n) for n in case.world.warm[:3]], [int(n) for n in case.world.warm[-3:]])
        assert np.isfinite(one).all() and np.isfinite(other).all()
        assert np.allclose(one, other) != case.member.personal

    def test_an_empty_history(self, case: Fitted) -> None:
        """Finite numbers, and for whom nothing personal can be said the member is silent."""
        nobody = np.full((2, 3), PADDING, np.int32)
        nobody[1, 0] = case.world.warm[0]
        scores, mask = (t.numpy() for t in MemberScores({"m": case.member})(tf.constant(nobody)))
        assert np.isfinite(scores).all()
        assert mask[0].any() != case.member.personal and mask[1].any()
        no_columns = case.member.scorer()(tf.zeros([2, 0], tf.int32)).numpy()
        np.testing.assert_allclose(no_columns[0], scores[0, 0], atol=1e-6)

    def test_who_speaks_about_cold_items(self, case: Fitted) -> None:
        """Who learns from interactions knows nothing of an item without any; who reads content does."""
        cold = case.world.counts == 0
        assert cold.sum() > 3
        assert case.member.speaks.dtype == bool and case.member.speaks[~cold].all()
        of_cold_ones_too = case.member.reads_content or kind_of(case.member) == "random_order"
        assert (case.member.speaks[cold] == of_cold_ones_too).all()

    def test_beats_random(self, case: Fitted, tmp_path: Path) -> None:
        """D3m: among the items that it speaks about; popularity, which cannot know taste, where all have the same."""
        if kind_of(case.member) in {"random_order", "category_popularity"}:
            pytest.skip("the one is chance, and of the other's categories none is popular here: see below")
        member, where = case.member, case.world
        if not member.personal:
            where = world(shuffle_labels=True, noise=20.0)
            member = fitted({"kind": kind_of(member)}, where.training(tmp_path), tmp_path)
        asked = where.asked(among=member.speaks)
        assert ndcg(member, asked) > max(random_ndcg(asked, seed) for seed in range(20))

    def test_personal_members_beat_popularity(self, case: Fitted, tmp_path: Path) -> None:
        """D3m"""
        if not case.member.personal:
            pytest.skip("it is the baseline")
        popular = fitted({"kind": "popularity"}, case.world.training(tmp_path), tmp_path)
        asked = case.world.asked(among=popular.speaks)
        assert ndcg(case.member, asked) > 1.3 * ndcg(popular, asked)

    def test_savedmodel_and_tflite_give_the_same_numbers(self, case: Fitted, tmp_path: Path) -> None:
        """O1, O5: with TensorFlow's own operations, and with TFLite's builtin ones."""
        scorer = case.member.scorer()
        sample = pad(([int(n) for n in case.world.warm[:5]], [int(case.world.warm[7])], []), length=6)
        expected = scorer(tf.constant(sample)).numpy()

        served = tf.function(lambda history: {"scores": scorer(history)}, input_signature=[HISTORY_SPEC])
        savedmodel.save(scorer, tmp_path / "saved", {"serving_default": served})
        write_manifest(tmp_path / "saved", Manifest(kind="recommender"))
        loaded = savedmodel.load(tmp_path / "saved").signatures["serving_default"]
        np.testing.assert_allclose(loaded(history=tf.constant(sample))["scores"], expected, rtol=1e-5, atol=1e-5)

        one = tf.function(
            lambda history: {"scores": scorer(history)}, input_signature=[tf.TensorSpec([1, 6], tf.int32, "history")]
        )
        (tmp_path / "scorer.tflite").write_bytes(tflite.convert({"serving_default": one}, scorer))
        for row, scores in zip(sample, expected, strict=True):
            found = tflite.run(tmp_path / "scorer.tflite", {"history": row[None]})["scores"][0]
            np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-4)

    def test_packed_tables_answer_nearly_alike(self, case: Fitted) -> None:
        """L1: tables in 8 bits give nearly the same scores."""
        scorer, histories = case.member.scorer(), pad(tuple([int(n)] for n in case.world.warm[:8]))
        before, expected = size_of(scorer), scorer(tf.constant(histories)).numpy()
        pack(scorer, 8)
        packed = scorer(tf.constant(histories)).numpy()
        assert np.abs(packed - expected).max() <= 0.15 * (expected.std() or 1.0) + 0.002 * np.abs(expected).max()
        assert size_of(scorer) == before or size_of(scorer) < 0.75 * before  # some have no table

    @pytest.mark.slow
    def test_packed_tables_convert(self, case: Fitted, tmp_path: Path) -> None:
        """L1, O5: the `.tflite` unpacks as TensorFlow does, 4 bits as well, which are mostly right."""
        histories = pad(tuple([int(n)] for n in case.world.warm[:8]))
        expected = case.member.scorer()(tf.constant(histories)).numpy()
        spread = float(expected.std()) or 1.0
        row = pad(([int(n) for n in case.world.warm[:3]],), 4)
        for bits in (8, 4):
            scorer = case.member.scorer()
            pack(scorer, bits)
            one = tf.function(
                lambda history, scorer=scorer: {"scores": scorer(history)},
                input_signature=[tf.TensorSpec([1, 4], tf.int32, "history")],
            )
            path = tmp_path / f"packed{bits}.tflite"
            path.write_bytes(tflite.convert({"serving_default": one}, scorer))
            found = tflite.run(path, {"history": row})["scores"]
            np.testing.assert_allclose(found, scorer(tf.constant(row)).numpy(), rtol=1e-3, atol=1e-3 * spread)
            difference = np.abs(scorer(tf.constant(histories)).numpy() - expected)
            assert np.median(difference) <= 0.5 * spread + 0.02 * np.abs(expected).max()


def size_of(scorer: tf.Module) -> int:
    """Bytes of a scorer's variables."""
    return sum(int(np.prod(variable.shape)) * variable.dtype.size for variable in scorer.variables)


def kind_of(member: Member) -> str:
    return next(kind for kind in MEMBERS if MEMBERS[kind] is type(member))


def quickly(settings: dict[str, Any]) -> dict[str, Any]:
    """The same member, trained too little to be of use."""
    short: dict[str, Any] = {"training": {**TOWERS, "epochs": 1}} if "training" in settings else {}
    if "fine_tuning" in settings:
        short["fine_tuning"] = {"pairs": 128, "training": {"epochs": 1, "batch_size": 32}}
    return {**settings, **short}


@every_kind_networks_slowly
def test_fitted_on_train_only(settings: dict[str, Any], tmp_path: Path) -> None:
    """B17: nothing that is fitted, vocabularies included, depends on test rows or on what only stands in them.

    A content member keeps a row for every item of the catalogue; what it learned is the rows of trained items.
    """
    if settings["kind"] == "random_order":
        pytest.skip("it is fitted on nothing")
    where, quick = world(strategy="item_holdout"), quickly(settings)
    trained, reads_content = where.warm, MEMBERS[settings["kind"]].reads_content
    by_item = {"available", "embeddings", "factors", "history_table", "item_table", "scores", "speaks"}
    number = iter(range(3))

    def fit(data: Interactions, parts: np.ndarray) -> State:
        folder = tmp_path / str(next(number))
        state = fitted(quick, training_data(data, parts, folder / "cache", validate=True), folder).state()
        return {
            n: array[trained] if reads_content and n.rpartition("/")[2] in by_item else array
            for n, array in state.items()
        }

    assert_fitted_on_train_only(fit, where.data, where.parts)


@every_kind_networks_slowly
def test_the_seed_decides(settings: dict[str, Any], tmp_path: Path) -> None:
    quick = quickly(settings)
    histories = pad(([1, 2, 3], [7]))
    first, same, other = (
        score(fitted(quick, world().training(tmp_path / "cache"), tmp_path / str(run), seed), histories)
        for run, seed in enumerate((3, 3, 4))
    )
    np.testing.assert_array_equal(first, same)
    part = member_part(settings)
    assert np.array_equal(first, other) != MEMBERS[part.kind].depends_on_seed(part.config)


@every_kind
def test_the_fingerprint_names_what_fitting_depends_on(settings: dict[str, Any], tmp_path: Path) -> None:
    """A cached member is used again for the same rows and content, and for no others."""
    part, data = member_part(settings), world().training(tmp_path)
    assert data.fingerprint(part) == world().training(tmp_path / "elsewhere").fingerprint(part)
    fewer = data.matrix.copy()
    fewer.data[0] = 0.0
    fewer.eliminate_zeros()
    changed = TrainingData(fewer, data.catalogue, tmp_path)
    assert changed.fingerprint(part) != data.fingerprint(part)
    catalogue = data.catalogue.assign(text="other words")
    reworded = TrainingData(data.matrix, catalogue, tmp_path).fingerprint(part)
    assert (reworded != data.fingerprint(part)) == MEMBERS[settings["kind"]].reads_content
    assert world().training(tmp_path, validate=True).fingerprint(part) != data.fingerprint(part)


# ---- one kind at a time --------------------------------------------------------------------------------------


def random_matrix(users: int, items: int, seed: int = 0) -> sparse.csr_matrix:
    dense = np.random.default_rng(seed).random((users, items)) < 0.3
    dense[:, -1] = False  # an item that nobody took
    return sparse.csr_matrix(dense.astype(np.float32))


def of_matrix(matrix: sparse.csr_matrix, tmp_path: Path, settings: dict[str, Any]) -> Member:
    return fitted(settings, TrainingData(matrix, pd.DataFrame(index=range(matrix.shape[1])), tmp_path), tmp_path)


def dense_weights(member: Any) -> np.ndarray:
    """Neighbour lists as the matrix `[I, I]` that they were cut from."""
    items = len(member.index)
    result = np.zeros((items, items))
    np.put_along_axis(result, member.index.astype(int), member.weight, axis=1)
    return result


class TestEase:
    @pytest.mark.parametrize(("users", "items"), [(40, 12), (12, 40)], ids=["item side", "user side (Woodbury)"])
    def test_the_closed_form(self, users: int, items: int, tmp_path: Path) -> None:
        """Both ways to invert give the B of Steck 2019, eq. 8, computed here by plain numpy in float64."""
        matrix, l2 = random_matrix(users, items), 3.0
        dense = matrix.toarray().astype(np.float64)
        inverse = np.linalg.inv(dense.T @ dense + l2 * np.eye(items))
        expected = -inverse / np.diag(inverse)
        np.fill_diagonal(expected, 0.0)
        member = of_matrix(matrix, tmp_path, {"kind": "ease", "l2": l2, "neighbours": items})
        np.testing.assert_allclose(dense_weights(member), expected, atol=1e-5)
        assert member.truncation == 0.0
        np.testing.assert_allclose(score(member, np.array([[0, 2]], np.int32))[0], expected[[0, 2]].sum(0), atol=1e-5)

    def test_truncation_keeps_the_largest_and_says_what_is_lost(self, tmp_path: Path) -> None:
        matrix = random_matrix(40, 12)
        whole = dense_weights(of_matrix(matrix, tmp_path, {"kind": "ease", "l2": 3.0, "neighbours": 12}))
        member = of_matrix(matrix, tmp_path, {"kind": "ease", "l2": 3.0, "neighbours": 4})
        cut = dense_weights(member)
        for row, kept in zip(whole, cut, strict=True):
            largest = np.sort(np.abs(row))[-4:]
            np.testing.assert_allclose(np.sort(np.abs(kept))[-4:], largest, rtol=1e-6)
        assert member.truncation == pytest.approx(1 - np.abs(cut).sum() / np.abs(whole).sum(), abs=1e-6)
        assert 0.05 < member.truncation < 1 and member.state()["truncation"] == np.float32(member.truncation)

    @pytest.mark.parametrize(
        ("shape", "neighbours"),
        [((30_000, 30_000), 10), ((6_000, 100_000), 10), ((100, 200_000), 2_000)],
        ids=["square matrix", "users x items", "neighbours"],
    )
    def test_refuses_what_does_not_fit(self, shape: tuple[int, int], neighbours: int, tmp_path: Path) -> None:
        """Beyond 1.5 GB it says so before it asks the machine for anything."""
        empty = sparse.csr_matrix(shape, dtype=np.float32)
        with pytest.raises(MachineError, match=r"must fit into 1\.5 GB.*need \d+\.\d GB"):
            of_matrix(empty, tmp_path, {"kind": "ease", "solver": "dense", "neighbours": neighbours})


class TestItemKnn:
    MATRIX = sparse.csr_matrix(np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 1]], np.float32))

    def test_cosines_worked_by_hand(self, tmp_path: Path) -> None:
        """Item 0 has users {0, 1, 2}, item 1 {0, 1}, item 2 {1, 3}."""
        member = of_matrix(
            self.MATRIX, tmp_path, {"kind": "item_knn", "weighting": "cosine", "shrinkage": 0.0, "neighbours": 3}
        )
        zero_one, zero_two, one_two = 2 / np.sqrt(6), 1 / np.sqrt(6), 1 / 2
        expected = [[0, zero_one, zero_two], [zero_one, 0, one_two], [zero_two, one_two, 0]]
        np.testing.assert_allclose(dense_weights(member), expected, rtol=1e-6)

    def test_shrinkage_and_neighbours_worked_by_hand(self, tmp_path: Path) -> None:
        member = of_matrix(
            self.MATRIX, tmp_path, {"kind": "item_knn", "weighting": "cosine", "shrinkage": 2.0, "neighbours": 1}
        )
        nearest = [2 / (np.sqrt(6) + 2), 2 / (np.sqrt(6) + 2), 1 / (2 + 2)]
        np.testing.assert_allclose(member.weight[:, 0], nearest, rtol=1e-6)
        assert member.index[:, 0].tolist() == [1, 0, 1]

    def test_tfidf_worked_by_hand(self, tmp_path: Path) -> None:
        """Users 0 to 3 took 2, 3, 1, 1 of 3 items: the weights are log(1 + 3 / length)."""
        member = of_matrix(
            self.MATRIX, tmp_path, {"kind": "item_knn", "weighting": "tfidf", "shrinkage": 0.0, "neighbours": 3}
        )
        u0, u1, u2, u3 = np.log(1 + 3 / np.array([2, 3, 1, 1])) ** 2
        expected = (u0 + u1) / np.sqrt((u0 + u1 + u2) * (u0 + u1))
        assert dense_weights(member)[0, 1] == pytest.approx(expected, rel=1e-5)
        assert dense_weights(member)[0, 2] == pytest.approx(u1 / np.sqrt((u0 + u1 + u2) * (u1 + u3)), rel=1e-5)

    def test_bm25_prefers_the_company_of_choosy_users(self, tmp_path: Path) -> None:
        lengths = [2, 2, 6]  # items 0 and 1 share a choosy user, 0 and 2 share one who takes everything
        matrix = np.zeros((3, 6), np.float32)
        matrix[0, [0, 1]], matrix[1, [2, 3]], matrix[2] = 1, 1, 1
        assert matrix.sum(axis=1).tolist() == lengths
        settings = {"kind": "item_knn", "shrinkage": 0.0, "neighbours": 6}
        weighed = dense_weights(of_matrix(sparse.csr_matrix(matrix), tmp_path, {**settings, "weighting": "bm25"}))
        plain = dense_weights(of_matrix(sparse.csr_matrix(matrix), tmp_path, {**settings, "weighting": "cosine"}))
        assert weighed[0, 1] / weighed[0, 2] > plain[0, 1] / plain[0, 2]


class TestImplicitALS:
    @pytest.mark.parametrize("frequency_scaling", [0.0, 1.0])
    def test_folding_in_is_the_exact_least_squares(self, frequency_scaling: float, tmp_path: Path) -> None:
        """A user of the training data gets the vector of eq. 3 of Rendle et al. 2022, solved here by numpy."""
        config = {"factors": 16, "epochs": 4, "l2": 0.05, "frequency_scaling": frequency_scaling}
        member: Any = fitted({"kind": "ials", **config}, world().training(tmp_path), tmp_path)
        matrix, factors, weight = world().training(tmp_path).matrix, member.factors.astype(np.float64), 0.1
        for user in (0, 17, 63):
            taken = matrix.indices[matrix.indptr[user] : matrix.indptr[user + 1]]
            vectors = factors[taken]
            penalty = 0.05 * (len(taken) + weight * len(factors)) ** frequency_scaling
            system = vectors.T @ vectors + weight * factors.T @ factors + penalty * np.eye(16)
            expected = np.linalg.solve(system, vectors.sum(axis=0))
            found = member.scorer().user(tf.constant(taken[None].astype(np.int32))).numpy()[0]
            assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)

    @pytest.mark.parametrize("solver", [{}, {"training_steps": 1}, {"block_size": 3}, {"block_size": 8}], ids=str)
    def test_a_round_never_raises_the_objective(self, solver: dict[str, Any], tmp_path: Path) -> None:
        """Neither half of it, whether vectors are solved exactly, in blocks, or by a few conjugate gradients."""
        config = ImplicitALS.Config(factors=8, l2=0.01, **solver)
        taken = world().training(tmp_path).matrix
        sides = [batches(matrix, 8) for matrix in (taken, taken.T.tocsr())]
        vectors = [
            np.random.default_rng(n).normal(0, 0.4, (size, 8)).astype(np.float32) for n, size in enumerate(taken.shape)
        ]
        for n, side in enumerate(sides):  # who took nothing has zeros from the start
            vectors[n][np.setdiff1d(np.arange(taken.shape[n]), np.concatenate([batch.rows for batch in side]))] = 0
        losses = [objective(*vectors, taken, config)]
        for half in range(16):
            side = half % 2
            vectors[side] = Solver(config).improved(sides[side], vectors[side], vectors[1 - side])
            losses.append(objective(*vectors, taken, config))
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
        assert losses[-1] < 0.5 * losses[0]

    @pytest.mark.parametrize("length", [3, 40], ids=["fewer items than factors", "more"])
    def test_both_solvers_end_at_the_least_squares(self, length: int) -> None:
        """min |1 - V w|^2 + |w|^2, against numpy in float64."""
        vectors = np.random.default_rng(0).normal(size=(5, length, 12)).astype(np.float32)
        exact = np.linalg.solve(
            vectors.transpose(0, 2, 1).astype(np.float64) @ vectors + np.eye(12), vectors.sum(axis=1)[..., None]
        )

        def distance(rounds: int = 1, **settings: Any) -> float:
            solution = np.full((5, 12, 1), 0.3, np.float32)
            for _ in range(rounds):
                solution = ridge(vectors, solution, ImplicitALS.Config(factors=12, **settings))
            return float(np.abs(solution - exact).max())

        assert distance(block_size=12) < 1e-5 and distance(block_size=100) < 1e-5, "one block is the exact solution"
        assert distance(training_steps=12) < 1e-5
        by_blocks, by_steps = (
            [distance(n, block_size=5) for n in (1, 4, 60)],
            [distance(training_steps=n) for n in (1, 3, 6)],
        )
        for distances in (by_blocks, by_steps):
            assert distances[0] > distances[1] > distances[2]
        assert by_blocks[2] < 1e-4

    def test_batches_hold_every_row_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ials, "BATCH_FLOATS", 64)
        matrix = random_matrix(50, 30)
        matrix = sparse.vstack([matrix, sparse.csr_matrix((1, 30), dtype=np.float32)]).tocsr()  # one took nothing
        found = batches(matrix, 4)
        assert sorted(np.concatenate([batch.rows for batch in found])) == list(range(50))
        for batch in found:
            assert batch.taken.size <= 16 or len(batch.rows) == 1
            for row, length, taken in zip(batch.rows, batch.lengths, batch.taken, strict=True):
                assert taken[:length].tolist() == matrix[row].indices.tolist() and (taken[length:] == PADDING).all()

    def test_conjugate_gradients_converge(self) -> None:
        random = np.random.default_rng(0)
        rows = random.normal(size=(3, 30, 12)).astype(np.float32)
        rows[2] = 0.0  # an empty history
        diagonal = random.uniform(0.5, 20, (3, 12)).astype(np.float32)
        systems = rows.transpose(0, 2, 1).astype(np.float64) @ rows + diagonal[:, None] * np.eye(12)
        exact = np.linalg.solve(systems, rows.sum(axis=1)[..., None])[..., 0]
        solve = lambda steps: conjugate_gradients(tf.constant(rows), tf.constant(diagonal), steps).numpy()  # noqa: E731
        distances = [np.abs(solve(steps) - exact).max() for steps in (1, 4, 16)]
        assert distances[0] > 3 * distances[1] > 300 * distances[2] and distances[2] < 1e-5
        np.testing.assert_allclose(solve(60), exact, atol=1e-5)  # steps too many do no harm
        assert (solve(16)[2] == 0).all()


def objective(users: np.ndarray, items: np.ndarray, matrix: sparse.csr_matrix, config: Any) -> float:
    """The loss of iALS, eq. 3 and 5 of Rendle et al. 2022."""
    predicted, taken = users.astype(np.float64) @ items.T.astype(np.float64), matrix.toarray() > 0
    loss = ((1 - predicted[taken]) ** 2).sum() + config.unobserved_weight * (predicted**2).sum()
    for vectors, counts, others in ((users, taken.sum(1), len(items)), (items, taken.sum(0), len(users))):
        weight = (counts + config.unobserved_weight * others) ** config.frequency_scaling
        loss += config.l2 * (weight[:, None] * vectors.astype(np.float64) ** 2).sum()
    return float(loss)


@every_kind
def test_decay_weighs_the_latest_items_most(settings: dict[str, Any], tmp_path: Path) -> None:
    """Where a member has the setting, the order of a history counts; for neighbours, worked by hand."""
    if "decay" not in MEMBERS[settings["kind"]].Config.model_fields:
        pytest.skip("reads histories as sets")
    member: Any = fitted({**quickly(settings), "decay": 0.5}, world().training(tmp_path), tmp_path)
    a, b = (int(n) for n in world().warm[[2, 9]])
    before, after, only_a, only_b = score(member, pad(([a, b], [b, a], [a], [b])))
    assert not np.allclose(before, after, rtol=1e-3)
    if hasattr(member, "index"):
        np.testing.assert_allclose(before, 0.5 * only_a + only_b, rtol=1e-4, atol=1e-5)


class TestCategoryPopularity:
    def test_scores_worked_by_hand(self, tmp_path: Path) -> None:
        """Two dramas were taken 3 and 1 times, a comedy 4 times; the others are cold, or nothing is known of them."""
        matrix = sparse.csr_matrix(
            np.array([[1, 0, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]])
        )
        genres = ["drama", "drama", "comedy", "drama|comedy", "western", None]
        data = TrainingData(matrix.astype(np.float32), pd.DataFrame({"genres": genres}), tmp_path)
        member = fitted({"kind": "category_popularity"}, data, tmp_path)
        drama, comedy = np.log1p(2.0), np.log1p(4.0)
        expected = [drama, drama, comedy, (drama + comedy) / 2, 0.0, 0.0]
        np.testing.assert_allclose(score(member, np.array([[1, -1]], np.int32))[0], expected, rtol=1e-6)
        assert member.speaks.tolist() == [True] * 4 + [False] * 2
        with pytest.raises(DataError, match="did you mean 'genres'"):
            fitted({"kind": "category_popularity", "column": "genre"}, data, tmp_path)


class TestSequentialRules:
    MATRIX = sparse.csr_matrix(  # the users took 0, 1, 2 and 2, 1 in this order
        (np.ones(5, np.float32), np.array([0, 1, 2, 2, 1], np.int32), np.array([0, 3, 5], np.int32)), shape=(2, 3)
    )

    def test_weights_worked_by_hand(self, tmp_path: Path) -> None:
        member = of_matrix(
            self.MATRIX,
            tmp_path,
            {"kind": "sequential_rules", "backward": 0.0, "shrinkage": 0.0, "neighbours": 3, "window": 2},
        )
        root = np.sqrt([1, 2, 2])
        follows = np.array([[0, 1, 0.5], [0, 0, 1], [0, 1, 0]]) / np.outer(root, root)
        np.testing.assert_allclose(dense_weights(member), follows, rtol=1e-5)

    def test_the_latest_item_weighs_most(self, tmp_path: Path) -> None:
        settings = {"kind": "sequential_rules", "backward": 0.0, "shrinkage": 0.0, "neighbours": 3, "decay": 0.5}
        member = of_matrix(self.MATRIX, tmp_path, settings)
        weights = dense_weights(member)
        found = score(member, np.array([[0, 2, -1]], np.int32))[0]
        np.testing.assert_allclose(found, 0.5 * weights[0] + weights[2], rtol=1e-5)


class TestMatrixFactorization:
    def test_it_learns(self, tmp_path: Path) -> None:
        """D3m: the loss falls in every epoch, the best epoch is kept, and taste is found."""
        part = member_part({"kind": "matrix_factorization", "factors": 8, "training": {**TOWERS, "epochs": 6}})
        member, data = part.make(0), world().training(tmp_path, validate=True)
        history = member.fit(data, RunOptions(0, tmp_path / "run", quiet=True))
        losses = [epoch["train_loss"] for epoch in history.epochs]
        assert len(losses) == 6 and all(b < a for a, b in itertools.pairwise(losses))
        measured = [epoch["ndcg@10"] for epoch in history.epochs]
        assert history.best_epoch == int(np.argmax(measured))
        assert data.validate is not None
        assert data.validate(member.scorer())["ndcg@10"] == pytest.approx(max(measured), abs=1e-6)

    def test_pairs_never_show_the_answer(self) -> None:
        """The item to be predicted is not in the history that it is predicted from."""
        matrix = world().training(Path()).matrix
        pairs = HistoryPairs(matrix, max_history=6, seed=0)
        batch = pairs.gather(np.arange(len(pairs)))
        assert batch["history"].shape == (len(pairs), 6)
        assert not (batch["history"] == batch["target"][:, None]).any()
        assert ((batch["history"] >= 0).sum(axis=1) >= 1).all()
        dense = matrix.toarray() > 0
        assert dense[pairs.users, batch["target"]].all()
        rows = np.repeat(pairs.users, 6).reshape(batch["history"].shape)
        assert dense[rows, batch["history"]][batch["history"] >= 0].all()
        share = np.bincount(batch["target"], minlength=matrix.shape[1]) / len(pairs)
        np.testing.assert_allclose(batch["probability"], share[batch["target"]], rtol=1e-5)


def test_the_loss_is_the_corrected_in_batch_softmax() -> None:
    """Yi et al. 2019: logits / temperature - log(probability), without the negatives that equal the target."""
    random = np.random.default_rng(0)
    user, item = random.normal(size=(2, 4, 3)).astype(np.float32)
    target, probability = np.array([5, 6, 5, 7]), np.array([0.4, 0.2, 0.4, 0.1], np.float32)
    logits = user @ item.T / 0.5 - np.log(probability)
    logits[(target[:, None] == target) & ~np.eye(4, dtype=bool)] = -np.inf
    expected = -np.diag(logits) + np.log(np.exp(logits).sum(axis=1))
    loss = in_batch_softmax(lambda batch, training: {"user": tf.constant(user), "item": tf.constant(item)}, 0.5)
    found = loss({"target": tf.constant(target), "probability": tf.constant(probability)})
    np.testing.assert_allclose(found, expected, rtol=1e-5)


class TestContent:
    def test_silent_where_there_is_nothing_to_read(self, tmp_path: Path) -> None:
        """A film without a plot is masked for the text member alone, cold or not."""
        data = world().training(tmp_path)
        texts = data.catalogue["text"].astype(object).copy()
        texts.iloc[[0, 7]] = ["", None]
        data = TrainingData(data.matrix, data.catalogue.assign(text=texts), tmp_path)
        member = fitted({"kind": "content", **TINY["content"][0]}, data, tmp_path / "run")
        assert np.flatnonzero(~member.speaks).tolist() == [0, 7]
        scores, mask = MemberScores({"text": member})(tf.constant([[0, 7], [0, 1]]))
        assert np.isfinite(scores.numpy()).all()
        assert not mask.numpy()[0].any(), "it knows no item of this history"
        assert np.flatnonzero(~mask.numpy()[1, 0]).tolist() == [0, 7]
        np.testing.assert_allclose(*score(member, np.array([[0, 1], [-1, 1]], np.int32)), atol=1e-6)

    def test_cosines_without_training(self, tmp_path: Path) -> None:
        settings = {**TINY["content"][0], "kind": "content", "scorer": "cosine"}
        member: Any = fitted(settings, world().training(tmp_path), tmp_path)
        taken = member.table[[3, 5]].sum(axis=0)
        expected = member.table @ (taken / np.linalg.norm(taken))
        np.testing.assert_allclose(score(member, np.array([[3, 5]], np.int32))[0], expected, rtol=1e-4, atol=1e-5)
        assert ndcg(member, world().asked()) > 1.5 * np.mean([random_ndcg(world().asked(), seed) for seed in range(5)])

    def test_the_encoder_is_exported_and_makes_the_table(self, tmp_path: Path) -> None:
        member: Any = fitted({"kind": "content", **TINY["content"][0]}, world().training(tmp_path), tmp_path)
        encoder = member.contents()["item"].encoder.encoder()
        texts = list(world().data.catalogue["text"][:4])
        np.testing.assert_allclose(encoder(member.encoder.prepare(texts)), member.table[:4], rtol=1e-4, atol=1e-5)

    def test_a_text_member_names_its_columns(self, tmp_path: Path) -> None:
        part = member_part({"kind": "content", "encoder": {"kind": "text_tfidf"}})
        with pytest.raises(ConfigError, match="must name its columns"):
            MEMBERS["content"].check(part.config)


def test_largest_by_row_by_hand() -> None:
    block = np.array([[0.0, -3.0, 1.0, 2.0], [4.0, 0.0, 0.0, -1.0]])
    index, weight, lost = largest_by_row(block, 2)
    assert index.tolist() == [[1, 3], [0, 3]] and weight.tolist() == [[-3.0, 2.0], [4.0, -1.0]]
    assert lost == pytest.approx(1 / 11)
    assert largest_by_row(np.zeros((2, 3)), 1)[2] == 0.0


def test_padding_has_the_row_after_the_last() -> None:
    assert padded_numbers(tf.constant([[0, -1, 4]]), 5).numpy().tolist() == [[0, 5, 4]]


def test_every_user_with_a_history_is_asked() -> None:
    """The world of this file has what its tests need: warm users, cold items, and something to find."""
    asked = question(world().data, world().parts, TEST)
    assert len(asked.users) > 80 and (np.diff(asked.history.indptr)[asked.users] > 5).all()
