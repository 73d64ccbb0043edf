"""Files into tables in which every cell is text and '' means nothing; numbers and times are read out of them.

Text first, because an id such as `007` or `NA` must come through as it stands, whatever the file format.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from fusion.errors import DataError
from fusion.registry import nearest
from recsys.schema import IMAGE, ITEM_ID, RATING, SPLIT, TIMESTAMP, USER_ID

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")

TimestampUnit = Literal["s", "ms", "us", "ns", "iso"]
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

_PARTS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
    "history": "history",
}  # fmt: skip


def read_table(path: Path, encoding: str = "utf-8-sig") -> pd.DataFrame:
    """Reads a CSV, TSV, JSONL or Parquet file, chosen by its suffix, as a table of text.

    Raises DataError when the file is missing, unreadable, empty, or of another kind.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise DataError(f"a table must be one of {', '.join(FORMATS)}; received {path}. Convert it first.")
    try:
        if suffix == ".parquet":
            return as_text(pd.read_parquet(path))
        if suffix == ".jsonl":
            return as_text(_read_json_lines(path, encoding))
        return read_delimited(path, "," if suffix == ".csv" else "\t", encoding)
    except FileNotFoundError:
        raise missing_file(path) from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_delimited(path: Path, separator: str, encoding: str, **options: Any) -> pd.DataFrame:
    """Reads separated values as text; `options` go to `pandas.read_csv`. Raises DataError."""
    try:
        with warnings.catch_warnings():
            # Rows longer than the header would lose their last cells with a mere warning.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                path, sep=separator, dtype=str, na_filter=False, index_col=False, encoding=encoding, **options
            )
    except FileNotFoundError:
        raise missing_file(path) from None
    except pd.errors.EmptyDataError:
        raise DataError(f"a table must have a header and rows; {path} is empty. Write the file again.") from None
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        raise _unreadable(path, error) from error
    filled: pd.DataFrame = table.fillna("")
    return filled


def missing_file(path: Path) -> DataError:
    """The error for a file that is not there, with the nearest name that is."""
    if not path.parent.is_dir():
        return DataError(f"the folder {path.parent} must exist to read {path.name} from it; it does not.")
    return DataError(f"the file {path} does not exist: {nearest(path.name, names_in(path.parent))}")


def names_in(folder: Path, at_most: int = 50) -> list[str]:
    """The first names in a folder, for hints."""
    return sorted(entry.name for entry in folder.iterdir())[:at_most]


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        reason = f"byte {error.start} is not {error.encoding}; set 'encoding' (latin-1 for old MovieLens files)"
    else:
        reason = " ".join(str(error).split())[:200].rstrip(".")
    return DataError(f"the table {path} must be readable; received: {reason}. Correct the file.")


def _read_json_lines(path: Path, encoding: str) -> pd.DataFrame:
    rows = []
    with path.open(encoding=encoding) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"each line must be one JSON object; {path}, line {number}: {error.msg}.") from None
            if not isinstance(row, dict):
                raise DataError(f"each line must be one JSON object; {path}, line {number} is not.")
            rows.append(row)
    if not rows:
        raise DataError(f"a table must have rows; {path} is empty. Write the file again.")
    return pd.DataFrame(rows, dtype=object)  # object: an integer beside a null must not become a float


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """Every column as text: whole numbers without a point, lists joined by ', ', nothing as ''."""
    return pd.DataFrame({str(name): _column_as_text(table[name]) for name in table.columns}, index=table.index)


def _column_as_text(column: pd.Series) -> pd.Series:
    if isinstance(column.dtype, pd.StringDtype):
        return column.fillna("")
    if pd.api.types.is_integer_dtype(column.dtype) and not column.hasnans:
        return column.astype("str")
    return column.astype(object).map(_cell_as_text).astype("str")


def _cell_as_text(cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, (list, tuple, np.ndarray)):
        return ", ".join(_cell_as_text(part) for part in cell)
    if cell is None or cell is pd.NA or cell is pd.NaT:
        return ""
    if isinstance(cell, (float, np.floating)):
        # Ids in a column with gaps arrive as 12.0.
        return "" if math.isnan(cell) else str(int(cell)) if float(cell).is_integer() else str(float(cell))
    if isinstance(cell, bytes):
        return cell.decode("utf-8", errors="replace")
    return str(cell)


def rename(table: pd.DataFrame, columns: Mapping[str, str], where: str) -> pd.DataFrame:
    """Gives columns our names; `columns` maps ours to theirs, and those that are not here are left out."""
    here = {ours: theirs for ours, theirs in columns.items() if theirs in table and ours != theirs}
    taken = [ours for ours in here if ours in table and ours not in columns.values()]
    if taken:
        raise DataError(
            f"a column may come from one place; {where} has '{taken[0]}' and 'columns' also makes it out of "
            f"'{here[taken[0]]}'. Take '{taken[0]}' out of 'columns'."
        )
    named: dict[str, pd.Series] = {}
    for name in table.columns:
        new = [ours for ours, theirs in here.items() if theirs == name]
        if not new or columns.get(name) == name:
            new.append(name)
        named |= dict.fromkeys(new, table[name])
    return pd.DataFrame(named, index=table.index)


def require(table: pd.DataFrame, names: Iterable[str], where: str) -> None:
    """Raises DataError with the nearest column name when one of `names` is missing from the table."""
    for name in names:
        if name not in table:
            raise DataError(
                f"{where} must have a column '{name}': {nearest(name, map(str, table.columns))} "
                f"If it has another name, say so with columns.{name}=NAME."
            )


def numbers(column: pd.Series) -> pd.Series:
    """Text as float64; what is not a number becomes NaN, for the cleaning to count."""
    values: pd.Series = pd.to_numeric(column, errors="coerce").astype(np.float64)
    return values


def seconds(column: pd.Series, unit: TimestampUnit = "s") -> pd.Series:
    """Text as whole seconds since 1970 (`Int64`, floored); what is no time becomes NA."""
    if unit == "iso":
        times = pd.to_datetime(column, errors="coerce", utc=True, format="ISO8601").dt.as_unit("s")
        return times.astype("int64").astype("Int64").mask(times.isna())
    values: pd.Series = np.floor(numbers(column) / _PER_SECOND[unit])
    return values.where(values.abs() < 2**53).astype("Int64")


def part_names(column: pd.Series, where: str) -> pd.Series:
    """`train`, `validation`, `test` out of the usual spellings (`valid`, `val`, `dev`); raises DataError."""
    known = {name: _PARTS.get(name.strip().lower()) for name in column.unique()}
    unknown = [name for name, part in known.items() if part is None]
    if unknown:
        raise DataError(
            f"the column '{SPLIT}' of {where} must hold train, validation or test in each row; "
            f"received '{unknown[0][:80]}'. Correct it, or map another column with columns.{SPLIT}=NAME."
        )
    named: pd.Series = column.map(known).astype("str")
    return named


def typed_interactions(table: pd.DataFrame, where: str, unit: TimestampUnit = "s") -> pd.DataFrame:
    """Interactions with ratings as float64, timestamps as seconds and the usual names of parts."""
    require(table, (USER_ID, ITEM_ID), where)
    typed: dict[str, pd.Series] = {}
    if RATING in table:
        typed[RATING] = numbers(table[RATING])
    if TIMESTAMP in table:
        typed[TIMESTAMP] = seconds(table[TIMESTAMP], unit)
    if SPLIT in table:
        typed[SPLIT] = part_names(table[SPLIT], where)
    return table.assign(**typed)


def items_of(interactions: pd.DataFrame) -> pd.DataFrame:
    """A catalogue without content for data that come without one: each item once, in order of id."""
    ids = np.sort(interactions[ITEM_ID].unique().astype(object))
    return pd.DataFrame({ITEM_ID: pd.Series(ids, dtype="str"), IMAGE: ""})


def comma_list(column: pd.Series) -> pd.Series:
    """`Action|Comedy` as `Action, Comedy`, and MovieLens' note that there are none as ''."""
    return column.str.replace("|", ", ", regex=False).where(column != "(no genres listed)", "")
