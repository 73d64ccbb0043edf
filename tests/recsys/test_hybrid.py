"""Content foretells collaborative vectors of items that nobody took; users of whom three items are known (D15m)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fusion.compat import tf
from fusion.config import read_config
from fusion.errors import ConfigError, DataError
from fusion.rules import RULES
from recsys.cleaning import clean
from recsys.collaborative.base import TrainingData
from recsys.collaborative.content_regression import STRENGTHS, balanced, fit_ridge
from recsys.core import MemberScores
from recsys.evaluation import Question, Ranker, question
from recsys.metrics import parse_metric
from recsys.schema import HISTORY, TEST, TRAIN, Interactions
from recsys.settings import parse_experiment
from recsys.significance import paired_difference
from recsys.splits import SplitSettings, split
from worlds import World, fitted, member_part, ndcg, random_ndcg, training_data

CONFIGS = Path(__file__).parents[2] / "configs"
BASE = {"kind": "ials", "factors": 8, "epochs": 5, "l2": 0.01, "frequency_scaling": 1.0}
TEXT = {"columns": ["text"], "encoder": {"kind": "text_tfidf", "dimensions": 16}}
HYBRID: dict[str, Any] = {"kind": "content_regression", "base": BASE, "content": {"text": TEXT}}


class TestRidge:
    random = np.random.default_rng(0)
    features = random.normal(size=(30, 4)) + 3.0
    targets = features @ random.normal(size=(4, 3)) + random.normal(size=(30, 3)) + 5.0

    def solved(self, rows: np.ndarray, l2: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights and bias by numpy's solver on the normal equations with a column of ones that no penalty meets."""
        x = np.hstack([self.features[rows], np.ones((rows.sum(), 1))])
        penalty = l2 * np.diag([1.0, 1.0, 1.0, 1.0, 0.0])
        solution = np.linalg.solve(x.T @ x + penalty, x.T @ self.targets[rows])
        return solution[:-1], solution[-1]

    @pytest.mark.parametrize("l2", [0.01, 3.0])
    def test_the_closed_form(self, l2: float) -> None:
        weights, bias = self.solved(np.ones(30, bool), l2)
        found = fit_ridge(self.features, self.targets, l2)
        np.testing.assert_allclose(found.weights, weights, rtol=1e-8)
        np.testing.assert_allclose(found.bias, bias, rtol=1e-8)
        np.testing.assert_allclose(found(self.features[:2]), self.features[:2] @ weights + bias, rtol=1e-8)

    def test_leave_one_out_is_what_thirty_fits_say(self) -> None:
        """PRESS of one decomposition = refitting without each row, and the strength is the best of the grid by it."""

        def refitted(l2: float) -> float:
            errors = []
            for row in range(30):
                weights, bias = self.solved(np.arange(30) != row, l2)
                errors.append(np.square(self.targets[row] - self.features[row] @ weights - bias).sum())
            return float(np.sum(errors))

        variance = np.square(self.targets - self.targets.mean(axis=0)).sum()
        assert fit_ridge(self.features, self.targets, 3.0).loss == pytest.approx(refitted(3.0) / variance, rel=1e-8)
        found = fit_ridge(self.features, self.targets)
        assert found.l2 == min(STRENGTHS.tolist(), key=refitted)
        noise = fit_ridge(self.random.normal(size=(30, 4)), self.random.normal(size=(30, 3)))
        assert noise.l2 > 10 * found.l2 and noise.loss > 0.9 > found.loss

    @pytest.mark.parametrize("rows", [0, 1])
    def test_too_few_rows_give_their_mean(self, rows: int) -> None:
        found = fit_ridge(self.features[:rows], self.targets[:rows])
        expected = self.targets[0] if rows else np.zeros(3)
        np.testing.assert_allclose(found(self.features), np.tile(expected, (30, 1)))

    def test_blocks_of_features_are_balanced(self) -> None:
        """Row 2 is cold: it is moved and scaled, but decides about neither. Row 3 has nothing: it is the mean."""
        table = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 7.0], [0.0, 0.0]])
        found = balanced(table, np.array([True, True, True, False]), np.array([True, True, False, True]))
        np.testing.assert_allclose(found, [[-1, 0], [1, 0], [0, 7], [0, 0]])


@functools.cache
def cold_world() -> World:
    data = World.planted(items=100).data
    return World(data, split(data, SplitSettings(strategy="item_holdout", test=0.3)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return cold_world().training(tmp_path_factory.mktemp("cache"))


class TestColdItems:
    def test_content_finds_their_place(self, data: TrainingData, tmp_path: Path) -> None:
        """D15m: among items without any interaction the hybrid beats chance and what their words' popularity says, text
        and image together beat text, and the base alone is silent."""
        world = cold_world()
        asked = question(world.data, world.parts, TEST, held_out=True)
        image = {"encoder": {"kind": "image_efficientnet", "image_size": 32}}
        both = {**HYBRID, "content": {"text": TEXT, "image": image}}
        figures = {name: ndcg(fitted(settings, data, tmp_path / name), asked) for name, settings in [
            ("text", HYBRID), ("both", both), ("base", BASE),
            ("popularity", {"kind": "category_popularity", "column": "text", "separator": " "}),
        ]}  # fmt: skip
        chance = np.mean([random_ndcg(asked, seed) for seed in range(20)])
        assert figures["text"] > 1.3 * max(chance, figures["popularity"]), figures
        assert figures["both"] > 1.05 * figures["text"] and figures["base"] == 0.0, figures

    def test_warm_items_keep_their_vector_and_cold_ones_get_the_predicted(
        self, data: TrainingData, tmp_path: Path
    ) -> None:
        member: Any = fitted(HYBRID, data, tmp_path)
        base: Any = member_part(BASE).make(member.base.seed)
        alone = fitted_again(base, data, tmp_path)
        warm = data.counts > 0
        np.testing.assert_allclose(member.base.factors[warm], alone.factors[warm], rtol=1e-5)
        assert np.allclose(alone.factors[~warm], 0.0, atol=1e-6) and member.speaks.all()
        features = balanced(member.tables["text"], member.available["text"], warm)
        predicted = fit_ridge(features[warm], alone.factors[warm])(features[~warm])
        np.testing.assert_allclose(member.base.factors[~warm], predicted, rtol=1e-3, atol=1e-5)

    def test_shrinkage_mixes_by_count(self, data: TrainingData, tmp_path: Path) -> None:
        """An item with as many interactions as `shrinkage` lies half-way between its own vector and the predicted."""
        plain: Any = fitted(HYBRID, data, tmp_path / "plain")
        count = int(np.median(data.counts[data.counts > 0]))
        item = int(np.flatnonzero(data.counts == count)[0])
        mixed: Any = fitted({**HYBRID, "shrinkage": float(count)}, data, tmp_path / "mixed")
        predicted: Any = fitted({**HYBRID, "shrinkage": 1e12}, data, tmp_path / "predicted")
        half = 0.5 * plain.base.factors[item] + 0.5 * predicted.base.factors[item]
        np.testing.assert_allclose(mixed.base.factors[item], half, rtol=1e-3, atol=1e-5)
        assert not np.allclose(plain.base.factors[item], predicted.base.factors[item], atol=1e-3)

    def test_a_trained_base(self, data: TrainingData, tmp_path: Path) -> None:
        """matrix_factorization has two tables of items; both are foretold, so a cold item counts in a history too."""
        training = {"epochs": 4, "batch_size": 128, "learning_rate": 0.02}
        base = {"kind": "matrix_factorization", "factors": 8, "training": training}
        member: Any = fitted({**HYBRID, "base": base}, data, tmp_path)
        cold = np.flatnonzero(data.counts == 0)[:2].astype(np.int32)
        scores = member.scorer()(tf.constant(cold[:, None])).numpy()
        assert np.isfinite(scores).all() and not np.allclose(scores[0], scores[1], atol=1e-4)
        world = cold_world()
        asked = question(world.data, world.parts, TEST, held_out=True)
        assert ndcg(member, asked) > np.mean([random_ndcg(asked, seed) for seed in range(20)])

    def test_categories_alone_and_missing_content(self, tmp_path: Path) -> None:
        """Two groups of users, two genres: a cold item is liked by the group of its genre; without genre or text
        nothing is said about it."""
        matrix = sparse.csr_matrix(np.kron(np.eye(2), np.ones((6, 3))).astype(np.float32))
        matrix.resize(12, 9)
        genres = ["war"] * 3 + ["love"] * 3 + ["war", "love", ""]
        catalogue = pd.DataFrame({"genres": genres, "text": ["some words"] * 6 + ["", "", ""]})
        settings = {**HYBRID, "base": {**BASE, "factors": 2}, "categories": ["genres"]}
        member = fitted(settings, TrainingData(matrix, catalogue, tmp_path), tmp_path)
        assert member.speaks.tolist() == [True] * 8 + [False]
        soldier, lover = member.scorer()(tf.constant([[0, 1], [3, 4]])).numpy()
        assert soldier[6] > 0.5 > abs(soldier[7]) and lover[7] > 0.5 > abs(lover[6])
        with pytest.raises(DataError, match="no column 'genre': did you mean 'genres'"):
            fitted({**settings, "categories": ["genre"]}, TrainingData(matrix, catalogue, tmp_path), tmp_path)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"base": {"kind": "popularity"}}, "the base must be a member with vectors .* received 'popularity'"),
            ({"content": {"t": {"encoder": TEXT["encoder"]}}}, "the text content 't' must name its columns"),
            ({"content": {"i": {"encoder": {"kind": "image_cnn"}}}}, "'i' must have an encoder that is used as it is"),
        ],
    )
    def test_settings_that_cannot_be(self, changes: dict[str, Any], sentence: str) -> None:
        part = member_part({**HYBRID, **changes})
        with pytest.raises(ConfigError, match=sentence):
            part.registry[part.kind].check(part.config)


def fitted_again(member: Any, data: TrainingData, folder: Path) -> Any:
    from fusion.types import RunOptions

    member.fit(data, RunOptions(3, folder, quiet=True))
    return member


def test_category_popularity_by_prefix(tmp_path: Path) -> None:
    """B13 and B12 are one family, B1; the third opening is cold and has its family's popularity."""
    matrix = sparse.csr_matrix(np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]], np.float32))
    data = TrainingData(matrix, pd.DataFrame({"eco": ["B13", "B12", "B10", "C00"]}), tmp_path)
    member: Any = fitted({"kind": "category_popularity", "column": "eco", "prefix": 2}, data, tmp_path)
    np.testing.assert_allclose(member.scores, np.log1p([2.0, 2.0, 2.0, 1.0]), rtol=1e-6)
    whole: Any = fitted({"kind": "category_popularity", "column": "eco"}, data, tmp_path)
    assert whole.speaks.tolist() == [True, True, False, True]


class TestThreeClicks:
    def test_the_first_three_are_known_and_all_others_asked_for(self) -> None:
        world = World.planted(users=40, items=40, interactions_per_user=10)
        parts = split(world.data, SplitSettings(strategy="user_holdout", validation=0.1, test=0.25, history_items=3))
        data = world.data
        assert data.timestamps is not None
        held_out = np.unique(data.users[parts == TEST])
        assert len(held_out) == 10
        for user in held_out:
            rows = np.flatnonzero(data.users == user)
            ordered = parts[rows][np.argsort(data.timestamps[rows], kind="stable")]
            assert ordered.tolist() == [HISTORY] * 3 + [TEST] * 7
        assert not np.isin(data.users[parts == TRAIN], held_out).any()

    def test_users_with_too_few_stay_in_train(self) -> None:
        world = World.planted(users=40, items=40, interactions_per_user=10)
        with pytest.raises(DataError, match="leaves validation without any"):
            split(world.data, SplitSettings(strategy="user_holdout", history_items=10))

    def test_their_lists_beat_popularity(self, tmp_path: Path) -> None:
        """D15m: users of whom three items are known are answered better than by popularity, with an interval."""
        world = World.planted(users=300, items=80)
        settings = SplitSettings(strategy="user_holdout", validation=0.1, test=0.3, history_items=3)
        parts = split(world.data, settings)
        asked = question(world.data, parts, TEST)
        assert (np.diff(asked.history.indptr)[asked.users] == 3).all()
        data = training_data(world.data, parts, tmp_path)
        values = metric_of({"popularity": {"kind": "popularity"}, "hybrid": HYBRID}, data, asked, tmp_path)
        found = paired_difference(values["hybrid"], values["popularity"])
        assert found["low"] is not None and found["low"] > 0.01, found


def metric_of(
    settings: dict[str, dict[str, Any]], data: TrainingData, asked: Question, folder: Path, metric: str = "ndcg@10"
) -> dict[str, np.ndarray]:
    """The metric of each member and of their average, for every user of a question."""
    members = {name: fitted(part, data, folder / name) for name, part in settings.items()}
    average = RULES["average"](RULES["average"].Config(), list(members), "candidates")
    lists = Ranker(MemberScores(members), {"average": average}, 20)(asked).lists
    return {name: parse_metric(metric, "candidates").of_lists(found) for name, found in lists.items()}


# ---- real data -----------------------------------------------------------------------------------------------


def of_config(name: str, data_dir: Path, folder: str) -> tuple[Any, Interactions, np.ndarray]:
    """Experiment, cleaned data and split of a config."""
    override = [f"data.path={data_dir / folder}"]
    experiment = parse_experiment(read_config(CONFIGS / f"{name}.yaml", override))
    interactions, _ = clean(experiment.data.registry[experiment.data.kind].read(experiment.data.config),
                            experiment.cleaning, experiment.positive)  # fmt: skip
    return experiment, interactions, split(interactions, experiment.split)


@pytest.mark.data
@pytest.mark.slow
class TestRealData:
    def test_cold_openings(self, data_dir: Path, tmp_path: Path) -> None:
        """Openings that nobody played in training: the hybrid beats the popularity of their ECO code, paired."""
        experiment, data, parts = of_config("lichess_cold", data_dir, "lichess_openings_multimodal")
        asked = question(data, parts, TEST, held_out=True)
        settings = {n: experiment.members[n].dump() for n in ("hybrid", "eco_popularity", "family_popularity")}
        for metric in ("ndcg@10", "recall@20"):
            values = metric_of(settings, training_data(data, parts, tmp_path / "cache"), asked, tmp_path, metric)
            for baseline in ("eco_popularity", "family_popularity"):
                assert paired_difference(values["hybrid"], values[baseline])["low"] > 0.05  # type: ignore[operator]

    def test_players_of_three_openings(self, data_dir: Path, tmp_path: Path) -> None:
        """Three openings of a new player are enough to beat popularity, paired."""
        experiment, data, parts = of_config("lichess_new_users", data_dir, "lichess_openings_multimodal")
        asked = question(data, parts, TEST)
        settings = {n: experiment.members[n].dump() for n in ("popularity", "item_knn", "ease", "text")}
        values = metric_of(settings, training_data(data, parts, tmp_path / "cache"), asked, tmp_path)
        for fused in ("average", "text"):
            assert paired_difference(values[fused], values["popularity"])["low"] > 0  # type: ignore[operator]
