"""Conditions such as `rating >= 4` on the columns of a table: parsed and compared, never executed."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fusion.errors import ConfigError, DataError
from fusion.registry import nearest

_FORM = re.compile(
    r"""\s*(?P<column>[^<>=!'"&|]+?)\s*(?P<sign>==|!=|>=|<=|>|<)\s*"""
    r"""(?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<bare>[^<>=!'"&|\s]+))\s*"""
)
_SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq, "!=": operator.ne,
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """One comparison of a column with a constant.

    A bare number is compared as a number, anything else and everything in quotes as text; text with spaces
    needs quotes. Cells that are not numbers meet no numeric condition except `!=`.

    >>> Condition.parse("rating >= 4").holds(pd.DataFrame({"rating": [3.5, 4.0]}), "interactions").tolist()
    [False, True]
    """

    column: str
    sign: str
    value: str | float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Reads `column sign value`; raises ConfigError for anything else."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"a condition must read 'column sign value' with one of {' '.join(_SIGNS)}, as in "
                f"rating >= 4 or genre == 'Film Noir'; received {text!r}."
            )
        quoted = match["single"] if match["single"] is not None else match["double"]
        return cls(match["column"], match["sign"], _constant(match["bare"]) if quoted is None else quoted)

    def __str__(self) -> str:
        if isinstance(self.value, str):
            return f"{self.column} {self.sign} '{self.value}'"
        return f"{self.column} {self.sign} {int(self.value) if self.value.is_integer() else self.value}"

    def holds(self, table: pd.DataFrame, where: str) -> np.ndarray:
        """Where the condition is met, bool `[N]`; raises DataError when `where` has no such column."""
        if self.column not in table:
            raise DataError(
                f"the condition '{self}' needs a column '{self.column}' in {where}: "
                f"{nearest(self.column, map(str, table.columns))}"
            )
        cells = table[self.column]
        if isinstance(self.value, float):
            numbers = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64, na_value=np.nan)
            return np.asarray(_SIGNS[self.sign](numbers, self.value))
        return np.asarray(_SIGNS[self.sign](cells.astype(str).to_numpy(object), self.value), bool)


def _constant(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
