"""Measures how fast the engine is on this machine, against what the machine itself can do."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli

EXAMPLES = """  python tools/benchmark.py scoring
  python tools/benchmark.py scoring --users 5000 --items 9000 -k 10 --json
"""


def main() -> int:
    parser = cli.parser(__doc__ or "", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("scoring", help="exact top-k of a catalogue for many users, seen items left out")
    scoring.add_argument("--users", type=cli.positive, default=30_000)
    scoring.add_argument("--items", type=cli.positive, default=41_000)
    scoring.add_argument("--dimensions", type=cli.positive, default=64)
    scoring.add_argument("--seen", type=float, default=27.0, help="items seen per user on average (default: 27)")
    scoring.add_argument("-k", type=cli.positive, default=20)
    scoring.add_argument("--block", type=cli.positive, help="users scored at once")
    scoring.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    result = measure_scoring(args)
    print(json.dumps(result) if args.json else "\n".join(f"{name:<28} {show(value)}" for name, value in result.items()))
    return 0


def show(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"


def measure_scoring(args: argparse.Namespace) -> dict[str, Any]:
    """Users per second of `recsys.retrieval.score_blocks`, checked against numpy, and where the time goes."""
    import numpy as np
    from scipy import sparse

    from fusion.compat import tf
    from recsys import retrieval

    random = np.random.default_rng(0)
    users = random.normal(size=(args.users, args.dimensions)).astype(np.float32)
    items = random.normal(size=(args.items, args.dimensions)).astype(np.float32)
    pairs = [random.integers(0, size, int(args.users * args.seen)) for size in (args.users, args.items)]
    seen = sparse.csr_matrix((np.ones(len(pairs[0]), np.float32), tuple(pairs)), shape=(args.users, args.items))
    block = args.block or retrieval.BLOCK

    retrieval.score_blocks(users[: 2 * block], items, seen[: 2 * block], args.k, block)  # traces the graph
    started = time.perf_counter()
    values, numbers = retrieval.score_blocks(users, items, seen, args.k, block)
    seconds = time.perf_counter() - started

    limit = matmul_limit(tf)
    work = 2.0 * args.users * args.items * args.dimensions
    return {
        "users per second": args.users / seconds,
        "seconds": seconds,
        "block": block,
        "peak memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "matmul limit GFLOP/s": limit / 1e9,
        "share of the matmul limit": work / seconds / limit,
        **{f"{part} s": spent for part, spent in breakdown(tf, retrieval, users, items, seen, args.k, block).items()},
        "rows equal to numpy": rows_equal(np, users, items, seen, values, numbers),
    }


def matmul_limit(tf: Any, size: int = 2048) -> float:
    """Float32 operations per second of one large square product, the best of five."""
    matrix = tf.random.normal((size, size))
    return 2.0 * size**3 / best_of(lambda: tf.matmul(matrix, matrix).numpy(), 5)


def breakdown(tf: Any, retrieval: Any, users: Any, items: Any, seen: Any, k: int, block: int) -> dict[str, float]:
    """Seconds for all users of product, exclusion and selection: differences of ever longer graphs over one block."""
    table = tf.constant(retrieval.pad_items(items))
    rows, pairs = tf.constant(users[:block]), tf.constant(retrieval.seen_pairs(seen, 0, min(block, len(users))))
    product = tf.function(lambda: tf.matmul(rows, table))
    excluded = tf.function(lambda: retrieval.exclude(tf.matmul(rows, table), pairs))
    selected = tf.function(lambda: retrieval.select(retrieval.exclude(tf.matmul(rows, table), pairs), len(items), k))
    ends = [best_of(step, 10) * len(users) / len(rows) for step in (product, excluded, selected)]
    return {"product": ends[0], "exclusion": ends[1] - ends[0], "selection": ends[2] - ends[1]}


def best_of(step: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times + 1):  # the first one traces
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def rows_equal(np: Any, users: Any, items: Any, seen: Any, values: Any, numbers: Any, sample: int = 64) -> int:
    """How many of `sample` random users got exactly numpy's items; equal scores within rounding may change places."""
    chosen = np.random.default_rng(1).choice(len(users), min(sample, len(users)), replace=False)
    equal = 0
    for user in chosen:
        scores = items @ users[user]
        scores[seen[user].indices] = -np.inf
        best = np.argsort(-scores, kind="stable")[: numbers.shape[1]]
        same_scores = np.allclose(scores[best], values[user], rtol=1e-5, atol=1e-5)
        equal += int(same_scores and np.allclose(scores[numbers[user]], values[user], rtol=1e-5, atol=1e-5))
    return equal


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    cli.run(main)
