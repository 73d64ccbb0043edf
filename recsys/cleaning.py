"""Cleaning: rules that remove rows which cannot be used, each with a count and examples of what it removed.

Images are judged by existence, size and first bytes; what only decoding shows, a `Decode` finds out.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import pydantic

from fusion.config import Settings
from fusion.errors import DataError
from recsys.conditions import Condition
from recsys.datasets.tables import as_text, part_names, require
from recsys.decoding import Decode
from recsys.schema import (
    IMAGE,
    ITEM_ID,
    LABEL,
    PART_NAMES,
    RATING,
    SPLIT,
    TIMESTAMP,
    USER_ID,
    Dropped,
    Interactions,
    Tables,
)

ANY = "any"
"""The rule by which every interaction is positive."""

_YEAR_9999 = 253_402_300_800
_EXAMPLES = 3
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF8", b"BM")
_DELIBERATE = {"k-core", "items without interactions"}
"""Rules that a config asks for; what they remove is no fault of the data, so `strict` lets them pass."""


class CleaningSettings(Settings):
    """Which rows are kept."""

    strict: bool = False
    """Fail on the first rule that would remove a row, instead of removing and counting."""
    duplicates: Literal["keep_last", "keep_first", "keep_all"] = "keep_last"
    """Of a user's repeated interactions with an item: by time, or by order in the table if there is none."""
    duplicate_examples: Literal["keep_all", "keep_first"] = "keep_all"
    """Of several classification examples with equal text and image path: all of them, or the first."""
    min_rating: float | None = None
    """Lowest rating that is not an error."""
    max_rating: float | None = None
    """Highest rating that is not an error."""
    unknown_items: Literal["keep", "drop"] = "keep"
    """Interactions with items that the catalogue lacks: kept with an item without content, or dropped."""
    items_without_interactions: Literal["keep", "drop"] = "keep"
    """Items of the catalogue that nobody took: kept as candidates, or dropped."""
    k_core_users: int = pydantic.Field(1, ge=1)
    """Users with fewer positive interactions than this are dropped; 1 drops none."""
    k_core_items: int = pydantic.Field(1, ge=1)
    """Items with fewer positive interactions than this leave data and catalogue; 1 drops none."""
    max_id_bytes: int = pydantic.Field(256, ge=1)
    """Longest id in bytes of UTF-8."""
    max_image_bytes: int = pydantic.Field(50_000_000, ge=1)
    """Largest image file."""

    @pydantic.model_validator(mode="after")
    def _range_of_ratings(self) -> CleaningSettings:
        if self.min_rating is not None and self.max_rating is not None and self.min_rating > self.max_rating:
            raise ValueError(f"min_rating {self.min_rating} must not exceed max_rating {self.max_rating}")
        return self


def parse_positive(rule: str) -> Condition | None:
    """`any` as None, `rating >= 4` as a condition; raises ConfigError for anything else."""
    return None if rule.strip() == ANY else Condition.parse(rule)


def clean(
    tables: Tables, settings: CleaningSettings, positive: str = ANY, decode: Decode | None = None
) -> tuple[Interactions, list[Dropped]]:
    """Applies the rules to a recommendation data set and turns ids into numbers.

    Numbers follow the sorted ids and rows are sorted by user, time and item, so the order of rows in the
    source does not matter, except that duplicates without timestamps are told apart by it.

    Args:
        positive: `any`, or a condition on a column of the interactions such as `rating >= 4`.
        decode: finds images that cannot be used; without it only files and first bytes are looked at.

    Returns:
        The cleaned interactions, and one entry for each rule that removed something, in order of application.

    Raises:
        DataError: a column is missing, too little is left, or `strict` is set and a rule found something.
        ConfigError: the positive rule cannot be read.
    """
    condition = parse_positive(positive)
    if tables.interactions is None:
        raise DataError(
            f"a recommender needs interactions; the data set '{tables.name}' has labelled examples only. "
            "Set task=classification, or name a file of interactions."
        )
    log = _Log(tables.name, settings.strict)
    where = f"{tables.name}'s interactions"
    require(tables.interactions, (USER_ID, ITEM_ID), where)
    require(tables.items, (ITEM_ID,), f"{tables.name}'s items")
    catalogue = _clean_items(_with_text(tables.items, (ITEM_ID,)), settings, log, decode)
    table = _with_text(tables.interactions, (USER_ID, ITEM_ID)).reset_index(drop=True)
    positive_rows = np.ones(len(table), bool) if condition is None else condition.holds(table, where)
    rows = _Rows(table, pd.Index(catalogue[ITEM_ID]), positive_rows)
    _check_empty(log, len(tables.interactions))
    for rule in (_drop_bad_ids, _drop_bad_numbers, _drop_unknown_items, _drop_duplicates, _k_core):
        rule(rows, settings, log)
    _check_enough(rows, log, len(tables.interactions), positive)
    interactions = rows.numbered(tables, catalogue, settings, log, str(condition or ANY))
    return interactions, log.entries


class _Log:
    """Collects what each rule removed, and fails at the first fault when strict."""

    def __init__(self, name: str, strict: bool) -> None:
        self.name = name
        self.strict = strict
        self.entries: list[Dropped] = []

    def add(self, rule: str, rows: int, examples: Sequence[object] | np.ndarray) -> None:
        if rows == 0:
            return
        shown = [_short(example) for example in examples[:_EXAMPLES]]
        if self.strict and rule not in _DELIBERATE:
            raise DataError(
                f"with cleaning.strict no rule may find anything; '{rule}' found {rows:,} in '{self.name}', "
                f"such as {', '.join(shown)}. Correct the data, or set cleaning.strict=false."
            )
        self.entries.append(Dropped(rule, rows, shown))

    def worst(self) -> str:
        if not self.entries:
            return "no rule removed anything"
        worst = max(self.entries, key=lambda entry: entry.rows)
        return f"the rule '{worst.rule}' removed most, {worst.rows:,}, such as {', '.join(worst.examples)}"


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_short, value))
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text):,} characters)"


class _Rows:
    """The interactions while they are cleaned: codes into the ids seen, and which rows are still there.

    Ids are looked at once each, rows only as integers; that is what makes a million rows a matter of seconds.
    """

    def __init__(self, table: pd.DataFrame, known: pd.Index, positive: np.ndarray) -> None:
        self.table = table
        self.users, self.user_ids = _codes(table[USER_ID])
        self.items, self.item_ids = _codes(table[ITEM_ID])
        self.item_is_known = self.item_ids.isin(known)
        self.positive = positive
        self.ratings = _floats(table, RATING)
        self.timestamps = _floats(table, TIMESTAMP)
        self.kept = np.ones(len(table), bool)
        self.core_items: np.ndarray | None = None

    def drop(self, bad: np.ndarray, rule: str, log: _Log, show: Sequence[str] = (USER_ID, ITEM_ID)) -> None:
        """Removes the rows `bad` (bool `[N]`) that are still there, and counts them."""
        bad = bad & self.kept
        count = int(bad.sum())
        first = self.table[list(show)].iloc[np.flatnonzero(bad)[:_EXAMPLES]]
        log.add(rule, count, [tuple(row) for row in first.to_numpy(object)])
        self.kept &= ~bad

    def numbered(
        self,
        tables: Tables,
        catalogue: pd.DataFrame,
        settings: CleaningSettings,
        log: _Log,
        positive_rule: str,
    ) -> Interactions:
        rows = np.flatnonzero(self.kept)
        user_ids = np.sort(self.user_ids[np.unique(self.users[rows])].to_numpy(object))
        content = _catalogue(catalogue, self, rows, settings, log)
        item_ids = content[ITEM_ID].to_numpy(object)
        users = pd.Index(user_ids).get_indexer(self.user_ids)[self.users[rows]].astype(np.int32)
        items = pd.Index(item_ids).get_indexer(self.item_ids)[self.items[rows]].astype(np.int32)
        given = _given_split(self.table.iloc[rows], f"{tables.name}'s interactions")
        keys = [items, users] if self.timestamps is None else [items, self.timestamps[rows], users]
        tie = [np.nan_to_num(self.ratings[rows])] if self.ratings is not None else []
        order = np.lexsort([*tie, *keys])
        rows = rows[order]
        return Interactions(
            name=tables.name,
            user_ids=user_ids,
            item_ids=item_ids,
            users=users[order],
            items=items[order],
            positive=self.positive[rows],
            timestamps=None if self.timestamps is None else self.timestamps[rows].astype(np.int64),
            ratings=None if self.ratings is None else self.ratings[rows].astype(np.float32),
            catalogue=content,
            given_split=None if given is None else given[order],
            positive_rule=positive_rule,
            notes=tuple(tables.notes),
        )


def _with_text(table: pd.DataFrame, always: Sequence[str]) -> pd.DataFrame:
    """The columns `always` and all of text or objects as text with '' for nothing; images stay as they are."""
    loose = [name for name in table if name != IMAGE and pd.api.types.is_string_dtype(table[name].dtype)]
    names = list(dict.fromkeys([*always, *loose]))
    return table.assign(**{str(name): column for name, column in as_text(table[names]).items()})


def _codes(column: pd.Series) -> tuple[np.ndarray, pd.Index]:
    """Codes into the distinct ids; a missing id is ''."""
    codes, ids = pd.factorize(column)
    return codes, pd.Index(ids, dtype=object)


def _floats(table: pd.DataFrame, column: str) -> np.ndarray | None:
    if column not in table:
        return None
    return pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64, na_value=np.nan)


def _id_faults(ids: pd.Index, max_bytes: int) -> dict[str, np.ndarray]:
    """Which ids are missing, too long, or hold characters that no id may hold; bool over `ids`."""
    missing = np.array([not external_id for external_id in ids], bool)
    sizes = np.array([len(external_id.encode("utf-8", "replace")) for external_id in ids], np.int64)
    too_long = sizes > max_bytes
    control = np.array([_has_control(external_id) for external_id in ids], bool)
    return {
        "missing": missing,
        f"longer than {max_bytes} bytes": too_long,
        "with NUL or control characters": control & ~too_long,
    }


def _has_control(external_id: str) -> bool:
    """Control characters (Cc) and lone surrogates (Cs) do not survive JSON, CSV and gRPC."""
    return not external_id.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in external_id)


def _clean_items(items: pd.DataFrame, settings: CleaningSettings, log: _Log, decode: Decode | None) -> pd.DataFrame:
    codes, ids = _codes(items[ITEM_ID])
    kept = np.ones(len(items), bool)
    for fault, bad_ids in _id_faults(ids, settings.max_id_bytes).items():
        bad = bad_ids[codes] & kept
        log.add(f"items: ids {fault}", int(bad.sum()), items[ITEM_ID].to_numpy(object)[bad])
        kept &= ~bad
    again = items[ITEM_ID].duplicated().to_numpy() & kept
    log.add("items: ids that stand twice", int(again.sum()), items[ITEM_ID].to_numpy(object)[again])
    catalogue = items[kept & ~again].reset_index(drop=True)
    if IMAGE not in catalogue:
        catalogue[IMAGE] = ""
    return _clean_images(catalogue, settings, log, decode)


def _clean_images(table: pd.DataFrame, settings: CleaningSettings, log: _Log, decode: Decode | None) -> pd.DataFrame:
    """Turns images that cannot be used into '' (the modality is missing); the rows stay."""
    images = table[IMAGE].to_numpy(object)
    largest = settings.max_image_bytes
    faults = [_image_fault(image, largest) if isinstance(image, str) else "" for image in images]
    if decode:
        passed = [image if not fault else "" for image, fault in zip(images, faults, strict=True)]
        faults = [before or after for before, after in zip(faults, decode(passed), strict=True)]
    cleaned = [image if not fault else "" for image, fault in zip(images, faults, strict=True)]
    found = np.array(faults, dtype=object)
    for fault in sorted(set(faults) - {""}):
        log.add(f"images: {fault}", int((found == fault).sum()), images[found == fault])
    return table.assign(**{IMAGE: pd.Series(cleaned, index=table.index, dtype=object)})


def _image_fault(path: str, max_bytes: int) -> str:
    if not path:
        return ""
    try:
        if os.stat(path).st_size > max_bytes:
            return f"larger than {max_bytes:,} bytes"
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return "missing or unreadable"
    known = start.startswith(_SIGNATURES) and (not start.startswith(b"RIFF") or start[8:12] == b"WEBP")
    return "" if known else "not a JPEG, PNG, WebP, GIF or BMP file"


def _drop_bad_ids(rows: _Rows, settings: CleaningSettings, log: _Log) -> None:
    for who, column, codes, ids in (
        ("user", USER_ID, rows.users, rows.user_ids),
        ("item", ITEM_ID, rows.items, rows.item_ids),
    ):
        for fault, bad in _id_faults(ids, settings.max_id_bytes).items():
            rows.drop(bad[codes], f"{who} ids {fault}", log, (column,))


def _drop_bad_numbers(rows: _Rows, settings: CleaningSettings, log: _Log) -> None:
    if rows.ratings is not None:
        shown = (USER_ID, ITEM_ID, RATING)
        rows.drop(~np.isfinite(rows.ratings), "ratings that are not finite numbers", log, shown)
        low = -np.inf if settings.min_rating is None else settings.min_rating
        high = np.inf if settings.max_rating is None else settings.max_rating
        outside = (rows.ratings < low) | (rows.ratings > high)
        rows.drop(outside, "ratings out of range", log, shown)
    if rows.timestamps is not None:
        bad = ~(np.abs(rows.timestamps) < _YEAR_9999)  # so written that NaN is bad
        rule = "timestamps that are no seconds before the year 10000"
        rows.drop(bad, rule, log, (USER_ID, ITEM_ID, TIMESTAMP))


def _drop_unknown_items(rows: _Rows, settings: CleaningSettings, log: _Log) -> None:
    if settings.unknown_items == "drop":
        rows.drop(~rows.item_is_known[rows.items], "items that the catalogue lacks", log)


def _drop_duplicates(rows: _Rows, settings: CleaningSettings, log: _Log) -> None:
    if settings.duplicates == "keep_all":
        return
    here = np.flatnonzero(rows.kept)
    if rows.timestamps is not None:
        # Ratings settle equal times, so that the source's order of rows does not.
        ratings = np.zeros(len(here)) if rows.ratings is None else rows.ratings[here]
        here = here[np.lexsort([ratings, rows.timestamps[here]])]
    pairs = rows.users[here].astype(np.int64) * len(rows.item_ids) + rows.items[here]
    keep: Literal["first", "last"] = "last" if settings.duplicates == "keep_last" else "first"
    again = pd.Series(pairs).duplicated(keep=keep).to_numpy()
    bad = np.zeros(len(rows.kept), bool)
    bad[here[again]] = True
    rows.drop(bad, "repeated interactions of a user with an item", log)


def _k_core(rows: _Rows, settings: CleaningSettings, log: _Log) -> None:
    """Drops users and items with too few positive pairs, again and again until none is left."""
    if settings.k_core_users <= 1 and settings.k_core_items <= 1:
        return
    taught = np.flatnonzero(rows.kept & rows.positive)
    pairs = np.unique(rows.users[taught].astype(np.int64) * len(rows.item_ids) + rows.items[taught])
    users, items = np.divmod(pairs, len(rows.item_ids))
    while True:
        user_is_core = np.bincount(users, minlength=len(rows.user_ids)) >= settings.k_core_users
        item_is_core = np.bincount(items, minlength=len(rows.item_ids)) >= settings.k_core_items
        if settings.k_core_users <= 1:
            user_is_core[:] = True
        if settings.k_core_items <= 1:
            item_is_core[:] = True
        stay = user_is_core[users] & item_is_core[items]
        if stay.all():
            break
        users, items = users[stay], items[stay]
    rows.drop(~(user_is_core[rows.users] & item_is_core[rows.items]), "k-core", log)
    rows.core_items = item_is_core if settings.k_core_items > 1 else None


def _catalogue(
    items: pd.DataFrame, rows: _Rows, kept: np.ndarray, settings: CleaningSettings, log: _Log
) -> pd.DataFrame:
    """One row per item, sorted by id: those of the table, and empty ones for taken items that it lacks."""
    taken = rows.item_ids[np.unique(rows.items[kept])]
    if settings.items_without_interactions == "drop" or rows.core_items is not None:
        unused = ~items[ITEM_ID].isin(taken).to_numpy()
        rule = "items without interactions" if rows.core_items is None else "k-core"
        if rule != "k-core":
            log.add(rule, int(unused.sum()), items[ITEM_ID].to_numpy(object)[unused])
        items = items[~unused]
    lacking = taken.difference(pd.Index(items[ITEM_ID], dtype=object), sort=False)
    if len(lacking):
        extra = pd.DataFrame({ITEM_ID: pd.Series(lacking, dtype="str")})
        extra[IMAGE] = pd.Series([""] * len(lacking), dtype=object)
        items = pd.concat([items, extra], ignore_index=True)
        texts = [name for name in items.columns if isinstance(items[name].dtype, pd.StringDtype)]
        items[texts] = items[texts].fillna("")
    order = np.argsort(items[ITEM_ID].to_numpy(object), kind="stable")
    return items.iloc[order].reset_index(drop=True)


def _given_split(table: pd.DataFrame, where: str) -> np.ndarray | None:
    """The split that the data give, as parts int8 `[N]`."""
    if SPLIT not in table:
        return None
    numbers = {name: number for number, name in enumerate(PART_NAMES)}
    return part_names(table[SPLIT], where).map(numbers).to_numpy(np.int8)


def _check_empty(log: _Log, before: int) -> None:
    if before == 0:
        raise DataError(f"a data set must have interactions; '{log.name}' has none. Check the files and data.where.")


def _check_enough(rows: _Rows, log: _Log, before: int, positive: str) -> None:
    kept = rows.kept
    if not (kept & rows.positive).any():
        why = f"'{positive}' calls none of them positive" if kept.any() else log.worst()
        raise DataError(
            f"positive interactions must remain after cleaning; of {before:,} rows of '{log.name}', "
            f"{int(kept.sum()):,} remain and {why}. Check the columns and "
            "the settings under 'cleaning' and 'positive'."
        )
    for what, codes, ids in (("user", rows.users, rows.user_ids), ("item", rows.items, rows.item_ids)):
        left = np.unique(codes[kept])
        if len(left) < 2:
            raise DataError(
                f"at least two {what}s must remain after cleaning; '{log.name}' has one, "
                f"{_short(ids[left[0]])}, in {int(kept.sum()):,} of {before:,} rows ({log.worst()}). "
                f"Check columns.{what}_id and 'cleaning'."
            )


def clean_examples(
    tables: Tables, settings: CleaningSettings, decode: Decode | None = None
) -> tuple[pd.DataFrame, list[Dropped]]:
    """Applies the rules to a classification data set; rows keep their order. `decode` as in `clean`.

    Returns:
        The table with `label` as text, and one entry for each rule that removed something.

    Raises:
        DataError: the label column is missing, fewer than two classes are left, or `strict` is set and a rule
            found something.
    """
    log = _Log(tables.name, settings.strict)
    require(tables.items, (LABEL,), f"{tables.name}'s examples")
    table = _with_text(tables.items, (LABEL,)).reset_index(drop=True)
    if IMAGE not in table:
        table = table.assign(**{IMAGE: ""})
    table = _clean_images(table, settings, log, decode)
    table = _drop_examples(table, table[LABEL].str.strip() == "", "empty labels", log)
    table = _drop_examples(table, _without_content(table), "examples without text and image", log)
    if settings.duplicate_examples == "keep_first":
        table = _drop_examples(table, _content(table).duplicated(), "repeated examples", log)
    classes = table[LABEL].nunique()
    if classes < 2:
        raise DataError(
            f"at least two classes must remain after cleaning; of {len(tables.items):,} rows of "
            f"'{tables.name}', {len(table):,} remain with {classes} class{'es' * (classes != 1)} "
            f"({log.worst()}). Check the column '{LABEL}'."
        )
    return table, log.entries


def _drop_examples(table: pd.DataFrame, bad: pd.Series, rule: str, log: _Log) -> pd.DataFrame:
    labels = table.loc[bad, LABEL].head(_EXAMPLES)
    log.add(rule, int(bad.sum()), [f"row {row}, label {label!r}" for row, label in labels.items()])
    return table[~bad].reset_index(drop=True)


def _content(table: pd.DataFrame) -> pd.DataFrame:
    """Text columns and images as text; arrays of pixels by their bytes."""
    content = table.drop(columns=[name for name in (LABEL, SPLIT) if name in table])
    pixels = table[IMAGE].map(lambda image: image if isinstance(image, str) else image.tobytes().hex())
    return content.assign(**{IMAGE: pixels.astype("str")})


def _without_content(table: pd.DataFrame) -> pd.Series:
    other = (LABEL, SPLIT, IMAGE)
    texts = [name for name in table if name not in other and isinstance(table[name].dtype, pd.StringDtype)]
    empty = table[IMAGE].map(lambda image: isinstance(image, str) and not image).astype(bool)
    for name in texts:
        empty &= table[name].fillna("").str.strip() == ""
    return empty
