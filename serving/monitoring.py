"""Watches what is asked and answered: rolling statistics against the training baseline, and alarms.

A monitor keeps for each series the last `window` observations, as numbers of bins: a histogram of the present costs a
counter, whatever the traffic. Every `every` requests it compares. An alarm is raised when something goes wrong, and
again after it was right in between, or every `again_s` seconds while it stays wrong: what handles it may have been in
a cool-down (`serving.actions`).

| kind | what is compared | alarm when |
|---|---|---|
| drift | the histogram of a number with that of training | the distance is more than chance, and matters (`drift`) |
| rate | share of flags: unknown users, silent members | off by `rate_change` and by five standard errors |
| errors | share of requests that failed | above `error_rate`, by five standard errors of it |
| latency | 95th percentile | above `latency_factor` × that of the first full window, and by 5 ms |
| spike | mean of a series in the last `every` requests | 6 deviations from its moving average (EWMA; Roberts 1959) |
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fusion.export.baseline import Baseline, Histogram, Series
from serving.drift import PRACTICAL, STATISTICS, bound

CERTAIN = 5.0
"""Standard errors beyond which a share has changed."""
SPIKE = 6.0
"""Deviations of a moving average that make a spike; values of small groups have tails."""
STEADY = 1e-3
"""The least deviation that is believed, as a share of the mean: a series that never changed has none."""
MEMORY = 0.1
"""Weight of the newest group in the moving averages."""
SETTLED = 20
"""Groups before a moving average is believed."""
LASTING = 10
"""Jumps in a row after which they are what is usual."""
MILLISECONDS = "milliseconds"
"""The series of times."""
SLOWER_MS = 5.0
"""An increase of latency below this is nobody's concern."""

Kind = Literal["drift", "rate", "errors", "latency", "spike"]


class MonitorSettings(BaseModel):
    """How closely traffic is watched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: int = Field(500, ge=50, le=100_000)
    """Observations that stand for the present."""
    every: int = Field(50, ge=1, le=10_000)
    """Requests between two comparisons."""
    statistic: Literal["psi", "ks", "js"] = "psi"
    """The distance that decides about drift; all three are reported."""
    chance: float = Field(1e-6, gt=0, lt=0.1)
    """Probability of an alarm by chance, for one comparison of one series."""
    rate_change: float = Field(0.05, gt=0, le=1)
    """The smallest change of a share that matters."""
    error_rate: float = Field(0.01, ge=0, le=1)
    """Share of failed requests that is borne."""
    latency_factor: float = Field(3.0, gt=1)
    """How many times slower than at first is too slow."""
    again_s: float = Field(60.0, gt=0)
    """Seconds after which what is still wrong is raised again; a rule with a longer cool-down waits for that."""


@dataclass(frozen=True)
class Observation:
    """One request, as the monitor sees it: no id, no text, nothing of a person.

    Attributes:
        numbers: by series, a value; what is missing is not counted.
        flags: by series, true or false.
        milliseconds: from question to answer.
        failed: whether it was our fault that there was no answer.
    """

    numbers: Mapping[str, float] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    milliseconds: float = 0.0
    failed: bool = False


@dataclass(frozen=True)
class Alarm:
    """Something is not as it was.

    Attributes:
        kind: a row of the table above.
        series: which.
        value: what was measured; `expected` what would have been right.
        sentence: for people.
        at: seconds since 1970.
        version: of the model that answered; None where nobody said.
    """

    kind: Kind
    series: str
    value: float
    expected: float
    sentence: str
    at: float
    version: int | None = None


class Monitor:
    """The rolling statistics of one model.

    Args:
        baseline: of the version that answers.
        settings: how closely.
        on_alarm: called with each alarm, after the request that raised it, outside of the lock.
        clock: seconds since 1970.
        version: that answers, for the alarms.
    """

    def __init__(
        self,
        baseline: Baseline,
        settings: MonitorSettings | None = None,
        on_alarm: Callable[[Alarm], None] | None = None,
        clock: Callable[[], float] = time.time,
        version: int | None = None,
    ) -> None:
        self.baseline = baseline
        self._version = version
        self.settings = settings or MonitorSettings()
        self._on_alarm = on_alarm
        self._clock = clock
        self._lock = threading.Lock()
        size = self.settings.window
        self._numbers = {name: _Bins(histogram, size) for name, histogram in baseline.numbers.items()}
        self._rates: dict[str, _Share] = {name: _Share(size) for name in baseline.rates}
        self._failed = _Share(size)
        self._latency: deque[float] = deque(maxlen=size)
        self._usual_ms: float | None = None
        self._groups = {name: _Moving() for name in (*baseline.numbers, MILLISECONDS)}
        self._raised: dict[tuple[Kind, str], float] = {}  # when last, of what is wrong now
        self.requests = 0

    def observe(self, seen: Observation) -> None:
        """Counts one request; every `settings.every` of them everything is compared."""
        with self._lock:
            self._count(seen)
            alarms = self._compare() if self.requests % self.settings.every == 0 else []
        for alarm in alarms:
            if self._on_alarm:
                self._on_alarm(alarm)

    def observe_all(self, series: Series, milliseconds: float) -> None:
        """Counts the rows of one call, each as a request that took `milliseconds`."""
        rows = max((len(values) for values in (*series.numbers.values(), *series.flags.values())), default=0)
        for row in range(rows):
            numbers = {name: float(values[row]) for name, values in series.numbers.items()}
            flags = {name: bool(values[row]) for name, values in series.flags.items()}
            self.observe(Observation(numbers, flags, milliseconds))

    def report(self) -> dict[str, Any]:
        """The present, for a metrics page: distances by series, shares, latency, and what is alarming now."""
        with self._lock:
            return {
                "requests": self.requests,
                "drift": {name: self._distances(bins) for name, bins in self._numbers.items() if bins.full},
                "rates": {
                    name: {"now": share.value, "training": self.baseline.rates[name]}
                    for name, share in self._rates.items()
                },
                "error_rate": self._failed.value,
                "p95_ms": _p95(self._latency),
                "alarms": sorted(f"{kind}:{series}" for kind, series in self._raised),
            }

    def _count(self, seen: Observation) -> None:
        self.requests += 1
        self._failed.add(seen.failed)
        if seen.failed:
            return
        self._latency.append(seen.milliseconds)
        self._groups[MILLISECONDS].add(seen.milliseconds)
        for name, value in seen.numbers.items():
            if name in self._numbers and math.isfinite(value):
                self._numbers[name].add(value)
                self._groups[name].add(value)
        for name, flag in seen.flags.items():
            if name in self._rates:
                self._rates[name].add(flag)

    def _compare(self) -> list[Alarm]:
        """Alarms of what was right at the comparison before, or was raised long enough ago."""
        found = [*self._drifts(), *self._changed_rates(), *self._errors(), *self._slower(), *self._spikes()]
        new = [alarm for alarm in found if alarm.at - self._last(alarm) >= self.settings.again_s]
        last = {(alarm.kind, alarm.series): self._last(alarm) for alarm in found}
        self._raised = last | {(alarm.kind, alarm.series): alarm.at for alarm in new}
        return new

    def _last(self, alarm: Alarm) -> float:
        """When an alarm of this kind was raised that still stands; -inf where none does."""
        return self._raised.get((alarm.kind, alarm.series), -math.inf)

    def _alarm(self, kind: Kind, series: str, value: float, expected: float, sentence: str) -> Alarm:
        return Alarm(kind, series, float(value), float(expected), sentence, self._clock(), self._version)

    def _distances(self, bins: _Bins) -> dict[str, float]:
        expected = np.array(bins.histogram.counts)
        return {name: statistic(expected, bins.counts) for name, statistic in STATISTICS.items()}

    def _drifts(self) -> list[Alarm]:
        found, name = [], self.settings.statistic
        for series, bins in self._numbers.items():
            if not bins.full:
                continue
            expected = np.array(bins.histogram.counts)
            value = STATISTICS[name](expected, bins.counts)
            chance = bound(name, len(expected), int(expected.sum()), len(bins), self.settings.chance)
            most = max(chance, PRACTICAL[name])
            if value > most:
                sentence = f"'{series}' is not distributed as in training: {name} {value:.3f}, above {most:.3f}."
                found.append(self._alarm("drift", series, value, most, sentence))
        return found

    def _changed_rates(self) -> list[Alarm]:
        found = []
        for series, share in self._rates.items():
            usual = self.baseline.rates[series]
            if share.full and _differs(share.value, usual, len(share), self.baseline.rows, self.settings.rate_change):
                sentence = f"'{series}' is true for {share.value:.1%} of requests; in training it was {usual:.1%}."
                found.append(self._alarm("rate", series, share.value, usual, sentence))
        return found

    def _errors(self) -> list[Alarm]:
        most, share = self.settings.error_rate, self._failed
        if not share.full or share.value <= most + CERTAIN * math.sqrt(max(most, 1 / len(share)) / len(share)):
            return []
        sentence = f"{share.value:.1%} of the last {len(share)} requests failed; {most:.1%} is borne."
        return [self._alarm("errors", "requests", share.value, most, sentence)]

    def _slower(self) -> list[Alarm]:
        if len(self._latency) < self.settings.window:
            return []
        now = _p95(self._latency)
        if self._usual_ms is None:
            self._usual_ms = now
        most = max(self._usual_ms * self.settings.latency_factor, self._usual_ms + SLOWER_MS)
        if now <= most:
            return []
        sentence = f"95 % of answers take up to {now:.1f} ms; at first it was {self._usual_ms:.1f} ms."
        return [self._alarm("latency", MILLISECONDS, now, self._usual_ms, sentence)]

    def _spikes(self) -> list[Alarm]:
        found = []
        for series, group in self._groups.items():
            value, expected, deviations = group.close()
            slight = series == MILLISECONDS and value - expected < SLOWER_MS
            if deviations > SPIKE and not slight:
                sentence = f"'{series}' jumped to a mean of {value:.3g} from about {expected:.3g}."
                found.append(self._alarm("spike", series, value, expected, sentence))
        return found


class _Window:
    """How often each bin was met among the last `size` values."""

    def __init__(self, bins: int, size: int) -> None:
        self.counts = np.zeros(bins, np.int64)
        self._last: deque[int] = deque()
        self._size = size

    def __len__(self) -> int:
        return len(self._last)

    @property
    def full(self) -> bool:
        return len(self._last) == self._size

    def put(self, place: int) -> None:
        if self.full:
            self.counts[self._last.popleft()] -= 1
        self._last.append(place)
        self.counts[place] += 1


class _Bins(_Window):
    """The last values of a number, as counts of the bins of its training histogram."""

    def __init__(self, histogram: Histogram, size: int) -> None:
        super().__init__(len(histogram.counts), size)
        self.histogram = histogram

    def add(self, value: float) -> None:
        self.put(self.histogram.bin_of(value))


class _Share(_Window):
    """The share of true ones among the last flags."""

    def __init__(self, size: int) -> None:
        super().__init__(2, size)

    @property
    def value(self) -> float:
        return float(self.counts[1]) / len(self) if len(self) else 0.0

    def add(self, flag: bool) -> None:
        self.put(int(flag))


class _Moving:
    """Exponentially weighted mean and variance of the means of groups of values."""

    def __init__(self) -> None:
        self._sum, self._n = 0.0, 0
        self._mean, self._variance, self._groups = 0.0, 0.0, 0
        self._jumps = 0  # in a row

    def add(self, value: float) -> None:
        self._sum += value
        self._n += 1

    def close(self) -> tuple[float, float, float]:
        """Ends a group: its mean, what was expected, and how many deviations lie between; 0 until settled.

        A jump is not learned from, so that it does not become what is usual before somebody looked. After LASTING of
        them in a row the average starts anew, or it would stand still for good and no later jump be one; that a step
        stays is for the comparison of whole windows to say.
        """
        if not self._n:
            return 0.0, self._mean, 0.0
        value, expected = self._sum / self._n, self._mean
        self._sum, self._n = 0.0, 0
        away = value - expected
        usual = max(math.sqrt(self._variance), STEADY * abs(expected), 1e-12)
        deviations = abs(away) / usual if self._groups >= SETTLED else 0.0
        self._jumps = self._jumps + 1 if deviations > SPIKE else 0
        if self._jumps == LASTING:
            self._mean, self._variance, self._groups, self._jumps = 0.0, 0.0, 0, 0
        elif deviations <= SPIKE:
            weight = max(MEMORY, 1 / (self._groups + 1))  # plain means at first
            self._mean += weight * away
            self._variance = (1 - weight) * (self._variance + weight * away * away)
            self._groups += 1
        return value, expected, deviations


def _differs(now: float, usual: float, n: int, rows: int, least: float) -> bool:
    pooled = (now * n + usual * rows) / (n + rows)
    error = math.sqrt(max(pooled * (1 - pooled), 1e-12) * (1 / n + 1 / max(rows, 1)))
    return abs(now - usual) > max(least, CERTAIN * error)


def _p95(values: deque[float]) -> float:
    return float(np.percentile(values, 95)) if values else 0.0
