"""One batch while it is drawn: whole groups of images, in the background, until every line has a result."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flows.serving import batch_lines
from flows.serving.batch_files import Batch, Entry
from flows.serving.batch_lines import Line
from flows.serving.items import Items
from flows.serving.metrics import log
from flows.serving.requests import Drawn, Failed, Grouped, Grouping, Job, Model, RequestError
from flows.serving.state import Server
from flows.serving.worker import Event, Worker

_POLL = 0.1  # seconds between looks whether the model process takes jobs
_TRIES = 3  # of images that were lost with the model process
_AHEAD = 2  # full batches of the network that are with the model process

Image = tuple[int, int]  # line, number in the line
Result = tuple[Entry, bytes]


class Room:
    """How many images of batches are with the model process; who waits enters in order."""

    def __init__(self) -> None:
        """Begin with none."""
        self.size, self._inside = 1, 0
        self._turn, self._left = asyncio.Lock(), asyncio.Event()

    async def enter(self, count: int) -> int:
        """Wait until there is room for images, or all of it; return how many to leave with."""
        async with self._turn:
            count = min(count, self.size)
            while self._inside + count > self.size:
                self._left.clear()
                await self._left.wait()
            self._inside += count
            return count

    def leave(self, count: int) -> None:
        """Give room back."""
        self._inside -= count
        self._left.set()


class Run:
    """One batch while it is drawn."""

    def __init__(self, batch: Batch, server: Server, room: Room) -> None:
        """Take the batch, the state of the server, and the room that its images share with those of other batches."""
        self._batch, self._server, self._room = batch, server, room
        self._lines: dict[int, Line] = {}
        self._done: set[int] = set()  # lines with a result
        self._drawn_by: dict[int, Model] = {}
        self._unwritten: list[Result] = []
        self._writing = asyncio.Lock()

    async def finish(self) -> bool:
        """Draw what is left; return False if the server is shut down before."""
        while (model := self._server.worker.model) is None:
            await asyncio.sleep(_POLL)
        self._room.size = _AHEAD * model.batch_size
        self._done = {entry.line for entry in await asyncio.to_thread(self._batch.entries)}
        await self._record(await asyncio.to_thread(self._read, model))
        groups = self._batch.groups
        if groups is None:
            groups = await self._form()
            await asyncio.to_thread(self._batch.keep_groups, groups)
        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                group = [image for image in group if image[0] in self._lines]
                # A line that has a result is drawn again with its group: the images of the others depend on it.
                if all(line in self._done for line, _ in group):
                    continue
                entered = await self._room.enter(len(group))
                if self._server.draining:
                    self._room.leave(entered)
                    break
                tasks.create_task(self._draw(group, entered))
        return self._lines.keys() <= self._done

    def _read(self, model: Model) -> list[Result]:
        """Read the lines; return the results of those that cannot be drawn and have none yet."""
        accepted, limits = self._batch.accepted, self._server.options.limits
        refused = []
        for number, text in batch_lines.numbered(self._batch.input):
            try:
                asked = batch_lines.parsed(text)
                self._lines[number] = batch_lines.checked(number, asked, accepted.seed, accepted.tenant, limits, model)
            except RequestError as error:
                if number not in self._done:
                    why = {"code": error.code, "message": str(error), "param": error.param}
                    refused.append(_result(number, batch_lines.custom_id(text), error=why))
        return refused

    async def _form(self) -> list[list[Image]]:
        """Return the images that are drawn together, in the order of their first lines."""
        lines = list(self._lines.values())
        groups = [[(line.number, place) for place in line.items.places] for line in lines if line.job.share == "tenant"]
        groups += [[(line.number, place)] for line in lines if line.job.share == "none" for place in line.items.places]
        for images in batch_lines.kinds(lines).values():
            prompts = [self._lines[line].items.prompts[place] for line, place in images]
            settings = self._lines[images[0][0]].job.settings
            asked = Grouping(secrets.token_hex(8), prompts, settings)
            groups += [[images[index] for index in group] for group in await self._grouped(asked)]
        return sorted(groups)

    async def _grouped(self, asked: Grouping) -> list[list[int]]:
        """Return the model process's groups; ask again if it ends before it answers."""
        for _ in range(_TRIES):
            worker, events = await self._submitted(asked)
            try:
                answer = await events.get()
            finally:
                worker.close(asked.id, cancel=False)
            if isinstance(answer, Grouped):
                return answer.groups
            assert isinstance(answer, Failed)
            log(event="batch not grouped", id=self._batch.accepted.id, reason=answer.message)
        return [[index] for index in range(len(asked.prompts))]

    async def _submitted(self, job: Job | Grouping) -> tuple[Worker, asyncio.Queue[Event]]:
        """Send a job as soon as the model process takes it; return the process and the queue of events."""
        while True:
            with contextlib.suppress(RequestError):
                worker = self._server.worker
                return worker, worker.submit(job)
            await asyncio.sleep(_POLL)

    async def _draw(self, group: Sequence[Image], entered: int) -> None:
        """Draw images that belong together; if the model process ends with them, again, with none of others beside."""
        for number in range(_TRIES):
            if number:
                entered = await self._room.enter(self._room.size)
            try:
                lost = await self._try(group)
            finally:
                self._room.leave(entered)
            if lost is None or lost.code == "draining":
                return
        assert lost is not None
        self._fail(group, lost)
        await self._record(self._results(group))

    async def _try(self, group: Sequence[Image]) -> Failed | None:
        """Draw images that belong together and record the lines that they finish; return the error if all were lost."""
        job = self._job(group)
        worker, events = await self._submitted(job)
        model = worker.model
        assert model is not None
        open_ = set(range(len(group)))
        try:
            while open_:
                event = await events.get()
                if isinstance(event, Failed) and event.index is None:  # all that are left
                    return event
                assert isinstance(event, Drawn | Failed) and event.index is not None
                if isinstance(event, Drawn):
                    self._take(group, event, model)
                else:
                    self._fail([group[event.index]], event)
                open_.discard(event.index)
        finally:
            worker.close(job.id, cancel=bool(open_))
        await self._record(self._results(group))
        return None

    def _job(self, group: Sequence[Image]) -> Job:
        """Return the job of images that belong together: one group, or the images of a line that shares elsewhere."""
        lines = [self._lines[line] for line, _ in group]
        first = lines[0].job
        places = [line.items.places.index(place) for line, (_, place) in zip(lines, group, strict=True)]
        return replace(
            first,
            id=secrets.token_hex(8),
            prompts=[line.job.prompts[place] for line, place in zip(lines, places, strict=True)],
            seeds=[line.job.seeds[place] for line, place in zip(lines, places, strict=True)],
            # The noise of an image must not depend on what was drawn before the server was started again.
            seeded=True,
            progress=False,
            groups=None if first.share == "tenant" else [list(range(len(group)))],
            background=True,
        )

    def _take(self, group: Sequence[Image], event: Drawn, model: Model) -> None:
        number, place = group[event.index]
        self._server.metrics.drawn(event)
        found = self._lines[number].items
        if place in found.found:
            return  # drawn again, because others of its group had to be
        mates = [group[other] for other in event.shared_with]
        own = [other for line, other in mates if line == number]
        lines = {line: self._lines[line].items for line, _ in mates if line != number}
        beyond = {lines[line].name(other): lines[line].prompts[other] for line, other in mates if line != number}
        found.draw(place, event, own, model, beyond, shared_with_lines=sorted(lines))
        self._drawn_by[number] = model

    def _fail(self, images: Sequence[Image], event: Failed) -> None:
        for number, place in images:
            self._server.metrics.images.labels("failed").inc()
            found = self._lines[number].items
            if place not in found.found:
                found.fail(event, [place])

    def _results(self, group: Sequence[Image]) -> list[Result]:
        """Return the results of the lines that are finished and have none yet."""
        results = []
        for number in dict.fromkeys(line for line, _ in group):
            line = self._lines[number]
            if number in self._done or line.items.open:
                continue
            body = {"created": int(time.time()), "data": line.items.data, "usage": line.items.usage}
            if line.items.status == 200:
                sha256 = self._drawn_by[number].sha256
                response = {"status_code": 200, "request_id": line.job.id, "model_sha256": sha256, "body": body}
                results.append(_result(number, line.custom_id, response=response, found=line.items))
            else:
                why = {"code": line.items.errors[0].code, "message": line.items.errors[0].message, "param": None}
                results.append(_result(number, line.custom_id, error=why))
            line.items.forget()  # the images go to the disk
        return results

    async def _record(self, results: list[Result]) -> None:
        """Write results, those of several groups at once if the disk is slower than the network."""
        self._done |= {entry.line for entry, _ in results}
        self._unwritten += results
        async with self._writing:
            results, self._unwritten = self._unwritten, []
            if results:
                await asyncio.to_thread(self._batch.append, results)
        for entry, _ in results:
            self._server.metrics.lines.labels("completed" if entry.succeeded else "failed").inc()


def _result(
    line: int,
    custom_id: str | None,
    response: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
    found: Items | None = None,
) -> Result:
    """Return a finished line: either a response or an error is not None."""
    facts = {"line": line, "custom_id": custom_id, "response": response, "error": error}
    evaluations, alone = (round(found.evaluations, 6), found.alone) if found else (0.0, 0.0)
    return Entry(line, error is None, 0, evaluations, alone), json.dumps(facts).encode() + b"\n"
