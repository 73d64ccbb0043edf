"""New items join what is being served by their texts and images, without training; and items, new ones and others, are
withdrawn from all lists.

What an administrator brings is kept in a journal first (`serving.items_journal`), then embedded by the version's own
encoders and given to its signature `add_items`. Every process, and every version that is loaded later, does what the
journal says in the same order; a version whose catalogue has an item already leaves it out. Whether an item is
withdrawn is decided by what was said of it last, be it a new item to a version or one that it was trained with. That
needs no encoder and comes first: whatever keeps new items out of a version must not bring withdrawn ones back.

Tokenisers belong to training, so what reads raw texts and images is handed in (`Reader`).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from fusion.export.manifest import EngineError
from serving.catalogue import IMAGE, ITEM_ID, Catalogue
from serving.errors import (
    ArtifactRefused,
    InvalidRequest,
    ItemExists,
    LimitExceeded,
    NotPossible,
    Overloaded,
    UnknownItem,
    UnknownModel,
    unknown,
)
from serving.inputs import Arrays
from serving.items_journal import ADD, RESTORE, WITHDRAW, Entry, ItemsJournal
from serving.model_store import ModelStore, Servable, State
from serving.predictor import ADD_ITEMS, WITHDRAW_ITEMS
from serving.recommending import Recommending

logger = logging.getLogger(__name__)

EMBED = "embed_item_"
SPARE_ITEMS = "spare_items"
"""The limit of a manifest that says how many new items a version takes."""
MOST = 64
"""Items of one call."""
MOST_IDS = 1000
"""Ids of one call that withdraws or restores."""
LONGEST_TEXT = 100_000
"""Characters of one cell."""
LARGEST_IMAGE = 8 * 2**20
"""Bytes of one image."""
TOGETHER = 16
"""Items that are embedded at once."""
WATCH_S, LONGEST_WATCH_S = 0.5, 60.0
"""How often it is looked for what other processes added; where that fails, after pauses that double."""
PATIENCE_S = 30.0
"""How long a new version waits for a call of an administrator. Were that call to hang, no version could be loaded or
rolled back any more."""
CALLS, WAIT_S = 4, 3.0
"""How many calls may be here at once, and how long one waits for those before it. Were they to wait without limit, they
would take all threads of the door, and nobody could roll back."""
CLOSE_S = 5.0
"""How long the end waits for what is being added; the thread does not outlive the process."""

Item = Mapping[str, Any]
"""`item_id`, cells by column, and `image`: in base64 as it is brought and kept, bytes for a Reader."""


class Reader(Protocol):
    """Reads items as the encoders of one artifact do (`recsys.examples.ItemReader`).

    Attributes:
        columns: by name of the signature `embed_item_<name>`, the columns of an item that it reads.
    """

    columns: Mapping[str, tuple[str, ...]]

    def read(self, name: str, items: Sequence[Item]) -> tuple[Mapping[str, np.ndarray], np.ndarray, Sequence[str]]:
        """The inputs of `embed_item_<name>` for those of the items that have such content, which these are (bool
        `[N]`), and by item why it has none. Raises EngineError for items that it cannot read at all."""

    def picture(self, image: bytes) -> bytes | None:
        """A small picture for pages, a JPEG of some kilobytes; None where the image cannot be used."""


@dataclass
class _Beside:
    """What is kept beside a version that takes new items.

    Attributes:
        make: makes `reader`.
        left: rows that no item has taken.
        fixed: items of rows below this one never get another row; what was said of them last is all that counts.
        read: bytes of the journal that it has.
        seen: how long the journal was when it was last read.
        offered: by item of which the journal says something, whether it is offered by what was said of it last.
    """

    make: Callable[[], Reader]
    left: int
    fixed: int
    read: int = 0
    seen: int = 0
    offered: dict[str, bool] = field(default_factory=dict)

    @functools.cached_property
    def reader(self) -> Reader:
        """Of the version's encoders. Raises ArtifactRefused where they do not say how they read."""
        return self.make()


class _Coming(NamedTuple):
    """What is left to be done of the journal.

    Attributes:
        item_ids: of items that come, or come again.
        end: the byte up to which the journal was read.
        size: how long it was then, at least.
    """

    item_ids: Set[str]
    end: int
    size: int


class NewItems:
    """Adds items to the versions that one process serves. Safe to use from several threads.

    Args:
        store: the models.
        recommending: has the catalogues of the versions.
        journal: where items are kept.
        reader: makes the Reader of an artifact, of its folder.
    """

    def __init__(
        self,
        store: ModelStore,
        recommending: Recommending,
        journal: ItemsJournal,
        reader: Callable[[Path], Reader],
    ) -> None:
        self._store, self._recommending = store, recommending
        self._journal, self._reader = journal, reader
        self._lock, self._places = threading.Lock(), threading.Semaphore(CALLS)
        self._versions: WeakKeyDictionary[Any, _Beside] = WeakKeyDictionary()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- the administrator's call ----------------------------------------------------------------------------

    def add(self, model: str, items: Sequence[Item]) -> dict[str, Any]:
        """Adds items to all versions of a model that are being served and take new items; to all of them or to none.

        Returns `added`, for each item its `item_id` and by which encoders of the newest of these versions it is
        `read_by`, and `spare_items_left` by version.

        Raises:
            UnknownModel: there is no such model.
            InvalidRequest: an item without an id, with a column that is not known, or of which no encoder reads
                anything; LimitExceeded for too many items, or one that is too large.
            ItemExists: an id is known already, or stands twice.
            NotPossible: no version takes new items, or one has not enough rows left.
            Overloaded: other calls are busy for longer than WAIT_S, or CALLS of them wait.
            ArtifactRefused: what reads items for a version fails, whatever they are. The log says why.
            NotWritable: the disk refuses. ServingError: the journal cannot be read.
        """
        check_items(items)
        read = [_for_reader(item) for item in items]
        with self._turn(), self._journal.alone(), self._leased(model) as servables:
            takers = [servable for servable in servables if _takes(servable)]
            if not takers:
                raise NotPossible(
                    f"no version of '{model or 'the model'}' that is being served takes new items; export one with "
                    "export.spare_items above 0."
                )
            for servable in takers:
                self._catch_up(servable)
                self._check(servable, items)
            embedded = [self._embedded(servable, read) for servable in takers]
            for servable, found in zip(takers, embedded, strict=True):
                for place, item in enumerate(items):
                    _check_embedded(item, place, found, self._beside(servable).reader)
                _check_change(servable, ADD_ITEMS, _added(items, found))
            self._journal.append(takers[0].name, items)
            for servable, found in zip(takers, embedded, strict=True):
                self._give(servable, items, found)
                self._is_up_to_date(servable, items, ADD)
            return {
                "added": [{ITEM_ID: item[ITEM_ID], "read_by": embedded[0].of(row)} for row, item in enumerate(items)],
                "spare_items_left": {str(servable.version): self._beside(servable).left for servable in takers},
            }

    def _check(self, servable: Servable, items: Sequence[Item]) -> None:
        """Raises for what a version cannot take, before anything is embedded."""
        beside, catalogue = self._beside(servable), self._recommending.catalogue(servable)
        known = {ITEM_ID, *catalogue.columns, *(name for names in beside.reader.columns.values() for name in names)}
        for item in items:
            if extra := set(item) - known:
                raise InvalidRequest(f"an item has no such column; {unknown(min(extra), known)}.")
            if not catalogue.has_room_for(item[ITEM_ID]):
                again = "" if catalogue.offers(item[ITEM_ID]) else ", and withdrawn: restore it"
                raise ItemExists(f"the item '{item[ITEM_ID][:100]}' is there already{again}.")
        catalogue.check(items)
        if len(items) > beside.left:
            raise NotPossible(
                f"version {servable.version} of '{servable.name}' has {beside.left} spare rows left, for {len(items)} "
                "items; publish a version that knows them, or one with a larger export.spare_items."
            )

    def withdraw(self, model: str, item_ids: Sequence[str]) -> dict[str, Any]:
        """Takes items out of all lists of all versions of a model that are being served, whether they are new or were
        trained with: they are not recommended, found, likened or shown any more. Histories know them all the same.

        Returns `item_ids`, and `versions`, those that know one of them. To withdraw an item twice changes nothing.

        Raises:
            UnknownModel, UnknownItem: there is no such model, or no version of it that is served has such an item.
            InvalidRequest: an id that none can be; LimitExceeded for too many.
            NotPossible: a version has such an item and cannot withdraw any.
            Overloaded: other calls are busy for longer than WAIT_S, or CALLS of them wait.
            NotWritable: the disk refuses. ServingError: the journal cannot be read.
        """
        return self._mark(model, item_ids, WITHDRAW)

    def restore(self, model: str, item_ids: Sequence[str]) -> dict[str, Any]:
        """Takes back `withdraw`; answers and raises as that does."""
        return self._mark(model, item_ids, RESTORE)

    def _mark(self, model: str, item_ids: Sequence[str], action: str) -> dict[str, Any]:
        _check_ids(item_ids)
        item_ids = list(dict.fromkeys(item_ids))
        with self._turn(), self._journal.alone(), self._leased(model) as servables:
            late = [servable for servable in filter(_takes, servables) if not self._caught_up(servable)]
            knowing = self._knowing(servables, item_ids)
            for servable in knowing:
                _check_change(servable, WITHDRAW_ITEMS, _marked(item_ids, action == RESTORE))
            items = [{ITEM_ID: item} for item in item_ids if self._changes(knowing, item, action == RESTORE)]
            if items:
                self._journal.append(knowing[0].name, items, action)
            for servable in knowing:
                if servable in late:  # what it does not have yet stands in the journal before this
                    self._settle(servable)
                else:
                    self._offer(servable, item_ids, action == RESTORE)
                    self._is_up_to_date(servable, items, action)
            return {"item_ids": item_ids, "versions": [servable.version for servable in knowing]}

    def _knowing(self, servables: Sequence[Servable], item_ids: Sequence[str]) -> list[Servable]:
        """The versions that know one of the items. Raises UnknownItem where none knows one of them, NotPossible where a
        version that does cannot withdraw it."""
        known = {servable.version: self._recommending.catalogue(servable).rows.keys() for servable in servables}
        for item in item_ids:
            if not any(item in ids for ids in known.values()):
                raise UnknownItem(f"the catalogue has no item '{item[:100]}'.")
        knowing = [servable for servable in servables if not known[servable.version].isdisjoint(item_ids)]
        for servable in knowing:
            if not _withdraws(servable):
                raise NotPossible(
                    f"version {servable.version} of '{servable.name}' cannot withdraw items; publish one that was "
                    "exported with export.spare_items above 0."
                )
        return knowing

    def _changes(self, servables: Sequence[Servable], item: str, offered: bool) -> bool:
        """Whether to offer an item, or not to, is new to the journal or to a version; else nothing is kept of it."""
        if self._beside(servables[0]).offered.get(item, True) != offered:
            return True
        catalogues = [self._recommending.catalogue(servable) for servable in servables]
        return any(item in found.rows and found.offers(item) != offered for found in catalogues)

    def listed(self, model: str) -> dict[str, Any]:
        """By version that is being served and takes new items: ids that were `added` and are `withdrawn`, and
        `spare_items_left`. Raises UnknownModel, and Overloaded and ServingError as `add` does."""
        with self._turn(), self._leased(model) as servables:
            versions = {}
            for servable in filter(_takes, servables):
                self._catch_up(servable)
                found, left = self._recommending.catalogue(servable), self._beside(servable).left
                about = {"added": found.added, "withdrawn": found.withdrawn, "spare_items_left": left}
                versions[str(servable.version)] = about
            return {"versions": versions}

    # ---- what others added -----------------------------------------------------------------------------------

    def prepare(self, servable: Servable) -> None:
        """Gives a version everything of the journal, before it takes over. New items that cannot be read must not keep
        a model from being served: that is logged, and tried again. Nor must a call that takes long: the version
        catches up. Withdrawn items stay withdrawn all the same.

        Raises ServingError where it cannot be known what is withdrawn.
        """
        if not self._lock.acquire(timeout=PATIENCE_S):
            logger.error("'%s' version %d gets its new items later: a call is busy", servable.name, servable.version)
            if _takes(servable):
                self._settle(servable)  # without the lock: nobody else has this version yet
            return
        try:
            if _takes(servable):
                self._caught_up(servable)
            else:
                self._say_what_lacks(servable)
        finally:
            self._lock.release()

    def _say_what_lacks(self, servable: Servable) -> None:
        """Logs what a version that takes no new items leaves out."""
        try:
            lacking = self._lacking(servable)
        except Exception:  # nothing of the journal could be given to it anyway
            logger.exception("the journal of new items cannot be compared with '%s'", servable.name)
            return
        if lacking:
            logger.error(
                "'%s' version %d takes no new items (export.spare_items); %d of the journal are left out",
                servable.name,
                servable.version,
                lacking,
            )

    def start(self) -> None:
        """Looks again and again, in a thread, for what other processes added, until `close`."""
        self._thread = threading.Thread(target=self._watch, name="new-items", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; does not wait for what hangs."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def catch_up(self) -> bool:
        """Gives all versions what was added to the journal since they last looked; whether that could be done."""
        fine = True
        for name in self._store.names():
            with contextlib.suppress(UnknownModel), self._lock, self._leased(name) as servables:
                for servable in filter(_takes, servables):
                    try:
                        if self._beside(servable).seen != self._journal.size:
                            self._catch_up(servable)
                    except Exception:  # the other versions must not go without
                        logger.exception("looking for new items of '%s' failed; it is tried again", name)
                        fine = False
        return fine

    def _watch(self) -> None:
        pause = WATCH_S
        while not self._stop.wait(pause):
            try:
                fine = self.catch_up()
            except Exception:  # the thread must outlive whatever a disk or a model comes up with
                logger.exception("looking for new items failed; it is tried again")
                fine = False
            pause = WATCH_S if fine else min(2 * pause, LONGEST_WATCH_S)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time. Raises Overloaded where others take too long, or too many wait for their turn."""
        busy = Overloaded("other calls add or withdraw items just now; nothing was changed, try it again.", 1.0)
        if not self._places.acquire(blocking=False):
            raise busy
        try:
            if not self._lock.acquire(timeout=WAIT_S):
                raise busy
            try:
                yield
            finally:
                self._lock.release()
        finally:
            self._places.release()

    def _catch_up(self, servable: Servable) -> None:
        """Gives a version what of the journal it does not have."""
        self._grow(servable, self._settle(servable))

    def _caught_up(self, servable: Servable) -> bool:
        """Whether a version could be given everything of the journal; what is withdrawn is withdrawn from it anyway.
        Raises ServingError where the journal cannot be read."""
        coming = self._settle(servable)
        try:
            self._grow(servable, coming)
        except Exception:  # a version without new items is better than none
            logger.exception("the new items of the journal cannot be added to '%s'", servable.name)
            return False
        return True

    def _settle(self, servable: Servable) -> _Coming:
        """Withdraws, and offers again, the items that a version has, by what was said of them last; or before they came
        again, which only `_grow` can do. Needs no reader, and may be done at any time and any number of times.
        """
        beside, found = self._beside(servable), self._recommending.catalogue(servable)
        size, end = self._journal.size, self._journal.end()
        if end < beside.read:  # what the version has of another journal, it keeps
            logger.error("the journal of new items is not the one that was read; it is read from its beginning")
            beside.read, beside.fixed, beside.offered = 0, len(found.item_ids), {}
        coming, offered = set[str](), dict[str, bool]()
        for item_id, entry in self._ours(servable, end):
            beside.offered[item_id] = entry.action != WITHDRAW
            if entry.action == ADD and found.rows.get(item_id, beside.fixed) >= beside.fixed:
                coming.add(item_id)
            elif item_id not in coming:
                offered[item_id] = entry.action != WITHDRAW
        for wanted in (False, True):
            self._replay_marked(servable, [item for item, word in offered.items() if word == wanted], wanted)
        return _Coming(coming, end, size)

    def _grow(self, servable: Servable, coming: _Coming) -> None:
        """Does what the journal says of items that come, or come again, strictly in its order."""
        beside = self._beside(servable)
        entries = self._ours(servable, coming.end) if coming.item_ids else ()
        ours = (entry for item_id, entry in entries if item_id in coming.item_ids)
        try:
            for action, run in itertools.groupby(ours, key=lambda entry: entry.action):
                while part := list(itertools.islice(run, TOGETHER)):
                    if self._stop.is_set():
                        return
                    self._replay(servable, action, [entry.item for entry in part])
                    beside.read = part[-1].end  # not before: what an error cut short is tried again, and nothing twice
        except Exception:
            self._settle(servable)  # of those that came, some may have been withdrawn behind what failed
            raise
        beside.read, beside.seen = coming.end, coming.size
        beside.fixed = self._recommending.catalogue(servable).trained

    def _ours(self, servable: Servable, end: int) -> Iterator[tuple[str, Entry]]:
        """With their ids, the entries up to a byte of the journal that a version does not have."""
        for entry in self._journal.read(self._beside(servable).read, end):
            if entry.model == servable.name:
                yield entry.item[ITEM_ID], entry

    def _lacking(self, servable: Servable) -> int:
        """How many items of the journal a version that takes none does not know, or offers although withdrawn."""
        catalogue, offered = self._recommending.catalogue(servable), dict[str, bool]()
        for model, item, action, _ in self._journal.read():
            if model == servable.name:
                offered[item[ITEM_ID]] = action != WITHDRAW
        return sum(catalogue.offers(item) != wanted for item, wanted in offered.items())

    def _replay(self, servable: Servable, action: str, items: Sequence[Item]) -> None:
        """Does what was accepted before to items, as far as this version can; the log says what it cannot."""
        if action == ADD:
            self._replay_added(servable, items)
        else:
            self._replay_marked(servable, [item[ITEM_ID] for item in items], action == RESTORE)

    def _replay_marked(self, servable: Servable, item_ids: Sequence[str], offered: bool) -> None:
        changed = self._unlike(servable, item_ids, offered)
        if not changed:
            return
        if not _withdraws(servable):
            logger.error("'%s' version %d cannot withdraw %d items", servable.name, servable.version, len(changed))
            return
        try:
            self._offer(servable, changed, offered)
        except (OSError, Overloaded):  # no fault of the items: it is tried again
            raise
        except Exception as error:  # as below, the other items must not suffer
            if len(changed) > 1:
                for item_id in changed:
                    self._replay_marked(servable, [item_id], offered)
                return
            what = "restore" if offered else "withdraw"
            logger.error("'%s' version %d cannot %s an item: %s", servable.name, servable.version, what, error)

    def _replay_added(self, servable: Servable, items: Sequence[Item]) -> None:
        catalogue, beside = self._recommending.catalogue(servable), self._beside(servable)
        distinct = {item[ITEM_ID]: item for item in reversed(items)}
        missing = [item for item in items if catalogue.has_room_for(item[ITEM_ID]) and item is distinct[item[ITEM_ID]]]
        if not missing:
            return
        _ = beside.reader  # before all else: what cannot be made is no fault of the items
        try:
            found = self._embedded(servable, [_for_reader(item) for item in missing])
            added = self._give(servable, [_fitting(catalogue, item) for item in missing], found)
        except (OSError, Overloaded):  # no fault of the items: it is tried again
            raise
        except Exception as error:  # of a reader; whatever it is, the other items must not suffer
            if len(missing) > 1:  # those that are not at fault
                for item in missing:
                    self._replay_added(servable, [item])
                return
            added, reason = 0, str(error)
        else:
            reason = f"it has {beside.left} spare rows (export.spare_items), or reads nothing of them"
        if added < len(missing):
            left_out = len(missing) - added
            logger.error("'%s' version %d lacks %d new items: %s", servable.name, servable.version, left_out, reason)

    # ---- one version -----------------------------------------------------------------------------------------

    def _beside(self, servable: Servable) -> _Beside:
        beside = self._versions.get(servable.predictor)
        if beside is None:
            # It must not hold the version, whose end is the end of this.
            make = functools.partial(self._read_by, servable.name, servable.version, servable.folder)
            fixed = self._recommending.catalogue(servable).trained
            beside = _Beside(make, servable.predictor.manifest.limits[SPARE_ITEMS], fixed)
            self._versions[servable.predictor] = beside
        return beside

    def _read_by(self, name: str, version: int, folder: Path) -> Reader:
        try:
            return self._reader(folder)
        except Exception as error:  # it was handed in: whatever it raises, an administrator is told whose fault it is
            raise _unreadable(name, version, "must say how its encoders read items", error) from error

    def _is_up_to_date(self, servable: Servable, items: Sequence[Item], action: str) -> None:
        """Notes that a version has everything of the journal; at its end stands what was done to these items."""
        beside = self._beside(servable)
        beside.read = beside.seen = self._journal.size
        beside.offered.update((item[ITEM_ID], action != WITHDRAW) for item in items)

    @contextlib.contextmanager
    def _leased(self, model: str) -> Iterator[list[Servable]]:
        """The versions of a model that are being served, the newest first. Raises UnknownModel."""
        with contextlib.ExitStack() as held:
            servables = []
            for status in self._store.statuses(model):
                if status.state == State.AVAILABLE:
                    with contextlib.suppress(UnknownModel):  # it has gone since
                        servables.append(held.enter_context(self._store.lease(model, status.version)))
            yield servables

    def _embedded(self, servable: Servable, items: Sequence[Item]) -> _Embedded:
        """Items with their images as bytes, for one version. Raises InvalidRequest where the reader does."""
        predictor, reader = servable.predictor, self._beside(servable).reader
        together = min(TOGETHER, predictor.limits.rows)
        vectors, reasons = Arrays(), dict[str, list[str]]()
        for name, spec in predictor.manifest.signatures[ADD_ITEMS].inputs.items():
            if not name.startswith(EMBED):
                continue
            content = name.removeprefix(EMBED)
            vectors[content], reasons[content] = np.zeros((len(items), spec.shape[1] or 0), np.float32), []
            for start in range(0, len(items), together):
                try:
                    inputs, available, why = reader.read(content, items[start : start + together])
                except EngineError as error:
                    sentence = str(error).replace(str(servable.folder), f"version {servable.version}")
                    raise InvalidRequest(f"'{content}' cannot read the items: {sentence}") from error
                except Exception as error:
                    what = f"must read items with '{content}'"
                    raise _unreadable(servable.name, servable.version, what, error) from error
                rows = start + np.flatnonzero(available)
                if len(rows):
                    vectors[content][rows] = predictor.predict(name, inputs)["embedding"]
                reasons[content] += why
        return _Embedded(vectors, reasons, [reader.picture(item[IMAGE]) if item.get(IMAGE) else None for item in items])

    def _give(self, servable: Servable, items: Sequence[Item], found: _Embedded) -> int:
        """Gives embedded items their rows, and the catalogue their cells; returns how many got one."""
        parts = _parts(servable, len(items))
        return sum(self._give_part(servable, items[part], found.only(range(len(items))[part])) for part in parts)

    def _give_part(self, servable: Servable, items: Sequence[Item], found: _Embedded) -> int:
        catalogue = self._recommending.catalogue(servable)
        # What fails, fails before the graph has them.
        renewed = catalogue.with_items(items, found.vectors, found.pictures)
        numbers = servable.predictor.predict(ADD_ITEMS, _added(items, found))["number"]
        rows = np.flatnonzero(numbers >= 0).tolist()
        if len(rows) < len(items):
            given = found.only(rows)
            renewed = catalogue.with_items([items[row] for row in rows], given.vectors, given.pictures)
        self._recommending.renew(servable, renewed)
        self._beside(servable).left -= len(rows)
        return len(rows)

    def _unlike(self, servable: Servable, item_ids: Sequence[str], offered: bool) -> list[str]:
        """Those of the items that a version knows, and does not offer, or withdraws, as it ought to."""
        found = self._recommending.catalogue(servable)
        return [item for item in dict.fromkeys(item_ids) if item in found.rows and found.offers(item) != offered]

    def _offer(self, servable: Servable, item_ids: Sequence[str], offered: bool) -> None:
        """Withdraws or restores those of the items that a version knows."""
        changed = self._unlike(servable, item_ids, offered)
        for part in _parts(servable, len(changed)):
            servable.predictor.predict(WITHDRAW_ITEMS, _marked(changed[part], offered))
            catalogue = self._recommending.catalogue(servable)
            again = catalogue.with_again if offered else catalogue.without
            self._recommending.renew(servable, again(changed[part]))


@dataclass(frozen=True)
class _Embedded:
    """Items for one version: by content their embeddings float32 `[N, D]`, 0 where there is none, and why; and by item
    its small picture, None where there is none."""

    vectors: Arrays
    reasons: Mapping[str, Sequence[str]]
    pictures: Sequence[bytes | None]

    def of(self, row: int) -> list[str]:
        """The contents that an item has."""
        return [name for name, vectors in self.vectors.items() if vectors[row].any()]

    def only(self, rows: Sequence[int]) -> _Embedded:
        """Some of the items."""
        return _Embedded(
            {name: vectors[list(rows)] for name, vectors in self.vectors.items()},
            {name: [reasons[row] for row in rows] for name, reasons in self.reasons.items()},
            [self.pictures[row] for row in rows],
        )


def _unreadable(name: str, version: int, what: str, error: Exception) -> ArtifactRefused:
    """What an administrator is told; why, with its paths, is for the log."""
    logger.error("version %d of '%s' %s", version, name, what, exc_info=error)
    return ArtifactRefused(f"version {version} of '{name}' {what}, and does not; nothing was added. The log says why.")


def _added(items: Sequence[Item], found: _Embedded) -> dict[str, Any]:
    """The inputs of ADD_ITEMS."""
    vectors = {EMBED + name: vectors for name, vectors in found.vectors.items()}
    return {ITEM_ID: [item[ITEM_ID] for item in items], **vectors}


def _marked(item_ids: Sequence[str], offered: bool) -> dict[str, Any]:
    """The inputs of WITHDRAW_ITEMS."""
    return {ITEM_ID: item_ids, "withdrawn": [not offered] * len(item_ids)}


def _parts(servable: Servable, rows: int) -> list[slice]:
    """Rows in parts that one call of a version may have."""
    most = servable.predictor.limits.rows
    return [slice(start, start + most) for start in range(0, rows, most)]


def _check_change(servable: Servable, signature: str, inputs: Mapping[str, Any]) -> None:
    """Raises InvalidRequest where a version would refuse a change: what is in the journal has been accepted."""
    for part in _parts(servable, len(inputs[ITEM_ID])):
        servable.predictor.check(signature, {name: values[part] for name, values in inputs.items()})


def _takes(servable: Servable) -> bool:
    return ADD_ITEMS in servable.predictor.manifest.signatures


def _withdraws(servable: Servable) -> bool:
    return WITHDRAW_ITEMS in servable.predictor.manifest.signatures


# ---- items ---------------------------------------------------------------------------------------------------


def check_items(items: Sequence[Any]) -> None:
    """Raises InvalidRequest, LimitExceeded or ItemExists for items that no version could take; nothing is decoded."""
    if len(items) > MOST:
        raise LimitExceeded(f"a call may bring at most {MOST} items; received {len(items)}.")
    ids: set[str] = set()
    for place, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get(ITEM_ID), str):
            raise InvalidRequest(f"items.{place} must be an object with an 'item_id' that is text.")
        _check_id(item[ITEM_ID], f"items.{place}.item_id")
        if item[ITEM_ID] in ids:
            raise ItemExists(f"the item '{item[ITEM_ID][:100]}' stands twice in one call.")
        ids.add(item[ITEM_ID])
        for column, cell in item.items():
            _check_cell(column, cell, f"items.{place}.{column[:100]}")


def _check_ids(item_ids: Sequence[str]) -> None:
    if not 1 <= len(item_ids) <= MOST_IDS:
        raise LimitExceeded(f"a call must name 1 to {MOST_IDS} items; received {len(item_ids)}.")
    for place, item_id in enumerate(item_ids):
        _check_id(item_id, f"item_ids.{place}")


def _check_id(item_id: str, where: str) -> None:
    if not 1 <= len(item_id) <= 256 or any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in item_id):
        raise InvalidRequest(f"{where} must have 1 to 256 characters, none of them a control character.")


def _check_cell(column: str, cell: Any, where: str) -> None:
    if column == IMAGE:
        if not isinstance(cell, str):
            raise InvalidRequest(f"{where} must be an image in base64.")
        if len(cell) > LARGEST_IMAGE // 3 * 4 + 4:
            raise LimitExceeded(f"{where} must have at most {LARGEST_IMAGE} bytes; in base64 it has {len(cell)}.")
        return
    texts = cell if isinstance(cell, list) else [cell]
    if not all(isinstance(text, str | int | float | bool | None) for text in texts):
        raise InvalidRequest(f"{where} must be text, a number, true, false, or a list of these.")
    if any(isinstance(text, float) and not math.isfinite(text) for text in texts):
        raise InvalidRequest(f"{where} must be a finite number.")
    if sum(len(str(text)) for text in texts) > LONGEST_TEXT:
        raise LimitExceeded(f"{where} must have at most {LONGEST_TEXT} characters.")


def _for_reader(item: Item) -> Item:
    """The item with its image as bytes. Raises InvalidRequest where it is no base64."""
    if IMAGE not in item:
        return item
    try:
        return {**item, IMAGE: base64.b64decode(item[IMAGE], validate=True)}
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"the image of '{item[ITEM_ID][:100]}' must be in base64; it is not.") from error


def _check_embedded(item: Item, row: int, found: _Embedded, reader: Reader) -> None:
    """Raises InvalidRequest for an image that cannot be used, and an item that no encoder reads anything of."""
    for name, columns in reader.columns.items():
        if item.get(IMAGE) and columns == (IMAGE,) and (reason := found.reasons[name][row]):
            raise InvalidRequest(f"the image of '{item[ITEM_ID][:100]}' cannot be used: {reason}.")
    if item.get(IMAGE) and found.pictures[row] is None:
        raise InvalidRequest(f"the image of '{item[ITEM_ID][:100]}' cannot be used: no page could show it.")
    if not found.of(row):
        readable = sorted({column for columns in reader.columns.values() for column in columns})
        raise InvalidRequest(
            f"the item '{item[ITEM_ID][:100]}' must bring what an encoder reads, one of {', '.join(readable)}; it does "
            "not, or no word of it is known."
        )


def _fitting(catalogue: Catalogue, item: Item) -> Item:
    """The item, or its id alone where its cells do not fit the columns that a later version has."""
    try:
        catalogue.check([item])
        return item
    except InvalidRequest as error:
        logger.warning("the new item '%s' is shown without its columns: %s", item[ITEM_ID], error)
        return {ITEM_ID: item[ITEM_ID]}
