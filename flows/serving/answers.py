"""One accepted request for images, from the reserved room to the last byte."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from flows.serving import items, requests
from flows.serving.items import Items
from flows.serving.requests import Drawn, Failed, ImagesRequest, Progress, RequestError
from flows.serving.state import Server


class Answer:
    """One accepted request for images, from the reserved room to the last byte."""

    def __init__(self, server: Server, request: Request, asked: ImagesRequest, key: str | None) -> None:
        """Reserve room and send the job; raise RequestError if it cannot be taken."""
        model = server.worker.model
        if model is None:
            raise RequestError(503, "not_ready", f"{server.worker.problem}; try again", retry_after=5)
        tenant = requests.tenant_name(key, asked.user)
        self.job, failed = requests.job(asked, tenant, server.options.limits, model)
        self._server, self._request, self._asked = server, request, asked
        self._worker, self._model = server.worker, model
        self._items = Items(self.job, failed, self._shown)
        server.take(self._items.open)
        try:
            self._events = self._worker.submit(self.job)
        except RequestError:
            server.give(self._items.open)
            raise
        server.metrics.images.labels("refused").inc(len(failed))
        request.state.facts = {"id": self.job.id, "images": self._items.count, "share": asked.share}

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
        found = self._items
        if found.open:
            return Response(status_code=499)  # the client is gone
        if found.status != 200:
            code = found.errors[0].code
            raise RequestError(
                found.status, code, found.errors[0].message, retry_after=5 if found.status == 503 else None
            )
        return JSONResponse({"created": int(time.time()), "data": found.data, "usage": found.usage})

    async def _stream(self) -> AsyncIterator[str]:
        found = self._items
        try:
            for place, item in found.found.items():
                yield event("image_generation.failed", {"index": place, **item})
            async for told in self._until_gone():
                if isinstance(told, Progress):
                    yield event("image_generation.progress", {"done": told.done, "planned": told.planned})
                    continue
                name = "completed" if isinstance(told, Drawn) else "failed"
                for place in self._news:
                    yield event(f"image_generation.{name}", {"index": place, **found.found[place]})
            if not found.open:
                yield event("image_generation.done", {"usage": found.usage})
        finally:
            self._end()

    async def _until_gone(self) -> AsyncIterator[Drawn | Failed | Progress]:
        """Yield the job's events until it is finished or the client leaves; `_news` are the images of an event."""
        gone = asyncio.create_task(_gone(self._request))
        try:
            while self._items.open:
                waiting = asyncio.create_task(self._events.get())
                await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    waiting.cancel()
                    return
                told = waiting.result()
                assert isinstance(told, Drawn | Failed | Progress)
                self._news = self._take(told)
                yield told
        finally:
            gone.cancel()

    def _take(self, told: Drawn | Failed | Progress) -> list[int]:
        """Take over what an event says; return the images that are finished with it."""
        if isinstance(told, Progress):
            return []
        found = self._items
        if isinstance(told, Drawn):
            places = [found.places[told.index]]
            found.draw(places[0], told, [found.places[other] for other in told.shared_with], self._model)
            self._server.metrics.drawn(told)
        else:
            # One event may stand for all images that are left.
            named = found.places if told.index is None else [found.places[told.index]]
            places = [place for place in named if place not in found.found]
            found.fail(told, places)
            self._server.metrics.images.labels("failed").inc(len(places))
        self._server.give(len(places), drawn=len(places))
        return places

    def _shown(self, png: bytes) -> dict[str, Any]:
        if self._asked.response_format == "url":
            return {"url": f"{self._request.base_url}images/{self._server.link(png)}.png"}
        return items.encoded(png)

    def _end(self) -> None:
        """Give back what is left of the room; what was not drawn for a client that left is cancelled."""
        left = self._items.open
        self._worker.close(self.job.id, cancel=left > 0)
        if left:
            self._server.metrics.images.labels("cancelled").inc(left)
            self._server.give(left)
        spent = self._items.usage
        self._request.state.facts |= {name: spent[name] for name in ("evaluations", "evaluations_alone")}


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(name: str, facts: Mapping[str, Any], number: int | None = None) -> str:
    """Return a server-sent event; `number` is its id, from which a client may go on."""
    begin = "" if number is None else f"id: {number}\n"
    return f"{begin}event: {name}\ndata: {json.dumps({'type': name, **facts})}\n\n"
