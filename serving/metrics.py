"""Numbers for Prometheus, under TensorFlow Serving's names where it has the same number, so that its dashboards fit.

Latencies are in microseconds, as there. Worker processes that share one port write their numbers to a folder that they
share too, so that whichever of them is asked answers with the sum. prometheus_client is not used for
this: it appends `_total` to every counter, which is another name.
"""

from __future__ import annotations

import bisect
import itertools
import json
import logging
import operator
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from serving.files import replace_text

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MICROSECONDS = tuple(10 * 1.8**step for step in range(33))
"""Upper bounds of the latency buckets: 10 µs to 24 minutes, those of TensorFlow Serving."""
ROWS = tuple(float(2**step) for step in range(13))
ROOT = ":tensorflow:serving:"
CPU = "serving_cpu_seconds"
NOT_ADDED = {"serving_version_state", "serving_drift"}
"""Gauges that are not added up: of what several processes say, the largest stands."""

Labels = tuple[str, ...]


@dataclass
class _Metric:
    """One name. A sample is a number, or for a histogram the counts of its buckets and then the sum."""

    name: str
    kind: str
    text: str
    labels: Labels
    bounds: tuple[float, ...] = ()
    samples: dict[Labels, list[float]] = field(default_factory=dict)


class Metrics:
    """All numbers of one process. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared: Path | None = None
        self._gauges: list[Callable[[], Iterable[tuple[str, Labels, float]]]] = []
        every = (
            _Metric(f"{ROOT}request_count", "counter", "Requests by model and status.", ("model_name", "status")),
            _Metric(
                f"{ROOT}request_latency",
                "histogram",
                "Microseconds from a request to its answer.",
                ("model_name", "API", "entrypoint"),
                MICROSECONDS,
            ),
            _Metric(
                f"{ROOT}runtime_latency",
                "histogram",
                "Microseconds of one call of the graph.",
                ("model_name",),
                MICROSECONDS,
            ),
            _Metric(
                f"{ROOT}batching_session:queuing_latency",
                "histogram",
                "Microseconds that the oldest request of a batch waited.",
                ("model_name",),
                MICROSECONDS,
            ),
            _Metric(
                f"{ROOT}batching:processed_batch_size",
                "histogram",
                "Rows of one call of the graph.",
                ("model_name",),
                ROWS,
            ),
            _Metric("serving_load_failures", "counter", "Versions that could not be loaded.", ("model_name",)),
            _Metric("serving_alarms", "counter", "Alarms by what they are about.", ("model_name", "kind", "series")),
            _Metric(CPU, "counter", "Processor time of the server's processes: over calls, what an answer costs.", ()),
            _Metric("serving_kept_answers", "counter", "Calls that were answered without the graph.", ("model_name",)),
            _Metric("serving_unwatched", "counter", "Calls that the monitor had no time for.", ("model_name",)),
            _Metric("serving_queue_depth", "gauge", "Requests that wait for the graph.", ("model_name", "version")),
            _Metric(
                "serving_drift",
                "gauge",
                "Distance of the last requests from those of training.",
                ("model_name", "version", "series", "measure"),
            ),
            _Metric(
                "serving_version_state",
                "gauge",
                "State of each version: 10 start, 20 loading, 30 available, 40 unloading, 50 end.",
                ("model_name", "version"),
            ),
        )
        self._metrics = {metric.name: metric for metric in every}

    def request(self, model: str, api: str, entrypoint: str, status: str, seconds: float) -> None:
        """Counts one answered request.

        Args:
            model: the model's name as far as it is one that is served, else ''. A caller must not make new series.
            api: `Predict`, `Classify`, `Recommend` ...
            entrypoint: `GRPC` or `REST`.
            status: the gRPC code's name, `OK` where all went well.
            seconds: from the request to the answer.
        """
        self.count(f"{ROOT}request_count", (model, status))
        self.observe(f"{ROOT}request_latency", (model, api, entrypoint), seconds * 1e6)

    def batch(self, model: str, rows: int, seconds: float, waited: float) -> None:
        """Counts one call of the graph, of so many rows, whose oldest request waited for so many seconds."""
        self.observe(f"{ROOT}runtime_latency", (model,), seconds * 1e6)
        self.observe(f"{ROOT}batching_session:queuing_latency", (model,), waited * 1e6)
        self.observe(f"{ROOT}batching:processed_batch_size", (model,), rows)

    def count(self, name: str, labels: Labels) -> None:
        """Adds 1 to a counter."""
        with self._lock:
            self._metrics[name].samples.setdefault(labels, [0.0])[0] += 1

    def observe(self, name: str, labels: Labels, value: float) -> None:
        """Adds one value to a histogram."""
        metric = self._metrics[name]
        place = bisect.bisect_left(metric.bounds, value)
        with self._lock:
            sample = metric.samples.setdefault(labels, [0.0] * (len(metric.bounds) + 2))
            sample[place] += 1
            sample[-1] += value

    def watch(self, gauges: Callable[[], Iterable[tuple[str, Labels, float]]]) -> Callable[[], None]:
        """Asks `gauges` for (name, labels, value) whenever the numbers are read; returns how to stop it."""
        self._gauges.append(gauges)
        return lambda: self._gauges.remove(gauges)

    def value(self, name: str, labels: Labels) -> float:
        """The number of a counter, or how many values a histogram has seen; 0 where there is none."""
        with self._lock:
            metric = self._metrics[name]
            sample = metric.samples.get(labels, [0.0])
            return sum(sample[:-1]) if metric.bounds else sample[0]

    def share(self, folder: Path) -> None:
        """From now on the numbers of all processes that share `folder` are put together; `save` writes our own."""
        self._shared = folder

    def save(self) -> None:
        """Writes this process's numbers for the others. A disk that refuses costs numbers, not the server."""
        if self._shared is not None:
            path = self._shared / f"{os.getpid()}.json"
            rows = [[name, labels, sample] for (name, labels), sample in self._own().items()]
            try:
                replace_text(path, json.dumps(rows))
            except OSError as error:
                logger.error("the numbers for the other processes cannot be written: %s", error.strerror)

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        samples = self._own()
        for name, labels, sample in self._of_others():
            metric, key = self._metrics[name], (name, labels)
            own = samples.get(key, [0.0] * len(sample))
            together = max if metric.name in NOT_ADDED else operator.add
            samples[key] = [together(a, b) for a, b in zip(own, sample, strict=True)]
        lines = []
        for name, metric in self._metrics.items():
            lines += [f"# HELP {name} {metric.text}", f"# TYPE {name} {metric.kind}"]
            for (_, values), numbers in sorted(item for item in samples.items() if item[0][0] == name):
                lines += _lines(metric, values, numbers)
        return "\n".join([*lines, ""]).encode()

    def _of_others(self) -> Iterator[tuple[str, Labels, list[float]]]:
        """What other processes wrote. Of those that have ended the counts stay, so that no counter ever falls."""
        for path in self._shared.glob("[0-9]*.json") if self._shared else ():  # orders are kept there as well
            if path.stem == str(os.getpid()):
                continue
            alive = psutil.pid_exists(int(path.stem))
            for name, labels, sample in json.loads(path.read_text(encoding="utf-8")):
                if alive or self._metrics[name].kind != "gauge":
                    yield name, tuple(labels), sample

    def _own(self) -> dict[tuple[str, Labels], list[float]]:
        with self._lock:
            found = {
                (metric.name, labels): list(sample)
                for metric in self._metrics.values()
                for labels, sample in metric.samples.items()
            }
        found[CPU, ()] = [time.process_time()]
        for gauges in list(self._gauges):
            found |= {(name, labels): [value] for name, labels, value in gauges()}
        return found


def _lines(metric: _Metric, labels: Labels, sample: list[float]) -> Iterator[str]:
    named = [f'{name}="{_escaped(value)}"' for name, value in zip(metric.labels, labels, strict=True)]
    if not metric.bounds:
        yield f"{metric.name}{{{','.join(named)}}} {sample[0]:.17g}"
        return
    counts = list(itertools.accumulate(sample[:-1]))
    for bound, count in zip((*map("{:g}".format, metric.bounds), "+Inf"), counts, strict=True):
        bucket = ",".join([*named, f'le="{bound}"'])
        yield f"{metric.name}_bucket{{{bucket}}} {count:.0f}"
    yield f"{metric.name}_sum{{{','.join(named)}}} {sample[-1]:.17g}"
    yield f"{metric.name}_count{{{','.join(named)}}} {counts[-1]:.0f}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


METRICS = Metrics()
"""The numbers of this process."""
