"""The server's routes: OpenAI's images API, health, metrics, and a page to try it."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from flows.serving import batch_routes, refusals, requests
from flows.serving.answers import Answer
from flows.serving.batches import Batches
from flows.serving.bodies import JSON, read
from flows.serving.refusals import described
from flows.serving.requests import ImagesRequest, RequestError
from flows.serving.state import Server
from flows.serving.watch import Watch


def create_app(server: Server, batches: Batches | None = None) -> FastAPI:
    """Return the application; the model process lives as long as it. Without `batches` it takes none."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        if batches is not None:
            batches.start()
        yield
        if batches is not None:
            await batches.stop()
        await server.stop()

    app = FastAPI(title="SAGE", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Watch, metrics=server.metrics, hosts=server.options.hosts)
    app.add_exception_handler(RequestError, refusals.refused)
    app.add_exception_handler(HTTPException, refusals.http_error)
    app.add_exception_handler(RequestValidationError, refusals.wrong_parameter)
    app.add_exception_handler(Exception, refusals.broken)

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

    @app.get("/v1/models", responses=described(401, 503))
    async def models(request: Request) -> dict[str, Any]:
        server.tenant(request)
        model = server.worker.model
        if model is None:
            raise RequestError(503, "not_ready", f"{server.worker.problem}; try again", retry_after=5)
        own = {
            "version": model.version,
            "sha256": model.sha256,
            "settings": model.settings,
            "loras": model.loras,
            "safe_image_steps": model.safe_image_steps,
            "size": f"{model.size[1]}x{model.size[0]}",
        }
        listed = {"id": model.name, "object": "model", "created": model.created, "owned_by": "sage", **own}
        return {"object": "list", "data": [listed]}

    @app.get("/images/{name}", response_class=Response, responses=described(404))
    async def linked(name: str) -> Response:
        png = server.linked(name.removesuffix(".png"))
        if png is None:
            raise RequestError(404, "not_found", "there is no such image, or it was dropped for newer ones")
        return Response(png, media_type="image/png")

    body = {"content": {"application/json": {"schema": ImagesRequest.model_json_schema()}}, "required": True}

    @app.post(
        "/v1/images/generations",
        response_model=None,
        responses=described(400, 401, 404, 408, 413, 415, 422, 429, 500, 503)
        | {200: {"content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}}},
        openapi_extra={"requestBody": body},
    )
    async def generate(request: Request) -> Response:
        try:
            tenant = server.tenant(request)
            asked = requests.parsed(await read(request, JSON, server.options.limits.body))
            answer = Answer(server, request, asked, tenant)
        except RequestError as error:
            server.metrics.rejected.labels(error.code).inc()
            raise
        return await answer.respond()

    batch_routes.add(app, server, batches)
    return app
