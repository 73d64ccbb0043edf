"""Lists from a store: filters, weights, diversity, and what happens when members fail, hang or say nothing."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fake_serving import ITEMS, MEMBERS, FakeServable, FakeStore, write_tables
from fusion.export import savedmodel
from fusion.export.manifest import Manifest, write_manifest
from fusion.rules import RULES
from recsys.core import MemberScores, RankingCore
from recsys.recommender import ServedRecommender
from recsys.schema import TEST
from serving.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    Overloaded,
    ServingError,
    Unavailable,
    UnknownItem,
    UnknownModel,
)
from serving.members import Breaker, Members
from serving.messages import RecommendRequest, SimilarRequest
from serving.model_store import ModelConfig, ModelStore
from serving.recommending import Recommending, Shortlist, reweighed, spread
from worlds import World, fitted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films") / "1"
    write_tables(folder)
    return folder


@pytest.fixture
def servable(folder):
    servable = FakeServable(folder)
    yield servable
    servable.released.set()


@pytest.fixture(params=["thread", "loop"])
def ask(servable, request):
    """Asks with the fields of a RecommendRequest, in both ways; a member is paused for .6 s after two failures."""
    recommending = Recommending(FakeStore(servable), failures=2, pause_s=0.6)
    if request.param == "thread":
        return lambda **fields: recommending.recommend(RecommendRequest(**{"k": 5, **fields}))
    recommending.recommend(RecommendRequest(k=1))  # reads the tables
    servable.calls.clear()
    return lambda **fields: soon(recommending, RecommendRequest(**{"k": 5, **fields}))


def soon(recommending, request, in_thread=asyncio.to_thread):
    async def computed(servable, signature, arrays, deadline, here):
        return await asyncio.wrap_future(servable.submit(signature, arrays, deadline))

    async def answered():
        return await recommending.recommend_soon(request, computed, in_thread)

    return asyncio.run(answered())


INPUTS = {"user_id": ["u0"], "history": [[""]], "k": [1], "exclude": [[""]], "include": [[""]]}


def ids(answer):
    return [item.item_id for item in answer.items]


# Every member scores item n by -|n - place| - 1, with the places 0, 2 and 4: i2 is best (-3 - 1 - 3), then i1, i3 (-8).
SUMS = {f"i{n}": -float(abs(n) + abs(n - 2) + abs(n - 4) + 3) for n in range(8)}


def test_one_call_answers_while_all_is_well(ask, servable):
    """A7: the contributions of the members sum to the score."""
    answer = ask(user_id="u0", k=3)
    assert ids(answer) == ["i2", "i1", "i3"] and (answer.model, answer.version) == ("films", 1)
    assert [item.score for item in answer.items] == [SUMS[i] for i in ids(answer)] == [-7.0, -8.0, -8.0]
    assert dict(answer.items[1].contributions) == {"likes": -2.0, "text": -2.0, "image": -4.0}
    assert (answer.members_used, answer.fallback, answer.unknown_user) == (MEMBERS, "", False)
    assert servable.calls == {"recommend": 1}


def test_on_an_event_loop_only_what_takes_long_is_done_in_a_thread(servable):
    recommending, threads = Recommending(FakeStore(servable)), []

    async def in_thread(function, given):
        threads.append(given)
        return function(given)

    def counted(**fields):
        soon(recommending, RecommendRequest(k=2, **fields), in_thread)
        found, threads[:] = len(threads), []
        return found

    assert [counted(), counted(), counted(history=("i1",), profile="fast")] == [1, 0, 0]  # the first reads the tables
    assert counted(filters={"language": ("fr",)}) == counted(weights={"text": 2.0}) == 1
    servable.faults = {"recommend": "raise"}
    assert counted(user_id="u0") == 1


def test_users_and_histories(ask):
    assert ask(user_id="nobody").unknown_user and ask().unknown_user
    assert ids(ask(user_id="nobody", k=2)) == ["i2", "i1"]  # what the artifact says of nobody in particular
    known = ask(user_id="nobody", history=("i2", "never seen"))
    assert not known.unknown_user and "i2" not in ids(known)
    assert ask(history=("x", "y")).unknown_user


def test_exclude_include_and_filters(ask):
    assert ids(ask(exclude=("i2", "i1"), k=2)) == ["i3", "i0"]
    assert set(ids(ask(include=("i7", "i5")))) == {"i7", "i5"}
    assert ids(ask(filters={"language": ("fr",)})) == ["i2", "i3", "i7"]
    assert ids(ask(filters={"language": ("fr", "de"), "year": ("1990",)})) == ["i2", "i4", "i7"]
    assert set(ids(ask(filters={"genres": ("war",)}))) == {"i0", "i4", "i5"}
    assert ids(ask(filters={"seen": ("true",)}, include=("i1", "i6"))) == ["i6"]


@pytest.mark.parametrize("filters", [{"language": ("klingon",)}, {"language": ("de",), "year": ("1991",)}])
def test_filters_that_leave_nothing_allow_nothing(ask, filters):
    answer = ask(user_id="u0", filters=filters)
    assert answer.items == () and "no item is left" in answer.fallback and not answer.unknown_user


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"filters": {"langauge": ("fr",)}}, InvalidRequest, "did you mean 'language'?"),
        ({"filters": {"year": tuple(map(str, range(9)))}}, LimitExceeded, "at most 8 columns and values; received 10"),
        ({"k": 0}, LimitExceeded, "'k' must be between 1 and 6; received 0"),
        ({"k": 7}, LimitExceeded, "received 7"),
        ({"k": 0, "weights": {"text": 2.0}}, LimitExceeded, "received 0"),
        ({"exclude": ("a",) * 65}, LimitExceeded, "'exclude' must have at most 64 entries; received 65"),
        ({"history": ("x" * 65,)}, LimitExceeded, "at most 64 bytes; one of 'history' has 65"),
        ({"user_id": "\ud800"}, InvalidRequest, "'user_id' must hold valid Unicode"),
        ({"profile": "fastest"}, InvalidRequest, "did you mean 'fast'?"),
        ({"diversity": float("nan")}, InvalidRequest, "'diversity' must be between 0 and 1; received nan"),
        ({"diversity": 1.1}, InvalidRequest, "received 1.1"),
        ({"weights": {"texts": 2.0}}, InvalidRequest, "did you mean 'text'?"),
        ({"weights": {"text": float("inf")}}, InvalidRequest, "'text' has inf"),
        ({"weights": {"text": -1.0}}, InvalidRequest, "'text' has -1.0"),
        ({"timeout_ms": 0.0}, InvalidRequest, "'timeout_ms' must be above 0"),
        ({"version": 1, "label": "stable"}, InvalidRequest, "a version or a label; received both"),
        ({"model": "songs"}, UnknownModel, "received 'songs'"),
    ],
)
def test_refusals_name_what_must_hold(ask, servable, fields, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        ask(**fields)
    assert not servable.calls["member_text"], "the request's fault is no reason to ask the members"


def test_nul_bytes_are_ids_that_nobody_has(ask):
    assert ids(ask(history=("\0", "i2\0"), k=1)) == ["i2"]


# ---- weights and diversity -----------------------------------------------------------------------------------


def test_weights_change_the_list_and_the_contributions(ask, servable):
    """A8: who asks decides how much a member counts; what is said of each item still sums to its score."""
    answer = ask(weights={"likes": 0.0, "text": 0.0}, k=2)
    assert ids(answer) == ["i4", "i3"] and [item.score for item in answer.items] == [-1.0, -2.0]
    assert dict(answer.items[0].contributions) == {"likes": 0.0, "text": 0.0, "image": -1.0}
    assert answer.members_used == MEMBERS
    assert ids(ask(weights=dict.fromkeys(MEMBERS, 1.0), k=6)) == ids(ask(k=6))


def test_reweighing_keeps_the_bias_and_the_order_of_equals():
    best = Shortlist(["a", "b", "c"], np.float32([6, 5, 5]), np.float32([[1, 2, 2], [2, 0, 0]]))
    changed = reweighed(best, [1.0, 0.5])
    assert changed.item_ids == ["a", "b", "c"] and changed.scores.tolist() == [5.0, 5.0, 5.0]
    assert reweighed(best, [2.0, 0.0]).item_ids == ["b", "c", "a"]


def slow_spread(scores, vectors, diversity, k):
    """Maximal marginal relevance by its definition."""
    relevance = (scores - scores.min()) / (scores.max() - scores.min())
    taken = []
    while len(taken) < min(k, len(scores)):
        gains = {
            n: (1 - diversity) * relevance[n]
            - diversity * max((float(vectors[n] @ vectors[m]) for m in taken), default=0.0)
            for n in range(len(scores))
            if n not in taken
        }
        taken.append(max(gains, key=lambda n: (gains[n], -n)))
    return taken


@pytest.mark.parametrize("diversity", [0.1, 0.5, 0.9])
def test_spread_is_maximal_marginal_relevance(diversity):
    random = np.random.default_rng(3)
    scores = np.sort(random.normal(size=40))[::-1]
    vectors = np.abs(random.normal(size=(40, 5)))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    request = RecommendRequest(k=12, diversity=diversity)
    assert spread(scores, vectors, request) == slow_spread(scores, vectors, diversity, 12)
    assert spread(np.zeros(0), vectors[:0], request) == [] and spread(scores[:1], vectors[:1], request) == [0]


def test_diversity_puts_like_items_apart(ask):
    """i0 and i1 have the same vector: of the two the second is taken last when the list is to be spread."""
    allowed = ("i0", "i1", "i3", "i4")
    assert ids(ask(include=allowed)) == ["i1", "i3", "i0", "i4"]
    assert ids(ask(include=allowed, diversity=0.9)) == ["i1", "i3", "i4", "i0"]
    assert ids(ask(include=allowed, diversity=0.9, k=2)) == ["i1", "i3"]


def test_diversity_needs_vectors(tmp_path):
    recommending = Recommending(FakeStore(FakeServable(tmp_path)))
    with pytest.raises(InvalidRequest, match="no item vectors"):
        recommending.recommend(RecommendRequest(k=1, diversity=0.5))


# ---- profiles ------------------------------------------------------------------------------------------------


def test_the_fast_profile_asks_the_student(ask, servable):
    """A8: the caller chooses the cheaper model; the answer says who it was."""
    answer = ask(profile="fast", k=2)
    assert answer.profile == "fast" and answer.members_used == ("pupil",) and ids(answer) == ["i0", "i1"]
    assert dict(answer.items[1].contributions) == {"pupil": -2.0}
    assert servable.calls == {"recommend_fast": 1}


def test_a_fast_profile_without_student_is_refused(folder):
    recommending = Recommending(FakeStore(FakeServable(folder, fast=False)))
    with pytest.raises(InvalidRequest, match="'profile' must be 'best' for this artifact"):
        recommending.recommend(RecommendRequest(k=1, profile="fast"))


# ---- members that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise", "failed"),
        ("invalid", "failed"),
        ("hang", "did not answer in time"),
        ("stuck", "did not answer in time"),
    ],
)
def test_a_member_that_fails_or_hangs_is_left_out(ask, servable, fault, reason):
    """H7, O13: the others answer in the caller's time, and the answer says who is missing."""
    servable.faults = {"text": fault, "recommend": "hang" if fault == "stuck" else ""}
    started = time.monotonic()
    answer = ask(user_id="u0", k=2, timeout_ms=1000)
    assert time.monotonic() - started < 3
    assert answer.members_used == ("likes", "image") and answer.fallback == f"'text' {reason}."
    assert ids(answer) == ["i1", "i2"] and dict(answer.items[0].contributions) == {"likes": -2.0, "image": -4.0}
    assert "secret" not in answer.fallback and not answer.unknown_user


def test_a_member_of_nan_is_left_out(ask, servable):
    """H7: whether the graph left it out or the members were asked one by one."""
    servable.faults = {"text": "nan"}
    within = ask(k=3)
    servable.faults["recommend"] = "raise"
    apart = ask(k=3)
    assert within == apart and servable.calls["fuse"] == 1
    assert within.members_used == ("likes", "image") and within.fallback == "'text' had nothing to say."


def test_the_sentence_names_members_by_what_they_lack(ask, servable):
    servable.faults = {"text": "nan", "image": "nan"}
    assert ask(k=1).fallback == "'text' and 'image' had nothing to say."
    servable.faults = {"text": "raise", "likes": "nan", "image": "nan", "recommend": "raise"}
    assert ask(k=1).fallback == "'text' failed; 'likes' and 'image' had nothing to say."


def test_members_one_by_one_answer_as_the_whole(ask, servable):
    """H7: with no member missing, the way round a fault gives the same list and does not speak of one."""
    whole = ask(user_id="u1", history=("i2",), exclude=("i5",), k=6)
    servable.faults = {"recommend": "raise"}
    assert ask(user_id="u1", history=("i2",), exclude=("i5",), k=6) == whole
    assert servable.calls == {"recommend": 2, "fuse": 1, **{f"member_{name}": 1 for name in MEMBERS}}


def test_members_run_side_by_side(ask, servable):
    """O14: three members of .5 s each take the time of one, not of three."""
    servable.faults, servable.seconds = {"recommend": "raise"}, 0.5
    started = time.monotonic()
    ask(timeout_ms=2000)
    assert 0.5 <= time.monotonic() - started < 1.3


def test_a_failing_member_is_not_waited_for_again_until_a_pause_is_over(ask, servable):
    """H7, O13: the first requests pay for what hangs, later ones do not; when it is well again it is asked again."""
    servable.faults = {"text": "hang"}
    for _ in range(2):
        ask(timeout_ms=600)
    calls = servable.calls.copy()
    started = time.monotonic()
    answer = ask(timeout_ms=3000)
    assert time.monotonic() - started < 1.2, "neither the whole nor the member was waited for"
    assert answer.fallback == "'text' is paused, since it kept failing." and answer.members_used == ("likes", "image")
    assert servable.calls["member_text"] == calls["member_text"] and servable.calls["recommend"] == calls["recommend"]
    servable.faults = {}
    time.sleep(0.7)
    assert ask().fallback == "" and servable.calls["recommend"] == calls["recommend"] + 1


def test_what_one_request_brings_pauses_nothing_for_others(ask, servable):
    servable.faults = {"text": "invalid"}
    for _ in range(4):
        assert ask(k=1).fallback == "'text' failed."
    assert servable.calls["recommend"] == servable.calls["member_text"] == 4
    servable.faults = {}
    assert ask(k=1).fallback == ""


def test_a_stuck_member_holds_a_bounded_number_of_threads(folder):
    servable = FakeServable(folder)
    servable.faults = {"recommend": "raise", "text": "stuck"}
    recommending = Recommending(FakeStore(servable), places=1, failures=100)
    before = threading.active_count()
    answers = [recommending.recommend(RecommendRequest(k=1, timeout_ms=600)) for _ in range(5)]
    assert threading.active_count() - before <= 2
    assert [answer.fallback for answer in answers[2:]] == ["'text' is still busy with earlier requests."] * 3
    servable.released.set()


def test_requests_wait_for_a_place_and_are_refused_without_one(folder):
    """What is asked past the queue is bounded, so that a fault does not become an overload."""
    servable = FakeServable(folder)
    servable.faults, servable.seconds = {"recommend": "raise"}, 0.15
    recommending = Recommending(FakeStore(servable), places=1, failures=100)
    ask = lambda ms: recommending.recommend(RecommendRequest(k=1, timeout_ms=ms))  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        started = time.monotonic()
        answers = [future.result() for future in [pool.submit(ask, 20_000) for _ in range(3)]]
        assert time.monotonic() - started >= 0.45 and {answer.fallback for answer in answers} == {""}
        servable.seconds = 1.0
        first = pool.submit(ask, 20_000)
        time.sleep(0.2)
        with pytest.raises(Overloaded, match="one by one"):
            ask(100)
        assert first.result().fallback == ""


@pytest.mark.parametrize("stuck", [("fuse",), ("text", "fuse"), MEMBERS])
def test_no_answer_comes_later_than_its_deadline(ask, servable, stuck):
    """O13: whatever hangs, the caller hears of it in time."""
    servable.faults = {"recommend": "raise", **dict.fromkeys(stuck, "stuck")}
    started = time.monotonic()
    with pytest.raises(ServingError):
        ask(timeout_ms=300)
    assert time.monotonic() - started < 0.8


def test_fuse_is_not_started_when_the_time_is_over(servable):
    servable.seconds = 0.05
    answer = lambda **times: Members(MEMBERS).answer(servable.aside, INPUTS, **times)  # noqa: E731
    now = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="before the members had answered"):
        answer(members_until=now + 5, deadline=now + 0.01)
    with pytest.raises(DeadlineExceeded, match="before members could be asked"):
        answer(members_until=time.monotonic() + 0.004, deadline=now + 5)
    assert servable.calls == {f"member_{name}": 1 for name in MEMBERS}


def test_fuse_that_hangs_keeps_its_place(folder):
    """O13: hung threads do not pile up; what finds no place is refused in time, and places come back."""
    servable = FakeServable(folder)
    servable.faults = {"recommend": "raise", "fuse": "stuck"}
    recommending = Recommending(FakeStore(servable), places=2, failures=100)
    errors = []
    for _ in range(4):
        started = time.monotonic()
        with pytest.raises(ServingError) as raised:
            recommending.recommend(RecommendRequest(k=1, timeout_ms=300))
        assert time.monotonic() - started < 0.8
        errors.append(raised.type)
    assert errors == [ServingError] * 2 + [Overloaded] * 2  # the first two of `recommend`, whose way round hangs
    assert servable.calls["fuse"] == 2, "no thread beyond the two that hang"
    servable.released.set()
    servable.faults = {"recommend": "raise"}
    assert recommending.recommend(RecommendRequest(k=1)).fallback == ""


def test_fuse_that_keeps_failing_is_paused(folder):
    """O13: nobody waits for what cannot come."""
    servable = FakeServable(folder)
    servable.faults = {"recommend": "raise", "fuse": "raise"}
    recommending = Recommending(FakeStore(servable), failures=2, pause_s=0.3)
    for error in (ServingError, ServingError, Unavailable):
        with pytest.raises(error):
            recommending.recommend(RecommendRequest(k=1))
    assert servable.calls["fuse"] == servable.calls["member_text"] == 2
    servable.faults = {}
    time.sleep(0.4)
    assert recommending.recommend(RecommendRequest(k=1)).fallback == ""


def test_callers_in_a_hurry_pause_nothing_for_others(ask, servable):
    """O13: deadlines that no model could keep say nothing about the model."""
    servable.faults = dict.fromkeys(MEMBERS, "hang")
    for _ in range(4):
        with pytest.raises(DeadlineExceeded):
            ask(timeout_ms=20)
    servable.faults, asked = {}, servable.calls["recommend"]
    assert ask().fallback == "" and servable.calls["recommend"] == asked + 1


def test_time_in_a_queue_counts(servable):
    """O13: who waited for a thread has the rest of the time, and no more than the door waits."""
    recommending, request = Recommending(FakeStore(servable)), RecommendRequest(k=1, timeout_ms=2000)
    with pytest.raises(DeadlineExceeded, match="waited for a thread"):
        recommending.recommend(request, time.monotonic() - 2)
    assert not servable.calls
    servable.faults = {"recommend": "hang"}
    started = time.monotonic()
    assert recommending.recommend(request, started - 1.6).items and time.monotonic() - started < 0.5
    started = time.monotonic()
    assert recommending.recommend(request, until=started + 0.4).items and time.monotonic() - started < 0.5


def test_no_request_gets_more_than_the_longest_time(servable):
    """O13: whatever it asks for, and whatever is usual; a shorter one is kept."""
    servable.faults = dict.fromkeys(MEMBERS, "hang")
    for usual, asked, longest, seconds in (
        (60_000, 3600_000, 300, 0.3),
        (60_000, None, 300, 0.3),
        (100, 200, 9000, 0.2),
    ):
        recommending = Recommending(FakeStore(servable), timeout_ms=usual, longest_ms=longest)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            recommending.recommend(RecommendRequest(k=1, timeout_ms=asked))
        assert 0.5 * seconds < time.monotonic() - started < seconds + 1.0


def test_a_member_may_be_taken_out_and_put_back(servable):
    """H7: what an operator, or a rule of the monitor, does about a member that says nonsense."""
    store = FakeStore(servable)
    recommending = Recommending(store)
    store.drop_member("films", "text")
    without = recommending.recommend(RecommendRequest(k=2))
    assert without.members_used == ("likes", "image") and without.fallback == "'text' was taken out."
    assert ids(without) == ["i0", "i1"]
    store.restore_member("films", "text")
    everybody = recommending.recommend(RecommendRequest(k=2))
    assert everybody.fallback == ""
    store.out = frozenset(MEMBERS)  # all that a later version has; it must answer all the same
    assert recommending.recommend(RecommendRequest(k=2)) == everybody


@pytest.mark.parametrize(("fault", "error"), [("raise", ServingError), ("hang", DeadlineExceeded)])
def test_no_member_left_is_an_error(ask, servable, fault, error):
    servable.faults = dict.fromkeys(MEMBERS, fault)
    with pytest.raises(error):
        ask(timeout_ms=150)


def test_an_overload_is_not_made_worse(ask, servable, monkeypatch):
    def overloaded(*_):
        raise Overloaded("the queue is full.")

    monkeypatch.setattr(servable, "call", overloaded)
    with pytest.raises(Overloaded):
        ask()
    assert not servable.calls


def test_the_lease_ends_with_the_answer(servable):
    store = FakeStore(servable)
    recommending = Recommending(store)
    recommending.recommend(RecommendRequest(k=1))
    with pytest.raises(InvalidRequest):
        recommending.recommend(RecommendRequest(k=1, weights={"nobody": 1.0}))
    assert store.leases == 0


def test_breaker_lets_one_call_through_after_each_pause():
    breaker, fault = Breaker(failures=2, pause_s=0.05), ServingError("it fails.")
    breaker.failed(fault, 0.0)
    breaker.failed(InvalidRequest("the caller's fault."), 1.0)
    breaker.failed(DeadlineExceeded("too short a time."), 0.01)
    assert breaker.allows()
    breaker.failed(DeadlineExceeded("long enough."), 0.2)
    assert not breaker.allows()
    time.sleep(0.06)
    assert [breaker.allows(), breaker.allows()] == [True, False]
    breaker.succeeded()
    assert breaker.allows() and breaker.allows()


# ---- like one item -------------------------------------------------------------------------------------------


def test_similar_items(servable):
    recommending = Recommending(FakeStore(servable))
    answer = recommending.similar(SimilarRequest("i2", k=2))
    assert ids(answer) == ["i1", "i3"] and answer.members_used == MEMBERS and answer.fallback == ""
    assert sum(answer.items[0].contributions.values()) == answer.items[0].score
    with pytest.raises(UnknownItem, match="no item 'i99'"):
        recommending.similar(SimilarRequest("i99", k=1))
    with pytest.raises(LimitExceeded, match="'k'"):
        recommending.similar(SimilarRequest("i2", k=0))


# ---- the catalogue -------------------------------------------------------------------------------------------


def test_the_catalogue_offers_columns_of_few_values(servable):
    catalogue = Recommending(FakeStore(servable)).catalogue(servable)
    assert catalogue.choices == {
        "language": ["de", "en", "fr"],
        "year": ["1990", "1991"],
        "seen": ["false", "true"],
        "genres": ["love", "sea", "war"],
    }
    assert catalogue.search("FILM", 2) == ["i0", "i1"] and catalogue.search("i3", 9) == ["i3"]
    assert catalogue.described("i2") == {"title": "Film 2", "language": "fr", "year": 1990, "seen": True}
    assert catalogue.title("i3") == "" == catalogue.title("none") and catalogue.described("none") == {}
    assert catalogue.user_ids == ["u0", "u1", "ü 2"] and catalogue.item_ids == ITEMS


def test_tables_are_read_once_for_each_version(folder, servable, monkeypatch):
    import serving.catalogue

    read = []
    table = serving.catalogue.pq.read_table
    monkeypatch.setattr(serving.catalogue.pq, "read_table", lambda path: read.append(path) or table(path))
    recommending = Recommending(FakeStore(servable))
    for _ in range(3):
        recommending.recommend(RecommendRequest(k=1, filters={"language": ("fr",)}))
    assert read == [folder / "items.parquet"]


def test_what_is_kept_of_a_version_goes_with_it(folder):
    """tensorflow/serving#1664: memory comes back when a version is unloaded."""
    store = FakeStore(FakeServable(folder))
    recommending = Recommending(store)
    recommending.recommend(RecommendRequest(k=1, history=("i2",), filters={"genres": ("war",)}))
    kept = weakref.ref(recommending.catalogue(store.servable))
    assert kept() is not None
    store.servable = FakeServable(folder, version=2)
    assert recommending.recommend(RecommendRequest(k=1)).version == 2
    gc.collect()
    assert kept() is None


# ---- an artifact as the engine exports it --------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A store with a recommender of popularity and EASE over 40 items."""
    folder = tmp_path_factory.mktemp("real")
    world = World.planted(users=40, items=40, interactions_per_user=10)
    data = world.training(folder)
    members = {name: fitted({"kind": name}, data, folder) for name in ("popularity", "ease")}
    rule = RULES["average"](RULES["average"].Config(), list(members), "candidates")
    asked, item_ids = world.asked(TEST), world.data.item_ids
    core = RankingCore(MemberScores(members, data.counts), rule)
    module = ServedRecommender(core, item_ids, world.data.user_ids, asked.history, asked.seen, 20)
    artifact = folder / "shop" / "1"
    wanted = ("recommend", "fuse", "similar_items", "member_popularity", "member_ease")
    made = module.signatures()
    savedmodel.save(module, artifact, {name: made[name] for name in wanted})
    genres = [["even"] if n % 2 == 0 else ["odd", "all"] for n in range(40)]
    pq.write_table(pa.table({"item_id": item_ids.astype(str), "genres": genres}), artifact / "items.parquet")
    pq.write_table(pa.table({"user_id": world.data.user_ids.astype(str)}), artifact / "users.parquet")
    np.save(artifact / "item_vectors.npy", np.eye(40, dtype=np.float16))
    signatures, limits = savedmodel.signatures_of(artifact), {"k_max": 20}
    write_manifest(artifact, Manifest("recommender", tuple(members), signatures, limits=limits))
    store = ModelStore([ModelConfig("shop", folder / "shop")])
    store.poll()
    yield store
    store.close()


def test_an_exported_artifact_answers(real, monkeypatch):
    """A7, H7, O14: whole, member by member, and without one, over the graphs that are served."""
    recommending = Recommending(real, timeout_ms=60_000)  # graphs are traced at their first call
    with real.lease() as servable:
        somebody = recommending.catalogue(servable).user_ids[3]
    user = RecommendRequest(user_id=somebody, k=6)
    whole = recommending.recommend(user)
    assert len(whole.items) == 6 and whole.members_used == ("popularity", "ease") and whole.fallback == ""
    for item in whole.items:
        assert sum(item.contributions.values()) == pytest.approx(item.score, abs=1e-4)
    filtered = recommending.recommend(RecommendRequest(user_id=somebody, k=20, filters={"genres": ("odd",)}))
    with real.lease() as servable:
        rows = recommending.catalogue(servable).rows
        assert 10 < len(filtered.items) <= 20 and all(rows[item.item_id] % 2 for item in filtered.items)
        spread_out = recommending.recommend(RecommendRequest(user_id=somebody, k=6, diversity=0.5))
        assert ids(spread_out) == ids(whole), "vectors at right angles leave the order as it is"
        alone = recommending.recommend(RecommendRequest(user_id=somebody, k=6, weights={"ease": 0.0}))

        def fails(*_):
            raise ServingError("it fails.")

        aside = servable.aside
        monkeypatch.setattr(servable, "call", fails)
        apart = recommending.recommend(user)
        assert ids(apart) == ids(whole) and apart.fallback == ""
        assert [i.score for i in apart.items] == pytest.approx([i.score for i in whole.items], abs=1e-4)
        parts = {"member_ease": fails}
        monkeypatch.setattr(servable, "aside", lambda name, given: parts.get(name, aside)(name, given))
        without = recommending.recommend(user)
    assert without.fallback == "'ease' failed." and without.members_used == ("popularity",)
    scores = [item.score for item in without.items]
    assert scores == sorted(scores, reverse=True) and ids(without) != ids(whole)
    halves = [2 * item.score for item in alone.items[:2]]  # of two a weight of 0 leaves half; of one the whole is left
    assert scores[:2] == pytest.approx(halves, abs=1e-4)


def test_an_unknown_user_gets_what_is_popular(real):
    """What the artifact says of nobody in particular, and that it is so."""
    answer = Recommending(real, timeout_ms=60_000).recommend(RecommendRequest(user_id="nobody", k=5))
    assert answer.unknown_user and len(answer.items) == 5
    assert answer.members_used == ("popularity",) and answer.fallback == "'ease' had nothing to say."
