"""The lines of a batch: what each asks for, or why it cannot be drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from flows.serving import items, requests
from flows.serving.items import Items
from flows.serving.requests import ImagesRequest, Job, Limits, Model, RequestError
from sage.sampling.seeds import prompt_seed

URL = "/v1/images/generations"


class BatchLine(BaseModel):
    """A line as OpenAI's batches have it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    custom_id: Annotated[str, Field(max_length=512)] | None = Field(None, description="Comes back with the result.")
    method: Literal["POST"] = "POST"
    url: Literal["/v1/images/generations"] = "/v1/images/generations"
    body: ImagesRequest


@dataclass(frozen=True)
class Line:
    """A line that can be drawn, and what is known of its images."""

    number: int
    custom_id: str | None
    job: Job
    items: Items


def numbered(body: bytes) -> list[tuple[int, bytes]]:
    """Return the lines that are not blank, by number; the first has the number 0."""
    return [(number, line) for number, line in enumerate(body.split(b"\n")) if line.strip()]


def parsed(line: bytes) -> BatchLine:
    """Return a line as OpenAI's batches have it, or a request itself with a `custom_id` or without.

    Raises RequestError with status 422 for anything else.
    """
    try:
        value = from_json(line)
    except ValueError as error:
        raise RequestError(422, "invalid_json", f"the line is not JSON: {error}"[:300]) from error
    bare = isinstance(value, dict) and "body" not in value
    if bare:
        own = {"custom_id": value.pop("custom_id")} if "custom_id" in value else {}
        value = {**own, "body": value}
    try:
        found = BatchLine.model_validate(value)
    except ValidationError as error:
        raise requests.invalid(error, within="body" if bare else None) from error
    for name, given in (("stream", found.body.stream), ("response_format", found.body.response_format == "url")):
        if given:
            raise RequestError(422, "invalid_request", f"a line of a batch takes no {name}; leave it out", name)
    return found


def images(body: bytes) -> tuple[int, int]:
    """Return how many lines a body has, and images; raise RequestError with status 422 if no line can be read."""
    lines, count, first = numbered(body), 0, None
    for _, line in lines:
        try:
            asked = parsed(line).body
            count += len(asked.prompts) * asked.n
        except RequestError as error:
            first = first or error
    if not count:
        reason = str(first) if first else "it has no line"
        raise RequestError(422, "invalid_batch", f"send one JSON object in each line; no line can be read: {reason}")
    return len(lines), count


def checked(number: int, asked: BatchLine, seed: int, tenant: str | None, limits: Limits, model: Model) -> Line:
    """Return what a line asks for; raise RequestError if none of it can be drawn.

    number   of the line
    asked    what it says
    seed     of the batch; a line without seeds has one that follows from it
    tenant   of the client's token
    limits   those of a single request
    model    that draws it
    """
    body = asked.body
    if body.seed is None and body.seeds is None:
        body = body.model_copy(update={"seed": prompt_seed(seed, str(number))})
    job, failed = requests.job(body, requests.tenant_name(tenant, body.user), limits, model)
    return Line(number, asked.custom_id, job, Items(job, failed, items.encoded, number))


def custom_id(line: bytes) -> str | None:
    """Return the `custom_id` of a line that cannot be drawn, if it has one."""
    try:
        value: Any = from_json(line)
    except ValueError:
        return None
    found = value.get("custom_id") if isinstance(value, dict) else None
    return found[:512] if isinstance(found, str) else None


def kinds(lines: Sequence[Line]) -> dict[Any, list[tuple[int, int]]]:
    """Return the images that may share steps with each other: those of one tenant with equal settings.

    Images are (line, number in the line). Those of a line that shares nothing, or with other requests, are left out.
    """
    found: dict[Any, list[tuple[int, int]]] = {}
    for line in lines:
        if line.job.share == "request":
            kind = (line.job.tenant if line.job.tenant != line.job.id else None, *sorted(line.job.settings.items()))
            found.setdefault(kind, []).extend((line.number, place) for place in line.items.places)
    return found
