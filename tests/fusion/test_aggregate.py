"""Parameters of several members as one: means, weighted means, greedy soups."""

from __future__ import annotations

import numpy as np
import pytest

from fusion.errors import DataError
from fusion.training.aggregate import greedy_soup, mean_state, validation_weights


def state(seed: int, rows: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "kernel": random.normal(size=(rows, 4)).astype(np.float32),
        "bias": random.normal(size=4).astype(np.float32),
        "classes": np.int64(4),
        "words": np.array(["a", "b"]),
    }


class TestMean:
    def test_equals_the_mean(self) -> None:
        """G5: to 1e-7, array by array; what is no parameter is kept."""
        states = {f"run{seed}": state(seed) for seed in range(5)}
        found = mean_state(states)
        for key in ("kernel", "bias"):
            expected = np.mean([s[key].astype(np.float64) for s in states.values()], axis=0)
            np.testing.assert_allclose(found[key], expected, rtol=0, atol=1e-7)
            assert found[key].dtype == np.float32
        assert found["classes"] == 4 and found["words"].tolist() == ["a", "b"]

    def test_weights_count_examples(self) -> None:
        """G6: a client with three times the rows counts three times (FedAvg); weight 0 is leaving out."""
        one, two, three = state(1), state(2), state(3)
        found = mean_state({"one": one, "two": two, "three": three}, {"one": 30, "two": 10, "three": 0})
        np.testing.assert_allclose(found["bias"], 0.75 * one["bias"] + 0.25 * two["bias"], rtol=1e-6)

    def test_weights_follow_validation(self) -> None:
        """G6: by the metric, or by its inverse where low is good; alike where none reaches anything."""
        assert validation_weights({"a": 0.9, "b": 0.3}, higher_is_better=True) == {"a": 0.9, "b": 0.3}
        assert validation_weights({"a": 0.5, "b": 2.0}, higher_is_better=False) == {"a": 2.0, "b": 0.5}
        assert validation_weights({"a": 0.0, "b": 0.0}, higher_is_better=True) == {"a": 1.0, "b": 1.0}

    def test_a_mean_of_one_is_that_one_and_shares_no_memory(self) -> None:
        one = state(1)
        found = mean_state({"one": one})
        np.testing.assert_array_equal(found["kernel"], one["kernel"])
        found["kernel"][:] = 0
        assert one["kernel"].any()

    def test_refuses_other_shapes_and_names_them(self) -> None:
        """G5, E-14: different structures cannot be averaged; both shapes are said."""
        with pytest.raises(DataError, match=r"'kernel' is float32 \(3, 4\) in 'a' and float32 \(5, 4\) in 'b'"):
            mean_state({"a": state(1), "b": state(2, rows=5)})

    def test_refuses_other_arrays_vocabularies_and_weights(self) -> None:
        lacking = {key: value for key, value in state(2).items() if key != "bias"}
        with pytest.raises(DataError, match="'bias' is in one of 'a' and 'b' alone"):
            mean_state({"a": state(1), "b": lacking})
        with pytest.raises(DataError, match="'words' must be the same in 'a' and 'b'"):
            mean_state({"a": state(1), "b": {**state(2), "words": np.array(["a", "c"])}})
        for weights in ({"a": 1.0}, {"a": -1.0, "b": 2.0}, {"a": 0.0, "b": 0.0}, {"a": np.nan, "b": 1.0}):
            with pytest.raises(DataError, match="must have a weight from 0 upwards"):
                mean_state({"a": state(1), "b": state(2)}, weights)
        with pytest.raises(DataError, match="received none"):
            mean_state({})


class TestGreedySoup:
    def test_takes_what_helps_and_leaves_the_rest(self) -> None:
        """G6: the target is the mean of two states; the third would pull it away."""
        states = {"a": state(1), "b": state(2), "far": {k: v + 5 if k == "bias" else v for k, v in state(3).items()}}
        target = (states["a"]["bias"] + states["b"]["bias"]) / 2

        def value(mean: dict[str, np.ndarray]) -> float:
            return -float(np.abs(mean["bias"] - target).sum())

        alone = {name: value(dict(s)) for name, s in states.items()}
        soup = greedy_soup(states, alone, value)
        assert set(soup.chosen) == {"a", "b"}
        np.testing.assert_allclose(soup.state["bias"], target, rtol=1e-6)
        assert soup.value == pytest.approx(0.0, abs=1e-5) and soup.value >= max(alone.values())

    def test_never_worse_than_the_best(self) -> None:
        states = {f"run{seed}": state(seed) for seed in range(4)}
        alone = {name: float(number) for number, name in enumerate(states)}
        soup = greedy_soup(states, alone, lambda mean: -1.0)
        assert soup.chosen == ("run3",) and soup.value == 3.0
        np.testing.assert_array_equal(soup.state["bias"], states["run3"]["bias"])
