"""Lists of items for one user, or like one item: what every door answers `recommend` and `similar` with.

One call of the signature `recommend` answers while all is well. Where it fails, or has not answered when half of the
time is over, the members are asked one by one (`serving.members`), those that fail, hang or say nothing are left out,
`fuse` makes the list from the rest, and the answer says so. While `recommend` keeps failing it is not waited for again
before a pause.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from fusion.export.manifest import Manifest
from serving.catalogue import Catalogue
from serving.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    Overloaded,
    ServingError,
    Unavailable,
    UnknownItem,
    UnknownModel,
    UnknownSignature,
    unknown,
)
from serving.inputs import Arrays, text_row
from serving.limits import Limits
from serving.members import SILENT, Breaker, Members, asked_apart
from serving.messages import BEST, FAST, PROFILES, Item, ItemList, RecommendRequest, SimilarRequest

if TYPE_CHECKING:
    from serving.model_store import ModelStore, Servable

WHOLE_SHARE, MEMBERS_SHARE = 0.5, 0.8
"""Parts of the time after which `recommend`, and then the members, are no longer waited for; the rest is for `fuse`."""
SIGNATURES = {BEST: "recommend", FAST: "recommend_fast"}
STUDENT = "student"
"""Whose contributions `recommend_fast` returns, where the manifest does not name it."""
NOBODY = "\0"
"""An id that no item has: what is allowed when filters leave nothing, since an empty list would allow everything."""
LARGEST_WEIGHT = 100.0
MOST_AT_ONCE = 1000
"""Ids of a request that an event loop looks at itself; the work of more would keep other callers waiting."""

Given = TypeVar("Given")
Answer = TypeVar("Answer")


class Compute(Protocol):
    """Computes checked inputs for somebody on an event loop. Gives up at the deadline, with a TimeoutError, and when it
    is cancelled. `here` allows the loop itself for quick ones, which it could not leave if they hung."""

    async def __call__(
        self, servable: Servable, signature: str, arrays: Arrays, deadline: float | None, /, here: bool
    ) -> Arrays: ...


class InThread(Protocol):
    """Calls a function with one argument in a thread, and waits for it on an event loop."""

    async def __call__(self, function: Callable[[Given], Answer], given: Given, /) -> Answer: ...


@dataclass
class Loaded:
    """What is kept beside a loaded version for as long as it is loaded; `read` once its tables were read."""

    catalogue: Catalogue
    members: Members | None
    """None where the artifact cannot be asked member by member."""
    whole: Breaker
    read: bool = False


@dataclass(frozen=True)
class _Asked:
    """A request that was checked against the leased version that is to answer it.

    Attributes:
        signature: that answers.
        names: whose contributions it returns.
        inputs: of the signature.
        started, seconds: `time.monotonic()` when work on it began, and the time that it has from there.
    """

    request: RecommendRequest
    servable: Servable
    loaded: Loaded
    signature: str
    names: tuple[str, ...]
    inputs: Arrays
    started: float
    seconds: float

    @property
    def members(self) -> Members | None:
        """The way round a fault, where there is one."""
        return self.loaded.members if self.signature == SIGNATURES[BEST] else None

    @property
    def deadline(self) -> float:
        """`time.monotonic()` until which the signature is waited for."""
        return self.started + self.seconds * (1.0 if self.members is None else WHOLE_SHARE)


@dataclass
class Shortlist:
    """Items of one answer, best first: N ids, scores `[N]`, contributions `[S, N]`."""

    item_ids: list[str]
    scores: np.ndarray
    contributions: np.ndarray

    def at(self, places: Sequence[int] | np.ndarray) -> Shortlist:
        """The items at these places, in this order."""
        ids = [self.item_ids[place] for place in places]
        return Shortlist(ids, self.scores[places], self.contributions[:, places])

    def first(self, k: int) -> Shortlist:
        """The k best items."""
        return Shortlist(self.item_ids[:k], self.scores[:k], self.contributions[:, :k])


class Recommending:
    """Answers RecommendRequest and SimilarRequest from the models of a store. Safe to use from several threads.

    Args:
        store: where versions are leased.
        timeout_ms: the time of a request that does not bring its own.
        longest_ms: the longest that a request may bring; it gets no more.
        places: requests whose members are asked one by one at the same time (`serving.members`).
        failures, pause_s: after so many failures in a row, `recommend` or a member is not asked for so many seconds.
    """

    def __init__(
        self,
        store: ModelStore,
        timeout_ms: float = 2000.0,
        longest_ms: float = 60_000.0,
        places: int = 4,
        failures: int = 3,
        pause_s: float = 10.0,
    ) -> None:
        self._store = store
        self._timeout_ms, self._longest_ms = timeout_ms, longest_ms
        self._places, self._failures, self._pause_s = places, failures, pause_s
        self._lock = threading.Lock()
        self._loaded: WeakKeyDictionary[Any, Loaded] = WeakKeyDictionary()

    def recommend(self, request: RecommendRequest, arrived: float | None = None, until: float = math.inf) -> ItemList:
        """The k best items for a user, a history, or both.

        A user who is not known and has no history gets what the artifact says of nobody in particular, usually what is
        popular; `unknown_user` says so. With `weights` or `diversity` the list is made from the `k_max` best items.

        Args:
            request: what is wanted.
            arrived: `time.monotonic()` from which its time counts, where it had to wait for a thread; None is now.
            until: `time.monotonic()` at which its time is over at the latest, since the door waits no longer.

        Raises InvalidRequest, LimitExceeded, UnknownSignature, Overloaded, DeadlineExceeded, what `lease` raises for
        models and versions, and ServingError when no member answers.
        """
        with self._asked(request, arrived, until) as asked:
            return _list(asked, *self._answered(asked))

    async def recommend_soon(self, request: RecommendRequest, compute: Compute, in_thread: InThread) -> ItemList:
        """`recommend` on an event loop. While all is well no thread is held, and the bounded queue of the version
        decides what is refused. What takes long, such as filters or members that are asked one by one, is done in a
        thread.

        Args:
            compute: calls the graph.
            in_thread: does what takes long.
        """
        arrived = time.monotonic()
        if request.filters or request.weights or request.diversity or _ids(request) > MOST_AT_ONCE:
            return await in_thread(partial(self.recommend, arrived=arrived), request)
        with self._asked(request, arrived) as asked:
            if not asked.loaded.read:  # the first request reads the tables of the version
                return await in_thread(lambda held: _list(held, *self._answered(held)), asked)
            failure = None
            if self._whole(asked):
                alone = asked.members is None  # there is no way round the signature
                try:
                    answer = await compute(asked.servable, asked.signature, asked.inputs, asked.deadline, here=alone)
                except TimeoutError:
                    failure = _borne(asked, DeadlineExceeded("the deadline passed before the model answered."))
                except ServingError as error:
                    failure = _borne(asked, error)
                else:
                    return _list(asked, *_succeeded(asked, answer))
            return _list(asked, *await in_thread(lambda failed: self._apart(asked, failed), failure))

    def similar(self, request: SimilarRequest) -> ItemList:
        """The k items most like one item. Raises UnknownItem for an item that the catalogue does not have, and as
        `recommend` does."""
        deadline = time.monotonic() + self._timeout_ms / 1000
        with self._store.lease(request.model, request.version, request.label) as servable:
            loaded, names = self._beside(servable), servable.predictor.manifest.members
            check_k(request.k, servable.predictor.limits)
            if not loaded.catalogue.offers(request.item_id):
                raise UnknownItem(f"the catalogue has no item '{request.item_id[:100]}'.")
            inputs = {"item_id": [request.item_id], "k": np.full(1, request.k, np.int32)}
            answer = servable.call("similar_items", inputs, deadline)
            silent = _silent(answer, names)  # by design, such as popularity, which likens nothing to anything
            used = tuple(name for name in names if name not in silent)
            best = _shortlist(answer, request.k)
            return ItemList(
                items=_items(best, names, used),
                model=servable.name,
                version=servable.version,
                members_used=used,
                fallback=_sentence({}, best, names),
            )

    def titles(self, answer: ItemList) -> list[str]:
        """The title of each item of an answer, '' where there is none; of none when the version has gone since."""
        try:
            with self._store.lease(answer.model, answer.version) as servable:
                return [self.catalogue(servable).title(item.item_id) for item in answer.items]
        except (UnknownModel, Unavailable):
            return [""] * len(answer.items)

    def catalogue(self, servable: Servable) -> Catalogue:
        """The items of a leased version."""
        return self._beside(servable).catalogue

    def renew(self, servable: Servable, catalogue: Catalogue) -> None:
        """From now on a leased version has these items, such as new ones (`Catalogue.with_items`)."""
        self._beside(servable).catalogue = catalogue

    def _beside(self, servable: Servable) -> Loaded:
        with self._lock:
            loaded = self._loaded.get(servable.predictor)
            if loaded is None:
                manifest = servable.predictor.manifest
                members = Members(manifest.members, self._places, self._failures, self._pause_s)
                loaded = Loaded(
                    catalogue=Catalogue(servable.folder),
                    members=members if asked_apart(manifest) else None,
                    whole=Breaker(self._failures, self._pause_s),
                )
                self._loaded[servable.predictor] = loaded
            return loaded

    def _profile(self, request: RecommendRequest, servable: Servable) -> tuple[str, tuple[str, ...]]:
        """The signature that answers, and whose contributions it returns."""
        manifest, signature = servable.predictor.manifest, SIGNATURES[request.profile]
        if request.profile == BEST:
            return signature, manifest.members
        if signature not in manifest.signatures:
            raise InvalidRequest(
                f"'profile' must be '{BEST}' for this artifact; '{FAST}' needs one with a distilled student."
            )
        return signature, (student_of(manifest),)

    @contextmanager
    def _asked(self, request: RecommendRequest, arrived: float | None, until: float = math.inf) -> Iterator[_Asked]:
        """The request beside the version that answers it, which stays loaded."""
        started = time.monotonic()
        check(request)
        given = min(request.timeout_ms or self._timeout_ms, self._longest_ms) / 1000
        seconds = min((started if arrived is None else arrived) + given, until) - started
        if seconds <= 0:
            raise DeadlineExceeded("the deadline passed while the request waited for a thread.")
        with self._store.lease(request.model, request.version, request.label, request.user_id) as servable:
            loaded, limits = self._beside(servable), servable.predictor.limits
            signature, names = self._profile(request, servable)
            check_weights(request.weights, names)
            inputs = _inputs(request, loaded.catalogue, limits)
            yield _Asked(request, servable, loaded, signature, names, inputs, started, seconds)

    def _answered(self, asked: _Asked) -> tuple[Arrays, dict[str, str]]:
        """The answer of the graph, and by member that said nothing why."""
        failure = None
        if self._whole(asked):
            try:
                answer = asked.servable.call(asked.signature, asked.inputs, asked.deadline)
                return _succeeded(asked, answer)
            except ServingError as error:
                failure = _borne(asked, error)
        return self._apart(asked, failure)

    def _whole(self, asked: _Asked) -> bool:
        """Whether the one signature is asked: always where there is no way round it."""
        if asked.members is None:
            return True
        return self._dropped(asked).isdisjoint(asked.names) and asked.loaded.whole.allows()

    def _dropped(self, asked: _Asked) -> frozenset[str]:
        dropped = self._store.dropped(asked.servable.name)
        # Of a version that came later all members may have been dropped; one that answers is better than none.
        return frozenset() if dropped.issuperset(asked.names) else dropped

    def _apart(self, asked: _Asked, failure: ServingError | None) -> tuple[Arrays, dict[str, str]]:
        """What `_answered` gives, of members that are asked one by one."""
        assert asked.members is not None  # or `_borne` would have raised
        call, started, seconds = asked.servable.aside, asked.started, asked.seconds
        members_until, deadline = started + MEMBERS_SHARE * seconds, started + seconds
        try:
            answer, reasons = asked.members.answer(call, asked.inputs, members_until, deadline, self._dropped(asked))
        except DeadlineExceeded as error:
            raise failure or error from error
        return answer, {**_silent(answer, asked.names), **reasons}


# ---- requests ------------------------------------------------------------------------------------------------


def student_of(manifest: Manifest) -> str:
    """The name under which the one member of the profile `fast` stands in answers."""
    return str(manifest.profiles.get(FAST, {}).get("member", STUDENT))


def check(request: RecommendRequest) -> None:
    """Raises InvalidRequest for what no artifact could answer."""
    if request.profile not in PROFILES:
        raise InvalidRequest(f"'profile' must be one of {', '.join(PROFILES)}; {unknown(request.profile, PROFILES)}.")
    if not 0 <= request.diversity <= 1:
        raise InvalidRequest(f"'diversity' must be between 0 and 1; received {request.diversity}.")
    if request.timeout_ms is not None and not 0 < request.timeout_ms < math.inf:
        raise InvalidRequest(f"'timeout_ms' must be above 0; received {request.timeout_ms}.")
    if request.version is not None and request.label:
        raise InvalidRequest("a request names a version or a label; received both.")


def check_weights(weights: Mapping[str, float], names: Sequence[str]) -> None:
    """Raises InvalidRequest for a factor out of range, or of a member that is not there."""
    for name, factor in weights.items():
        if name not in names:
            raise InvalidRequest(f"'weights' must name members; {unknown(name, names)}.")
        if not 0 <= factor <= LARGEST_WEIGHT:
            raise InvalidRequest(f"'weights' must lie between 0 and {LARGEST_WEIGHT:g}; '{name}' has {factor}.")


def check_k(k: int, limits: Limits) -> None:
    """Raises LimitExceeded for a length that no list may have."""
    if not 1 <= k <= limits.k:
        raise LimitExceeded(f"'k' must be between 1 and {limits.k}; received {k}.")


def _inputs(request: RecommendRequest, catalogue: Catalogue, limits: Limits) -> Arrays:
    """The inputs of the signature, checked: they need not go through `Predictor.check` again."""
    check_k(request.k, limits)
    longer = bool(request.weights) or request.diversity > 0
    user_id = _checked_ids("user_id", (request.user_id,), limits)
    history = _checked_ids("history", request.history, limits)
    exclude = _checked_ids("exclude", request.exclude, limits)
    include = _checked_ids("include", request.include, limits)
    if request.filters:
        include = [item.encode("utf-8") for item in _filtered(request, catalogue, limits)]
    return {
        "user_id": np.array(user_id, object),
        "history": text_row(history, limits.history),
        "k": np.array([limits.k if longer else request.k], np.int32),
        "exclude": text_row(exclude, limits.exclude),
        "include": text_row(include, limits.include),
    }


def _ids(request: RecommendRequest) -> int:
    return len(request.history) + len(request.exclude) + len(request.include)


def _checked_ids(name: str, values: Sequence[str], limits: Limits) -> list[bytes]:
    """Ids as UTF-8. Refuses what the signature would refuse as well, so that whatever fails later is no fault of the
    request."""
    if not values:
        return []
    longest = limits.length(name)
    if longest is not None and len(values) > longest:
        raise LimitExceeded(f"'{name}' must have at most {longest} entries; received {len(values)}.")
    try:
        ids = [value.encode("utf-8") for value in values]
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"'{name}' must hold valid Unicode; received {error.object!r:.60}.") from error
    size = max(map(len, ids))
    if size > limits.id_bytes:
        raise LimitExceeded(f"every id must have at most {limits.id_bytes} bytes; one of '{name}' has {size}.")
    return ids


def _filtered(request: RecommendRequest, catalogue: Catalogue, limits: Limits) -> tuple[str, ...]:
    values = sum(map(len, request.filters.values())) + len(request.filters)
    if values > limits.filters:
        raise LimitExceeded(f"'filters' must have at most {limits.filters} columns and values; received {values}.")
    found = catalogue.allowed(request.filters)
    if request.include:
        wanted = set(request.include)
        found = [item for item in found if item in wanted]
    return tuple(found) or (NOBODY,)


# ---- answers -------------------------------------------------------------------------------------------------


def _succeeded(asked: _Asked, answer: Arrays) -> tuple[Arrays, dict[str, str]]:
    """Notes that the one signature answered."""
    if asked.members is not None:
        asked.loaded.whole.succeeded()
    return answer, _silent(answer, asked.names)


def _borne(asked: _Asked, error: ServingError) -> ServingError:
    """The error of the one signature, noted; raises it where asking the members apart is no way round it."""
    if asked.members is None or isinstance(error, LimitExceeded | UnknownSignature | Overloaded):
        raise error  # no member's fault; asking each of them would make an overload worse
    asked.loaded.whole.failed(error, time.monotonic() - asked.started)
    return error


def _list(asked: _Asked, answer: Arrays, reasons: Mapping[str, str]) -> ItemList:
    """The list out of the answer of the graph, weighed and spread out as the request wants it."""
    request, names, catalogue = asked.request, asked.names, asked.loaded.catalogue
    best = _shortlist(answer, len(answer["scores"][0]) if request.weights or request.diversity else request.k)
    if request.weights:
        best = reweighed(best, [request.weights.get(name, 1.0) for name in names])
    if request.diversity:
        best = best.at(spread(best.scores, catalogue.vectors(best.item_ids), request))
    rows, asked.loaded.read = catalogue.rows, True
    known = bool(answer["known_user"][0]) or any(item in rows for item in request.history)
    used = tuple(name for name in names if name not in reasons) if reasons else names
    return ItemList(
        items=_items(best.first(request.k), names, used),
        model=asked.servable.name,
        version=asked.servable.version,
        profile=request.profile,
        members_used=used,
        fallback=_sentence(reasons, best, names),
        unknown_user=not known,
    )


def _shortlist(answer: Arrays, k: int) -> Shortlist:
    """The first k items of an answer, or as many as it has."""
    ids = [item.decode("utf-8") for item in answer["item_ids"][0, :k].tolist() if item]
    there = len(ids)  # what is missing is missing at the end
    return Shortlist(ids, answer["scores"][0, :there], answer["contributions"][0, :, :there])


def reweighed(best: Shortlist, factors: Sequence[float]) -> Shortlist:
    """Each member's contribution times its factor, and the list sorted anew; equal scores keep their order.

    The bias, which is no member's, stays.
    """
    changed = best.contributions * np.asarray(factors, np.float32)[:, None]
    scores = best.scores + (changed - best.contributions).sum(axis=0)
    return Shortlist(best.item_ids, scores, changed).at(np.argsort(-scores, kind="stable"))


def spread(scores: np.ndarray, vectors: np.ndarray, request: RecommendRequest) -> list[int]:
    """Places of the k items that maximal marginal relevance takes, in its order (Carbonell and Goldstein, SIGIR 1998).

    Next is always the item with the largest (1 - d) · relevance - d · (largest cosine to an item taken already), where
    d is `request.diversity` and relevance is the score brought to 0 ... 1 over the shortlist, so that d means the same
    for every rule. An item without a vector is like no other.

    Args:
        scores: `[N]`, best first.
        vectors: unit vectors `[N, D]`.
    """
    span = float(scores.max() - scores.min()) if len(scores) else 0.0
    relevance = (scores - scores.min()) / span if span else np.zeros(len(scores))
    nearest = np.zeros(len(scores))
    left = np.ones(len(scores), bool)
    taken: list[int] = []
    for _ in range(min(request.k, len(scores))):
        gain = (1 - request.diversity) * relevance - request.diversity * nearest
        place = int(np.argmax(np.where(left, gain, -np.inf)))
        taken.append(place)
        left[place] = False
        nearest = np.maximum(nearest, vectors @ vectors[place])
    return taken


def _items(best: Shortlist, names: Sequence[str], used: Sequence[str]) -> tuple[Item, ...]:
    spoken = best.contributions
    if len(used) < len(names):
        spoken = spoken[[place for place, name in enumerate(names) if name in used]]
    return tuple(
        Item(item, score, dict(zip(used, share, strict=True)))
        for item, score, share in zip(best.item_ids, best.scores.tolist(), spoken.T.tolist(), strict=True)
    )


def _silent(answer: Arrays, names: Sequence[str]) -> dict[str, str]:
    """Members that added nothing to any item of the list."""
    if not answer["item_ids"][0, 0]:  # there is no list
        return {}
    spoke = answer["contributions"][0].any(axis=1)
    return {} if spoke.all() else {name: SILENT for name, says in zip(names, spoke, strict=True) if not says}


def _sentence(reasons: Mapping[str, str], best: Shortlist, names: Sequence[str]) -> str:
    if not best.item_ids:
        return "no item is left: all are seen, excluded, or not among those that are allowed."
    if not reasons:
        return ""
    whose: dict[str, list[str]] = {}
    for name in names:
        if name in reasons:
            whose.setdefault(reasons[name], []).append(f"'{name}'")
    parts = [f"{_and(quoted)} {reason}" for reason, quoted in sorted(whose.items(), key=lambda pair: pair[0] == SILENT)]
    return "; ".join(parts) + "."


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
