"""The routes of batches: accept, describe, results as they come, cancel."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse

from flows.serving.answers import event
from flows.serving.batch_files import Batch
from flows.serving.batch_lines import BatchLine
from flows.serving.batches import Batches
from flows.serving.batches import described as description
from flows.serving.bodies import JSONL, read
from flows.serving.refusals import described
from flows.serving.requests import RequestError
from flows.serving.state import Server

_EVENTS = "text/event-stream"
_LISTED = 100


def add(app: FastAPI, server: Server, batches: Batches | None) -> None:
    """Add the routes; without `batches` they say how to have some."""

    def found(request: Request, name: str) -> Batch:
        return kept().find(name, server.tenant(request))

    def kept() -> Batches:
        if batches is None:
            raise RequestError(404, "no_batches", "this server takes no batches; start it with --batches FOLDER")
        return batches

    body = {"content": {JSONL[0]: {"schema": {"type": "string"}, "x-line": BatchLine.model_json_schema()}}}

    @app.post(
        "/v1/batches",
        status_code=202,
        responses=described(401, 404, 408, 413, 415, 422, 429, 503, 507),
        openapi_extra={"requestBody": body | {"required": True}},
    )
    async def accept(request: Request) -> dict[str, Any]:
        try:
            tenant, known = server.tenant(request), kept()
            accepted = await known.accept(await read(request, JSONL, server.options.limits.batch_body), tenant)
        except RequestError as error:
            server.metrics.rejected.labels(error.code).inc()
            raise
        request.state.facts = {"id": accepted["id"], "lines": accepted["request_counts"]["total"]}
        return accepted

    @app.get("/v1/batches", responses=described(401, 404))
    async def listed(request: Request) -> dict[str, Any]:
        known, tenant = kept(), server.tenant(request)

        def newest() -> list[dict[str, Any]]:
            return [description(one) for one in known.of(tenant)[:_LISTED]]

        return {"object": "list", "data": await asyncio.to_thread(newest), "has_more": False}

    @app.get("/v1/batches/{name}", responses=described(401, 404))
    async def one(request: Request, name: str) -> dict[str, Any]:
        return await asyncio.to_thread(description, found(request, name))

    @app.post("/v1/batches/{name}/cancel", responses=described(401, 404))
    async def cancel(request: Request, name: str) -> dict[str, Any]:
        batch = found(request, name)
        if batch.ended is None:
            batch.cancel()
        return await asyncio.to_thread(description, batch)

    @app.get(
        "/v1/batches/{name}/results",
        response_class=Response,
        responses=described(401, 404, 422) | {200: {"content": {JSONL[0]: {}, _EVENTS: {}}}},
    )
    async def results(
        request: Request,
        name: str,
        skip: Annotated[int, Query(ge=0, le=10**9, description="Results that the client has already.")] = 0,
        wait: Annotated[bool, Query(description="Whether to wait for those to come, until the batch ends.")] = True,
    ) -> Response:
        batch, known = found(request, name), kept()
        headers = {"Cache-Control": "no-store"}
        if _EVENTS not in request.headers.get("accept", ""):
            return StreamingResponse(_lines(known, batch, skip, wait), media_type=JSONL[0], headers=headers)
        seen = request.headers.get("last-event-id", "")
        skip = int(seen) if seen.isdecimal() and len(seen) < 10 else skip
        return StreamingResponse(_told(known, batch, skip, wait), media_type=_EVENTS, headers=headers)


async def _lines(batches: Batches, batch: Batch, skip: int, wait: bool) -> AsyncIterator[bytes]:
    async for _, line in batches.results(batch, skip, wait):
        if line:
            yield line


async def _told(batches: Batches, batch: Batch, skip: int, wait: bool) -> AsyncIterator[str]:
    """Yield server-sent events; each has the number of results so far as its id, for Last-Event-ID."""
    async for count, line in batches.results(batch, skip, wait):
        yield event("batch.result", json.loads(line), count) if line else ": waiting\n\n"
    facts = await asyncio.to_thread(description, batch)
    if facts["status"] in ("completed", "cancelled"):
        yield event("batch.done", facts)
