"""N2: bootstrap intervals cover the truth about as often as they say, and pairing finds what is there."""

from __future__ import annotations

import numpy as np
import pytest

from fusion.errors import ConfigError, DataError
from recsys.significance import interval, paired_difference, point


@pytest.mark.parametrize(("level", "least", "most"), [(0.95, 0.905, 0.975), (0.80, 0.74, 0.855)])
def test_intervals_cover_the_truth_at_the_stated_rate(level: float, least: float, most: float) -> None:
    """400 trials of 120 skewed values each; the true mean is 1. The bounds are three standard errors wide,
    and lower by the two points that the percentile bootstrap is known to lose on skewed data."""
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        found = interval(random.exponential(1.0, 120), samples=400, seed=trial, level=level)
        covered += found["low"] <= 1.0 <= found["high"]
    assert least <= covered / 400 <= most


def test_paired_difference_finds_what_single_intervals_hide() -> None:
    random = np.random.default_rng(1)
    easy = random.beta(0.5, 1.0, 300)  # users differ far more than systems do
    better, worse = easy + 0.02 + random.normal(0, 0.05, 300), easy
    found = paired_difference(better, worse, seed=3)
    assert 0 < found["low"] < 0.02 < found["high"] < 0.04 and found["n"] == 300
    assert interval(better)["low"] < interval(worse)["high"]


def test_no_difference_is_found_about_as_often_as_stated() -> None:
    """The negative control: equal systems are called different in about 5 of 100 comparisons."""
    random = np.random.default_rng(2)
    called = 0
    for trial in range(300):
        found = paired_difference(*random.normal(size=(2, 80)), samples=300, seed=trial)
        called += not found["low"] <= 0 <= found["high"]
    assert 0.015 <= called / 300 <= 0.10


def test_undefined_users_are_left_out_on_both_sides() -> None:
    a, b = np.array([1.0, np.nan, 3.0, 5.0]), np.array([0.0, 2.0, np.nan, 1.0])
    assert interval(a)["n"] == 3 and interval(a)["value"] == 3.0
    found = paired_difference(a, b)
    assert found["n"] == 2 and found["difference"] == 2.5


def test_edges() -> None:
    assert interval(np.array([0.25])) == {"value": 0.25, "low": 0.25, "high": 0.25, "n": 1}
    assert interval(np.array([np.nan])) == {"value": None, "low": None, "high": None, "n": 0}
    assert interval(np.zeros(0))["n"] == 0
    assert point(0.5, 7) == {"value": 0.5, "low": None, "high": None, "n": 7}
    assert point(float("nan"), 7)["value"] is None
    with pytest.raises(DataError, match="same users"):
        paired_difference(np.zeros(3), np.zeros(4))
    with pytest.raises(ConfigError, match="samples=0"):
        interval(np.zeros(3), samples=0)


def test_the_seed_decides_and_memory_is_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).random(50)
    whole = interval(values, seed=1)
    assert whole == interval(values, seed=1) and whole != interval(values, seed=2)
    monkeypatch.setattr("recsys.significance._DRAWS_AT_ONCE", 120)
    assert interval(values, seed=1) == whole
