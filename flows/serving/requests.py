"""What a client may ask for, within limits, and what it becomes: a job for the model process."""

import itertools
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flows.serving import texts
from sage.data.rows import Rejected
from sage.sampling.seeds import prompt_seed

LARGEST_SEED = 2**63 - 1
Share = Literal["none", "request", "tenant"]
_Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
_Prompt = Annotated[str, Field(max_length=1_000_000)]  # the server's own limit is lower; this bounds the message


_Weight = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]


class ImagesRequest(BaseModel):
    """The body of POST /v1/images/generations: OpenAI's fields, and this project's from `steps` on."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: _Prompt | Annotated[list[_Prompt], Field(min_length=1)] = Field(description="One prompt or several.")
    n: Annotated[int, Field(ge=1, le=10**6)] = Field(1, description="Images of each prompt.")
    size: str | None = Field(None, pattern=r"^([0-9]{1,5}x[0-9]{1,5}|auto)$", description="WIDTHxHEIGHT in pixels.")
    response_format: Literal["b64_json", "url"] = "b64_json"
    user: Annotated[str, Field(max_length=256)] | None = Field(None, description="End user; a tenant of its own.")
    model: Annotated[str, Field(max_length=256)] | None = Field(None, description="Name that /v1/models lists.")
    stream: bool = Field(False, description="Answer with server-sent events as images finish.")
    steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="Inference steps.")
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    share_ratio: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    branch_noise: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    image_steps: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        None, description="First steps that the images of one prompt share; 0: none."
    )
    negative_prompt: _Prompt = ""
    literal: bool = Field(
        False,
        description="Whether templates, {a|b}, and markup of web UIs, (word:1.3), are text; else they are refused.",
    )
    lora: Annotated[str, Field(max_length=64)] | Annotated[dict[str, _Weight], Field(max_length=8)] | None = Field(
        None, description="Name of a LoRA that /v1/models lists, or names with weights."
    )
    share: Share = Field(
        "request", description="Who may share early steps: nobody, this request's prompts, the tenant."
    )
    seed: _Seed | None = Field(None, description="Each image's seed follows from it and from the prompt.")
    seeds: list[_Seed] | None = Field(None, description="A seed for each image, in order of the answer.")

    @model_validator(mode="after")
    def _one_kind_of_seed(self) -> "ImagesRequest":
        if self.seed is not None and self.seeds is not None:
            raise ValueError("give either seed or seeds, and not both")
        return self

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


@dataclass(frozen=True)
class Limits:
    """The largest request: bytes of the body, prompts, characters of each, images, pixels of each, images x steps.

    And the largest batch: bytes of the body, lines, images, and how many batches of a tenant may be open.
    """

    body: int = 1 << 20
    prompts: int = 64
    characters: int = 2000
    images: int = 64
    pixels: int = 1 << 20
    steps: int = 64 * 50
    batch_body: int = 32 << 20
    batch_lines: int = 10_000
    batch_images: int = 50_000
    batches: int = 16


@dataclass(frozen=True)
class Model:
    """What the model process says of its pipeline: name, hash, default settings and sizes it can draw."""

    name: str
    sha256: str
    settings: dict[str, Any]
    size: tuple[int, int]  # height, width
    multiple: int
    batch_size: int
    created: int = 0
    version: str | None = None  # of a registered model
    loras: dict[str, str] = field(default_factory=dict)  # SHA-256 by name
    safe_image_steps: int = 0  # first steps that images of one prompt share without loss, with full branch noise


@dataclass(frozen=True)
class Job:
    """A request as the model process takes it: prompts and seeds have an entry for each image to draw.

    `groups` are lists of images that share their early steps; None: the engine forms them as `share` says. A job in the
    `background` is drawn with what others leave free.
    """

    id: str
    tenant: str
    prompts: list[str]
    seeds: list[int]
    settings: dict[str, Any]  # those of `flows.drawing.draw`, and height, width, lora
    share: Share
    seeded: bool  # whether the client chose the seeds
    progress: bool = False  # whether the client wants to hear of each step
    groups: list[list[int]] | None = None
    background: bool = False


@dataclass(frozen=True)
class Grouping:
    """A question to the model process: which of these prompts, drawn with these settings, should share?"""

    id: str
    prompts: list[str]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Grouped:
    """The answer: lists of prompts, by number."""

    job: str
    groups: list[list[int]]


@dataclass(frozen=True)
class Drawn:
    """One finished image of a job; `evaluations` is its part of the cost, `alone` what it would have cost alone.

    `steps` are those of its plan, of which the images of its prompt shared `image_steps`.
    """

    job: str
    index: int
    png: Any  # bytes; between engine and sender the image itself
    seed: int
    evaluations: float
    alone: int
    shared_with: list[int] = field(default_factory=list)  # images of the same request
    others: int = 0  # how many images of the tenant's other requests
    prefix: str | None = None  # how it began from an earlier request's prefix: "exact", "similar"
    truncated_tokens: int = 0
    steps: int = 0
    image_steps: int = 0


@dataclass(frozen=True)
class Failed:
    """One image of a job (None: all that are left) that cannot be drawn, with a code and a message."""

    job: str
    index: int | None
    code: str
    message: str


@dataclass(frozen=True)
class Progress:
    """How many of the evaluations of a job's running images are done."""

    job: str
    done: int
    planned: int


@dataclass(frozen=True)
class Kept:
    """The prefixes that the model process keeps: in memory, and on disk if it has a folder."""

    prefixes: int = 0
    bytes: int = 0
    oldest: float | None = None  # time of the last use of the one that goes next
    files: int = 0
    file_bytes: int = 0
    damaged: int = 0  # files that were dropped
    unwritten: int = 0  # prefixes that could not be written


class RequestError(Exception):
    """A request that is refused: HTTP status, machine-readable code, message, and the field that is wrong."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        """Keep what the answer says; `retry_after` is in seconds."""
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


def parsed(body: bytes) -> ImagesRequest:
    """Return the request in a body; raise RequestError with status 422 for anything that is not one."""
    try:
        return ImagesRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from error


def invalid(error: ValidationError, within: str | None = None) -> RequestError:
    """Return the refusal, with status 422, that names the first field that is wrong, by its name in `within`."""
    # What the client sent is not repeated: it may be no valid text, or not finite.
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    parts = first["loc"][1:] if within is not None and first["loc"][:1] == (within,) else first["loc"]
    place = ".".join(str(part)[:64] for part in parts).encode("ascii", "replace").decode()
    message = f"{place}: {first['msg']}" if place else first["msg"]
    return RequestError(422, "invalid_request", message[:500], place or None)


def tenant_name(key: str | None, user: str | None) -> str | None:
    """Return with whom a request may share: the tenant of its token together with its user; None without both."""
    return None if key is None and user is None else json.dumps([key, user])


def job(request: ImagesRequest, tenant: str | None, limits: Limits, model: Model) -> tuple[Job, dict[int, Failed]]:
    """Return the job of a request, and errors by image for prompts that cannot be drawn.

    Image i of the answer is image i mod n of prompt i / n; the job has the images without an error, in order.
    Raises RequestError with status 422 if the request exceeds a limit or none of its prompts can be drawn.
    """
    settings = _settings(request, limits, model)
    count = len(request.prompts) * request.n
    _check_counts(request, count, settings["steps"], limits)
    if request.share == "tenant" and tenant is None:
        raise _wrong("share", "share 'tenant' needs an API key or a user, to know with whom to share")
    if request.model not in (None, model.name, "sage"):
        raise RequestError(
            404, "model_not_found", f"there is no model {request.model!r}; this is {model.name}", "model"
        )
    identity = secrets.token_hex(8)
    seeds = _seeds(request, count)
    prompts: list[str] = []
    kept: list[int] = []
    failed: dict[int, Failed] = {}
    for number, prompt in enumerate(request.prompts):
        images = range(number * request.n, (number + 1) * request.n)
        try:
            prompts += [texts.drawn(prompt, request.literal)] * request.n
            kept += images
        except Rejected as error:
            failed |= {i: Failed(identity, i, str(error.reason), str(error.detail)) for i in images}
    if not kept:
        first = failed[0]
        raise _wrong("prompt", f"no prompt can be drawn: {first.message}", first.code)
    drawn = [seeds[i] for i in kept]
    seeded = request.seed is not None or request.seeds is not None
    return Job(identity, tenant or identity, prompts, drawn, settings, request.share, seeded, request.stream), failed


def _settings(request: ImagesRequest, limits: Limits, model: Model) -> dict[str, Any]:
    """Return the sampling settings, the model's where the request says nothing."""
    names = ("steps", "guidance_scale", "share_ratio", "branch_noise")
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    settings = {name: model.settings[name] for name in names if name in model.settings} | given
    try:
        negative = request.negative_prompt
        settings["negative_prompt"] = texts.drawn(negative, request.literal) if negative else ""
    except Rejected as error:
        raise _wrong("negative_prompt", str(error.detail), str(error.reason)) from error
    height, width = model.size
    if request.size not in (None, "auto"):
        width, height = map(int, str(request.size).split("x"))
        if min(height, width) < model.multiple or height % model.multiple or width % model.multiple:
            raise _wrong("size", f"size is {width}x{height}; width and height must be multiples of {model.multiple}")
        if height * width > limits.pixels:
            raise _wrong("size", f"size {width}x{height} is {height * width} pixels; at most {limits.pixels}")
    settings["image_steps"] = _image_steps(request, settings, model)
    if model.loras or request.lora:
        settings["lora"] = _loras(request, model)
    return settings | {"height": height, "width": width}


def _image_steps(request: ImagesRequest, settings: Mapping[str, Any], model: Model) -> int | None:
    """Return how many first steps the images of a prompt share, None for the pipeline's rule.

    The model's own setting gives way to the rest of the request; raises RequestError if the request's cannot be held.
    """
    noise, asked = settings.get("branch_noise", 0.0), request.image_steps
    if asked is None:
        default = model.settings.get("image_steps", 0)
        able = request.share != "none" and noise and (default is None or default < settings["steps"])
        return default if able else 0
    if asked and request.share == "none":
        raise _wrong("image_steps", f"image_steps is {asked}, but share is none; leave one of them out")
    if asked and (not noise or asked >= settings["steps"]):
        needs = f"needs branch_noise above 0 (it is {noise}) and more steps than that ({settings['steps']})"
        raise _wrong("image_steps", f"image_steps {asked} {needs}: the images would come out alike")
    return asked


def _loras(request: ImagesRequest, model: Model) -> tuple[tuple[str, float, str], ...]:
    """Return name, weight and hash of each LoRA that is asked for, in order; raise RequestError with status 400."""
    asked = {request.lora: 1.0} if isinstance(request.lora, str) else request.lora or {}
    if unknown := sorted(asked.keys() - model.loras.keys()):
        known = ", ".join(sorted(model.loras)) or "none; load some with --lora NAME=PATH"
        raise RequestError(400, "unknown_lora", f"there is no LoRA {unknown[0]!r}; loaded: {known}", "lora")
    return tuple((name, float(weight), model.loras[name]) for name, weight in sorted(asked.items()) if weight)


def _check_counts(request: ImagesRequest, count: int, steps: int, limits: Limits) -> None:
    prompts, longest = len(request.prompts), max(map(len, (*request.prompts, request.negative_prompt)))
    if prompts > limits.prompts:
        raise _wrong("prompt", f"{prompts} prompts were given; at most {limits.prompts} in a request")
    if longest > limits.characters:
        raise _wrong("prompt", f"a prompt has {longest} characters; at most {limits.characters}", "too_long")
    if count > limits.images:
        raise _wrong("n", f"{prompts} prompts with n={request.n} are more than {limits.images} images")
    if count * steps > limits.steps:
        raise _wrong("steps", f"{count} images of {steps} steps are more than {limits.steps} steps in a request")
    if request.seeds is not None and len(request.seeds) != count:
        raise _wrong("seeds", f"{len(request.seeds)} seeds were given for {count} images; give one for each")


def _seeds(request: ImagesRequest, count: int) -> list[int]:
    """Return a seed for each image; image r of a prompt has the seed of its r-th copy in a list of prompts."""
    if request.seeds is not None:
        return request.seeds
    seed = secrets.randbits(62) if request.seed is None else request.seed
    times: dict[str, itertools.count[int]] = {}
    copies = [prompt for prompt in request.prompts for _ in range(request.n)]
    return [prompt_seed(seed, f"{next(times.setdefault(prompt, itertools.count()))}:{prompt}") for prompt in copies]


def _wrong(param: str, message: str, code: str = "invalid_request") -> RequestError:
    return RequestError(422, code, message, param)
