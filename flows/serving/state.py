"""The state behind the routes: the model process, its open images, and the figures."""

import asyncio
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import Request

from flows.serving.metrics import Metrics, log
from flows.serving.requests import Limits, RequestError
from flows.serving.tenants import tenant_of
from flows.serving.worker import Worker

_KEPT_IMAGES = 64 << 20  # bytes of images kept for response_format "url"


@dataclass(frozen=True)
class Options:
    """How the server answers: waiting images, tenants by hash of their token (None: no tokens), its host names."""

    queue: int = 64
    limits: Limits = field(default_factory=Limits)
    tokens: Mapping[bytes, str] | None = None
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "::1")


class Server:
    """The state behind the routes: the model process, its open images, and the figures."""

    def __init__(self, worker: Worker, options: Options, metrics: Metrics) -> None:
        """Take the model process and how to answer."""
        self.worker, self.options, self.metrics = worker, options, metrics
        self.draining = False
        self.refused_version: str | None = None  # why the version that the alias names is not served
        self._others: set[Worker] = set()  # one that is tried, and those that finish their last jobs
        self._swaps: set[asyncio.Task[None]] = set()
        worker.moved = self.swap
        self.open = 0
        self._pace: float | None = None  # seconds for each image, at the last rate
        self._last = time.monotonic()
        self._links: OrderedDict[str, bytes] = OrderedDict()
        self._linked = 0  # bytes

    def tenant(self, request: Request) -> str | None:
        """Return the tenant of a request's token, None without tokens; raise RequestError with status 401."""
        if self.options.tokens is None:
            return None
        return tenant_of(request.headers.get("authorization", ""), self.options.tokens)

    def take(self, count: int) -> None:
        """Reserve room for images.

        Raises RequestError with status 429 if there is too little now, 413 if there never is enough.
        """
        if self.draining:
            raise RequestError(503, "draining", "the server is shutting down; ask another one", retry_after=5)
        capacity = self.options.queue + (self.worker.model.batch_size if self.worker.model else 0)
        if count > capacity:
            message = (
                f"{count} images were asked for, but the server holds {capacity} at a time; send fewer in a request"
            )
            raise RequestError(413, "too_many_images", f"{message}, or start it with a larger --queue", "prompt")
        if self.open + count > capacity:
            wait = math.ceil((self._pace or 1.0) * self.open)
            message = f"{self.open} images are open, of {capacity} at most; try again in {max(1, min(wait, 60))} s"
            raise RequestError(429, "queue_full", message, retry_after=max(1, min(wait, 60)))
        if self.open == 0:
            self._last = time.monotonic()
        self._change(count)

    def give(self, count: int, *, drawn: int = 0) -> None:
        """Return room for images, of which `drawn` were finished just now."""
        now = time.monotonic()
        if drawn:
            pace = (now - self._last) / drawn
            self._pace = pace if self._pace is None else 0.9 * self._pace + 0.1 * pace
            self._last = now
        self._change(-count)

    def swap(self, version: str) -> None:
        """Try another version of the model in a second process, and serve it if it draws the test image."""
        task = asyncio.create_task(self._swap(version))
        self._swaps.add(task)
        task.add_done_callback(self._swaps.discard)

    async def _swap(self, version: str) -> None:
        old, refusals = self.worker, list[str]()
        new = old.successor(version, refusals.append)
        self._others.add(new)
        new.start()
        while new.problem is not None and not refusals:
            await asyncio.sleep(0.05)
        if refusals or self.draining or self.worker is not old:
            self.refused_version = f"version {version}: {refusals[0]}" if refusals else None
            log(event="version refused", version=version, reason=self.refused_version)
            retired = new
        else:
            self.worker, new.gave_up, new.moved, self.refused_version = new, old.gave_up, self.swap, None
            self._others = self._others - {new} | {old}
            log(event="version served", version=version)
            retired = old
        retired.moved = lambda version: None
        while retired.jobs:
            await asyncio.sleep(0.05)
        await retired.stop()
        self._others.discard(retired)

    def fail_all(self, code: str, message: str) -> None:
        """Answer everything that is open with an error."""
        for worker in (self.worker, *self._others):
            worker.fail_all(code, message)

    async def stop(self) -> None:
        """End the model processes."""
        for task in self._swaps:
            task.cancel()
        await asyncio.gather(*(worker.stop() for worker in (self.worker, *self._others)))

    def link(self, png: bytes) -> str:
        """Keep an image for a while; return the name under which it can be fetched."""
        name = secrets.token_urlsafe(24)
        self._links[name] = png
        self._linked += len(png)
        while self._linked > _KEPT_IMAGES:
            self._linked -= len(self._links.popitem(last=False)[1])
        return name

    def linked(self, name: str) -> bytes | None:
        """Return a kept image."""
        return self._links.get(name)

    def _change(self, count: int) -> None:
        self.open += count
        self.metrics.open.set(self.open)
