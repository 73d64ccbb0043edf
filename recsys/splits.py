"""Splits into train, validation and test, and the manifest by which all members share one.

Which interactions go where depends on ids, times and the seed only, never on the order of rows in a file.
Where two have the same time, a seeded hash of user, item and time decides; it decides everything where time
does not enter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pydantic

from fusion.config import Settings
from fusion.errors import ConfigError, DataError, GateError
from recsys.schema import HISTORY, IMAGE, PART_NAMES, SPLIT, TEST, TRAIN, VALIDATION, Interactions

Strategy = Literal[
    "temporal_global",
    "temporal_per_user",
    "leave_last_out",
    "user_holdout",
    "item_holdout",
    "random",
    "stratified",
    "given",
]
_FOR_EXAMPLES = ("stratified", "random", "given")


class SplitSettings(Settings):
    """How rows are divided."""

    strategy: Strategy = "temporal_global"
    """How rows are divided; `stratified` is for classification, which takes `random` and `given` as well."""
    validation: float = pydantic.Field(0.1, gt=0, lt=1)
    """Share of validation: of rows, of each user's rows, of users or of items, as the strategy counts."""
    test: float = pydantic.Field(0.1, gt=0, lt=1)
    """Share of test, counted in the same way."""
    history: float = pydantic.Field(0.8, gt=0, lt=1)
    """For user_holdout: share of a held-out user's interactions that are known when answering."""
    history_items: int | None = pydantic.Field(None, ge=1)
    """For user_holdout, in place of `history`: so many of a held-out user's first positives are known when answering
    (three clicks of somebody new), and all later ones are asked for."""
    seed: int = pydantic.Field(0, ge=0)
    """Seed of all that is decided by chance, ties in time included."""

    @pydantic.model_validator(mode="after")
    def _something_to_train_on(self) -> SplitSettings:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test must be below 1; received {self.validation} + {self.test}")
        return self


def split(interactions: Interactions, settings: SplitSettings) -> np.ndarray:
    """The part of each interaction, int8 `[N]` with TRAIN, VALIDATION, TEST and HISTORY.

    * `temporal_global`: the last rows in time are test, those before them validation.
    * `temporal_per_user`, `random`: of each user's positives the last (or a randomly chosen) share, rounded
      down but at least one, as RecBole counts; users with fewer than three positives stay in train.
    * `leave_last_out`: each user's last positive is test, the one before validation; the same exception.
    * `user_holdout`: some users are held out; their earlier interactions (a share, or a number) are HISTORY, the later
      the target.
    * `item_holdout`: all interactions of some items are test, those of some others validation.
    * `given`: as the data say; without a validation part each user's last (without times: randomly chosen)
      positives in train become one.

    A row that is not positive goes with the positive before it, so that nothing later is known earlier.

    Raises:
        DataError: the strategy needs timestamps or a given split that are not there, or a part would have no
            positive interaction.
        ConfigError: the strategy is for classification only.
    """
    if settings.strategy not in _STRATEGIES:
        raise ConfigError(
            f"split.strategy must be one of {', '.join(_STRATEGIES)} for recommendation; received "
            f"'{settings.strategy}', which is for classification."
        )
    parts = _STRATEGIES[settings.strategy](interactions, settings)
    counts = np.bincount(parts[interactions.positive], minlength=len(PART_NAMES))
    _refuse_empty(counts, settings, f"{len(interactions.user_ids):,} users and {len(parts):,} interactions")
    return parts


def _refuse_empty(counts: np.ndarray, settings: SplitSettings, of_what: str) -> None:
    for part in (TRAIN, VALIDATION, TEST):
        if counts[part] == 0:
            raise DataError(
                f"train, validation and test must each have a row to learn or be measured on; the split "
                f"'{settings.strategy}' of {of_what} leaves {PART_NAMES[part]} without any. "
                "Change split.strategy, split.validation or split.test, or keep more rows when cleaning."
            )


def _times(interactions: Interactions, settings: SplitSettings) -> np.ndarray:
    if interactions.timestamps is None:
        raise DataError(
            f"split.strategy={settings.strategy} needs timestamps, which '{interactions.name}' has not. "
            "Map them with columns.timestamp=NAME, or use split.strategy=random."
        )
    return interactions.timestamps


def _row_hash(interactions: Interactions, seed: int) -> np.ndarray:
    """A seeded hash of user id, item id and time, uint64 `[N]`; the same whatever else is in the data set."""
    users = _id_hash(interactions.user_ids, seed, "user")[interactions.users]
    items = _id_hash(interactions.item_ids, seed, "item")[interactions.items]
    hashed = _mix(users ^ _mix(items))
    if interactions.timestamps is None:
        return hashed
    return _mix(hashed ^ _mix(interactions.timestamps.astype(np.uint64)))


def _id_hash(ids: np.ndarray, seed: int, salt: str) -> np.ndarray:
    salted = np.uint64(int.from_bytes(hashlib.sha256(f"{salt}/{seed}".encode()).digest()[:8], "little"))
    return _mix(pd.util.hash_array(np.asarray(ids, object), categorize=False) ^ salted)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of the input reaches every bit."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _temporal_global(interactions: Interactions, settings: SplitSettings) -> np.ndarray:
    order = np.lexsort([_row_hash(interactions, settings.seed), _times(interactions, settings)])
    n_test, n_validation = (round(len(order) * share) for share in (settings.test, settings.validation))
    parts = np.full(len(order), TRAIN, np.int8)
    parts[order[len(order) - n_test :]] = TEST
    parts[order[len(order) - n_test - n_validation : len(order) - n_test]] = VALIDATION
    return parts


@dataclass(frozen=True)
class _Ranks:
    """Where each row stands among its user's positives.

    Attributes:
        rank: int64 `[N]`; 0 is the user's first positive. Rows that are not positive have the rank of the
            positive before them, -1 where there is none.
        totals: int64 `[U]`, positives per user.
        from_end: int64 `[N]`; 0 is the user's last positive and what follows it.
    """

    rank: np.ndarray
    totals: np.ndarray
    from_end: np.ndarray


def _ranks(interactions: Interactions, times: np.ndarray | None, seed: int, of: np.ndarray | None = None) -> _Ranks:
    """Ranks by time, or by chance where there is none, among the rows `of` (bool `[N]`, all by default)."""
    rows = np.arange(len(interactions.users)) if of is None else np.flatnonzero(of)
    users = interactions.users[rows]
    keys = [_row_hash(interactions, seed)[rows], *([] if times is None else [times[rows]]), users]
    order = np.lexsort(keys)
    positive = interactions.positive[rows]
    totals = np.bincount(users[positive], minlength=len(interactions.user_ids))
    before_user = np.concatenate([[0], np.cumsum(totals)[:-1]])
    rank = np.full(len(interactions.users), -1, np.int64)
    rank[rows[order]] = np.cumsum(positive[order]) - before_user[users[order]] - 1
    return _Ranks(rank, totals, totals[interactions.users] - 1 - rank)


def _cut(interactions: Interactions, ranks: _Ranks, n_validation: np.ndarray, n_test: np.ndarray) -> np.ndarray:
    """Each user's last positives as test, those before as validation; counts int `[U]`."""
    users, ranked = interactions.users, ranks.rank >= 0
    parts = np.full(len(users), TRAIN, np.int8)
    parts[ranked & (ranks.from_end < (n_test + n_validation)[users])] = VALIDATION
    parts[ranked & (ranks.from_end < n_test[users])] = TEST
    return parts


def _shares(totals: np.ndarray, share: float) -> np.ndarray:
    """The share of each total, rounded down but at least one; none where the total is below three."""
    # 0.1 * 30 is 3.0000000000000004 and 0.29 * 100 is 28.999999999999996: the margin absorbs both.
    return np.where(totals >= 3, np.maximum(1, np.floor(totals * share + 1e-9)), 0).astype(np.int64)


def _temporal_per_user(interactions: Interactions, settings: SplitSettings) -> np.ndarray:
    ranks = _ranks(interactions, _times(interactions, settings), settings.seed)
    return _cut(interactions, ranks, _shares(ranks.totals, settings.validation), _shares(ranks.totals, settings.test))


def _random(interactions: Interactions, settings: SplitSettings) -> np.ndarray:
    ranks = _ranks(interactions, None, settings.seed)
    return _cut(interactions, ranks, _shares(ranks.totals, settings.validation), _shares(ranks.totals, settings.test))


def _leave_last_out(interactions: Interactions, settings: SplitSettings) -> np.ndarray:
    ranks = _ranks(interactions, _times(interactions, settings), settings.seed)
    one = (ranks.totals >= 3).astype(np.int64)
    return _cut(interactions, ranks, one, one)


def _held_out(ids: np.ndarray, eligible: np.ndarray, settings: SplitSettings, salt: str) -> np.ndarray:
    """A part for each of `ids`, int8: shares of the eligible ones (bool), chosen by a hash of seed and id."""
    order = np.argsort(_id_hash(ids, settings.seed, f"hold out {salt}"), kind="stable")
    order = order[eligible[order]]
    n_test, n_validation = (round(len(order) * share) for share in (settings.test, settings.validation))
    parts = np.full(len(ids), TRAIN, np.int8)
    parts[order[:n_test]] = TEST
    parts[order[n_test : n_test + n_validation]] = VALIDATION
    return parts


def _user_holdout(interactions: Interactions, settings: SplitSettings) -> np.ndarray:
    ranks = _ranks(interactions, interactions.timestamps, settings.seed)
    # A user needs one positive (or as many as are asked for) to be known by, and one to be asked for.
    of_user = _held_out(interactions.user_ids, ranks.totals > (settings.history_items or 1), settings, "users")
    if settings.history_items:
        targets = ranks.totals - settings.history_items
    else:
        targets = np.maximum(1, np.floor(ranks.totals * (1 - settings.history) + 1e-9)).astype(np.int64)
    parts: np.ndarray = of_user[interactions.users]
    is_target = (ranks.rank >= 0) & (ranks.from_end < targets[interactions.users])
    parts[(parts != TRAIN) & ~is_target] = HISTORY
    return parts


def _item_holdout(interactions: Interactions, settings: SplitSettings) -> np.ndarray:
    taken = np.bincount(interactions.items[interactions.positive], minlength=len(interactions.item_ids)) > 0
    of_item = _held_out(interactions.item_ids, taken, settings, "items")
    parts: np.ndarray = of_item[interactions.items]
    return parts


def _given(interactions: Interactions, settings: SplitSettings) -> np.ndarray:
    given = interactions.given_split
    if given is None:
        raise DataError(
            f"split.strategy=given needs a split in the data, which '{interactions.name}' has not. "
            "Map it with columns.split=NAME, files by part or data.fold, or use another strategy."
        )
    parts = given.astype(np.int8)
    if not (parts == VALIDATION).any():
        train = parts == TRAIN
        ranks = _ranks(interactions, interactions.timestamps, settings.seed, of=train)
        none = np.zeros(len(ranks.totals), np.int64)
        cut = _cut(interactions, ranks, _shares(ranks.totals, settings.validation), none)
        parts[train] = cut[train]
    return parts


_STRATEGIES: dict[str, Callable[[Interactions, SplitSettings], np.ndarray]] = {
    "temporal_global": _temporal_global,
    "temporal_per_user": _temporal_per_user,
    "leave_last_out": _leave_last_out,
    "user_holdout": _user_holdout,
    "item_holdout": _item_holdout,
    "random": _random,
    "given": _given,
}


def split_examples(
    labels: Sequence[str] | np.ndarray, given: Sequence[str] | None, settings: SplitSettings
) -> np.ndarray:
    """The part of each classification example, int8 `[N]` with TRAIN, VALIDATION and TEST.

    `stratified` gives each class the same shares (rounded down, at least one each; classes with fewer than
    three examples stay in train), `random` ignores classes, `given` takes the data's own and, without a
    validation part, cuts a stratified one from train. Examples have no ids, so chance follows their order.

    Args:
        labels: `[N]`.
        given: the column `split` of the cleaned table with the names of parts, or None.

    Raises:
        DataError: a part would be empty, or `given` is asked for and not there.
        ConfigError: the strategy is for recommendation only.
    """
    if settings.strategy not in _FOR_EXAMPLES:
        raise ConfigError(
            f"split.strategy must be one of {', '.join(_FOR_EXAMPLES)} for classification; received "
            f"'{settings.strategy}', which is for recommendation."
        )
    codes = pd.factorize(np.asarray(labels, object), sort=True)[0]
    everything = np.ones(len(codes), bool)
    if settings.strategy == "given":
        parts = _given_examples(codes, given, settings)
    elif settings.strategy == "stratified":
        parts = _cut_examples(codes, everything, settings, settings.test)
    else:
        parts = _cut_examples(np.zeros(len(codes), np.int64), everything, settings, settings.test)
    _refuse_empty(np.bincount(parts, minlength=len(PART_NAMES)), settings, f"{len(parts):,} examples")
    return parts


def _given_examples(codes: np.ndarray, given: Sequence[str] | None, settings: SplitSettings) -> np.ndarray:
    if given is None:
        raise DataError(
            f"split.strategy=given needs a column '{SPLIT}' or files by part; the data have neither. "
            "Map it with columns.split=NAME, or use split.strategy=stratified."
        )
    parts = np.array([PART_NAMES.index(name) for name in given], np.int8)
    if not (parts == VALIDATION).any():
        train = parts == TRAIN
        parts[train] = _cut_examples(codes, train, settings, 0.0)[train]
    return parts


def _cut_examples(strata: np.ndarray, of: np.ndarray, settings: SplitSettings, test: float) -> np.ndarray:
    """Shares of each stratum (int `[N]`) among the rows `of` (bool `[N]`), drawn by chance."""
    rows = np.flatnonzero(of)
    rows = np.random.default_rng(settings.seed).permutation(rows)
    rows = rows[np.argsort(strata[rows], kind="stable")]
    totals = np.bincount(strata[rows], minlength=int(strata.max(initial=0)) + 1)
    n_test = _shares(totals, test) if test else np.zeros_like(totals)
    n_validation = _shares(totals, settings.validation)
    place = np.arange(len(rows)) - np.concatenate([[0], np.cumsum(totals)[:-1]])[strata[rows]]
    parts = np.full(len(strata), TRAIN, np.int8)
    parts[rows[place < (n_test + n_validation)[strata[rows]]]] = VALIDATION
    parts[rows[place < n_test[strata[rows]]]] = TEST
    return parts


@dataclass(frozen=True)
class SplitManifest:
    """One split, kept on the disk and shared by all members.

    Attributes:
        strategy: its name.
        settings: all settings, as in the config.
        counts: rows by name of part.
        sha256: of the rows and their parts, whatever their order in memory or in a file.
        parts: int8 `[N]` in the order of the cleaned rows.
    """

    strategy: str
    settings: Mapping[str, Any]
    counts: Mapping[str, int]
    sha256: str
    parts: np.ndarray

    @classmethod
    def of(cls, interactions: Interactions, parts: np.ndarray, settings: SplitSettings) -> SplitManifest:
        """The manifest of a recommendation split."""
        return cls._made(parts, settings, hash_interactions(interactions, parts))

    @classmethod
    def of_examples(cls, table: pd.DataFrame, parts: np.ndarray, settings: SplitSettings) -> SplitManifest:
        """The manifest of a classification split."""
        return cls._made(parts, settings, hash_examples(table, parts))

    @classmethod
    def _made(cls, parts: np.ndarray, settings: SplitSettings, sha256: str) -> SplitManifest:
        counts = np.bincount(parts, minlength=len(PART_NAMES)).tolist()
        by_name = dict(zip(PART_NAMES, counts, strict=True))
        return cls(settings.strategy, settings.model_dump(), by_name, sha256, parts)

    def save(self, directory: Path) -> None:
        """Writes `split.json` and `split.npz` into an existing directory."""
        described = {
            "strategy": self.strategy,
            "settings": dict(self.settings),
            "counts": dict(self.counts),
            "sha256": self.sha256,
        }
        np.savez_compressed(directory / "split.npz", parts=self.parts)
        (directory / "split.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> SplitManifest:
        """Reads what `save` wrote. Raises DataError if it is unreadable, GateError if counts differ."""
        try:
            described = json.loads((directory / "split.json").read_text(encoding="utf-8"))
            with np.load(directory / "split.npz", allow_pickle=False) as arrays:
                parts = arrays["parts"].astype(np.int8)
            manifest = cls(**described, parts=parts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"the split in {directory} must be readable: {error}. Make it anew with --fresh."
            ) from error
        counts = np.bincount(parts, minlength=len(PART_NAMES)).tolist()
        if counts != [manifest.counts.get(name) for name in PART_NAMES]:
            raise GateError(
                f"split.npz and split.json in {directory} must belong together; they count differently. "
                "Make the split anew with --fresh."
            )
        return manifest

    def verify(self, rows: Interactions | pd.DataFrame) -> None:
        """Raises GateError unless these interactions, or examples, are the rows that were split."""
        length = len(rows.users) if isinstance(rows, Interactions) else len(rows)
        if length == len(self.parts):
            hashed = hash_interactions if isinstance(rows, Interactions) else hash_examples
            if hashed(rows, self.parts) == self.sha256:  # type: ignore[arg-type]
                return
        raise GateError(
            f"the data must be those that were split; {length:,} rows do not give the split's hash "
            f"{self.sha256[:12]} of {len(self.parts):,} rows. Restore the data, or start anew with --fresh."
        )


def hash_interactions(interactions: Interactions, parts: np.ndarray) -> str:
    """SHA-256 (hex) of (user id, item id, timestamp, part) of every row, in an order of their own."""
    digest = hashlib.sha256()
    columns = []
    of_users, of_items = (
        (interactions.user_ids, interactions.users),
        (interactions.item_ids, interactions.items),
    )
    for ids, numbers in (of_users, of_items):
        present, places = np.unique(numbers, return_inverse=True)
        names = ids[present]
        order = np.argsort(names)
        digest.update(json.dumps(names[order].tolist()).encode())
        columns.append(np.argsort(order)[places])
    if interactions.timestamps is not None:
        columns.append(interactions.timestamps)
    rows = np.stack([*columns, parts.astype(np.int64)], axis=1).astype("<i8")
    digest.update(np.ascontiguousarray(rows[np.lexsort(rows.T)]).tobytes())
    return digest.hexdigest()


def hash_examples(table: pd.DataFrame, parts: np.ndarray) -> str:
    """SHA-256 (hex) of the content and part of every example, in an order of their own.

    Images count by their file's name or their pixels, not by where the data set lies.
    """
    columns = sorted(name for name in table.columns if name != SPLIT)
    rows = zip(parts.tolist(), *(_identity(table[name]) for name in columns), strict=True)
    digests = sorted(_digest(row) for row in rows)
    return hashlib.sha256(json.dumps(columns).encode() + b"".join(digests)).hexdigest()


def _identity(column: pd.Series) -> pd.Series:
    if column.name != IMAGE:
        return column
    return column.map(lambda image: image.rpartition("/")[2] if isinstance(image, str) else image)


def _digest(row: tuple[Any, ...]) -> bytes:
    cells = [_cell(cell) for cell in row]
    return hashlib.sha256(b"".join(len(cell).to_bytes(8, "little") + cell for cell in cells)).digest()


def _cell(cell: Any) -> bytes:
    if isinstance(cell, np.ndarray):
        return str(cell.shape).encode() + cell.tobytes()
    return str(cell).encode("utf-8", "replace")
