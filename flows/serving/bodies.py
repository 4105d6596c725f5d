"""Bodies of requests: of the right type, not too long, and not too slow."""

import asyncio
from collections.abc import Collection

from fastapi import Request

from flows.serving.requests import RequestError

JSON = ("application/json",)
JSONL = ("application/jsonl", "application/x-ndjson", "application/json-lines")
_SECONDS = 10.0  # to send a whole body; a larger one may take a second for each MiB of its limit


async def read(request: Request, types: Collection[str], limit: int) -> bytes:
    """Return the body; raise RequestError if it has another type, or is too long or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in types:
        wanted = " or ".join(types)
        raise RequestError(415, "unsupported_media_type", f"send the body with Content-Type: {wanted}")
    too_long = RequestError(413, "too_large", f"the body has more than {limit} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_long
    body, seconds = bytearray(), max(_SECONDS, limit / (1 << 20))
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_long
    except TimeoutError as error:
        raise RequestError(408, "too_slow", f"the body took more than {seconds:.0f} s") from error
    return bytes(body)
