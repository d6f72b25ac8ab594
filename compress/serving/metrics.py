"""The Prometheus metrics of the server; label values are served models, outcomes and kinds, never text from clients."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from compress.runtime.tenants import Tenants
from compress.serving.engine import Engine


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, engine: Engine, tenants: Tenants) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "compress_requests", "Requests by model and outcome", ("model", "outcome"), registry=self.registry
        )
        self.tokens = Counter("compress_tokens", "Tokens by model and kind", ("model", "kind"), registry=self.registry)
        self.seconds = Histogram(
            "compress_request_seconds", "Seconds until an answer is complete", registry=self.registry
        )
        self.batch = Histogram(
            "compress_step_rows", "Sequences per step", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=self.registry
        )
        gauges = {
            "compress_waiting": ("Waiting sequences", lambda: len(engine.waiting)),
            "compress_running": ("Running sequences", lambda: engine.active),
            "compress_delta_bytes": ("Bytes of deltas in memory", tenants.delta_bytes),
        }
        for name, (told, value) in gauges.items():
            Gauge(name, told, registry=self.registry).set_function(value)
        engine.observe = self.batch.observe
