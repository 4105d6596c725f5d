"""Error answers as OpenAI's API has them, and their descriptions in the OpenAPI document."""

from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from flows.serving.requests import RequestError


def answer(error: RequestError) -> JSONResponse:
    """Return the answer for a refused request."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    facts = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
    return JSONResponse({"error": facts}, error.status, headers)


async def refused(request: Request, error: Exception) -> Response:
    """Answer a RequestError."""
    assert isinstance(error, RequestError)
    return answer(error)


async def http_error(request: Request, error: Exception) -> Response:
    """Answer what the framework refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    found = answer(RequestError(error.status_code, "http_error", str(error.detail)))
    found.headers.update(error.headers or {})
    if error.status_code == 405:
        # The framework names the methods of one route, and a path may have several.
        routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        found.headers["Allow"] = ", ".join(sorted({method for route in routes for method in route.methods or ()}))
    return found


async def wrong_parameter(request: Request, error: Exception) -> Response:
    """Answer if a parameter of the address is wrong."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = str(first["loc"][-1])[:64]
    return answer(RequestError(422, "invalid_request", f"{place}: {first['msg']}", place))


async def broken(request: Request, error: Exception) -> Response:
    """Answer if the server is at fault."""
    return answer(RequestError(500, "internal_error", "the server made a mistake; its log says more"))


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the descriptions of error answers for the OpenAPI document."""
    text = {"type": ["string", "null"]}
    error = {"type": "object", "properties": dict.fromkeys(("message", "type", "param", "code"), text)}
    schema = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    content = {"application/json": {"schema": schema}}
    return {status: {"description": "An error as OpenAI's API has it", "content": content} for status in statuses}
