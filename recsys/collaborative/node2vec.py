"""node2vec: item vectors from random walks over the graph of who took what."""

from __future__ import annotations

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.compat import keras, tf
from fusion.config import Settings
from fusion.training.strategy import scope
from fusion.training.trainer import TrainingSettings
from fusion.types import Features, History, RunOptions, derive_seed
from recsys.collaborative.base import Decay, EmbeddingScorer, Member, TrainingData
from recsys.collaborative.pairs import train_towers


class Node2Vec(Member):
    """Skip-gram over biased walks (Grover & Leskovec 2016, "node2vec", section 3.2) on the graph of users and items.

    A walk goes from an item to a user who took it, to another item of that user, and so on; items that stand close to
    each other in it are a pair. An item has one vector of length 1, and the cosines of pairs are trained with an
    in-batch softmax, whose negatives are the items of other pairs. An item's score is the sum of its cosines with the
    history.
    """

    class Config(Settings):
        """Settings of node2vec."""

        factors: int = Field(64, ge=1, le=1024)
        """Length D of the vectors."""
        walks: int = Field(10, ge=1, le=1000)
        """Walks that begin at each item."""
        length: int = Field(10, ge=2, le=1000)
        """Items of a walk."""
        window: int = Field(2, ge=1, le=100)
        """Items of a walk up to so many apart are a pair."""
        p: float = Field(4.0, gt=0)
        """The larger, the less often a walk goes back along the edge that it came by."""
        q: float = Field(1.0, gt=0)
        """The larger, the less often it goes on. In a graph whose edges all join a user and an item, nodes are
        either where the walk was or two steps from there, so that only q / p matters."""
        temperature: float = Field(0.2, gt=0)
        """Divides cosines in the softmax."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""
        training: TrainingSettings = TrainingSettings(epochs=5, batch_size=1024, learning_rate=0.005)
        """The training loop."""

    def fit(self, data: TrainingData, options: RunOptions) -> History:
        config = self.config
        walks = item_walks(
            data.matrix, config.walks, config.length, config.p, config.q, derive_seed(self.seed, "walks")
        )
        pairs = WalkPairs(walks, config.window, data.matrix.shape[1])
        with scope(options):
            self.model = self._build(data.matrix.shape[1])
        history = train_towers(self.model, self._scorer_now, data, pairs, config, options)
        self.vectors = self._vectors()
        self.speaks = data.counts > 0
        return history

    def _build(self, items: int) -> keras.Model:
        inputs = {name: keras.Input((), dtype=tf.int32, name=name) for name in ("source", "target")}
        start = keras.initializers.RandomNormal(
            stddev=self.config.factors**-0.5, seed=derive_seed(self.seed, "vectors")
        )
        table = keras.layers.Embedding(items, self.config.factors, embeddings_initializer=start, name="vectors")
        source, target = (tf.math.l2_normalize(table(numbers), axis=-1) for numbers in inputs.values())
        return keras.Model(inputs, {"user": source, "item": target})

    def _vectors(self) -> np.ndarray:
        table = self.model.get_layer("vectors").get_weights()[0]
        return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)

    def _scorer_now(self) -> tf.Module:
        return self._scorer_of(self._vectors())

    def _scorer_of(self, vectors: np.ndarray) -> tf.Module:
        return EmbeddingScorer(vectors, vectors, unit=False, decay=self.config.decay)

    def state(self) -> dict[str, np.ndarray]:
        return {"item_vectors": self.vectors, "speaks": self.speaks}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.vectors, self.speaks = state["item_vectors"], state["speaks"]

    def scorer(self) -> tf.Module:
        return self._scorer_of(self.vectors)


class WalkPairs:
    """Pairs of items that stand within a window of a walk, in both directions, gathered in batches by position.

    `gather(positions)` -> `source` and `target` int32 `[b]`, and `probability` float32 `[b]`: how often the target is
    drawn as a negative. Pairs of an item with itself are left out.
    """

    def __init__(self, walks: np.ndarray, window: int, items: int) -> None:
        pairs = []
        for apart in range(1, min(window, walks.shape[1] - 1) + 1):
            ahead = np.stack([walks[:, :-apart].ravel(), walks[:, apart:].ravel()], axis=1)
            pairs += [ahead, ahead[:, ::-1]]
        both = np.concatenate(pairs)
        both = both[both[:, 0] != both[:, 1]]
        self.sources, self.targets = np.ascontiguousarray(both.T, np.int32)
        counts = np.bincount(self.targets, minlength=items)
        self.probability = (counts / max(counts.sum(), 1)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.targets)

    def gather(self, positions: np.ndarray) -> Features:
        targets = self.targets[positions]
        return {"source": self.sources[positions], "target": targets, "probability": self.probability[targets]}


def item_walks(matrix: sparse.csr_matrix, walks: int, length: int, p: float, q: float, seed: int) -> np.ndarray:
    """`walks` walks from every item that was taken: the items they pass, int32 `[walks × items, length]`.

    All walks take a step together. From a node of degree n a walk goes back along its edge with the probability
    (1/p) / (1/p + (n-1)/q), and otherwise along one of the n - 1 others (Grover & Leskovec 2016, eq. 2 for a graph
    of two sides); each walk keeps the number of the edge that it came by, so that nothing has to be searched.
    """
    random = np.random.default_rng(seed)
    graph = _Edges(matrix)
    items = np.repeat(np.flatnonzero(graph.degrees[1]), walks)
    edges = graph.starts[1][items] + random.integers(0, graph.degrees[1][items])  # in the order of items
    passed = [items]
    for _ in range(length - 1):
        edges = graph.step(graph.other_side(edges, 1), 0, p, q, random)
        edges = graph.step(graph.other_side(edges, 0), 1, p, q, random)
        passed.append(graph.nodes[1][edges])
    return np.stack(passed, axis=1).astype(np.int32)


class _Edges:
    """The edges of the graph, numbered twice: in the order of users (side 0) and of items (side 1).

    Attributes:
        nodes: of each side, the node of its edges in its order.
        starts, degrees: of each side, the first edge of a node and how many it has.
    """

    def __init__(self, matrix: sparse.csr_matrix) -> None:
        lengths = np.diff(matrix.indptr).astype(np.int64)
        users = np.repeat(np.arange(matrix.shape[0]), lengths)
        by_item = np.argsort(matrix.indices, kind="stable")  # the edges in the order of items
        counts = np.bincount(matrix.indices, minlength=matrix.shape[1]).astype(np.int64)
        by_user = np.empty_like(by_item)
        by_user[by_item] = np.arange(len(by_item))
        self._other = (by_user, by_item)
        self.nodes = (users, matrix.indices[by_item])
        self.degrees = (lengths, counts)
        self.starts = tuple(np.cumsum(degrees) - degrees for degrees in self.degrees)

    def other_side(self, edges: np.ndarray, side: int) -> np.ndarray:
        """The numbers of edges of a side in the order of the other one."""
        return self._other[side][edges]

    def step(self, edges: np.ndarray, side: int, p: float, q: float, random: np.random.Generator) -> np.ndarray:
        """Edges by which walks leave the nodes of a side that they reached by `edges`, all in the order of the side."""
        nodes = self.nodes[side][edges]
        start, others = self.starts[side][nodes], self.degrees[side][nodes] - 1
        back = random.random(len(edges)) * (1 / p + others / q) < 1 / p
        onward = start + random.integers(0, np.maximum(others, 1))
        onward += onward >= edges  # any but the one it came by
        return np.where(back | (others == 0), edges, onward)
