"""The warm-up requests of an artifact (`fusion.export.warmup`): a few for every signature, made of real rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from fusion.compat import tf
from fusion.embeddings import take
from fusion.export.manifest import Signature
from fusion.export.warmup import Request
from fusion.types import Features
from recsys.collaborative.base import PADDING
from recsys.collaborative.content import Contents, read_items
from recsys.core import RankingCore
from recsys.growing import CHANGING

if TYPE_CHECKING:
    from recsys.ranking_task import RankingTask

BATCHES = (1, 8)
"""How many rows a request has."""
ITEMS, CANDIDATES, LENGTH = 16, 100, 10
"""Items in the history of a visitor, candidates that are scored, and items that are asked for."""


def ranking_requests(
    task: RankingTask, core: RankingCore, contents: Mapping[str, Contents], signatures: Mapping[str, Signature]
) -> Iterator[Request]:
    """For every signature requests of one row and of more: visitors with the histories of users, and every other row a
    user who is known. Where a signature takes users, also a known one alone. What changes the model has none."""
    asked = [_inputs(task, core, rows) for rows in BATCHES]
    known = {name: array[1:2] for name, array in asked[-1].items()} | {"history": np.full((1, 1), "", object)}
    of_examples = {f"{kind}_{name}": read for name, read in contents.items() for kind in ("embed_item", "search")}
    for name, signature in signatures.items():
        if name in CHANGING:
            continue
        examples = _examples(task, of_examples[name]) if name in of_examples else {}
        for inputs in (*asked, *([known] if "user_id" in signature.inputs else [])):
            given = inputs | {feature: array[: len(inputs["k"])] for feature, array in examples.items()}
            yield name, {feature: given[feature] for feature in signature.inputs}


def _inputs(task: RankingTask, core: RankingCore, rows: int) -> Features:
    """So many rows of everything that a signature may take but examples, by name."""
    data, (histories, _) = task.interactions, task.known()
    random = np.random.default_rng(rows)
    users = random.choice(np.flatnonzero(np.diff(histories.indptr) > 0), rows)
    numbers = np.full((rows, ITEMS), PADDING, np.int32)
    for row, user in zip(numbers, users, strict=True):
        latest = histories.indices[histories.indptr[user] : histories.indptr[user + 1]][-ITEMS:]
        row[: len(latest)] = latest
    scores, mask = core.members(tf.constant(numbers))
    items, known = data.item_ids.astype(object), np.arange(rows) % 2 == 1
    nothing = np.full((rows, 1), "", object)
    return {
        "user_id": np.where(known, data.user_ids.astype(object)[users], ""),
        "history": np.where((numbers < 0) | known[:, None], "", items[numbers]),
        "k": np.full(rows, LENGTH, np.int32),
        "exclude": nothing,
        "include": nothing,
        "scores": np.where(mask, scores, np.float32("nan")),
        "item_id": items[numbers[:, 0]],
        "candidates": random.choice(items, (rows, CANDIDATES)),
    }


def _examples(task: RankingTask, content: Contents) -> Features:
    """What the encoder reads of as many items as the largest request has rows, over again where fewer have any."""
    rows = np.resize(np.flatnonzero(content.available), max(BATCHES))
    catalogue = task.interactions.catalogue.iloc[rows].reset_index(drop=True)
    values, _ = read_items(content.encoder, content.columns, catalogue)
    return content.encoder.prepare(take(values, np.arange(len(rows))))
