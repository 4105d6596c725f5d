"""Batches: thousands of prompts, accepted at once, drawn in the background, with their results on disk.

A batch outlives its client and the server. Its lines are drawn when no request in the foreground needs the model. Lines
with `share: "request"` share within the whole batch: the groups are formed once, written down, and drawn whole, so that
a batch that was interrupted goes on with the images that it would have had.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from flows.serving import batch_lines
from flows.serving.batch_files import KEPT_DAYS, Batch, BatchFolder
from flows.serving.batch_run import Room, Run
from flows.serving.items import usage
from flows.serving.metrics import log
from flows.serving.requests import RequestError
from flows.serving.state import Server

_LOOK = 2.0  # seconds between looks for batches that nobody draws
_POLL = 0.1  # seconds between looks for new results
_QUIET = 15.0  # seconds without a result until the client gets a sign of life


class Batches:
    """The batches of a folder: accepts them, draws those that no other server draws, and finds results."""

    def __init__(self, server: Server, folder: BatchFolder) -> None:
        """Take the state of the server and the folder."""
        self.folder = folder
        self._server = server
        self._room = Room()
        self._drawing: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Draw what was accepted earlier, and look for more."""
        self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        """Stop drawing; what is not finished stays on disk."""
        tasks = [task for task in (self._looking, *self._drawing.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def accept(self, body: bytes, tenant: str | None) -> dict[str, Any]:
        """Write a batch down and return its description; raise RequestError if it exceeds a limit."""
        limits = self._server.options.limits
        if self._server.draining:
            raise RequestError(503, "draining", "the server is shutting down; ask another one", retry_after=5)
        lines, images = await asyncio.to_thread(batch_lines.images, body)
        for name, count, most in (("lines", lines, limits.batch_lines), ("images", images, limits.batch_images)):
            if count > most:
                raise RequestError(422, "invalid_batch", f"the batch has {count} {name}; at most {most}")
        open_ = sum(one.ended is None for one in await asyncio.to_thread(self.of, tenant))
        if open_ >= limits.batches:
            message = f"{open_} batches are open, of {limits.batches} at most; wait for one to end or cancel it"
            raise RequestError(429, "too_many_batches", message, retry_after=60)
        try:
            batch = await asyncio.to_thread(self.folder.accept, body, tenant, lines, images)
        except OSError as error:
            raise RequestError(507, "not_stored", f"the batch cannot be stored: {error.strerror}") from error
        self._draw(batch)
        return await asyncio.to_thread(described, batch)

    def of(self, tenant: str | None) -> list[Batch]:
        """Return the batches of a tenant, the newest first."""
        return [one for one in self.folder.all() if one.accepted.tenant == tenant]

    def find(self, name: str, tenant: str | None) -> Batch:
        """Return a batch of a tenant; raise RequestError with status 404 if there is none of this id."""
        batch = self.folder.find(name)
        if batch is None or batch.accepted.tenant != tenant:
            raise RequestError(404, "not_found", f"there is no such batch, or it ended more than {KEPT_DAYS} days ago")
        return batch

    async def results(self, batch: Batch, skip: int, wait: bool) -> AsyncIterator[tuple[int, bytes]]:
        """Yield results from the `skip`-th on, with the number of results up to each; `wait` for those to come.

        Ends with the batch, or with the server. An empty result says that there was nothing new for a while.
        """
        entries = await asyncio.to_thread(batch.entries)
        begin = entries[min(skip, len(entries)) - 1].end if skip and entries else 0
        entries, count, quiet = entries[skip:], min(skip, len(entries)), time.monotonic()
        while True:
            ended = batch.ended is not None or not wait or self._server.draining
            entries = entries or await asyncio.to_thread(batch.entries, count)
            for entry in entries:
                content = await asyncio.to_thread(b"".join, batch.results(begin, entry.end))
                begin, count, quiet = entry.end, count + 1, time.monotonic()
                yield count, content
            if ended and not entries:
                return
            if not entries:
                await asyncio.sleep(_POLL)
                if time.monotonic() - quiet > _QUIET:
                    quiet = time.monotonic()
                    yield count, b""
            entries = []

    async def _look(self) -> None:
        """Draw the batches that nobody draws: of this server before it was started again, or of one that ended."""
        while True:
            try:
                await asyncio.to_thread(self.folder.sweep)
                for batch in reversed(await asyncio.to_thread(self.folder.all)):
                    if batch.ended is None:
                        self._draw(batch)
            except OSError as error:
                log(event="batches cannot be read", reason=str(error))
            await asyncio.sleep(_LOOK)

    def _draw(self, batch: Batch) -> None:
        name = batch.accepted.id
        if name in self._drawing or self._server.draining or batch.ended is not None or not batch.lock():
            return
        task = asyncio.create_task(self._drawn(batch))
        self._drawing[name] = task
        task.add_done_callback(lambda _: self._done(batch))
        self._server.metrics.batches.set(len(self._drawing))

    def _done(self, batch: Batch) -> None:
        batch.unlock()
        del self._drawing[batch.accepted.id]
        self._server.metrics.batches.set(len(self._drawing))

    async def _drawn(self, batch: Batch) -> None:
        """Draw a batch until it has ended; after an error it is taken up again by `_look`."""
        running = asyncio.create_task(Run(batch, self._server, self._room).finish())
        try:
            while not running.done() and not batch.cancelled:
                await asyncio.wait({running}, timeout=_POLL)
            if running.done() and not running.result():
                return  # the server is shutting down
            status = "completed" if running.done() else "cancelled"
        except Exception as error:
            log(event="batch interrupted", id=batch.accepted.id, reason=f"{type(error).__name__}: {error}"[:300])
            return
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        await asyncio.to_thread(batch.end, status)
        log(event="batch ended", id=batch.accepted.id, status=status, **described(batch)["request_counts"])


def described(batch: Batch) -> dict[str, Any]:
    """Return a batch as OpenAI's API describes it, with its usage and where its results are."""
    accepted, ended, entries = batch.accepted, batch.ended, batch.entries()
    status = ended["status"] if ended else "cancelling" if batch.cancelled else "in_progress"
    succeeded = sum(entry.succeeded for entry in entries)
    at = ended["at"] if ended else None
    return {
        "id": accepted.id,
        "object": "batch",
        "endpoint": batch_lines.URL,
        "status": status,
        "created_at": accepted.created_at,
        "completed_at": at if status == "completed" else None,
        "cancelled_at": at if status == "cancelled" else None,
        "expires_at": at + KEPT_DAYS * 86400 if at else None,
        "request_counts": {
            "total": accepted.lines,
            "completed": succeeded,
            "failed": len(entries) - succeeded,
        },
        "images": accepted.images,
        "usage": usage(sum(entry.evaluations for entry in entries), sum(entry.alone for entry in entries)),
        "results": f"/v1/batches/{accepted.id}/results",
    }
