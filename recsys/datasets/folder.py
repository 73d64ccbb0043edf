"""The house's own format: a data set is a folder of tables and images, mapped to our names by config alone.

The README of this project describes the format; `recsys.datasets.planted.write_folder` writes an example.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pandas as pd
import pydantic

from fusion.config import Settings, expand_path
from fusion.errors import ConfigError, DataError
from fusion.registry import nearest
from recsys.conditions import Condition
from recsys.datasets import images
from recsys.datasets.tables import (
    FORMATS,
    TimestampUnit,
    items_of,
    names_in,
    part_names,
    read_table,
    rename,
    require,
    typed_interactions,
)
from recsys.schema import IMAGE, ITEM_ID, LABEL, SPLIT, Tables

Part = Literal["train", "validation", "test"]
FileNames = str | list[str]
FileSet = FileNames | dict[Part, FileNames]
Conditions = str | list[str]


class Files(Settings):
    """Which files hold what; a list is read one after the other, a mapping gives each file's part."""

    interactions: FileSet | None = None
    """Interactions: a file, several, or one for each of train, validation and test."""
    items: FileNames | None = None
    """The catalogue with text columns and images."""
    examples: FileSet | None = None
    """For classification: the labelled examples, in the same forms as `interactions`."""
    train: FileNames | None = None
    """Short for `examples: {train: ...}`."""
    validation: FileNames | None = None
    """Short for `examples: {validation: ...}`."""
    test: FileNames | None = None
    """Short for `examples: {test: ...}`."""

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> Files:
        kinds = {
            "interactions": self.interactions is not None,
            "examples": self.examples is not None,
            "train/validation/test": bool(self.examples_by_part),
        }
        given = [kind for kind, is_given in kinds.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"files must name either interactions or examples; found {' and '.join(given)}")
        for name in self.names():
            if not images.safe_relative(name):
                raise ValueError(f"files must lie below the data folder; received '{name}'")
        return self

    @property
    def examples_by_part(self) -> dict[Part, FileNames]:
        """The short form as the long one."""
        parts: dict[Part, FileNames | None] = {
            "train": self.train, "validation": self.validation, "test": self.test
        }  # fmt: skip
        return {part: names for part, names in parts.items() if names is not None}

    def names(self) -> Iterator[str]:
        """Every file name that the config gives."""
        for files in (self.interactions, self.items, self.examples, self.examples_by_part):
            for names in files.values() if isinstance(files, dict) else [files or []]:
                yield from [names] if isinstance(names, str) else names


class Where(Settings):
    """Conditions that rows must meet to be read, as in `in_latest_small == 1`; all of a list must hold."""

    interactions: Conditions = pydantic.Field(default_factory=list)
    """Conditions on interactions."""
    items: Conditions = pydantic.Field(default_factory=list)
    """Conditions on the catalogue."""
    examples: Conditions = pydantic.Field(default_factory=list)
    """Conditions on labelled examples."""

    @pydantic.field_validator("*")
    @classmethod
    def _parses(cls, conditions: Conditions) -> list[str]:
        listed = [conditions] if isinstance(conditions, str) else conditions
        for condition in listed:
            Condition.parse(condition)
        return listed


class Fold(Settings):
    """A split by the number (or name) of a fold in some column."""

    column: str
    """The column that holds the fold."""
    test: str | int | list[str | int]
    """The fold or folds that are the test part."""
    validation: str | int | list[str | int] = pydantic.Field(default_factory=list)
    """The fold or folds that are the validation part; none means that one is cut from train."""


class Folder:
    """Reads the folder format: interactions and items, or labelled examples."""

    class Config(Settings):
        """Where the folder is and how its names map to ours."""

        path: str
        """The folder; environment variables and ~ are expanded."""
        name: str = ""
        """Name of the data set in reports; empty takes the folder's."""
        files: Files = Files()
        """File names; without them `interactions.*`, `items.*` or `examples.*` are looked for."""
        columns: dict[str, str] = pydantic.Field(default_factory=dict)
        """Our column names to theirs, as in `{user_id: userId, item_id: movieId}`."""
        image: str | list[str] = pydantic.Field(default_factory=list)
        """Path template of the image, as in `posters/{item_id}.jpg`; of several the first that exists."""
        fold: Fold | None = None
        """A split by fold number."""
        where: Where = Where()
        """Which rows are read."""
        timestamp_unit: TimestampUnit = "s"
        """Unit of timestamps: s, ms, us, ns since 1970, or iso for ISO 8601 dates."""
        encoding: str = "utf-8-sig"
        """Encoding of text files."""

        @pydantic.field_validator("image")
        @classmethod
        def _safe_templates(cls, image: str | list[str]) -> list[str]:
            templates = [image] if isinstance(image, str) else image
            return [images.check_template(template) for template in templates]

        @pydantic.field_validator("encoding")
        @classmethod
        def _known_encoding(cls, encoding: str) -> str:
            try:
                "".encode(encoding)
            except LookupError:
                raise ConfigError(
                    f"'encoding' must be one that Python knows, such as utf-8; received '{encoding}'."
                ) from None
            return encoding

    @staticmethod
    def read(config: Folder.Config) -> Tables:
        """Reads the folder. Raises DataError when a file or a column is missing or cannot be read."""
        return _FolderReading(config).tables()


class _FolderReading:
    """One reading of one folder."""

    def __init__(self, config: Folder.Config) -> None:
        self.config = config
        self.folder = expand_path(config.path)
        if not self.folder.is_dir():
            siblings = names_in(self.folder.parent) if self.folder.parent.is_dir() else []
            raise DataError(
                f"the data path must be a folder that exists; received '{self.folder}': "
                f"{nearest(self.folder.name, siblings)} Set data.path."
            )
        self.name = config.name or self.folder.resolve().name
        self.columns_seen: set[str] = set()

    def tables(self) -> Tables:
        files = self.config.files
        examples = files.examples_by_part or files.examples
        interactions = files.interactions
        if examples is None and interactions is None:
            interactions = self._default("interactions")
            examples = None if interactions else self._default("examples")
            if interactions is None and examples is None:
                held = ", ".join(names_in(self.folder, 8)) or "nothing"
                raise DataError(
                    f"the folder {self.folder} must hold interactions.* or examples.* ({', '.join(FORMATS)}), "
                    f"or data.files must name them; it holds {held}."
                )
        tables = self._recommendation(interactions) if interactions else self._classification(examples or "")
        self._check_mapping()
        return tables

    def _default(self, kind: str) -> str | None:
        return next((kind + suffix for suffix in FORMATS if (self.folder / (kind + suffix)).is_file()), None)

    def _recommendation(self, files: FileSet) -> Tables:
        interactions = self._read(files, "interactions", self.config.where.interactions)
        interactions = typed_interactions(interactions, f"{self.name}'s interactions", self.config.timestamp_unit)
        item_files = self.config.files.items or self._default("items")
        if item_files:
            items = self._read(item_files, "items", self.config.where.items)
            require(items, [ITEM_ID], f"{self.name}'s items")
        else:
            items = items_of(interactions)
        return self._with_images(Tables(items, self.name, interactions))

    def _classification(self, files: FileSet) -> Tables:
        examples = self._read(files, "examples", self.config.where.examples)
        require(examples, [LABEL], f"{self.name}'s examples")
        if SPLIT in examples:
            examples[SPLIT] = part_names(examples[SPLIT], f"{self.name}'s examples")
        return self._with_images(Tables(examples, self.name))

    def _read(self, files: FileSet, what: str, conditions: Conditions) -> pd.DataFrame:
        if isinstance(files, dict):
            parts = [self._read_files(names, what).assign(**{SPLIT: part}) for part, names in files.items()]
            table = pd.concat(parts, ignore_index=True).fillna("")
        else:
            table = self._read_files(files, what)
        for condition in conditions:
            table = table[Condition.parse(condition).holds(self._under_both_names(table), f"{self.name}'s {what}")]
        if self.config.fold is not None and what != "items":
            table = _split_by_fold(table, self.config.fold, f"{self.name}'s {what}")
        return table.reset_index(drop=True)

    def _read_files(self, names: FileNames, what: str) -> pd.DataFrame:
        tables = []
        for name in [names] if isinstance(names, str) else names:
            table = read_table(self.folder / name, self.config.encoding)
            self.columns_seen.update(table.columns)
            tables.append(rename(table, self.config.columns, f"{self.name}'s {what} ({name})"))
        return pd.concat(tables, ignore_index=True).fillna("") if len(tables) > 1 else tables[0]

    def _under_both_names(self, table: pd.DataFrame) -> pd.DataFrame:
        """A view in which conditions may use the source's column names as well as ours."""
        theirs = {theirs: table[ours] for ours, theirs in self.config.columns.items() if ours in table}
        return table.assign(**{name: column for name, column in theirs.items() if name not in table})

    def _with_images(self, tables: Tables) -> Tables:
        aliases = {theirs: ours for ours, theirs in self.config.columns.items()}
        templates = list(self.config.image) or (["{image}"] if IMAGE in tables.items else [])
        found = images.locate(tables.items, templates, aliases, self.folder)
        tables.items[IMAGE] = pd.Series(found, index=tables.items.index, dtype=object)
        if templates:
            there = np.count_nonzero(tables.items[IMAGE] != "")
            tables.notes.append(f"{there:,} of {len(found):,} rows of {self.name} have an image.")
        return tables

    def _check_mapping(self) -> None:
        for ours, theirs in self.config.columns.items():
            if theirs not in self.columns_seen:
                raise DataError(
                    f"columns.{ours} must name a column of {self.name}; '{theirs}' is in none of its tables: "
                    f"{nearest(theirs, self.columns_seen)}"
                )


def _split_by_fold(table: pd.DataFrame, fold: Fold, where: str) -> pd.DataFrame:
    require(table, [fold.column], where)
    part = np.full(len(table), "train", dtype=object)
    for name, wanted in (("validation", fold.validation), ("test", fold.test)):
        values = [str(value) for value in (wanted if isinstance(wanted, list) else [wanted])]
        unknown = set(values) - set(table[fold.column])
        if unknown:
            raise DataError(
                f"fold.{name} must be a value of the column '{fold.column}' of {where}; '{min(unknown)}' is not."
            )
        part[table[fold.column].isin(values).to_numpy()] = name
    return table.assign(**{SPLIT: pd.Series(part, index=table.index, dtype="str")})
