"""Evaluation (N2): which rows a question knows, and a ranking that equals a slow one written without its code."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from fusion.compat import tf
from fusion.rules import RULES
from recsys.collaborative.base import PADDING
from recsys.core import HISTORY_SPEC, MemberScores, RankingCore
from recsys.evaluation import (
    BLOCK_CELLS,
    BLOCK_USERS,
    SCORE_CELLS,
    Question,
    Ranker,
    blocks,
    history_rows,
    question,
    sample,
    validator,
)
from recsys.metrics import parse_metric
from recsys.schema import HISTORY, TEST, TRAIN, VALIDATION, Interactions
from recsys.splits import SplitSettings, split
from worlds import World

STRATEGIES = (
    "temporal_global", "temporal_per_user", "leave_last_out", "user_holdout", "item_holdout", "random", "given",
)  # fmt: skip


class Table(tf.Module):
    """A member of given scores: what it says of an item depends on the first item of the history."""

    personal = True

    def __init__(self, table: np.ndarray, speaks: np.ndarray, personal: bool = True) -> None:
        super().__init__()
        self.table = tf.constant(np.vstack([table, np.zeros_like(table[:1])]), tf.float32)
        self.speaks = speaks
        self.personal = personal

    def scorer(self) -> tf.Module:
        return self

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        first = tf.pad(history, [[0, 0], [0, 1]], constant_values=PADDING)[:, 0]
        return tf.gather(self.table, tf.where(first < 0, self.table.shape[0] - 1, first))


def random_question(seed: int, users: int = 30, items: int = 12, held_out: bool = False) -> Question:
    random = np.random.default_rng(seed)
    seen = random.random((users, items)) < 0.3
    seen[:2] = False  # users of whom nothing is known
    relevant = (random.random((users, items)) < 0.2) & ~seen
    relevant[4] = False
    candidates = random.random(items) < 0.7 if held_out else np.ones(items, bool)
    history = seen & (random.random((users, items)) < 0.8)
    matrix = lambda dense: sparse.csr_matrix(dense.astype(np.float32))  # noqa: E731
    return Question(matrix(history), matrix(seen), matrix(relevant & candidates), candidates)


def random_members(seed: int, items: int = 12) -> dict[str, Any]:
    """Scores of few different values, so that there are many ties; one member is silent on some items."""
    random = np.random.default_rng(seed)
    tables = random.integers(0, 4, (2, items, items)).astype(np.float32)
    return {
        "tied": Table(tables[0], np.ones(items, bool)),
        "silent": Table(tables[1], random.random(items) < 0.6),
        "for_all": Table(np.tile(tables[0][:1], (items, 1)), np.arange(items) > 2, personal=False),
    }


def slow_orders(
    asked: Question, members: dict[str, Any], rule: Any
) -> dict[str, dict[int, tuple[list[int], list[int]]]]:
    """System -> user -> the items it says something about, best first, and the candidates on which it is silent, by
    Python's own sort, one user and one item at a time."""
    result: dict[str, dict[int, tuple[list[int], list[int]]]] = {name: {} for name in [*members, "rule"]}
    items = len(asked.candidates)
    for user in range(asked.relevant.shape[0]):
        if not asked.relevant[user].nnz:
            continue
        history = asked.history[user].indices.tolist()
        row = np.array([history or [PADDING]], np.int32)
        seen = set(asked.seen[user].indices.tolist())
        said = np.full((1, len(members), items), np.nan, np.float32)
        for position, member in enumerate(members.values()):
            known = any(member.speaks[item] for item in history) or not member.personal
            scores = member(tf.constant(row)).numpy()[0]
            for item in range(items):
                if known and member.speaks[item]:
                    said[0, position, item] = scores[item]
        fused = rule(tf.constant(said)).numpy()[0]
        for name, scores in zip([*members, "rule"], [*said[0], fused], strict=True):
            open_to = [item for item in range(items) if item not in seen and asked.candidates[item]]
            spoken = [item for item in open_to if np.isfinite(scores[item])]
            spoken.sort(key=lambda item, s=scores: (-s[item], item))
            result[name][user] = spoken, [item for item in open_to if not np.isfinite(scores[item])]
    return result


class TestRanker:
    @pytest.mark.parametrize("held_out", [False, True])
    @pytest.mark.parametrize("seed", range(3))
    def test_equals_an_independent_slow_ranking(self, seed: int, held_out: bool, monkeypatch: Any) -> None:
        """Ties go to the lower number; seen items, silent ones and those that are no candidates are not listed."""
        monkeypatch.setattr("recsys.evaluation.BLOCK_CELLS", 20)  # several blocks, and shorter ones still
        monkeypatch.setattr("recsys.evaluation.SCORE_CELLS", 4 * 12 * (2 + seed))
        asked, members = random_question(seed, held_out=held_out), random_members(seed)
        rule = RULES["average"](RULES["average"].Config(), list(members), "candidates")
        ranked = Ranker(MemberScores(members), {"rule": rule}, 5)(asked)
        expected = slow_orders(asked, members, rule)
        assert sorted(ranked.users.tolist()) == sorted(expected["rule"]) and 4 not in ranked.users
        for name, lists in ranked.lists.items():
            for row, user in enumerate(ranked.users.tolist()):
                spoken, silent = expected[name][user]
                assert lists.top[row].tolist() == (spoken + [PADDING] * 5)[:5], name
                of_user = slice(lists.relevant_indptr[row], lists.relevant_indptr[row + 1])
                ranks = [1 + (spoken + silent).index(item) for item in lists.relevant_indices[of_user]]
                assert lists.ranks[of_user].tolist() == ranks, name
        assert min(len(spoken) for spoken, _ in expected["silent"].values()) < 5

    def test_memory_is_bounded_by_the_block_and_not_by_the_users(self, monkeypatch: Any) -> None:
        """A5: ten times the users, the same largest table of scores, and no more memory beside the lists."""
        items, cells = 500, 4 * 500 * 16
        monkeypatch.setattr("recsys.evaluation.SCORE_CELLS", cells)
        members = MemberScores(random_members(0, items))
        rule = RULES["average"](RULES["average"].Config(), members.names, "candidates")
        peaks = []
        for users in (200, 2000):
            random = np.random.default_rng(users)
            taken = sparse.random(users, items, 0.02, "csr", np.float32, random_state=random)
            asked = replace(random_question(0, items=items), history=taken, seen=taken, relevant=taken)
            ranker = Ranker(members, {"rule": rule}, 5)
            rank, sizes = ranker._rank, []

            def recorded(*block: Any, rank: Any = rank, sizes: list[int] = sizes) -> Any:
                lists, keys = rank(*block)
                sizes.append(sum(int(tf.size(key)) for key in keys))
                return lists, keys

            ranker._rank = recorded
            recorded(np.full((1, 1), PADDING, np.int32), np.ones((1, items), bool))  # traces
            tracemalloc.start()
            ranked = ranker(asked)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            kept = [value for lists in ranked.lists.values() for value in vars(lists).values()]
            peaks.append(peak - 2 * sum(array.nbytes for array in kept))  # in parts, and joined
            assert max(sizes) <= cells and sum(sizes) >= 4 * items * len(asked.users)
        assert peaks[1] < 2 * peaks[0] + 1_000_000 < users * items * 4, "what all users' scores would take"

    @pytest.mark.parametrize("strategy", STRATEGIES[:6])
    def test_nothing_seen_is_ever_recommended(self, strategy: str) -> None:
        """Whatever the split, and although the member likes nothing better than what was seen."""
        where = World.planted(strategy, users=60, items=40, interactions_per_user=10)
        asked = where.asked()
        items = where.data.shape[1]
        loves_history = Table(np.eye(items) * 9 + 1, np.ones(items, bool), personal=False)
        ranked = Ranker(MemberScores({"m": loves_history}), {}, items)(asked)
        rows, places = np.nonzero(ranked.lists["m"].top >= 0)
        users, listed = ranked.users[rows], ranked.lists["m"].top[rows, places]
        assert not np.asarray(asked.seen[users, listed]).any()
        seen_counts = np.diff(asked.seen.indptr)[ranked.users]
        assert (ranked.lists["m"].candidates == items - seen_counts).all()
        assert (ranked.lists["m"].ranks > 0).all(), "everything relevant is a candidate"

    def test_a_member_that_knows_the_answer_is_perfect(self) -> None:
        """The whole path from question to metric: an oracle has NDCG 1 and recall 1, its opposite 0."""
        asked = random_question(5, users=12)
        history = sparse.csr_matrix(np.eye(12, dtype=np.float32))  # each user is known by one item of their own
        seen = sparse.csr_matrix(np.zeros((12, 12), np.float32))
        asked = replace(asked, history=history, seen=seen)
        truth = asked.relevant.toarray()
        members = {"oracle": Table(truth, np.ones(12, bool)), "opposite": Table(-truth, np.ones(12, bool))}
        ranked = Ranker(MemberScores(members), {}, 12)(asked)
        score = lambda metric, name: np.nanmean(parse_metric(metric, "candidates").of_lists(ranked.lists[name]))  # noqa: E731
        assert score("ndcg@10", "oracle") == pytest.approx(1.0) and score("auc", "oracle") == 1.0
        assert score("hit_rate@5", "opposite") < 0.2 and score("auc", "opposite") == 0.0

    def test_progress_counts_every_user_once(self) -> None:
        asked, done = random_question(1), []
        Ranker(MemberScores(random_members(1)), {}, 5)(asked, done.append)
        assert sum(done) == len(asked.users)

    def test_core_and_evaluation_are_the_same_numbers(self) -> None:
        """Evaluation, batch jobs and servers score by one code: the core's order is the evaluated one."""
        asked, members = random_question(2), random_members(2)
        rule = RULES["average"](RULES["average"].Config(), list(members), "candidates")
        ranked = Ranker(MemberScores(members), {"rule": rule}, 3)(asked)
        core = RankingCore(MemberScores(members), rule)
        fused = core(tf.constant(history_rows(asked.history, ranked.users))).numpy()
        explained, contributions = core.explained(tf.constant(history_rows(asked.history, ranked.users)))
        np.testing.assert_array_equal(fused, explained.numpy())
        spoken = np.isfinite(fused)
        np.testing.assert_allclose(contributions.numpy().sum(axis=1)[spoken], fused[spoken], rtol=1e-5, atol=1e-6)
        fused[asked.seen[ranked.users].toarray() > 0] = -np.inf
        best = ranked.lists["rule"].top[:, 0]
        expected = np.where(np.isfinite(fused).any(axis=1), fused.argmax(axis=1), -1)
        np.testing.assert_array_equal(best, expected)

    def test_validation_measures_a_scorer_on_a_fixed_sample(self) -> None:
        asked = random_question(3)
        scorer = Table(np.random.default_rng(3).random((12, 12)), np.ones(12, bool))
        lists = Ranker(MemberScores({"m": scorer}), {}, 5)(asked).lists["m"]
        per_user = parse_metric("ndcg@5", "candidates").of_lists(lists)
        assert validator(asked, "ndcg@5")(scorer)["ndcg@5"] == pytest.approx(np.nanmean(per_user))
        assert sample(asked, 10**6) is asked
        few = sample(asked, 7, seed=1)
        assert len(few.users) == 7 and few.users.tolist() == sample(asked, 7, seed=1).users.tolist()
        assert few.users.tolist() != sample(asked, 7, seed=2).users.tolist()
        for user in few.users:
            assert few.relevant[user].indices.tolist() == asked.relevant[user].indices.tolist()
        one = validator(asked, "ndcg@5", max_users=1)
        assert one(scorer)["ndcg@5"] in per_user and one(scorer) == one(scorer)


# ---- questions -----------------------------------------------------------------------------------------------


def small_data(seed: int = 0, users: int = 30, items: int = 25) -> Interactions:
    """Random interactions with times, some of them seen and not liked, and a given split."""
    world = World.planted(users=users, items=items, interactions_per_user=10, cold_share=0.2, seed=seed)
    random = np.random.default_rng(seed)
    rows = len(world.data.users)
    return replace(
        world.data,
        positive=random.random(rows) < 0.8,
        given_split=random.choice([TRAIN, VALIDATION, TEST], rows, p=[0.7, 0.1, 0.2]).astype(np.int8),
    )


def pairs(matrix: sparse.csr_matrix) -> set[tuple[int, int]]:
    rows, columns = matrix.nonzero()
    return set(zip(rows.tolist(), columns.tolist(), strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("part", [VALIDATION, TEST], ids=["validation", "test"])
def test_a_question_knows_exactly_the_earlier_rows(strategy: str, part: int) -> None:
    """History and seen hold what comes before the part and nothing of it; the test's history holds validation."""
    data = small_data()
    parts = split(data, SplitSettings(strategy=strategy, validation=0.15, test=0.15))
    asked = question(data, parts, part)
    rows = list(zip(data.users.tolist(), data.items.tolist(), parts.tolist(), data.positive.tolist(), strict=True))
    earlier = {TRAIN, HISTORY} | ({VALIDATION} if part == TEST else set())
    assert pairs(asked.history) == {(u, i) for u, i, p, positive in rows if p in earlier and positive}
    assert pairs(asked.seen) == {(u, i) for u, i, p, _ in rows if p in earlier}
    wanted = {(u, i) for u, i, p, positive in rows if p == part and positive} - pairs(asked.seen)
    assert pairs(asked.relevant) == wanted and wanted
    assert asked.candidates.all()
    assert asked.users.tolist() == sorted({user for user, _ in wanted})
    assert (asked.history.data == 1).all() and (asked.relevant.data == 1).all()


def test_a_repeated_item_is_no_answer() -> None:
    """Who takes an item again that they had in training is not asked for it: it can not be recommended."""
    data = small_data()
    parts = np.full(len(data.users), TRAIN, np.int8)
    again = replace(data, items=data.items.copy(), positive=np.ones(len(data.users), bool))
    own = np.flatnonzero(data.users == data.users[0])
    parts[own[-2:]] = TEST
    again.items[own[-1]] = data.items[own[0]]
    asked = question(again, parts, TEST)
    assert pairs(asked.relevant) == {(int(data.users[0]), int(data.items[own[-2]]))}


@pytest.mark.parametrize("strategy", ["item_holdout", "temporal_global"])
@pytest.mark.parametrize("part", [VALIDATION, TEST], ids=["validation", "test"])
def test_held_out_candidates_are_the_items_of_the_part(strategy: str, part: int) -> None:
    """Cold items: with held_out only the part's own items that training never met may be recommended."""
    data = small_data()
    parts = split(data, SplitSettings(strategy=strategy, validation=0.2, test=0.2))
    asked = question(data, parts, part, held_out=True)
    expected = set(data.items[parts == part].tolist()) - set(data.items[parts == TRAIN].tolist())
    assert set(np.flatnonzero(asked.candidates).tolist()) == expected and len(expected) < len(asked.candidates)
    assert {item for _, item in pairs(asked.relevant)} <= expected
    assert len(asked.users) or (strategy, part) == ("temporal_global", VALIDATION), "its cold items come last"


@pytest.mark.parametrize("strategy", ["temporal_global", "temporal_per_user", "leave_last_out"])
def test_histories_stand_in_the_order_of_time(strategy: str) -> None:
    data = small_data()
    parts = split(data, SplitSettings(strategy=strategy))
    asked = question(data, parts, TEST)
    rows = history_rows(asked.history, asked.users)
    assert data.timestamps is not None
    time_of = {(u, i): t for u, i, t in zip(data.users, data.items, data.timestamps, strict=True)}
    for user, row in zip(asked.users, rows, strict=True):
        times = [time_of[user, item] for item in row if item >= 0]
        assert times == sorted(times) and (row[len(times) :] == PADDING).all()


# ---- blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [1, 40, 3000])
def test_blocks_cover_each_user_once_with_bounded_cells(longest: int) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(0, longest + 1, 700)
    lengths[0] = longest
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    indices = np.concatenate([random.permutation(3000)[:length] for length in lengths]).astype(np.int32)
    matrix = sparse.csr_matrix((np.ones(len(indices), np.float32), indices, starts), shape=(700, 3000))
    asked = np.flatnonzero(random.random(700) < 0.9)
    covered = []
    for users, histories in blocks(matrix, asked):
        assert len(users) <= BLOCK_USERS and histories.dtype == np.int32
        assert histories.size <= BLOCK_CELLS or len(users) == 1
        for user, row in zip(users, histories, strict=True):
            assert row[row >= 0].tolist() == indices[starts[user] : starts[user + 1]].tolist()
        covered.extend(users.tolist())
    assert sorted(covered) == asked.tolist()


@pytest.mark.parametrize("items", [10, 41_000, 10**9])
def test_large_catalogues_get_short_blocks(items: int) -> None:
    """Memory stays bounded whatever the catalogue: ten systems' scores of a block fit the limit, or it is one user."""
    history = sparse.csr_matrix((600, 50), dtype=np.float32)
    sizes = [len(users) for users, _ in blocks(history, np.arange(600), 10 * items)]
    assert sum(sizes) == 600
    assert max(sizes) == min(BLOCK_USERS, max(1, SCORE_CELLS // (10 * items)))


def test_no_users_no_blocks() -> None:
    empty = sparse.csr_matrix((3, 5), dtype=np.float32)
    assert list(blocks(empty, np.zeros(0, np.int64))) == []
    ((users, histories),) = blocks(empty, np.array([1, 2]))
    assert users.tolist() == [1, 2] and histories.tolist() == [[PADDING], [PADDING]]


def test_the_graph_takes_any_block() -> None:
    """One trace for all shapes: every block has another one."""
    members = MemberScores(random_members(0))
    scores = tf.function(members, input_signature=[HISTORY_SPEC])
    for shape in ((1, 1), (3, 0), (2, 9)):
        assert scores(tf.fill(shape, PADDING))[0].shape == (shape[0], 3, 12)
