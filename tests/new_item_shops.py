"""Two shops of the planted world, alike but for the last items: in one they are cold, in the other they are not there
yet. A helper of several test files."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy import sparse

from fusion.export import savedmodel
from fusion.export.manifest import Manifest, write_manifest
from fusion.files import save_arrays
from fusion.rules import RULES
from recsys.collaborative.base import Member, TrainingData
from recsys.core import MemberScores, RankingCore
from recsys.examples import write_examples
from recsys.growing import GrowingCore, GrowingScores
from recsys.item_tables import PROJECTIONS, VECTORS, item_vectors
from recsys.recommender import ServedRecommender, contents_of
from recsys.schema import IMAGE
from worlds import World, fitted

ITEMS, NEW, K_MAX = 40, 3, 12
STEPS = {"epochs": 2, "batch_size": 128, "learning_rate": 0.02}
WORDS = {"kind": "text_tfidf", "dimensions": 16}
PIXELS = {"kind": "image_cnn", "image_size": 16, "widths": [8], "dropout": 0.0}
MEMBERS: dict[str, dict[str, Any]] = {
    "popularity": {"kind": "popularity"},
    "ease": {"kind": "ease", "l2": 5.0},
    "text": {"kind": "content", "columns": ["text"], "encoder": WORDS, "dimensions": 8, "training": STEPS},
    "image": {
        "kind": "content",
        "encoder": PIXELS,
        "scorer": "cosine",
        "fine_tuning": {"pairs": 64, "training": {"epochs": 1, "batch_size": 32}},
    },
}
CONTENTS = ("text", "image")


@dataclass(frozen=True)
class Shop:
    """Members, and what they were fitted on."""

    members: dict[str, Member]
    data: TrainingData
    item_ids: np.ndarray
    user_ids: np.ndarray

    @property
    def items(self) -> int:
        return len(self.item_ids)

    def rule(self, name: str = "average") -> Any:
        return RULES[name](RULES[name].Config(), list(self.members), "candidates")

    def module(self, spare: int = 0, student: Any = None) -> ServedRecommender:
        """What is served of the shop."""
        if spare:
            growing = GrowingScores(self.members, self.data.counts, spare)
            core: RankingCore = GrowingCore(growing, self.rule(), self.items)
        else:
            core = RankingCore(MemberScores(self.members, self.data.counts), self.rule())
        taken = self.data.matrix
        contents = contents_of(self.members)
        return ServedRecommender(core, self.item_ids, self.user_ids, taken, taken, K_MAX, contents, student)

    def write(self, folder: Path, spare: int = 0) -> Path:
        """An artifact with tables of items and users, and what is needed to read new ones."""
        module = self.module(spare)
        savedmodel.save(module, folder, module.signatures())
        table = {"item_id": self.item_ids.astype(str), "title": self.data.catalogue["title"].astype(str)}
        genres, years = [["old", "kept"]] * self.items, [1990] * self.items
        pq.write_table(pa.table({**table, "genres": genres, "year": years}), folder / "items.parquet")
        pq.write_table(pa.table({"user_id": self.user_ids.astype(str)}), folder / "users.parquet")
        vectors = item_vectors(contents_of(self.members), self.data.matrix)
        np.save(folder / VECTORS, vectors.rows)
        if spare:
            save_arrays(folder / PROJECTIONS, vectors.projections)
        write_examples(folder, contents_of(self.members))
        limits = {"k_max": K_MAX, **({"spare_items": spare} if spare else {})}
        signatures = savedmodel.signatures_of(folder)
        write_manifest(folder, Manifest("recommender", tuple(self.members), signatures, limits=limits))
        return folder


def two_shops(folder: Path) -> tuple[Shop, Shop]:
    """The shop that has all items, of which the last NEW were never taken, and the one that lacks these."""
    world = World.planted(users=40, items=ITEMS, interactions_per_user=10)
    data = world.training(folder)
    there = ITEMS - NEW
    known = data.matrix[:, :there].tocsr()
    nobody = sparse.csr_matrix((known.shape[0], NEW), dtype=np.float32)
    whole = sparse.hstack([known, nobody]).tocsr()
    ids, users = world.data.item_ids.astype(object), world.data.user_ids
    shops = []
    for name, matrix, catalogue in (("whole", whole, data.catalogue), ("lacking", known, data.catalogue.iloc[:there])):
        rows = TrainingData(matrix, catalogue, folder / name)
        members = {member: fitted(settings, rows, folder / name / member) for member, settings in MEMBERS.items()}
        shops.append(Shop(members, rows, ids[: matrix.shape[1]], users))
    return shops[0], shops[1]


def raw(shop: Shop, row: int) -> dict[str, Any]:
    """An item as an administrator brings it."""
    cells: pd.Series = shop.data.catalogue.iloc[row]
    picture = io.BytesIO()
    Image.fromarray(np.asarray(cells[IMAGE], np.uint8)).save(picture, "PNG")
    text = {name: str(cells[name]) for name in ("title", "text")}
    image = base64.b64encode(picture.getvalue()).decode()
    return {"item_id": str(shop.item_ids[row]), **text, "genres": ["new"], "year": 2026, "image": image}
