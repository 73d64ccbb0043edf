"""The guard: notices on each row that a member has gone wrong, by how far it lies from all others, and silences it.

A member whose answers are finite but senseless (a broken feature, weights of another version, noise) is believed by
every rule, and the more weight it has the worse. What gives it away is that no other member says anything like it. So
the guard measures distances between members, pair by pair: over classes the Bhattacharyya distance of calibrated
probabilities, over candidates one less the correlation of scores over the catalogue. What counts is the distance to the
*nearest* other member. It stays small for a sound member as long as one other is sound, however many are mad, where a
distance to the mean of the others would make all look wrong beside one; and a member that is unlike most (text among
collaborative ones) is judged by the one it is like.

The fit keeps for each member how far that nearest one normally is: a far quantile over rows that members were not
fitted on. With four members or more it is taken as if any one of the others were silent, whichever makes it largest, so
that a member does not look wrong because the one it resembles has failed. At inference the member that lies farthest
beyond its normal distance, in units of it, is silent for that row: at most one of a row, and one of three that can be
compared at least, because of two that disagree nobody can say who is wrong.

What it cannot see: members that go wrong together and alike (they vouch for each other); a member whose answers are
those to another user, as far as users are alike; and, among members that are alike in nothing, anything at all, because
there no distance is far.

Axes: B batch, S submodel, C class or candidate. Only operations that LiteRT has as builtins are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusion.compat import tf
from fusion.rules.normalisation import LARGEST, standardise

FEWEST = 3
"""Members that must speak for one of them to be silenced."""

CLOSE = 0.05
"""Members no farther apart than this are alike, whatever is normal: a correlation of .95, or an affinity of .95."""

LEAST = 1e-12
"""The smallest affinity of probabilities that is told from none; float32 knows little below."""


def class_distances(log_probabilities: Any, speaks: Any) -> Any:
    """Bhattacharyya distances `-ln Σ √(p·q)` between members (Bhattacharyya 1946), float32 `[B, S, S]`.

    It has no bound, so that a member that rules out what the others are sure of stands out from an honest mistake
    between two classes that are alike.

    Args:
        log_probabilities: calibrated, `[B, S, C]`, anything where silent.
        speaks: bool `[B, S, 1]`.

    Returns:
        `LARGEST` on the diagonal and between members that do not both speak.
    """
    roots = tf.where(speaks, tf.exp(tf.where(speaks, log_probabilities, 0.0) / 2.0), 0.0)
    affinity = tf.matmul(roots, roots, transpose_b=True)
    heard = tf.cast(speaks, tf.float32)
    both = tf.matmul(heard, heard, transpose_b=True)
    return _between_two(-tf.math.log(tf.maximum(affinity, LEAST)), both > 0.0)


def candidate_distances(scores: Any, speaks: Any) -> Any:
    """One less the cosine of two members' z-scores over the items on which both speak, float32 `[B, S, S]`: one less
    the correlation where they speak on the same items.

    For scores that are dealt anew among the items that has a mean of 1 whatever they are, and a deviation of
    1 / √(items - 1) (Pitman 1937, "Significance tests which may be applied to samples from any populations, II").

    Args:
        scores: `[B, S, C]` over the whole catalogue, on any scale, anything where silent.
        speaks: bool `[B, S, C]`.

    Returns:
        `LARGEST` on the diagonal and between members that cannot be compared: no item on which both speak, or all
        items alike to one of them.
    """
    values = standardise(scores, speaks)
    values = tf.where(speaks, values, 0.0)
    told = tf.cast(speaks, tf.float32)
    products = tf.matmul(values, values, transpose_b=True)
    squares = tf.matmul(tf.square(values), told, transpose_b=True)  # of the first, over what both speak on
    size = squares * tf.transpose(squares, [0, 2, 1])
    compared = size > 0.0
    return _between_two(1.0 - products / tf.sqrt(tf.where(compared, size, 1.0)), compared)


def _between_two(distances: Any, compared: Any) -> Any:
    other = ~np.eye(distances.shape[1], dtype=bool)[np.newaxis]
    return tf.where(tf.logical_and(compared, other), distances, LARGEST)


def implausible(distances: Any, normal: Any) -> Any:
    """Who is silenced, bool `[B, S]`: at most one of a row, and nobody unless three can be compared.

    Args:
        distances: `[B, S, S]` of `class_distances` or `candidate_distances`.
        normal: `[S]`, > 0, what `normal_distances` found.
    """
    compared = tf.reduce_sum(tf.cast(distances < LARGEST, tf.float32), axis=2)
    excess = tf.where(compared >= FEWEST - 1.0, tf.reduce_min(distances, axis=2) / normal, 0.0)
    farthest = excess >= tf.reduce_max(excess, axis=1, keepdims=True)
    # Where two are equally far beyond what is normal, nobody can say who is wrong.
    alone = tf.reduce_sum(tf.cast(farthest, tf.float32), axis=1, keepdims=True) < 2.0
    return tf.logical_and(tf.logical_and(farthest, alone), excess > 1.0)


def spread(found: Any, places: list[int], members: int) -> Any:
    """`found` `[B, s]` of the members at these places as `[B, S]`, False for the others."""
    column = [places.index(s) if s in places else len(places) for s in range(members)]
    return tf.gather(tf.concat([found, tf.zeros_like(found[:, :1])], axis=1), column, axis=1)


def normal_distances(distances: np.ndarray, quantile: float) -> np.ndarray:
    """How far the nearest other member normally is, float64 `[S]`; 0 where no row compares a member with two others.

    Args:
        distances: `[N, S, S]` of rows that the members were not fitted on.
        quantile: of the rows, that are taken as normal.
    """
    members = distances.shape[1]
    normal = _quantiles(distances, quantile)
    for silent in range(members if members > FEWEST else 0):
        without = distances.copy()
        without[:, :, silent] = LARGEST
        normal = np.maximum(normal, np.where(np.arange(members) == silent, 0.0, _quantiles(without, quantile)))
    return normal


def _quantiles(distances: np.ndarray, quantile: float) -> np.ndarray:
    judged = (distances < LARGEST).sum(axis=2) >= FEWEST - 1
    nearest, found = distances.min(axis=2), np.zeros(distances.shape[1])
    for member, rows in enumerate(judged.T):
        if rows.any():
            found[member] = max(CLOSE, float(np.quantile(nearest[rows, member], quantile, method="higher")))
    return found


def fit_guard(
    distances: np.ndarray, names: Sequence[str], shares: np.ndarray, quantile: float, *, witness: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Learns what distances are normal among the members with influence.

    Args:
        distances: `[N, S, S]` of rows that the members were not fitted on.
        names: of the members.
        shares: `[S]`, how much each counts.
        quantile: as `normal_distances` takes it.
        witness: whether a third member stands beside two that alone have influence.

    Returns:
        The normal distances, float32 `[S]`, 0 for those among whom the guard does not look; all of them where fewer
        than three are left. And a report: `members` among whom it looks; `witness`, the one of them without influence,
        or None; by member `normal`, and `silenced`, on which share of these rows it would be.
    """
    # By name, so that the order of members in a config does not matter.
    order = sorted(range(len(names)), key=lambda s: names[s])
    places, added = [s for s in order if shares[s] > 0], None
    if len(places) == FEWEST - 1 and witness:
        added = best_witness(distances, places, [s for s in order if shares[s] <= 0], quantile)
        places += [] if added is None else [added]
    normal = np.zeros(len(names), np.float32)
    if len(places) >= FEWEST:
        normal[places] = normal_distances(distances[:, places][:, :, places], quantile)
    places = guarding(normal)
    normal = np.where(np.isin(np.arange(len(names)), places), normal, np.float32(0))
    among, silenced = [names[s] for s in places], np.zeros(0)
    if places:
        silenced = implausible(tf.constant(distances[:, places][:, :, places]), normal[places]).numpy().mean(axis=0)
    return normal, {
        "members": among,
        "witness": names[added] if added in places else None,
        "normal": dict(zip(among, normal[places].tolist(), strict=True)),
        "silenced": dict(zip(among, silenced.tolist(), strict=True)),
    }


def guarding(normal: np.ndarray) -> list[int]:
    """Places of the members among whom a guard with these normal distances `[S]` looks; none where they are too few."""
    places: list[int] = np.flatnonzero(normal > 0).tolist()
    return places if len(places) >= FEWEST else []


def best_witness(distances: np.ndarray, judged: list[int], others: list[int], quantile: float) -> int | None:
    """Who of `others` should stand beside two members: the one that leaves them the smallest normal distances, the
    first of equals; None where none can be compared with both."""
    found: dict[int, float] = {}
    for other in others:
        three = [*judged, other]
        normal = _quantiles(distances[:, three][:, :, three], quantile)
        if (normal > 0).all():
            found[other] = float(normal[:-1].sum())
    return min(found, key=lambda other: found[other]) if found else None
