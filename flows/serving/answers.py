"""One accepted request for images, from the reserved room to the last byte."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from flows.serving import requests
from flows.serving.requests import Drawn, Failed, ImagesRequest, Progress, RequestError
from flows.serving.state import Server

_STATUS = {"worker_lost": 503, "draining": 503, "generation_failed": 500}


class Answer:
    """One accepted request for images, from the reserved room to the last byte."""

    def __init__(self, server: Server, request: Request, asked: ImagesRequest, key: str | None) -> None:
        """Reserve room and send the job; raise RequestError if it cannot be taken."""
        model = server.worker.model
        if model is None:
            raise RequestError(503, "not_ready", f"{server.worker.problem}; try again", retry_after=5)
        tenant = None if key is None and asked.user is None else json.dumps([key, asked.user])
        self.job, failed = requests.job(asked, tenant, server.options.limits, model)
        self._server, self._request, self._asked = server, request, asked
        self._worker = server.worker
        self._count = len(self.job.prompts) + len(failed)
        # The image of the answer that each image of the job is.
        self._places = [place for place in range(self._count) if place not in failed]
        self._items: dict[int, dict[str, Any]] = {place: _error_item(one) for place, one in failed.items()}
        self._errors = list(failed.values())
        self._evaluations = self._alone = 0.0
        self._open = len(self.job.prompts)
        server.take(self._open)
        try:
            self._events = self._worker.submit(self.job)
        except RequestError:
            server.give(self._open)
            raise
        server.metrics.images.labels("refused").inc(len(failed))
        request.state.facts = {"id": self.job.id, "images": self._count, "share": asked.share}

    async def respond(self) -> Response:
        """Return the answer when it is finished, or as it comes."""
        if self._asked.stream:
            return StreamingResponse(
                self._stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        try:
            async for _ in self._until_gone():
                pass
        finally:
            self._end()
        if self._open:
            return Response(status_code=499)  # the client is gone
        if len(self._items) == len(self._errors):
            code = self._errors[0].code
            raise RequestError(
                _STATUS.get(code, 422), code, self._errors[0].message, retry_after=5 if code in _STATUS else None
            )
        data = [self._items[place] for place in range(self._count)]
        return JSONResponse({"created": int(time.time()), "data": data, "usage": self._usage()})

    async def _stream(self) -> AsyncIterator[str]:
        try:
            for place, item in self._items.items():
                yield _event("image_generation.failed", {"index": place, **item})
            async for event in self._until_gone():
                if isinstance(event, Progress):
                    yield _event("image_generation.progress", {"done": event.done, "planned": event.planned})
                elif isinstance(event, Drawn):
                    place = self._places[event.index]
                    yield _event("image_generation.completed", {"index": place, **self._items[place]})
                else:
                    for place in self._places if event.index is None else [self._places[event.index]]:
                        if "error" in self._items[place]:
                            yield _event("image_generation.failed", {"index": place, **self._items[place]})
            yield _event("image_generation.done", {"usage": self._usage()})
        finally:
            self._end()

    async def _until_gone(self) -> AsyncIterator[Drawn | Failed | Progress]:
        """Yield the job's events until it is finished or the client leaves."""
        gone = asyncio.create_task(_gone(self._request))
        try:
            while self._open:
                event = asyncio.create_task(self._events.get())
                await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    return
                self._take(event.result())
                yield event.result()
        finally:
            gone.cancel()

    def _take(self, event: Drawn | Failed | Progress) -> None:
        if isinstance(event, Progress):
            return
        metrics = self._server.metrics
        if isinstance(event, Drawn):
            self._items[self._places[event.index]] = self._item(event)
            self._evaluations += event.evaluations
            self._alone += event.alone
            metrics.images.labels("drawn").inc()
            metrics.evaluations.inc(event.evaluations)
            metrics.alone.inc(event.alone)
            metrics.prefixes.labels(event.prefix or "none").inc()
            count = 1
        else:
            # One event may stand for all images that are left.
            left = [place for place in self._places if place not in self._items]
            places = left if event.index is None else [self._places[event.index]]
            self._items |= {place: _error_item(event) for place in places}
            self._errors += [event] * len(places)
            count = len(places)
            metrics.images.labels("failed").inc(count)
        self._open -= count
        self._server.give(count, drawn=count)

    def _item(self, event: Drawn) -> dict[str, Any]:
        where: dict[str, Any] = {"b64_json": base64.b64encode(event.png).decode()}
        if self._asked.response_format == "url":
            base = str(self._request.base_url)
            where = {"url": f"{base}images/{self._server.link(event.png)}.png"}
        return where | {
            "revised_prompt": self.job.prompts[event.index],
            "seed": event.seed,
            "evaluations": event.evaluations,
            "evaluations_alone": event.alone,
            "shared_with": [self._places[other] for other in event.shared_with],
            "shared_with_other_requests": event.others,
            "prefix": event.prefix,
            "truncated_tokens": event.truncated_tokens,
        }

    def _usage(self) -> dict[str, float]:
        saved = 1 - self._evaluations / self._alone if self._alone else 0.0
        spent = round(self._evaluations, 6)
        return {"evaluations": spent, "evaluations_alone": self._alone, "saved": round(saved, 6)}

    def _end(self) -> None:
        """Give back what is left of the room; what was not drawn for a client that left is cancelled."""
        self._worker.close(self.job.id, cancel=self._open > 0)
        if self._open:
            self._server.metrics.images.labels("cancelled").inc(self._open)
            self._server.give(self._open)
        self._request.state.facts |= {"evaluations": round(self._evaluations, 6), "evaluations_alone": self._alone}


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error_item(event: Failed) -> dict[str, Any]:
    return {"b64_json": None, "error": {"code": event.code, "message": event.message}}


def _event(name: str, facts: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **facts})}\n\n"
