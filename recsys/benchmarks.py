"""What the engine does a second on this machine, beside what the machine allows and beside a peer (`implicit`).

Whatever is compared is measured in turns within one run, so that a machine that is busy for a while is busy for both.
"""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from threadpoolctl import threadpool_limits

from fusion.compat import tf
from fusion.errors import ConfigError
from fusion.export.savedmodel import load as load_savedmodel
from fusion.registry import nearest
from fusion.types import RunOptions
from recsys import retrieval
from recsys.approximate import ApproximateIndex, exact_top
from recsys.approximate import recall as approximate_recall
from recsys.collaborative import MEMBERS
from recsys.collaborative.base import Member, TrainingData
from recsys.core import MemberScores
from recsys.datasets.long_tail import SIZES, TEST_SHARE, long_tail
from recsys.evaluation import Question, Ranker, blocks, sample
from recsys.fast_profile import SIGNATURE as FAST
from recsys.measuring import PeakMemory
from recsys.metrics import parse_metric
from recsys.results import latency
from recsys.schema import USER_ID

FITTED = ("item_knn", "rp3beta", "spectral_filter", "ease")
"""Members whose time and memory are measured."""
JUDGED_USERS = 3000
"""Users over whom the recall of a member is a mean; of more a fixed random part."""
PEER = "implicit"
NEAR, ASIDE = 22, 0.15
"""How far away in number the neighbour is that a made-up item lies next to, and how far aside, relative to its size."""
UNOBSERVED, PENALTY = 0.1, 0.01
"""Of the factorisation that is timed: the weight of what was not taken, and the peer's default of the penalty."""
FITTED_ON_THE_WORLD = {"unobserved_weight": UNOBSERVED, "l2": UNOBSERVED * PENALTY, "frequency_scaling": 0.0}
"""The same in the settings of `ials`."""


# ---- exact top-k of made-up vectors -----------------------------------------------------------------------------


def measure_scoring(
    users: int, items: int, dimensions: int, seen: float, k: int, block: int | None = None
) -> dict[str, Any]:
    """Users per second of `score_blocks` on random vectors, checked against numpy, and where the time goes.

    Args:
        users, items, dimensions: shapes of the two tables.
        seen: how many items a user has seen on average.
        k: items per user.
        block: users at once; None for the default.
    """
    random = np.random.default_rng(0)
    user_vectors = random.normal(size=(users, dimensions)).astype(np.float32)
    item_vectors = random.normal(size=(items, dimensions)).astype(np.float32)
    pairs = [random.integers(0, size, int(users * seen)) for size in (users, items)]
    known = sparse.csr_matrix((np.ones(len(pairs[0]), np.float32), tuple(pairs)), shape=(users, items))
    block = block or retrieval.BLOCK

    retrieval.score_blocks(user_vectors[: 2 * block], item_vectors, known[: 2 * block], k, block)  # traces the graph
    started = time.perf_counter()
    values, numbers = retrieval.score_blocks(user_vectors, item_vectors, known, k, block)
    seconds = time.perf_counter() - started

    limit = matmul_limit()
    work = 2.0 * users * items * dimensions
    spent = breakdown(user_vectors, item_vectors, known, k, block)
    return {
        "users per second": users / seconds,
        "seconds": seconds,
        "block": block,
        "peak memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "matmul limit GFLOP/s": limit / 1e9,
        "share of the matmul limit": work / seconds / limit,
        **{f"{part} s": seconds for part, seconds in spent.items()},
        "rows equal to numpy": rows_equal(user_vectors, item_vectors, known, values, numbers),
    }


def matmul_limit(size: int = 2048) -> float:
    """Float32 operations per second of one large square product, the best of five."""
    matrix = tf.random.normal((size, size))
    return 2.0 * size**3 / best_of(lambda: tf.matmul(matrix, matrix).numpy(), 5)


def breakdown(users: np.ndarray, items: np.ndarray, seen: sparse.csr_matrix, k: int, block: int) -> dict[str, float]:
    """Seconds for all users of product, exclusion and selection: differences of ever longer graphs over one block."""
    table = tf.constant(retrieval.pad_items(items))
    rows, pairs = tf.constant(users[:block]), tf.constant(retrieval.seen_pairs(seen, 0, min(block, len(users))))
    product = tf.function(lambda: tf.matmul(rows, table))
    excluded = tf.function(lambda: retrieval.exclude(tf.matmul(rows, table), pairs))
    selected = tf.function(lambda: retrieval.select(retrieval.exclude(tf.matmul(rows, table), pairs), len(items), k))
    ends = [best_of(step, 10) * len(users) / len(rows) for step in (product, excluded, selected)]
    return {"product": ends[0], "exclusion": ends[1] - ends[0], "selection": ends[2] - ends[1]}


def best_of(step: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest of some calls, after one that traces."""
    step()
    return min(timed(step)[0] for _ in range(times))


def timed(step: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    started = time.perf_counter()
    result = step()
    return time.perf_counter() - started, result


def rows_equal(
    users: np.ndarray,
    items: np.ndarray,
    seen: sparse.csr_matrix,
    values: np.ndarray,
    numbers: np.ndarray,
    checked: int = 64,
) -> int:
    """How many of `checked` random users got exactly numpy's items; equal scores within rounding may change places."""
    chosen = np.random.default_rng(1).choice(len(users), min(checked, len(users)), replace=False)
    equal = 0
    for user in chosen:
        scores = items @ users[user]
        scores[seen[user].indices] = -np.inf
        best = np.argsort(-scores, kind="stable")[: numbers.shape[1]]
        same_scores = np.allclose(scores[best], values[user], rtol=1e-5, atol=1e-5)
        equal += int(same_scores and np.allclose(scores[numbers[user]], values[user], rtol=1e-5, atol=1e-5))
    return equal


# ---- a world, and everything that is timed on it ----------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Who took what, `[U, I]` of ones: what is known, and what is held out."""

    train: sparse.csr_matrix
    test: sparse.csr_matrix

    @classmethod
    def made(cls, name: str) -> World:
        """The long-tailed world of a name in `WORLDS`, a random fifth of it held out. ConfigError for other names."""
        if name not in WORLDS:
            raise ConfigError(f"no world '{name}': {nearest(name, WORLDS)}")
        matrix = long_tail(*WORLDS[name]).tocoo()
        held_out = np.random.default_rng(1).random(matrix.nnz) < TEST_SHARE

        def part(rows: np.ndarray) -> sparse.csr_matrix:
            return sparse.csr_matrix((matrix.data[rows], (matrix.row[rows], matrix.col[rows])), shape=matrix.shape)

        return cls(part(~held_out), part(held_out))

    @property
    def question(self) -> Question:
        """All unseen items are ranked for everybody who has something held out."""
        return Question(self.train, self.train, self.test, np.ones(self.train.shape[1], bool))


WORLDS = {f"{name}-size": size for name, size in SIZES.items()}
"""Users, items and interactions, by the name of a world."""


def measure_world(
    name: str,
    members: Sequence[str] = FITTED,
    *,
    factors: int = 128,
    epochs: int = 15,
    rounds: int = 3,
    k: int = 20,
) -> dict[str, Any]:
    """Times factorisation and top-k beside `implicit`, and what it takes to fit the given members.

    Args:
        name: of the world.
        members: names in the registry; what is not there is skipped, and `skipped` says so.
        factors, epochs: of both factorisations.
        rounds: how often ours and the peer take turns; ratios are medians over rounds, the rest is the best round.
        k: items per user.
    """
    world = World.made(name)
    users, items = world.train.shape
    skipped = [f"{member} is not registered" for member in members if member not in set(MEMBERS)]
    if new_peer() is None:
        skipped.append(f"{PEER} is not installed (it comes with the extra dev): nothing stands beside ours")
    factorised, vectors = measure_factorisation(world, factors, epochs, rounds, k)
    return {
        "world": {"name": name, "users": users, "items": items, "train": world.train.nnz, "test": world.test.nnz},
        "settings": {"factors": factors, "epochs": epochs, "rounds": rounds, "k": k},
        "als": factorised,
        "top_k": measure_top_k(world, *vectors, rounds, k),
        "members": {
            member: in_own_process(measure_member, name, member, k) for member in members if member in set(MEMBERS)
        },
        "skipped": skipped,
    }


def new_peer(**settings: Any) -> Any:
    """A factorisation of `implicit` on the CPU, or None where it is not installed."""
    try:
        from implicit.cpu.als import AlternatingLeastSquares
    except ImportError:
        return None
    return with_one_blas_thread(lambda: AlternatingLeastSquares(**settings))()


def with_one_blas_thread(step: Callable[[], Any]) -> Callable[[], Any]:
    """How `implicit` asks to be called: its own threads then share the work, which is twice as fast."""

    def run() -> Any:
        with threadpool_limits(1, "blas"):
            return step()

    return run


def measure_factorisation(
    world: World, factors: int, epochs: int, rounds: int, k: int
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Seconds an epoch and recall of `ials` and of `implicit`, and our vectors of users and items.

    Both are whole fits divided by their epochs, so that what is prepared once is counted, and both minimise the same:
    divided by the weight of unobserved cells, our loss is that of Hu et al. 2008, which the peer has.
    """
    ours = MEMBERS["ials"](MEMBERS["ials"].Config(factors=factors, epochs=epochs, **FITTED_ON_THE_WORLD))
    fits: dict[str, Callable[[], Any]] = {"ours": lambda: _fit(ours, world.train)}
    theirs = new_peer(
        factors=factors, iterations=epochs, alpha=1.0 / UNOBSERVED, regularization=PENALTY, random_state=0
    )
    if theirs is not None:
        fits[PEER] = with_one_blas_thread(lambda: theirs.fit(world.train, show_progress=False))
    seconds = in_turns(fits, rounds)
    vectors = {"ours": user_and_item_vectors(ours, world.train)}
    if theirs is not None:
        vectors[PEER] = (theirs.user_factors, theirs.item_factors)
    result: dict[str, Any] = {
        system: {
            "epoch_s": min(seconds[system]) / epochs,
            f"recall@{k}": recall(world, retrieval.score_blocks(*tables, world.train, k)[1]),
        }
        for system, tables in vectors.items()
    }
    return {**result, **_ratio("speed_ratio", seconds)}, vectors["ours"]


def user_and_item_vectors(member: Member, histories: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """The vectors `[U, D]` and `[I, D]` whose products are the scores of a factorisation, users folded in."""
    scorer = member.scorer()
    items = scorer.item_table.numpy()
    users = np.zeros((histories.shape[0], items.shape[1]), np.float32)
    fold_in = tf.function(scorer.user, input_signature=[tf.TensorSpec([None, None], tf.int32)])
    for numbers, history in blocks(histories, np.arange(histories.shape[0])):
        users[numbers] = fold_in(history).numpy()
    return users, items


def measure_top_k(world: World, users: np.ndarray, items: np.ndarray, rounds: int, k: int) -> dict[str, Any]:
    """Users a second of `score_blocks` and of `implicit`'s recommend over the same vectors, and what a selection
    of the best k and a plain maximum allow when the scores are there already."""
    scores = tf.matmul(users[: retrieval.BLOCK], items, transpose_b=True)
    repeats = -(-len(users) // len(scores))
    selection, maximum = tf.function(lambda s: tf.math.top_k(s, k)), tf.function(lambda s: tf.reduce_max(s, axis=1))

    def over_blocks(step: Callable[[tf.Tensor], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(repeats):
                step(scores)

        return run

    steps: dict[str, Callable[[], Any]] = {
        "ours": lambda: retrieval.score_blocks(users, items, world.train, k),
        "tf.math.top_k alone": over_blocks(selection),
        "maximum alone": over_blocks(maximum),
    }
    theirs = new_peer(factors=users.shape[1])
    if theirs is not None:
        theirs.user_factors, theirs.item_factors = users, items
        steps[PEER] = with_one_blas_thread(lambda: theirs.recommend(np.arange(len(users)), world.train, N=k))
    for step in steps.values():
        step()  # traces and warms up
    seconds = in_turns(steps, rounds)
    shares = [alone / ours for ours, alone in zip(seconds["ours"], seconds["tf.math.top_k alone"], strict=True)]
    return {
        "users_per_s": {name: len(users) / min(taken) for name, taken in seconds.items()},
        **_ratio("speed_ratio", seconds),
        "share_of_top_k_alone": statistics.median(shares),
    }


def in_turns(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step)[0])
    return seconds


def _ratio(name: str, seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """How many times as fast as the peer ours is: the median over rounds; nothing without a peer."""
    if PEER not in seconds:
        return {}
    return {name: statistics.median(b / a for a, b in zip(seconds["ours"], seconds[PEER], strict=True))}


def recall(world: World, numbers: np.ndarray) -> float:
    """Mean recall of lists `[U, k]` of item numbers, over users who have something held out."""
    held_out = np.diff(world.test.indptr)
    hits = world.test[np.arange(len(numbers))[:, None], numbers].toarray().sum(axis=1)
    asked = held_out > 0
    return float((hits[asked] / held_out[asked]).mean())


def measure_member(world_name: str, member_name: str, k: int) -> dict[str, float]:
    """Seconds and memory of fitting one member with its default settings, and its recall on a part of the users."""
    world = World.made(world_name)
    member = MEMBERS[member_name](MEMBERS[member_name].Config())
    processor = time.process_time()
    with PeakMemory() as memory:
        seconds, _ = timed(lambda: _fit(member, world.train))
    processor = time.process_time() - processor  # of all threads: the same on a machine that others use, too
    asked = sample(world.question, JUDGED_USERS)
    started = time.perf_counter()
    ranked = Ranker(MemberScores({member_name: member}), {}, k)(asked)
    ranking = time.perf_counter() - started
    values = parse_metric(f"recall@{k}", "candidates").of_lists(ranked.lists[member_name])
    return {
        "fit_s": seconds,
        "fit_cpu_s": processor,
        "peak_mb": memory.bytes / 1e6,
        f"recall@{k}": float(np.mean(values)),
        "users_per_s": len(ranked.users) / ranking,
    }


# ---- approximate retrieval -------------------------------------------------------------------------------------


def measure_retrieval(items: int, dimensions: int, k: int, queries: int = 500) -> dict[str, Any]:
    """Builds an index over vectors with the spread of trained ones, and measures recall against latency.

    A factorisation is trained on the world of Gowalla's size. Its item vectors are widened to `items` by going part of
    the way to a neighbour's and a little aside, so that norms, clusters and correlations stay those of trained vectors
    (of Gaussian noise they would not be: there nothing is near anything). Latency is that of one query at a time;
    the queries that are reported are not those on which the number of probes was chosen.
    """
    world = World.made("gowalla-size")
    member = MEMBERS["ials"](MEMBERS["ials"].Config(factors=dimensions, epochs=8, **FITTED_ON_THE_WORLD))
    _fit(member, world.train)
    users, trained = user_and_item_vectors(member, world.train)
    vectors = widened(trained[world.train.getnnz(axis=0) > 0], items)
    chosen = np.random.default_rng(0).permutation(len(users))[: 2 * queries]
    tuned_on, asked = users[chosen[:queries]], users[chosen[queries:]]
    exact = exact_top(vectors, asked, k)
    product = tf.constant(vectors.T)
    scan = tf.function(lambda user: retrieval.top_k(tf.matmul(user, product), k))
    whole = latency(lambda: scan(tf.constant(asked[:1])), 50)
    with PeakMemory() as memory:
        seconds, index = timed(lambda: ApproximateIndex.build(vectors, tuned_on, ApproximateIndex.Config(k=k)))
    found = index.search(asked, k)[1]
    one_by_one = itertools.cycle(asked)
    return {
        "settings": {"items": items, "dimensions": dimensions, "k": k, "queries": len(asked)},
        "build_s": seconds,
        "build_peak_mb": memory.bytes / 1e6,
        "lists": index.lists,
        "probes": index.probes,
        f"recall@{k}": approximate_recall(found, exact),
        **latency(lambda: index.search(next(one_by_one)[None], k), len(asked)),
        "exact": whole,
        "table": [asdict(point) for point in index.table],
    }


# ---- the fast profile ------------------------------------------------------------------------------------------


def measure_fast(artifact: Path, rounds: int = 300, users: int = 100) -> dict[str, Any]:
    """How long `recommend_fast` and `recommend` take for one known user, beside the bare product with the student's
    item vectors and `tf.math.top_k`.

    All three are signatures of loaded SavedModels and take turns, so that ratios hold on a machine that others use. The
    bare one is given the user's vector, and knows of no ids, histories or items to leave out.

    Raises ConfigError for an artifact without a student.
    """
    loaded = load_savedmodel(artifact)
    if FAST not in loaded.signatures:
        raise ConfigError(
            f"the artifact must have the signature {FAST}; {artifact} has not. Name a recipe with a student in "
            "export.fast and export it again."
        )
    # Of a loaded module, only variables have names. Beyond the items that it was taught, the bias is -inf.
    vectors = loaded.student_items.numpy().T[np.isfinite(loaded.student_bias.numpy())]
    k = loaded.signatures[FAST].structured_outputs["scores"].shape[1]
    ids = pd.read_parquet(artifact / "users.parquet")[USER_ID].to_numpy()
    chosen = np.random.default_rng(0).permutation(ids)[:users]
    nothing = tf.constant([[""]])
    asked = itertools.cycle([tf.constant([user]) for user in chosen])
    given = {"history": nothing, "exclude": nothing, "include": nothing, "k": tf.constant([k])}
    with tempfile.TemporaryDirectory() as folder:
        bare = _bare(vectors, k, folder)
        user = tf.constant(vectors[:1])
        steps = {
            "bare": lambda: bare(user=user),
            FAST: lambda: loaded.signatures[FAST](user_id=next(asked), **given),
            "recommend": lambda: loaded.signatures["recommend"](user_id=next(asked), **given),
        }
        in_turns(steps, 20)  # warms up
        seconds = in_turns(steps, rounds)
    ratios = {name: np.divide(seconds[name], seconds["bare"]) for name in (FAST, "recommend")}
    return {
        "settings": {"items": len(vectors), "dimensions": vectors.shape[1], "k": k, "rounds": rounds},
        "p50_ms": {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()},
        "fastest_ms": {name: 1e3 * min(taken) for name, taken in seconds.items()},
        "times_the_bare_one": {name: float(np.median(ratio)) for name, ratio in ratios.items()},
    }


def _bare(vectors: np.ndarray, k: int, folder: str) -> Any:
    """User vectors `[B, D]` -> the k largest products with item vectors `[I, D]`: a signature of a SavedModel."""
    module = tf.Module()
    module.table = tf.Variable(vectors, trainable=False)

    @tf.function(input_signature=[tf.TensorSpec([None, vectors.shape[1]], tf.float32, name="user")])
    def bare(user: tf.Tensor) -> dict[str, tf.Tensor]:
        values, items = tf.math.top_k(tf.matmul(user, module.table, transpose_b=True), k)
        return {"scores": values, "items": items}

    tf.saved_model.save(module, folder, {"bare": bare.get_concrete_function()})
    return tf.saved_model.load(folder).signatures["bare"]


def widened(vectors: np.ndarray, items: int, seed: int = 0) -> np.ndarray:
    """Float32 `[items, D]` with the spread of `vectors` `[N, D]`, whose neighbours in number are alike."""
    random = np.random.default_rng(seed)
    first = random.integers(0, len(vectors), items)
    second = np.clip(first + random.integers(-NEAR, NEAR + 1, items), 0, len(vectors) - 1)
    share = random.random((items, 1), dtype=np.float32)
    result = vectors[first] + share * (vectors[second] - vectors[first])
    aside = random.standard_normal(result.shape, dtype=np.float32)
    return result + ASIDE * aside * np.abs(result).mean(axis=1, keepdims=True)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own, whose memory nothing has been given back to yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _fit(member: Member, matrix: sparse.csr_matrix) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = TrainingData(matrix, pd.DataFrame(index=range(matrix.shape[1])), Path(folder))
        member.fit(data, RunOptions(seed=0, directory=Path(folder), quiet=True))


# ---- as text ----------------------------------------------------------------------------------------------------


def as_text(measured: Mapping[str, Any], indent: int = 0) -> str:
    """Names and numbers, one a line; what stands in a mapping under its name."""
    lines = []
    for name, value in measured.items():
        label = " " * indent + name
        if isinstance(value, Mapping):
            lines += [label, as_text(value, indent + 2)] if value else []
        elif isinstance(value, list):
            lines += [f"{label}: {entry}" for entry in value]
        else:
            lines.append(f"{label:<30} {_shown(value)}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.3g}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"
