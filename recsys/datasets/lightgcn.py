"""The layout in which LightGCN and much of the work on graphs share Gowalla, Yelp and Amazon-Book.

`train.txt`, `test.txt` and, where there is one, `valid.txt`: each line is a user and then every item that the user
took, whole numbers apart by spaces (He et al., LightGCN, SIGIR 2020). There are no times, so histories stand in
order of items.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from fusion.config import Settings, expand_path
from fusion.errors import DataError
from recsys.datasets.tables import items_of, names_in
from recsys.schema import IMAGE, ITEM_ID, SPLIT, USER_ID, Tables

FILES = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
"""The file of each part; only validation may be missing, and is then cut from train."""


class LightGCN:
    """Reads a folder of `train.txt`, `test.txt` and perhaps `valid.txt` as a given split."""

    class Config(Settings):
        """Where the three files are."""

        path: str
        """The folder with train.txt and test.txt; environment variables and ~ are expanded."""
        name: str = ""
        """Name of the data set in reports; empty takes the folder's."""

    @staticmethod
    def read(config: LightGCN.Config) -> Tables:
        """Reads all pairs of user and item with their part. Raises DataError for a missing file or a bad line."""
        folder = expand_path(config.path)
        there = {part: folder / name for part, name in FILES.items() if (folder / name).is_file()}
        missing = [FILES[part] for part in ("train", "test") if part not in there]
        if missing:
            held = ", ".join(names_in(folder, 8)) if folder.is_dir() else "no such folder"
            raise DataError(
                f"a LightGCN data set must have train.txt and test.txt; {missing[0]} is missing in {folder}, "
                f"which has: {held or 'nothing'}. Set data.path."
            )
        tables = [_read_lines(path).assign(**{SPLIT: part}) for part, path in there.items()]
        interactions = pd.concat(tables, ignore_index=True).astype({SPLIT: "str"})
        items = items_of(interactions)
        return Tables(items.assign(**{IMAGE: ""}), config.name or folder.resolve().name, interactions)


def _read_lines(path: Path) -> pd.DataFrame:
    """Pairs of `user_id` and `item_id` as text, in the order of the file."""
    try:
        lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be readable and hold digits and spaces only; received: {error}.") from error
    tokens = list(itertools.chain.from_iterable(lines))
    if not "".join(tokens).isdecimal():  # one look at a million ids is cheaper than a million looks
        raise _bad_line(path, lines)
    taken = np.array([max(len(line) - 1, 0) for line in lines], np.int64)
    users = np.repeat(np.array([line[0] if line else "" for line in lines], object), taken)
    items = np.fromiter(itertools.chain.from_iterable(line[1:] for line in lines), object, int(taken.sum()))
    return pd.DataFrame({USER_ID: pd.Series(users, dtype="str"), ITEM_ID: pd.Series(items, dtype="str")})


def _bad_line(path: Path, lines: list[list[str]]) -> DataError:
    for number, line in enumerate(lines, 1):
        for token in line:
            if not token.isdecimal():
                return DataError(
                    f"each line must read 'user item item ...' in whole numbers apart by spaces; {path}, line {number} "
                    f"has {token[:40]!r}. Correct the line."
                )
    return DataError(f"{path} must hold lines 'user item item ...'; it is empty. Write the file again.")
