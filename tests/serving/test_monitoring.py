"""Drift, changed rates, errors, latency and spikes: alarms where something was injected, silence on a clean replay."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fusion.export.baseline import Baseline, Histogram, Series, of_classes, of_lists
from serving.drift import bound, js, ks, psi
from serving.monitoring import Monitor, MonitorSettings, Observation

MEMBERS = ("text", "taste")


def questions(rng, rows, *, shift=0.0, silent=0.1):
    """Series of a made-up model: a number and a flag."""
    return Series({"top_score": rng.normal(shift, 1.0, rows)}, {"silent_text": rng.random(rows) < silent})


@pytest.fixture
def watched():
    """A monitor over a baseline of 5,000 questions, and the alarms that it raised."""
    alarms = []
    baseline = Baseline.of(questions(np.random.default_rng(0), 5000))
    return Monitor(baseline, on_alarm=alarms.append, clock=lambda: 12.0), alarms


def test_distances_by_hand():
    """P2: PSI, JS and KS of (1/2, 1/2) and (1/4, 3/4); large counts, so that smoothing does not show."""
    first, second = np.array([500_000, 500_000]), np.array([250_000, 750_000])
    assert psi(first, second) == pytest.approx(0.25 * np.log(2) + 0.25 * np.log(1.5), abs=1e-5)
    middle = np.array([0.375, 0.625])
    by_hand = (stats.entropy([0.5, 0.5], middle) + stats.entropy([0.25, 0.75], middle)) / 2
    assert js(first, second) == pytest.approx(by_hand, abs=1e-5)
    assert ks(first, second) == pytest.approx(0.25)
    assert psi(first, first) == js(first, first) == ks(first, first) == 0.0
    assert np.isfinite(psi(np.array([5, 0]), np.array([0, 5])))


@pytest.mark.parametrize("name, distance", [("psi", psi), ("js", js), ("ks", ks)])
def test_bounds_are_those_of_chance(name, distance):
    rng = np.random.default_rng(1)
    shares = np.full(10, 0.1)
    found = [distance(rng.multinomial(4000, shares), rng.multinomial(500, shares)) for _ in range(4000)]
    above = np.mean(np.array(found) > bound(name, 10, 4000, 500, 0.05))
    assert 0.005 < above < 0.07  # KS over ten bins is below its bound for numbers without bins
    assert not np.any(np.array(found) > bound(name, 10, 4000, 500, 1e-6))


def test_histograms_have_even_bins_and_survive_json():
    values = np.random.default_rng(2).normal(size=1000)
    histogram = Histogram.of(values)
    assert all(99 <= count <= 101 for count in histogram.counts) and len(histogram.counts) == 10
    assert sum(histogram.bin_of(value) == 3 for value in values) == histogram.counts[3]
    assert histogram.bin_of(-9.0) == 0 and histogram.bin_of(9.0) == 9
    assert Histogram.of([1.0, 1.0, 1.0, 2.0]).counts == (3, 1)
    with pytest.raises(ValueError, match="at least one finite"):
        Histogram.of([np.nan])


def test_a_clean_replay_raises_no_alarm(watched):
    """P2: 20,000 requests as in training."""
    monitor, alarms = watched
    rng = np.random.default_rng(3)
    for _ in range(20_000 // 50):
        monitor.observe_all(questions(rng, 50), milliseconds=float(rng.lognormal(1.0, 0.3)))
    assert alarms == []
    report = monitor.report()
    assert report["requests"] == 20_000 and report["alarms"] == []
    assert set(report["drift"]["top_score"]) == {"psi", "js", "ks"}


@pytest.mark.parametrize("statistic", ["psi", "js", "ks"])
def test_drift_is_noticed_within_a_thousand_requests(statistic):
    """P2: scores that lie a deviation higher."""
    alarms = []
    baseline = Baseline.of(questions(np.random.default_rng(0), 5000))
    monitor = Monitor(baseline, MonitorSettings(statistic=statistic), alarms.append)
    rng = np.random.default_rng(4)
    monitor.observe_all(questions(rng, 1000), 3.0)
    assert alarms == []
    monitor.observe_all(questions(rng, 1000, shift=1.0), 3.0)
    assert "drift" in {alarm.kind for alarm in alarms if alarm.series == "top_score"}
    assert statistic in next(alarm.sentence for alarm in alarms if alarm.kind == "drift")


def test_a_modality_that_goes_missing_is_noticed(watched):
    """P2: a tenth of training questions lack a text, then three tenths do."""
    monitor, alarms = watched
    rng = np.random.default_rng(5)
    monitor.observe_all(questions(rng, 1000), 3.0)
    monitor.observe_all(questions(rng, 1000, silent=0.3), 3.0)
    assert [(alarm.kind, alarm.series) for alarm in alarms] == [("rate", "silent_text")]
    assert "in training it was 9" in alarms[0].sentence or "in training it was 10" in alarms[0].sentence


def test_errors_and_slowness_are_noticed(watched):
    monitor, alarms = watched
    for row in range(1000):
        monitor.observe(Observation(milliseconds=3.0, failed=row >= 500 and row % 10 == 0))
    assert [alarm.kind for alarm in alarms] == ["errors"]
    alarms.clear()
    for _ in range(1000):
        monitor.observe(Observation(milliseconds=30.0))
    assert {"latency", "spike"} == {alarm.kind for alarm in alarms}


def test_a_spike_is_noticed_and_not_learned(watched):
    monitor, alarms = watched
    rng = np.random.default_rng(6)
    monitor.observe_all(questions(rng, 2000), 3.0)
    monitor.observe_all(questions(rng, 50, shift=4.0), 3.0)
    assert ("spike", "top_score") in {(alarm.kind, alarm.series) for alarm in alarms}


def test_an_alarm_is_raised_once_until_it_was_right_again(watched):
    monitor, alarms = watched
    rng = np.random.default_rng(7)
    for silent in (0.1, 0.5, 0.5, 0.5, 0.1, 0.1, 0.5, 0.5):
        monitor.observe_all(questions(rng, 1000, silent=silent), 3.0)
    assert len(alarms) == 2
    assert all(alarm.at == 12.0 for alarm in alarms)


def test_an_alarm_that_lasts_is_raised_again_after_a_while():
    """P2: or a rule that was in its cool-down would never hear of it."""
    now, alarms = [0.0], []
    baseline = Baseline.of(questions(np.random.default_rng(0), 5000))
    monitor = Monitor(baseline, MonitorSettings(again_s=60), alarms.append, lambda: now[0])
    rng = np.random.default_rng(7)
    for now[0], silent in ((0.0, 0.1), (10.0, 0.5), (69.0, 0.5), (70.0, 0.5), (129.0, 0.5), (131.0, 0.5)):
        monitor.observe_all(questions(rng, 1000, silent=silent), 3.0)
    assert [(alarm.series, alarm.at) for alarm in alarms] == [("silent_text", at) for at in (10.0, 70.0, 131.0)]


def test_a_step_that_stays_does_not_deafen_to_later_spikes():
    """P2: the step is small beside the bins, so that only the moving average can have noticed it."""
    alarms, rng = [], np.random.default_rng(9)
    baseline = Baseline({"top_score": Histogram((0.3, 0.5), (0, 5000, 0))}, {}, 5000)
    monitor = Monitor(baseline, on_alarm=alarms.append, clock=lambda: 12.0)
    for middle, rows in ((0.40, 2000), (0.42, 3000), (0.495, 50)):
        monitor.observe_all(Series({"top_score": rng.normal(middle, 0.002, rows)}, {}), 3.0)
    assert [(alarm.kind, alarm.expected) for alarm in alarms] == [
        ("spike", pytest.approx(0.40, abs=0.001)),
        ("spike", pytest.approx(0.42, abs=0.001)),
    ]


def test_series_of_lists():
    """P1: what is counted of a list holds no id of a user or of an item."""
    answer = {
        "item_ids": np.array([[b"a", b"b"], [b"", b""]], object),
        "scores": np.array([[3.0, 1.0], [0.0, 0.0]]),
        "contributions": np.array([[[0.0, 0.0], [3.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]),
        "known_user": np.array([True, False]),
    }
    series = of_lists(np.array([[b"x", b"y"], [b"", b""]], object), answer, MEMBERS)
    np.testing.assert_equal(series.numbers["history_length"], [2.0, np.nan])
    np.testing.assert_equal(series.numbers["top_score"], [3.0, np.nan])
    np.testing.assert_equal(series.numbers["share_taste"], [3.0, np.nan])
    flags = {name: values.tolist() for name, values in series.flags.items()}
    assert flags == {
        "unknown_user": [False, True],
        "empty_list": [False, True],
        "silent_text": [True, False],
        "silent_taste": [False, False],
    }


def test_series_of_classes():
    series = of_classes(np.array([[0.9, 0.1], [0.3, 0.7]]), np.array([[1.0, 0.0], [1.0, 1.0]]), MEMBERS)
    np.testing.assert_allclose(series.numbers["confidence"], [0.9, 0.7])
    assert series.numbers["class"].tolist() == [0.0, 1.0]
    assert series.flags["silent_taste"].tolist() == [True, False]


def test_the_baseline_is_a_file_of_the_artifact(tmp_path):
    import json

    baseline = Baseline.of(questions(np.random.default_rng(8), 100))
    (tmp_path / "baseline.json").write_text(json.dumps(baseline.as_json()), encoding="utf-8")
    assert Baseline.read(tmp_path) == baseline
    assert Baseline.read(tmp_path / "none") == Baseline()
