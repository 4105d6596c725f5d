"""The server's routes: OpenAI's images API, health, metrics, and a page to try it."""

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.serving import requests
from flows.serving.metrics import Metrics, log
from flows.serving.requests import Drawn, Failed, ImagesRequest, Limits, Progress, RequestError
from flows.serving.worker import Worker

_PROBES = ("/healthz", "/readyz", "/metrics")
_BODY_SECONDS = 10.0  # time to send a whole body
_KEPT_IMAGES = 64 << 20  # bytes of images kept for response_format "url"
_STATUS = {"worker_lost": 503, "draining": 503, "generation_failed": 500}


@dataclass(frozen=True)
class Options:
    """How the server answers: waiting images, tenants by hash of their token (None: no tokens), its host names."""

    queue: int = 64
    limits: Limits = field(default_factory=Limits)
    tokens: Mapping[bytes, str] | None = None
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "::1")


def read_tokens(path: Path) -> dict[bytes, str]:
    """Return tenants by the hash of their token; each line of the file is `tenant:token`, # begins a comment."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            tenant, _, token = line.strip().partition(":")
            if not tenant or not token:
                raise ValueError(f"{path}: a line is not tenant:token")
            found[_hash(token)] = tenant
    if not found:
        raise ValueError(f"{path} has no tokens; write lines of tenant:token")
    return found


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

    def tenant(self, request: Request) -> str | None:
        """Return the tenant of a request's token, None without tokens; raise RequestError with status 401."""
        if self.options.tokens is None:
            return None
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        found = self.options.tokens.get(_hash(token.strip())) if scheme.lower() == "bearer" else None
        if found is None:
            raise RequestError(401, "invalid_api_key", "give a valid token: Authorization: Bearer TOKEN")
        return found

    def take(self, count: int) -> None:
        """Reserve room for images; raise RequestError with status 429 if there is too little."""
        if self.draining:
            raise RequestError(503, "draining", "the server is shutting down; ask another one", retry_after=5)
        capacity = self.options.queue + (self.worker.model.batch_size if self.worker.model else 0)
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
        while sum(map(len, self._links.values())) > _KEPT_IMAGES:
            self._links.popitem(last=False)
        return name

    def linked(self, name: str) -> bytes | None:
        """Return a kept image."""
        return self._links.get(name)

    def _change(self, count: int) -> None:
        self.open += count
        self.metrics.open.set(self.open)


def create_app(server: Server) -> FastAPI:
    """Return the application; the model process lives as long as it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        await server.stop()

    app = FastAPI(title="SAGE", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Watch, server=server)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _broken)

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> JSONResponse:
        problem = "the server is shutting down" if server.draining else server.worker.problem
        facts = {"ready": problem is None, "reason": problem, "worker_pid": server.worker.pid}
        facts["refused_version"] = server.refused_version
        return JSONResponse(facts, 200 if problem is None else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        server.metrics.ready.set(server.worker.problem is None)
        server.metrics.show(server.worker.kept)
        server.metrics.restarts.set(server.worker.restarts)
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))

    @app.get("/v1/models", responses=_errors(401, 503))
    async def models(request: Request) -> dict[str, Any]:
        server.tenant(request)
        model = server.worker.model
        if model is None:
            raise RequestError(503, "not_ready", f"{server.worker.problem}; try again", retry_after=5)
        own = {
            "version": model.version,
            "sha256": model.sha256,
            "settings": model.settings,
            "size": f"{model.size[1]}x{model.size[0]}",
        }
        listed = {"id": model.name, "object": "model", "created": model.created, "owned_by": "sage", **own}
        return {"object": "list", "data": [listed]}

    @app.get("/images/{name}", response_class=Response, responses=_errors(404))
    async def linked(name: str) -> Response:
        png = server.linked(name.removesuffix(".png"))
        if png is None:
            raise RequestError(404, "not_found", "there is no such image, or it was dropped for newer ones")
        return Response(png, media_type="image/png")

    body = {"content": {"application/json": {"schema": ImagesRequest.model_json_schema()}}, "required": True}

    @app.post(
        "/v1/images/generations",
        response_model=None,
        responses=_errors(400, 401, 404, 408, 413, 415, 422, 429, 500, 503),
        openapi_extra={"requestBody": body},
    )
    async def generate(request: Request) -> Response:
        try:
            tenant = server.tenant(request)
            asked = requests.parsed(await _body(request, server.options.limits.body))
            answer = _Answer(server, request, asked, tenant)
        except RequestError as error:
            server.metrics.rejected.labels(error.code).inc()
            raise
        return await answer.respond()

    return app


class _Answer:
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


class Watch:
    """Middleware: refuses foreign hosts and origins; counts, times and logs every request except probes."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        """Take the application to call."""
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499
        scope.setdefault("state", {})

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if refusal := self._foreign(scope):
                await refusal(scope, receive, watched)
            else:
                await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "none")
            self._server.metrics.requests.labels(route, str(status)).inc()
            self._server.metrics.seconds.labels(route).observe(seconds)
            facts = scope["state"].get("facts", {})
            log(method=scope["method"][:16], route=route, status=status, ms=round(1000 * seconds, 1), **facts)

    def _foreign(self, scope: Scope) -> Response | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (b"host", b"origin")}
        host = _hostname(f"//{headers.get(b'host', '')}")
        origin = headers.get(b"origin")
        if host not in self._server.options.hosts:
            return _error(
                RequestError(421, "unknown_host", "this server is not known by that host; see --allowed-host")
            )
        if origin is not None and _hostname(origin) not in self._server.options.hosts:
            return _error(RequestError(403, "foreign_origin", "pages of other origins may not use this server"))
        return None


async def _body(request: Request, limit: int) -> bytes:
    """Return the body; raise RequestError if it is no JSON by its type, too long, or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "unsupported_media_type", "send JSON with Content-Type: application/json")
    too_long = RequestError(413, "too_large", f"the body has more than {limit} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_long
    except TimeoutError as error:
        raise RequestError(408, "too_slow", f"the body took more than {_BODY_SECONDS:.0f} s") from error
    return bytes(body)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error_item(event: Failed) -> dict[str, Any]:
    return {"b64_json": None, "error": {"code": event.code, "message": event.message}}


def _event(name: str, facts: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **facts})}\n\n"


def _error(error: RequestError) -> JSONResponse:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    facts = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
    return JSONResponse({"error": facts}, error.status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = _error(RequestError(error.status_code, "http_error", str(error.detail)))
    answer.headers.update(error.headers or {})
    return answer


async def _broken(request: Request, error: Exception) -> Response:
    return _error(RequestError(500, "internal_error", "the server made a mistake; its log says more"))


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the descriptions of error answers for the OpenAPI document."""
    text = {"type": ["string", "null"]}
    error = {"type": "object", "properties": dict.fromkeys(("message", "type", "param", "code"), text)}
    schema = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    content = {"application/json": {"schema": schema}}
    return {status: {"description": "An error as OpenAI's API has it", "content": content} for status in statuses}


def _hostname(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _hash(token: str) -> bytes:
    # A lookup by hash takes no longer for a token that is nearly right.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
