"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from relook.serve.engine import Engine

SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)


class Metrics:
    """Requests as they end, and the engines' own counts as they stand when somebody asks."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.registry, self.engines = CollectorRegistry(), engines
        self.registry.register(self)
        self.requests = Counter("relook_requests", "Requests by status.", ["model", "status"], registry=self.registry)
        self.seconds = Histogram(
            "relook_request_seconds",
            "From request to whole answer.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first = Histogram(
            "relook_first_text_seconds",
            "From request to first text of a stream.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )

    def collect(self) -> Iterator[Any]:
        running = GaugeMetricFamily("relook_running", "Answers in slots.", labels=["model"])
        waiting = GaugeMetricFamily("relook_waiting", "Requests that wait for a slot.", labels=["model"])
        for name, engine in self.engines.items():
            running.add_metric([name], engine.running)
            waiting.add_metric([name], engine.waiting)
        yield from (running, waiting)
        for key, text in {
            "prompt_tokens": "Positions of prompts.",
            "reused_tokens": "Positions of prompts that were in memory already.",
            "new_tokens": "Generated tokens.",
            "images": "Images that went through the vision tower.",
            "steps": "Forward passes that chose tokens.",
        }.items():
            family = CounterMetricFamily(f"relook_{key}", text, labels=["model"])
            for name, engine in self.engines.items():
                family.add_metric([name], getattr(engine.batch.counts, key))
            yield family

    def text(self) -> bytes:
        return generate_latest(self.registry)
