"""Several sets of weights of one shape as one: means, weighted means, greedy soups.

Averaging parameters only makes sense where they mean the same in every set: runs that went out from the same weights
(fine-tuned copies of one pretrained encoder, clients of one round of federated training, epochs of one run). Members of
different shapes are fused by their answers instead (`fusion.rules`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusion.errors import DataError

State = Mapping[str, np.ndarray]
"""Named arrays of one member, as its `state()` gives them."""


@dataclass(frozen=True)
class Soup:
    """What `greedy_soup` found: the mean of the chosen states, which they were, in what order, and how good it is."""

    state: dict[str, np.ndarray]
    chosen: tuple[str, ...]
    value: float


def mean_state(states: Mapping[str, State], weights: Mapping[str, float] | None = None) -> dict[str, np.ndarray]:
    """The mean of the floating-point arrays of several states, `Σ w·θ / Σ w`; other arrays must be equal in all.

    Summed in float64, so that the result is the mean to the last digit of the arrays' own type.

    Args:
        states: by name, all with the same arrays.
        weights: by the same names, ≥ 0 with a positive sum: validation scores, or numbers of examples (McMahan et al.
            2017, FedAvg); None means equal.

    Raises:
        DataError: no state, weights that do not fit, or arrays that differ in name, shape or (unless floating) value.
    """
    names = list(states)
    if not names:
        raise DataError("parameters can be aggregated of one member or more; received none.")
    shares = _shares(names, weights)
    first = states[names[0]]
    for name in names[1:]:
        check_same(names[0], first, name, states[name])
    result = {}
    for key, array in first.items():
        if array.dtype.kind != "f":
            result[key] = np.array(array)
            continue
        total = np.zeros(array.shape, np.float64)
        for name, share in zip(names, shares, strict=True):
            total += share * states[name][key]
        result[key] = total.astype(array.dtype)
    return result


def greedy_soup(
    states: Mapping[str, State], values: Mapping[str, float], evaluate: Callable[[dict[str, np.ndarray]], float]
) -> Soup:
    """Adds states to the mean, best first, each only where the mean gets no worse (Wortsman et al. 2022, recipe 1).

    So the soup is never worse than the best single state on what `evaluate` looks at.

    Args:
        states: by name, all with the same arrays.
        values: how good each state is by itself on held-out rows, higher is better.
        evaluate: the same of a mean of states.
    """
    order = sorted(states, key=lambda name: (-values[name], name))
    for name in order[1:]:
        check_same(order[0], states[order[0]], name, states[name])
    chosen, best = [order[0]], values[order[0]]
    for name in order[1:]:
        value = evaluate(mean_state({n: states[n] for n in [*chosen, name]}))
        if value >= best:
            chosen, best = [*chosen, name], value
    return Soup(mean_state({name: states[name] for name in chosen}), tuple(chosen), best)


def _shares(names: Sequence[str], weights: Mapping[str, float] | None) -> np.ndarray:
    if weights is None:
        return np.full(len(names), 1.0 / len(names))
    values = np.array([weights.get(name, np.nan) for name in names], np.float64)
    if set(weights) != set(names) or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise DataError(
            f"each of {', '.join(names)} must have a weight from 0 upwards, and one of them above 0; received "
            f"{dict(weights)}. Leave the weights out for a plain mean."
        )
    return values / values.sum()


def validation_weights(values: Mapping[str, float], higher_is_better: bool) -> dict[str, float]:
    """What states weigh in a mean by what they reach on validation: the value, or 1 / value where low is good; all
    alike where none reaches anything."""
    if not any(values.values()):
        return dict.fromkeys(values, 1.0)
    return {name: value if higher_is_better else 1.0 / max(value, 1e-12) for name, value in values.items()}


def check_same(one: str, first: State, other: str, second: State) -> None:
    """Raises DataError, naming the two shapes, unless both states are of one form."""
    differing = sorted(set(first) ^ set(second))
    if differing:
        raise DataError(
            f"parameters can only be averaged where all members have the same arrays; '{differing[0]}' is in one of "
            f"'{one}' and '{other}' alone. Fuse their answers by a rule instead."
        )
    for key, array in first.items():
        if array.shape != second[key].shape or array.dtype != second[key].dtype:
            raise DataError(
                f"parameters can only be averaged where shapes are equal; '{key}' is {array.dtype} {array.shape} in "
                f"'{one}' and {second[key].dtype} {second[key].shape} in '{other}'. Fuse answers by a rule instead."
            )
        if array.dtype.kind != "f" and not np.array_equal(array, second[key]):
            raise DataError(
                f"'{key}' must be the same in '{one}' and '{other}', because it cannot be averaged (it is "
                f"{array.dtype}); it differs. Fit both on the same vocabulary and classes."
            )
