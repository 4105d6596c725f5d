"""Middleware: refuses foreign hosts and origins, gives up clients that do not read; counts and logs all but probes."""

import asyncio
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.serving import refusals
from flows.serving.metrics import Metrics, log
from flows.serving.requests import RequestError

HEADERS = 16 << 10  # bytes of all headers of a request
_STALLED = 30.0  # seconds for a part of an answer, and those for its bytes at the slowest rate
_SLOWEST = 64 << 10  # bytes a second
_PROBES = ("/healthz", "/readyz", "/metrics")


class Watch:
    """The middleware of one server."""

    def __init__(self, app: ASGIApp, metrics: Metrics, hosts: Collection[str]) -> None:
        """Take the application to call, where to count, and the names by which this server is known."""
        self._app, self._metrics, self._hosts = app, metrics, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        began, status, stalled = time.perf_counter(), 499, False
        scope.setdefault("state", {})

        async def watched(message: Message) -> None:
            nonlocal status, stalled
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                async with asyncio.timeout(_STALLED + len(message.get("body", b"")) / _SLOWEST):
                    await send(message)
            except TimeoutError as error:
                stalled = True
                raise ConnectionError("the client does not read its answer") from error

        try:
            if refusal := self._too_long(scope) or self._foreign(scope):
                await refusal(scope, receive, watched)
            else:
                await self._app(scope, receive, watched)
        except Exception:
            status = 499 if stalled else 500
            if not stalled:
                raise
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            facts = scope["state"].get("facts", {})
            log(method=scope["method"][:16], route=route, status=status, ms=round(1000 * seconds, 1), **facts)

    def _too_long(self, scope: Scope) -> Response | None:
        """Return the refusal of headers above HEADERS; h11 refuses them only if they come in several parts."""
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size <= HEADERS:
            return None
        message = f"the headers have {size} bytes; at most {HEADERS} are read"
        return refusals.answer(RequestError(431, "headers_too_large", message))

    def _foreign(self, scope: Scope) -> Response | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (b"host", b"origin")}
        host = _hostname(f"//{headers.get(b'host', '')}")
        origin = headers.get(b"origin")
        if host not in self._hosts:
            return refusals.answer(
                RequestError(421, "unknown_host", "this server is not known by that host; see --allowed-host")
            )
        if origin is not None and _hostname(origin) not in self._hosts:
            return refusals.answer(RequestError(403, "foreign_origin", "pages of another origin may not use it"))
        return None


def _hostname(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
