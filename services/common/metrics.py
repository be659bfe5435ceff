"""Metrics over HTTP, in Prometheus' text format: the one place that knows its client library.

Owns: names' prefix, how tallies become families of samples, the endpoint's life. Must not know: what is counted.
Nothing is registered anywhere: whoever serves makes a registry of its own, of collectors that read tallies when they
are asked, on the endpoint's thread.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from services.common.tally import CallTally, Histogram
from services.common.telemetry_settings import METRICS_OFF
from services.common.values import PROTOCOL_VERSION

PREFIX = "outrider_"
Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name without prefix and `_total`, and a sentence with its unit.

    `labels` name what tells its samples apart, beside `constant` ones, which all of a collector's samples carry.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()


class Families:
    """Makes the families of one collector. `constant` labels go on all samples."""

    def __init__(self, constant: Labels | None = None) -> None:
        self._constant = dict(constant or {})

    def counter(self, family: Family, samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
        metric = CounterMetricFamily(PREFIX + family.name, family.help, labels=self._names(family))
        for labels, value in samples:
            metric.add_metric(self._values(labels), value)
        return metric

    def gauge(self, family: Family, samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
        metric = GaugeMetricFamily(PREFIX + family.name, family.help, labels=self._names(family))
        for labels, value in samples:
            metric.add_metric(self._values(labels), value)
        return metric

    def histogram(self, family: Family, samples: Iterable[tuple[tuple[str, ...], Histogram]]) -> Metric:
        metric = HistogramMetricFamily(PREFIX + family.name, family.help, labels=self._names(family))
        for labels, histogram in samples:
            metric.add_metric(self._values(labels), _buckets(histogram), histogram.sum)
        return metric

    def _names(self, family: Family) -> tuple[str, ...]:
        return (*self._constant, *family.labels)

    def _values(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        return (*self._constant.values(), *labels)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as the format wants them; the last one is +Inf and the count."""
    total = 0.0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), list(histogram.counts), strict=True):
        total += count
        buckets.append((bound, total))
    return buckets


CALLS = Family("requests", "gRPC calls answered, by method, status code and reason.", ("method", "code", "reason"))
CPU = Family("cpu_seconds", "CPU time of the process in seconds, all threads.")
BUILD = Family("build_info", "1, by the versions of the service and of the protocol.", ("version", "protocol_version"))


class ServiceCollector(Collector):
    """What every service shows: its version, its calls and its CPU time."""

    def __init__(self, calls: CallTally, constant: Labels) -> None:
        self._versions = (_version(), str(PROTOCOL_VERSION))
        self._calls = calls
        self._families = Families(constant)

    def collect(self) -> Iterable[Metric]:
        yield self._families.gauge(BUILD, [(self._versions, 1.0)])
        yield self._families.counter(CALLS, list(self._calls.counts.items()))
        yield self._families.counter(CPU, [((), time.process_time())])

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registry would otherwise collect once to learn the names."""
        return ()


def _version() -> str:
    """Of the package that is installed; empty where the code runs without."""
    try:
        return importlib.metadata.version("outrider")
    except importlib.metadata.PackageNotFoundError:
        return ""


def new_registry(calls: CallTally, constant: Labels) -> CollectorRegistry:
    """A service's registry: its calls, its CPU time, and the process's memory and open files where the system tells."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(calls, constant))
    ProcessCollector(registry=registry)
    return registry


@contextlib.contextmanager
def metrics_endpoint(host: str, port: int, registry: CollectorRegistry) -> Iterator[int]:
    """Serves `registry` from enter to exit, on a thread; yields the port, METRICS_OFF where none is wanted.

    Raises OSError where the port cannot be had.
    """
    if port == METRICS_OFF:
        yield METRICS_OFF
        return
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise OSError(
            f"metrics_port: cannot listen on {host}:{port}: {error.strerror} (0 takes a free one, -1 serves no metrics)"
        ) from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
