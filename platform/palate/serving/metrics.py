"""Figures of one replica in Prometheus' format.

Every line names its replica: behind one address, each scrape reaches one of several, whose counts must not be taken for
one another's. No label names a person, a key or a prompt.
"""

import os
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from palate.serving.service import Service

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class RequestMetrics:
    """Counts requests. Labels name no one."""

    def __init__(self) -> None:
        self.replica = f"{socket.gethostname()}-{os.getpid()}"
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "palate_requests", "Answers by route and status", ["route", "status"], registry=self._registry
        )

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def render(self) -> bytes:
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """What is measured, each sample with the replica's name."""
        for metric in self._registry.collect():
            metric.samples = [one._replace(labels={**one.labels, "replica": self.replica}) for one in metric.samples]
            yield metric


class Metrics(RequestMetrics):
    """Of a text server, tokens and waiting times too; the load is read from the service when asked."""

    def __init__(self, service: "Service") -> None:
        super().__init__()
        self._tokens = Counter("palate_tokens", "Tokens of complete answers", registry=self._registry)
        self._first = Histogram(
            "palate_first_token_seconds",
            "From the request to its first token",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._whole = Histogram(
            "palate_answer_seconds", "From the request to its last token", buckets=SECONDS, registry=self._registry
        )
        self._registry.register(_Load(service))

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def answered(self, started: float, tokens: int) -> None:
        """A complete answer; ``started`` is ``time.perf_counter()`` at its request."""
        self._whole.observe(time.perf_counter() - started)
        self._tokens.inc(tokens)


class _Load:
    """What each run is doing at the moment."""

    def __init__(self, service: "Service") -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        for name in ("running", "waiting", "jobs"):
            gauge = GaugeMetricFamily(f"palate_{name}", f"Requests that are {name}", labels=["run"])
            for hosted in self._service.all_hosted:
                gauge.add_metric([hosted.name], getattr(hosted.worker.load, name))
            yield gauge
        counts = self._service.cache.counts()
        for name in ("hits", "misses"):
            counter = CounterMetricFamily(f"palate_vector_cache_{name}", f"Lookups of vectors: {name}")
            counter.add_metric([], getattr(counts, name))
            yield counter
