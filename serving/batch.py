"""Recommendations for many users into one Parquet file, in bounded memory.

The file takes its name only when it is complete. One process, no resuming: a job that is stopped starts anew.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import InvalidRequest, ServingError
from serving.predictor import Arrays, Predictor


@dataclass(frozen=True)
class BatchSummary:
    """What a job wrote: rows of the file, users with at least one row, ids that the artifact does not know, time."""

    rows: int
    users: int
    unknown_users: tuple[str, ...]
    seconds: float


def recommend_all(
    predictor: Predictor,
    user_ids: Sequence[str],
    k: int,
    out_parquet: str | Path,
    block: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> BatchSummary:
    """Writes the k best items of every user.

    Columns: `user_id`, `rank` (from 1), `item_id`, `score`, and `contribution_<member>` for each member. Users whom the
    artifact does not know get no rows and are named in the summary.

    Args:
        predictor: the loaded artifact.
        user_ids: each id once.
        k: items per user.
        out_parquet: the file; one that stands there already is replaced at the end.
        block: users at once.
        progress: called with (users done, users in all) after every block.

    Raises InvalidRequest for an empty or repeated list of users, ServingError when the file cannot be written.
    """
    if not len(user_ids) or len(set(user_ids)) != len(user_ids):
        raise InvalidRequest("a batch job needs a list of users with each id once; it is empty or repeats some.")
    started = time.perf_counter()
    path = Path(out_parquet)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    rows, users, unknown = 0, 0, list[str]()
    try:
        with pq.ParquetWriter(partial, _schema(predictor)) as writer:
            for start, ids, answer in _blocks(predictor, user_ids, k, min(block, predictor.limits.rows)):
                table = _table(predictor, ids, answer)
                writer.write_table(table)
                rows += table.num_rows
                users += int((answer["known_user"] & (answer["item_ids"] != b"").any(axis=1)).sum())
                unknown.extend(ids[~answer["known_user"]])
                if progress:
                    progress(start + len(ids), len(user_ids))
        with open(partial, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ServingError(f"{path} must be writable; the system answered '{error.strerror or error}'.") from error
    finally:
        partial.unlink(missing_ok=True)
    return BatchSummary(rows, users, tuple(unknown), time.perf_counter() - started)


def _blocks(
    predictor: Predictor, user_ids: Sequence[str], k: int, block: int
) -> Iterator[tuple[int, np.ndarray, Arrays]]:
    for start in range(0, len(user_ids), block):
        ids = np.asarray(user_ids[start : start + block], object)
        yield start, ids, predictor.recommend(user_ids=list(ids), k=k)


def _schema(predictor: Predictor) -> pa.Schema:
    columns = {"user_id": pa.string(), "rank": pa.int32(), "item_id": pa.string(), "score": pa.float32()}
    columns |= {f"contribution_{member}": pa.float32() for member in predictor.members}
    return pa.schema(list(columns.items()))


def _table(predictor: Predictor, ids: np.ndarray, answer: Arrays) -> pa.Table:
    """One row per recommended item; places beyond a user's last item and unknown users have none."""
    row, place = np.nonzero((answer["item_ids"] != b"") & answer["known_user"][:, None])
    contributions = answer["contributions"][row, :, place]
    columns = [
        pa.array(ids[row], pa.string()),
        pa.array((place + 1).astype(np.int32)),
        pa.array([item.decode("utf-8") for item in answer["item_ids"][row, place]], pa.string()),
        pa.array(answer["scores"][row, place]),
        *(pa.array(contributions[:, member]) for member in range(len(predictor.members))),
    ]
    return pa.Table.from_arrays(columns, schema=_schema(predictor))
