"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dllm.serving.engine import Engine
from dllm.serving.events import Finished

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
PASSES_PER_TOKEN = (0.03, 0.06, 0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 4)

GAUGES = {
    "queued": ("dllm_queued_requests", "requests that wait"),
    "running": ("dllm_running_rows", "rows in the batch"),
    "jobs": ("dllm_running_jobs", "edits and scores that have begun"),
}
COUNTS = {
    "tokens": ("dllm_tokens", "tokens of finished texts"),
    "passes": ("dllm_passes", "forward passes of rows"),
    "computed": ("dllm_positions", "positions that went through the model"),
    "batches": ("dllm_batches", "forward passes of the model"),
}
OUTCOMES = ("finished", "failed", "cancelled", "refused")
"""Fields of `Stats` -> name and help; and the fields that count what became of requests."""


class Metrics:
    """A registry of its own: counters and histograms of requests, and what the engines say of themselves."""

    def __init__(self, engines: Mapping[str, Engine]):
        self.registry = CollectorRegistry()
        self.requests = Counter("dllm_http_requests", "answers of HTTP", ["path", "status"], registry=self.registry)
        self.seconds = self._histogram("dllm_http_request_seconds", "until an answer ended", "path", SECONDS)
        self.until_text = self._histogram("dllm_first_text_seconds", "until a stream sent text", "model", SECONDS)
        self.text_seconds = self._histogram(
            "dllm_text_seconds", "from being asked for a text to its end", "model", SECONDS
        )
        self.passes_per_token = self._histogram(
            "dllm_passes_per_token", "forward passes per token", "model", PASSES_PER_TOKEN
        )
        self.registry.register(_OfEngines(engines))

    def _histogram(self, name: str, text: str, label: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, [label], buckets=buckets, registry=self.registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """An answer ended; status 0: its client went away before it began."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def ended(self, model: str, text: Finished) -> None:
        """A text is finished."""
        self.text_seconds.labels(model).observe(text.seconds)
        if text.tokens:
            self.passes_per_token.labels(model).observe(text.passes / text.tokens)

    def first_text(self, model: str, seconds: float) -> None:
        """A stream sent its first text."""
        self.until_text.labels(model).observe(seconds)

    def page(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)


class _OfEngines(Collector):
    """What the engines count, at the moment at which it is asked for."""

    def __init__(self, engines: Mapping[str, Engine]):
        self.engines = engines

    def collect(self) -> Iterable[Metric]:
        """One family for each count, with a sample for each model."""
        stats = {name: engine.stats() for name, engine in self.engines.items()}
        families: dict[str, Metric] = {}
        for table, kind in ((GAUGES, GaugeMetricFamily), (COUNTS, CounterMetricFamily)):
            for field, (name, text) in table.items():
                family = kind(name, text, labels=["model"])
                for model, counted in stats.items():
                    family.add_metric([model], getattr(counted, field))
                families[name] = family
        outcomes = CounterMetricFamily("dllm_requests", "what became of requests", labels=["model", "outcome"])
        for model, counted in stats.items():
            for outcome in OUTCOMES:
                outcomes.add_metric([model, outcome], getattr(counted, outcome))
        return [*families.values(), outcomes]
