"""Reads what an artifact has not seen: a sentence or a picture becomes the inputs of its signature `search_<name>`, a
new item those of `embed_item_<name>`.

Texts are tokenised outside the graph, so an artifact keeps, beside the graph, how each of its encoders reads its
input: `examples/<name>.json`, and `examples/<name>.npz` with what the encoder was fitted to (a vocabulary).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fusion.config import parse_part
from fusion.embeddings import take
from fusion.errors import ConfigError, DataError
from fusion.files import load_arrays, save_arrays, write_atomically
from fusion.images import load_images
from fusion.registry import nearest
from fusion.submodels import SUBMODELS
from fusion.types import Features
from recsys.collaborative.content import read_items
from recsys.item_tables import SEPARATOR
from recsys.schema import IMAGE
from recsys.thumbnails import SIDE, small_jpegs

FOLDER = "examples"
CHOSEN_BY_PATTERN = ("numeric", "categorical")
"""What a tabular encoder's state calls the columns that it reads."""


def write_examples(folder: Path, contents: Mapping[str, Any]) -> None:
    """Writes, for each of an artifact's contents (`recsys.recommender.contents_of`), how an example of it is read."""
    home = folder / FOLDER
    for name, content in contents.items():
        home.mkdir(exist_ok=True)
        part = {"kind": _kind(content.encoder), **content.encoder.config.model_dump(mode="json")}
        described = {"modality": content.encoder.modality, "columns": list(content.columns), "encoder": part}
        write_atomically(home / f"{name}.json", json.dumps(described, indent=1))
        state = content.encoder.state()
        if state:
            save_arrays(home / f"{name}.npz", state)


def _kind(encoder: Any) -> str:
    return next(kind for kind in SUBMODELS if SUBMODELS[kind] is type(encoder))


class Examples:
    """What an artifact can be searched by. The artifact's manifest must have been verified before.

    Attributes:
        described: by name of the search, `modality`, `columns` and `encoder`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        paths = sorted(self.folder.glob("*.json"))
        self.described = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}

    def choose(self, modality: str, name: str | None = None) -> str:
        """The search `name`, or the first one of this modality; ConfigError when there is none."""
        fitting = [n for n, described in self.described.items() if described["modality"] == modality]
        if name is None and fitting:
            return fitting[0]
        if name in fitting:
            return str(name)
        if not fitting:
            raise ConfigError(
                f"a search by {modality} needs a member that reads {modality}s; the artifact has none. "
                "Add a member of kind content to the config."
            )
        raise ConfigError(f"no member '{name}' can be searched by {modality}: {nearest(str(name), fitting)}")

    def inputs(self, name: str, example: str | Path | np.ndarray) -> Features:
        """One text, or one image (a path, or an array `[H, W, 3]`), as the named inputs of `search_<name>`, B = 1.

        Raises DataError for an empty text and for an image that cannot be read.
        """
        encoder = self.encoder(name)
        return encoder.prepare([_text(example)] if encoder.modality == "text" else _pixels(example, encoder))

    def encoder(self, name: str) -> Any:
        """The submodel that reads, as it was fitted; its network is that of the artifact's graph."""
        encoder = parse_part(SUBMODELS, self.described[name]["encoder"], f"{FOLDER}/{name}").make(0)
        state = self.folder / f"{name}.npz"
        if state.is_file():
            encoder.load_state(load_arrays(state))
        return encoder


class ItemReader:
    """Reads new items as an artifact's encoders read those of its catalogue: what `serving.new_items` asks for.

    Attributes:
        columns: by name of the signature `embed_item_<name>`, the columns of an item that it reads.
    """

    def __init__(self, folder: Path) -> None:
        examples = Examples(folder)
        self._encoders = {name: examples.encoder(name) for name in examples.described}
        self.columns = {name: self._columns(name, examples.described[name]) for name in self._encoders}

    def _columns(self, name: str, described: Mapping[str, Any]) -> tuple[str, ...]:
        if described["modality"] == "image":
            return (IMAGE,)
        state = self._encoders[name].state() if described["modality"] == "tabular" else {}
        chosen = [str(column) for kind in CHOSEN_BY_PATTERN for column in state.get(kind, ())]
        return tuple(chosen) or tuple(described["columns"])

    def read(self, name: str, items: Sequence[Mapping[str, Any]]) -> tuple[Features, np.ndarray, list[str]]:
        """The inputs of `embed_item_<name>` for those of the items that have such content, which these are (bool
        `[N]`), and by item why it has none, '' where it does.

        Args:
            name: one of `columns`.
            items: cells by column; those that are not there are empty. An image is the content of a JPEG, PNG or WebP.
        """
        encoder, columns = self._encoders[name], self.columns[name]
        values: Any
        if encoder.modality == "image":
            values, available, reasons = load_images([item.get(IMAGE) for item in items], encoder.config.image_size)
        else:
            table = pd.DataFrame([{column: item.get(column, "") for column in columns} for item in items])
            values, available = read_items(encoder, columns, table.map(_cell))
            reasons = ["" if there else f"{' and '.join(columns)} are empty" for there in available]
        if not available.any():
            return {}, available, reasons
        return encoder.prepare(take(values, np.flatnonzero(available))), available, reasons

    def picture(self, image: bytes) -> bytes | None:
        """A small picture for pages, a JPEG of at most 168 × 168 pixels; None where the image cannot be used."""
        jpeg = small_jpegs([image], SIDE)[0]
        return None if jpeg is None else jpeg.content


def _cell(value: Any) -> str:
    """A cell as it stands in a table: of several values, with the separator between them."""
    return SEPARATOR.join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _text(example: Any) -> str:
    if not isinstance(example, str) or not example.strip():
        raise DataError(f"a search by text needs a text with a word in it; received {example!r:.60}.")
    return example


def _pixels(example: Any, encoder: Any) -> np.ndarray:
    value = example if isinstance(example, np.ndarray) else str(example)
    pixels, available, reasons = load_images([value], encoder.config.image_size)
    if not available[0]:
        shown = "the array" if isinstance(example, np.ndarray) else f"'{example}'"
        raise DataError(f"a search by image needs a JPEG, PNG or WebP; {shown} cannot be used: {reasons[0]}.")
    return pixels
