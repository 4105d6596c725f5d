"""`sage generate --server`: a running `sage serve` draws the images, through its HTTP API (docs/serving.md).

Each group of prompts is one request with the seeds of its images, so the server shares what a run on this machine would
share. Several requests are under way at a time; one that finds the server full, starting or gone is sent again.
"""

import asyncio
import base64
import binascii
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import typer
from PIL import Image, UnidentifiedImageError

from sage.config import Group, load_params
from sage.errors import ConfigurationError, DataError, SageError
from sage.grouping.auto import DEFAULT

if TYPE_CHECKING:
    from httpx import AsyncClient, Response

TOKEN = "SAGE_SERVER_TOKEN"  # noqa: S105 - the name of the variable
_AT_A_TIME = 8  # requests
_ANSWER, _CONNECT = 600.0, 10.0  # seconds for an answer with its images, and for a connection
_LATER = (408, 429, 502, 503, 504)
_LOSSES = 5  # tries of a request whose images are lost with the model process
_LOST = ("worker_lost", "draining", "not_ready")  # errors of images that another try may draw
_SETTINGS = ("steps", "guidance_scale", "share_ratio", "branch_noise", "image_steps")


class ServerError(SageError):
    """The server cannot be reached or does not answer as `sage serve` does; exit code 75 says: try again later."""

    exit_code = 75


@dataclass(frozen=True)
class Waits:
    """How a run waits for its server, in seconds.

    patience        without any answer, after which the run gives up
    first, longest  between two tries, at first and at most, unless the server asks for more
    quiet           between two messages that it waits
    """

    patience: float = 600.0
    first: float = 0.5
    longest: float = 60.0
    quiet: float = 10.0


@dataclass(frozen=True)
class Picture:
    """One image: the prompt's index, its seed, the indices that it shared steps with, and what it cost."""

    member: int
    image: Image.Image
    seed: int
    shared_with: Sequence[int]
    truncated_tokens: int
    evaluations: float
    alone: float


class Server:
    """A running `sage serve`, with the parts of a pipeline that planning a run needs.

    `refused` holds why the server drew no image for a prompt, by the prompt's index.
    """

    device = "server"
    scheduler_name = "unknown"

    def __init__(self, address: str, model: str | None = None, waits: Waits = Waits()) -> None:
        """Take the server's address and, if only one model will do, its name; the token is in SAGE_SERVER_TOKEN."""
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(
                f"--server {address} is no address; give http://HOST:PORT, as sage serve prints it"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigurationError(f"--server takes scheme, host, port and path only; a token belongs in {TOKEN}")
        token = os.environ.get(TOKEN, "").strip()
        if not (token.isascii() and token.isprintable()):
            raise ConfigurationError(f"{TOKEN} holds characters that no token has; write the token alone")
        self._address = address.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._model, self._waits = model, waits
        self._serves = ""  # hash of the model
        self._image_steps = 0  # that are safe with full branch noise
        self._heard = self._told = time.monotonic()
        self.refused: dict[int, str] = {}

    def evaluations(self, steps: int) -> int:
        """Return the steps of a plan; what a scheduler evaluates beyond them, only the server knows."""
        return steps

    def safe_image_steps(self, steps: int, branch_noise: float) -> int:
        """Return how many first steps the images of one prompt share if the model has no number for it."""
        return self._image_steps if branch_noise == 1 else 0

    def opened(self) -> tuple["Server", str, dict[str, Any], Group]:
        """Return this server, the hash of its model, and the model's sampling and grouping settings."""
        found = asyncio.run(self._alone())
        self._serves, self._image_steps = found["sha256"], found.get("safe_image_steps", 0)
        self.scheduler_name = found["settings"].get("scheduler") or self.scheduler_name
        settings = {name: found["settings"][name] for name in _SETTINGS if name in found["settings"]}
        group = found["settings"].get("group") or load_params().group.model_dump()
        if group.get("max_damage") is not None:
            # The measured damage is in the model's folder, on the server: here the groups are only candidates.
            group |= {"max_damage": None, "threshold": DEFAULT.threshold}
        if group.get("by") == "distilled":
            raise ConfigurationError(
                f"{self._address} groups prompts by the distilled encoder of its model, which is not on this machine; "
                "send the list as a batch (docs/serving.md), or draw it here, without --server"
            )
        return self, self._serves, settings, Group(**group)

    def draw(
        self,
        texts: Sequence[str],
        seeds: Sequence[int],
        groups: Sequence[Sequence[int]],
        settings: Mapping[str, Any],
        take: Callable[[Picture | int], None],
    ) -> None:
        """Have the images of groups drawn; call `take` with each image, or with the index of a refused prompt.

        texts, seeds  of all prompts
        groups        the groups to draw, indices of prompts
        settings      sampling settings (`Job.settings`)

        Raises ConfigurationError if the server refuses the run, DataError if it serves another model meanwhile, and
        ServerError if it does not answer.
        """
        common = {name: settings[name] for name in (*_SETTINGS, "negative_prompt") if name in settings}
        common |= {"prompt": texts, "seeds": seeds, "literal": True}  # the list was checked when it was read
        if self._model is not None:
            common["model"] = self._model
        self._heard = time.monotonic()
        try:
            asyncio.run(self._draw(iter(groups), common, take))
        except ExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _draw(
        self,
        groups: Iterator[Sequence[int]],
        common: Mapping[str, Any],
        take: Callable[[Picture | int], None],
    ) -> None:
        async def work() -> None:
            for group in groups:  # one iterator for all workers
                found = await self._group(client, group, _part(common, group))
                await self._check(client)
                for picture in found:
                    take(picture)

        async with self._client() as client, asyncio.TaskGroup() as tasks:
            for _ in range(_AT_A_TIME):
                tasks.create_task(work())

    async def _group(self, client: "AsyncClient", group: Sequence[int], body: dict[str, Any]) -> list[Picture | int]:
        """Return an image or the index of a refused prompt for each prompt of one request."""
        lost: Any = None
        for losses in range(1, _LOSSES + 1):
            answer = await self._answer(client, "POST", "/v1/images/generations", body)
            if answer.is_success:
                data = _json(answer).get("data")
                if not isinstance(data, list) or [type(item) for item in data] != [dict] * len(group):
                    raise ServerError(f"{self._address} answered without the {len(group)} images that were asked for")
                lost = next((item["error"] for item in data if item.get("error", {}).get("code") in _LOST), None)
                if lost is None:
                    return [self._picture(group, place, item) for place, item in enumerate(data)]
                await self._wait(lost["message"], float(losses))
                continue
            error = _error(answer)
            of_prompt = answer.status_code in (413, 422) and (error["param"] or "prompt").startswith("prompt")
            if of_prompt and len(group) > 1:
                # The answer does not say which prompt is at fault, or all are too many.
                half = len(group) // 2
                found: list[Picture | int] = []
                for part in (range(half), range(half, len(group))):
                    found += await self._group(client, [group[place] for place in part], _part(body, part))
                return found
            if of_prompt or error["code"] == "generation_failed":
                self.refused |= dict.fromkeys(group, f"{error['code']}: {error['message']}")
                return list(group)
            raise self._refusal(answer.status_code, error)
        raise ServerError(
            f"{self._address} lost the images of {body['prompt'][0]!r} {_LOSSES} times: {lost['message']}"
        )

    def _picture(self, group: Sequence[int], place: int, item: Mapping[str, Any]) -> Picture | int:
        if error := item.get("error"):
            self.refused[group[place]] = f"{error['code']}: {error['message']}"
            return group[place]
        try:
            image = Image.open(io.BytesIO(base64.b64decode(item["b64_json"], validate=True)), formats=["PNG"])
            image.load()
            return Picture(
                group[place],
                image,
                item["seed"],
                [group[other] for other in item["shared_with"]],
                item["truncated_tokens"],
                item["evaluations"],
                item["evaluations_alone"],
            )
        except (KeyError, IndexError, TypeError, binascii.Error, OSError, UnidentifiedImageError) as error:
            raise ServerError(f"{self._address} sent no image as sage serve does: {type(error).__name__}") from error

    async def _check(self, client: "AsyncClient") -> None:
        """Raise DataError if the server serves another model than when the run began."""
        found = await self._described(client)
        if found["sha256"] != self._serves:
            raise DataError(
                f"{self._address} now serves model {found['sha256'][:12]}, the run began with {self._serves[:12]}; "
                "start a new run in another folder"
            )

    async def _alone(self) -> dict[str, Any]:
        async with self._client() as client:
            try:
                await client.get("/healthz")
            except _transport_errors() as error:
                raise ServerError(
                    f"{self._address} does not answer ({error}); start `sage serve` there, or correct the address"
                ) from error
            return await self._described(client)

    async def _described(self, client: "AsyncClient") -> dict[str, Any]:
        answer = await self._answer(client, "GET", "/v1/models")
        if not answer.is_success:
            raise self._refusal(answer.status_code, _error(answer))
        listed = _json(answer).get("data")
        found: Any = listed[0] if isinstance(listed, list) and listed else None
        if not isinstance(found, dict) or not {"id", "sha256", "settings"} <= set(found):
            raise ServerError(f"{self._address} does not list its model as sage serve does; give the address of one")
        if self._model not in (None, found["id"]):
            raise ConfigurationError(f"{self._address} serves {found['id']}, not {self._model}; leave --model out")
        return found

    def _client(self) -> "AsyncClient":
        import httpx

        timeout = httpx.Timeout(_ANSWER, connect=_CONNECT)
        return httpx.AsyncClient(base_url=self._address, headers=self._headers, timeout=timeout)

    async def _answer(self, client: "AsyncClient", method: str, path: str, body: Any = None) -> "Response":
        """Return the answer to a request, which is sent again while the server is full, starting or gone."""
        pause = self._waits.first
        while True:
            try:
                answer = await client.request(method, path, json=body)
            except _transport_errors() as error:
                reason, wait = f"{type(error).__name__}: {error}", pause
            else:
                if answer.status_code not in _LATER:
                    self._heard = time.monotonic()
                    return answer
                reason = f"status {answer.status_code}, {_error(answer)['message']}"
                wait = _retry_after(answer, self._waits.patience) or pause
            await self._wait(reason, wait)
            pause = min(2 * pause, self._waits.longest)

    async def _wait(self, reason: str, seconds: float) -> None:
        """Wait before another try; raise ServerError if the server has not answered for too long."""
        now, waits = time.monotonic(), self._waits
        if now + seconds - self._heard > waits.patience:
            raise ServerError(
                f"{self._address} did not answer for {waits.patience:.0f} s, at last: {reason}; run the command again "
                "later"
            )
        if now - max(self._heard, self._told) > waits.quiet:
            self._told = now
            typer.echo(f"waiting for {self._address}: {reason}", err=True)
        await asyncio.sleep(seconds)

    def _refusal(self, status: int, error: Mapping[str, Any]) -> SageError:
        said = f"{self._address} refused the run with {status} {error['code']}: {error['message']}"
        if 400 <= status < 500:
            return ConfigurationError(f"{said}; set {TOKEN} to a token of the server" if status == 401 else said)
        return ServerError(said)


def _part(body: Mapping[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """Return the request for some of the prompts of another."""
    some = {name: [body[name][number] for number in numbers] for name in ("prompt", "seeds")}
    return {**body, **some, **({"share": "request"} if len(numbers) > 1 else {"share": "none", "image_steps": 0})}


def _transport_errors() -> type[Exception]:
    import httpx

    return httpx.TransportError


def _retry_after(answer: "Response", most: float) -> float | None:
    """Return the seconds that a server asks to wait, given in seconds or as a date; at most `most`."""
    value = answer.headers.get("retry-after", "")
    if value.isdecimal():
        return min(float(value[:9]), most)
    try:
        return min(max(0.0, parsedate_to_datetime(value).timestamp() - time.time()), most)
    except (TypeError, ValueError):
        return None


def _json(answer: "Response") -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _error(answer: "Response") -> dict[str, Any]:
    """Return code, message and param of an error as OpenAI's API has it; any other answer is described."""
    found = _json(answer).get("error")
    known = found if isinstance(found, dict) else {"message": answer.text[:200]}
    return {"code": known.get("code") or "error", "message": known.get("message") or "", "param": known.get("param")}
