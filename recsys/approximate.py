"""Approximate retrieval by inner product, for catalogues that are too large to score whole for every request.

Inverted lists of faiss (Douze et al. 2024, "The Faiss library"; Jégou et al. 2011): items are grouped around
centroids, and a query looks only into the lists whose centroids give the largest products. Graph indices (HNSW of
faiss, usearch and voyager) were measured on the same vectors: the norms of trained item vectors differ by an order of
magnitude, their greedy walks get lost, and recall stays below 0.5 where inverted lists reach 0.98 in the same time.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from fusion.compat import tf
from fusion.config import Settings
from fusion.errors import ConfigError, DataError, GateError, MachineError
from fusion.files import atomic_folder, sha256_of
from recsys.collaborative.base import PADDING
from recsys.core import HISTORY_SPEC, RankingCore
from recsys.results import latency

INDEX, FACTS = "index.faiss", "index.json"
_TRAINING_ROWS_PER_LIST = 64
"""Items a centroid is learned from; faiss asks for 39 at least, and more than 256 teach nothing."""


@dataclass(frozen=True)
class Point:
    """How well and how fast an index answers with a number of probes."""

    probes: int
    recall: float
    p50_ms: float
    p95_ms: float


class ApproximateIndex:
    """Finds the items with the largest inner products; `search` may miss some, never misreports a score."""

    class Config(Settings):
        """Settings of the index."""

        lists: int | None = Field(None, ge=1, le=1_000_000)
        """How many lists the items are divided into; the power of two next to 4 √I when not given."""
        recall: float = Field(0.97, gt=0, le=1)
        """The share of the exact top k that must be found; the number of probes is chosen for it."""
        k: int = Field(100, ge=1, le=10_000)
        """The length of the lists for which recall is measured."""
        seed: int = Field(0, ge=0)
        """Seed of the centroids."""

    def __init__(self, index: Any, config: Config, probes: int, table: Sequence[Point] = ()) -> None:
        self._index = index
        self.config = config
        self.probes = probes
        self.table = tuple(table)
        """Recall against latency as measured when the index was built."""

    @classmethod
    def build(cls, vectors: np.ndarray, queries: np.ndarray, config: Config | None = None) -> ApproximateIndex:
        """An index over item vectors float32 `[I, D]`, its probes chosen on sample queries `[Q, D]` (200 suffice).

        Raises:
            DataError: a vector is not finite, there is none, or the queries have another length.
        """
        faiss, config = _faiss(), config or cls.Config()
        vectors, queries = _checked(vectors, "item vectors"), _checked(queries, "queries")
        items, width = vectors.shape
        if queries.shape[1] != width:
            raise DataError(f"queries must have the items' {width} dimensions; received {queries.shape[1]}.")
        lists = min(config.lists or 2 ** round(np.log2(4 * np.sqrt(items))), items)
        quantiser = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFFlat(quantiser, width, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.min_points_per_centroid = config.seed + 1, 1
        chosen = np.random.default_rng(config.seed).permutation(items)[: lists * _TRAINING_ROWS_PER_LIST]
        index.train(vectors[np.sort(chosen)])
        index.add(vectors)
        built = cls(index, config, lists)
        built.table = tuple(built._measure(queries, exact_top(vectors, queries, min(config.k, items))))
        enough = [point.probes for point in built.table if point.recall >= config.recall]
        built.probes = enough[0] if enough else lists
        return built

    @property
    def lists(self) -> int:
        """How many lists the items are divided into."""
        return int(self._index.nlist)

    def search(self, queries: np.ndarray, k: int, probes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Inner products float32 `[B, k]`, descending, and item numbers int64 `[B, k]`; -1 where too few were found."""
        if k < 1:
            raise ConfigError(f"k must be at least 1; received {k}.")
        parameters = _faiss().SearchParametersIVF(nprobe=probes or self.probes)
        found: tuple[np.ndarray, np.ndarray] = self._index.search(_checked(queries, "queries"), k, params=parameters)
        return found

    def _measure(self, queries: np.ndarray, exact: np.ndarray) -> list[Point]:
        """Recall and latency, one query at a time, for ever more probes until all lists are looked into."""
        points: list[Point] = []
        probes, k = 1, exact.shape[1]
        while True:
            probes = min(probes, self.lists)
            clock = latency(functools.partial(self._ask_next, itertools.cycle(queries), k, probes), 100)
            points.append(Point(probes, recall(self.search(queries, k, probes)[1], exact), **clock))
            if points[-1].recall >= max(self.config.recall, 0.99) or probes == self.lists:
                return points
            probes *= 2

    def _ask_next(self, queries: Iterator[np.ndarray], k: int, probes: int) -> None:
        self.search(next(queries)[None], k, probes)

    def save(self, folder: Path) -> None:
        """Writes the index and its facts; the folder appears whole or not at all."""
        with atomic_folder(folder) as aside:
            _faiss().write_index(self._index, str(aside / INDEX))
            facts = {
                "sha256": sha256_of(aside / INDEX),
                "config": self.config.model_dump(mode="json"),
                "probes": self.probes,
                "table": [asdict(point) for point in self.table],
            }
            (aside / FACTS).write_text(json.dumps(facts, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ApproximateIndex:
        """The inverse of `save`; GateError when the bytes are not those that were written, before they are parsed."""
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if sha256_of(folder / INDEX) != facts["sha256"]:
            raise GateError(f"{folder / INDEX} must have the hash that {FACTS} names; it differs. Build it again.")
        table = [Point(**point) for point in facts["table"]]
        index = _faiss().read_index(str(folder / INDEX))
        return cls(index, cls.Config.model_validate(facts["config"]), facts["probes"], table)


class TwoStage:
    """Recommends from a catalogue that is too large to be scored whole: an index proposes, the ensemble decides.

    The vectors of one member propose a shortlist, and members and rule score just these items, exactly. What the
    rule normalises over (z-scores, ranks) is the shortlist instead of the catalogue, so orders may differ from those
    of `RankingCore` over everything: `recall` of the two lists says by how much.
    """

    def __init__(self, core: RankingCore, proposer: str, index: ApproximateIndex, shortlist: int = 300) -> None:
        """`proposer` is the member whose vectors `index` holds; ConfigError when it has no vectors of users."""
        scorer = core.members.scorers[core.members.names.index(proposer)]
        if not hasattr(scorer, "at"):  # the scorers of one vector a user
            raise ConfigError(
                f"'{proposer}' cannot propose: it has no vectors. Name a factorisation or content member."
            )
        self._user = tf.function(scorer.user, input_signature=[HISTORY_SPEC])
        self._fused = tf.function(
            lambda history, items: core.rule(*core.members.at(history, items), core.members.context(history, items)),
            input_signature=[HISTORY_SPEC, tf.TensorSpec([None, None], tf.int32)],
        )
        self.index = index
        self.shortlist = shortlist

    def recommend(self, history: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best items that are not in the history (int32 `[B, L]`, padded with -1): fused scores float32
        `[B, k]`, descending, and item numbers int32 `[B, k]`; -inf and -1 where there are fewer."""
        wanted = max(self.shortlist, k) + history.shape[1]
        _, items = self.index.search(self._user(history).numpy(), wanted)
        items = np.where((items[:, :, None] == history[:, None, :]).any(axis=2), PADDING, items).astype(np.int32)
        scores = np.where(items >= 0, self._fused(history, items).numpy(), -np.inf)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, order, axis=1)
        return best, np.where(np.isfinite(best), np.take_along_axis(items, order, axis=1), PADDING)


def exact_top(vectors: np.ndarray, queries: np.ndarray, k: int, block: int = 32) -> np.ndarray:
    """The k items `[Q, k]` with the largest inner products, by scoring all of them; in no order within a row."""
    parts = []
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ vectors.T
        # A copy: a view would keep the order of the whole catalogue in memory.
        parts.append(np.argpartition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k :].copy())
    return np.concatenate(parts)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """The mean share of the exact items `[Q, k]` that are among those found `[Q, K]`."""
    return float(np.mean([np.isin(wanted, given).mean() for wanted, given in zip(exact, found, strict=True)]))


def _checked(vectors: np.ndarray, what: str) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or not vectors.size or not np.isfinite(vectors).all():
        raise DataError(f"{what} must be finite numbers [N, D] with N and D at least 1; received {vectors.shape}.")
    return vectors


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MachineError(
            "approximate retrieval needs the package faiss-cpu, which is not installed. "
            "Run: pip install fusion-recommender[retrieval]"
        ) from error
    return faiss
