"""New items join what is being served by their texts and images, without training.

What an administrator brings is kept in a journal first (`serving.items_journal`), then embedded by the version's own
encoders and given to its signature `add_items`. Every process, and every version that is loaded later, makes its rows
out of the journal in the same order; a version whose catalogue has an item already leaves it out.

Tokenisers belong to training, so what reads raw texts and images is handed in (`Reader`).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from serving.catalogue import IMAGE, ITEM_ID, Catalogue
from serving.errors import InvalidRequest, ItemExists, LimitExceeded, NotPossible, UnknownModel, unknown
from serving.inputs import Arrays
from serving.items_journal import ItemsJournal
from serving.model_store import ADD_ITEMS, ModelStore, Servable, State
from serving.recommending import Recommending

logger = logging.getLogger(__name__)

EMBED = "embed_item_"
SPARE_ITEMS = "spare_items"
"""The limit of a manifest that says how many new items a version takes."""
MOST = 64
"""Items of one call."""
LONGEST_TEXT = 100_000
"""Characters of one cell."""
LARGEST_IMAGE = 8 * 2**20
"""Bytes of one image."""
TOGETHER = 16
"""Items that are embedded at once."""
WATCH_S = 0.5
"""How often it is looked for what other processes added."""

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
        `[N]`), and by item why it has none."""


@dataclass
class _Beside:
    """What is kept beside a version that takes new items.

    Attributes:
        reader: of its encoders.
        left: rows that no item has taken.
        read: bytes of the journal that it has.
        seen: how long the journal was when it was last read.
    """

    reader: Reader
    left: int
    read: int = 0
    seen: int = 0


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
        self._lock = threading.Lock()
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
            NotWritable: the disk refuses.
        """
        check_items(items)
        read = [_for_reader(item) for item in items]
        with self._lock, self._journal.alone(), self._leased(model) as servables:
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
            self._journal.append(takers[0].name, items)
            for servable, found in zip(takers, embedded, strict=True):
                self._give(servable, items, found.vectors)
                beside = self._beside(servable)
                beside.read = beside.seen = self._journal.size
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
            if item[ITEM_ID] in catalogue.rows:
                raise ItemExists(f"the item '{item[ITEM_ID][:100]}' is there already.")
        catalogue.check(items)
        if len(items) > beside.left:
            raise NotPossible(
                f"version {servable.version} of '{servable.name}' has {beside.left} spare rows left, for {len(items)} "
                "items; publish a version that knows them, or one with a larger export.spare_items."
            )

    # ---- what others added -----------------------------------------------------------------------------------

    def prepare(self, servable: Servable) -> None:
        """Gives a version everything of the journal, before it takes over. What cannot be read must not keep a model
        from being served: it is logged, and tried again."""
        with self._lock:
            try:
                if _takes(servable):
                    self._catch_up(servable)
                elif missing := self._missing(servable, 0)[0]:
                    logger.error(
                        "'%s' version %d takes no new items (export.spare_items); %d of the journal are left out",
                        servable.name,
                        servable.version,
                        len(missing),
                    )
            except Exception:  # a version without new items is better than none
                logger.exception("the new items of the journal cannot be added to '%s'", servable.name)

    def start(self) -> None:
        """Looks again and again, in a thread, for what other processes added, until `close`."""
        self._thread = threading.Thread(target=self._watch, name="new-items", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def catch_up(self) -> None:
        """Gives all versions what was added to the journal since they last looked."""
        for name in self._store.names():
            with contextlib.suppress(UnknownModel), self._lock, self._leased(name) as servables:
                for servable in filter(_takes, servables):
                    try:
                        if self._beside(servable).seen != self._journal.size:
                            self._catch_up(servable)
                    except Exception:  # the other versions must not go without
                        logger.exception("looking for new items of '%s' failed; it is tried again", name)

    def _watch(self) -> None:
        while not self._stop.wait(WATCH_S):
            try:
                self.catch_up()
            except Exception:  # the thread must outlive whatever a disk or a model comes up with
                logger.exception("looking for new items failed; it is tried again")

    def _catch_up(self, servable: Servable) -> None:
        beside = self._beside(servable)
        seen = self._journal.size
        missing, end = self._missing(servable, beside.read)
        for start in range(0, len(missing), TOGETHER):
            self._replay(servable, missing[start : start + TOGETHER])
        beside.read, beside.seen = end, seen  # not before: what an error cut short is tried again

    def _missing(self, servable: Servable, start: int) -> tuple[list[Item], int]:
        """What the journal has, from a byte on, that the version does not know, and where the journal ends."""
        entries, end = self._journal.read(start)
        rows, missing = self._recommending.catalogue(servable).rows, dict[str, Item]()
        for model, item in entries:
            if model == servable.name and item[ITEM_ID] not in rows:
                missing.setdefault(item[ITEM_ID], item)
        return list(missing.values()), end

    def _replay(self, servable: Servable, items: Sequence[Item]) -> None:
        """Adds items that were accepted before; what this version cannot take is left out, and the log says so."""
        try:
            catalogue = self._recommending.catalogue(servable)
            found = self._embedded(servable, [_for_reader(item) for item in items])
            added = self._give(servable, [_fitting(catalogue, item) for item in items], found.vectors)
        except OSError:
            raise
        except Exception as error:  # of a reader; whatever it is, the other items must not suffer
            if len(items) > 1:  # those that are not at fault
                for item in items:
                    self._replay(servable, [item])
                return
            added, reason = 0, str(error)
        else:
            reason = f"it has {self._beside(servable).left} spare rows (export.spare_items), or reads nothing of them"
        if added < len(items):
            left_out = len(items) - added
            logger.error("'%s' version %d lacks %d new items: %s", servable.name, servable.version, left_out, reason)

    # ---- one version -----------------------------------------------------------------------------------------

    def _beside(self, servable: Servable) -> _Beside:
        beside = self._versions.get(servable.predictor)
        if beside is None:
            beside = _Beside(self._reader(servable.folder), servable.predictor.manifest.limits[SPARE_ITEMS])
            self._versions[servable.predictor] = beside
        return beside

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
        predictor, reader = servable.predictor, self._beside(servable).reader
        vectors, reasons = Arrays(), dict[str, list[str]]()
        for name, spec in predictor.manifest.signatures[ADD_ITEMS].inputs.items():
            if not name.startswith(EMBED):
                continue
            content = name.removeprefix(EMBED)
            vectors[content], reasons[content] = np.zeros((len(items), spec.shape[1] or 0), np.float32), []
            for start in range(0, len(items), TOGETHER):
                inputs, available, why = reader.read(content, items[start : start + TOGETHER])
                rows = start + np.flatnonzero(available)
                if len(rows):
                    vectors[content][rows] = predictor.predict(name, inputs)["embedding"]
                reasons[content] += why
        return _Embedded(vectors, reasons)

    def _give(self, servable: Servable, items: Sequence[Item], vectors: Arrays) -> int:
        """Gives embedded items their rows, and the catalogue their cells; returns how many got one."""
        inputs: dict[str, Any] = {EMBED + name: found for name, found in vectors.items()}
        inputs[ITEM_ID] = [item[ITEM_ID] for item in items]
        numbers = servable.predictor.predict(ADD_ITEMS, inputs)["number"]
        added = [item for item, number in zip(items, numbers, strict=True) if number >= 0]
        self._recommending.add_items(servable, added)
        self._beside(servable).left -= len(added)
        return len(added)


@dataclass(frozen=True)
class _Embedded:
    """Items for one version: by content their embeddings float32 `[N, D]`, 0 where there is none, and why."""

    vectors: Arrays
    reasons: Mapping[str, Sequence[str]]

    def of(self, row: int) -> list[str]:
        """The contents that an item has."""
        return [name for name, vectors in self.vectors.items() if vectors[row].any()]


def _takes(servable: Servable) -> bool:
    return ADD_ITEMS in servable.predictor.manifest.signatures


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
