"""Figures of the server for Prometheus, and one line of log for each request."""

import json
import sys
import time
from typing import IO, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flows.serving.requests import Drawn, Kept

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60)


class Metrics:
    """Counters of one server; labels have few values, none of them chosen by clients."""

    def __init__(self) -> None:
        """Begin with everything at 0."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "sage_requests", "Answered requests, probes excluded", ["route", "status"], registry=registry
        )
        self.rejected = Counter(
            "sage_rejected", "Refused requests for images, by reason", ["reason"], registry=registry
        )
        self.images = Counter("sage_images", "Images of accepted requests", ["outcome"], registry=registry)
        self.evaluations = Counter("sage_evaluations", "Network evaluations of finished images", registry=registry)
        self.alone = Counter(
            "sage_evaluations_alone", "What the finished images would have cost alone", registry=registry
        )
        self.prefixes = Counter("sage_prefixes", "Images by how they began", ["start"], registry=registry)
        self.seconds = Histogram(
            "sage_request_seconds", "Time to answer", ["route"], buckets=_SECONDS, registry=registry
        )
        self.open = Gauge("sage_images_open", "Accepted images that are not finished", registry=registry)
        self.ready = Gauge("sage_ready", "1 if the model process can draw", registry=registry)
        self.kept = Gauge("sage_prefixes_kept", "Prefixes of earlier requests in memory", registry=registry)
        self.bytes = Gauge("sage_prefixes_bytes", "Bytes of these prefixes", registry=registry)
        self.lines = Counter("sage_batch_lines", "Finished lines of batches", ["outcome"], registry=registry)
        self.batches = Gauge("sage_batches_open", "Batches that this server draws", registry=registry)
        self.age = Gauge(
            "sage_prefixes_age_seconds", "Time since the last use of the one that goes next", registry=registry
        )
        self.files = Gauge("sage_prefix_files", "Prefixes on disk", registry=registry)
        self.file_bytes = Gauge("sage_prefix_files_bytes", "Bytes of these files", registry=registry)
        self.damaged = Gauge("sage_prefix_files_damaged", "Damaged files that were dropped", registry=registry)
        self.unwritten = Gauge("sage_prefix_files_unwritten", "Prefixes that could not be written", registry=registry)
        self.restarts = Gauge("sage_worker_restarts", "Restarts of the model process", registry=registry)

    def drawn(self, event: Drawn) -> None:
        """Count a finished image."""
        self.images.labels("drawn").inc()
        self.evaluations.inc(event.evaluations)
        self.alone.inc(event.alone)
        self.prefixes.labels(event.prefix or "none").inc()

    def show(self, kept: Kept) -> None:
        """Take over what the model process says of its prefixes."""
        self.kept.set(kept.prefixes)
        self.bytes.set(kept.bytes)
        self.age.set(0.0 if kept.oldest is None else max(0.0, time.time() - kept.oldest))
        self.files.set(kept.files)
        self.file_bytes.set(kept.file_bytes)
        self.damaged.set(kept.damaged)
        self.unwritten.set(kept.unwritten)

    def text(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return generate_latest(self.registry)


def log(output: IO[str] | None = None, **facts: Any) -> None:
    """Write one line of JSON in ASCII, so that no client can put control characters into it."""
    print(json.dumps({"time": round(time.time(), 3), **facts}), file=output or sys.stderr, flush=True)
