"""The items of an answer: an image or an error for each, and what all of them cost."""

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flows.prompts import metadata
from flows.serving.requests import Drawn, Failed, Job, Model

_STATUS = {"worker_lost": 503, "draining": 503, "generation_failed": 500}


def encoded(png: bytes) -> dict[str, Any]:
    """Return an image as it stands in an item."""
    return {"b64_json": base64.b64encode(png).decode()}


class Items:
    """The items of one request, in the order of its images, as they become known."""

    def __init__(
        self, job: Job, failed: dict[int, Failed], shown: Callable[[bytes], dict[str, Any]], line: int | None = None
    ) -> None:
        """Begin with the images that cannot be drawn.

        job     the images that can be drawn, in order
        failed  errors of the others, by number in the answer
        shown   what an item says of where its image is
        line    of a batch, which is a part of its images' names
        """
        self.count = len(job.prompts) + len(failed)
        self.places = [place for place in range(self.count) if place not in failed]
        self.found: dict[int, dict[str, Any]] = {place: _error(one) for place, one in failed.items()}
        self.errors = list(failed.values())
        self.evaluations = self.alone = 0.0
        self.prompts = dict(zip(self.places, job.prompts, strict=True))
        self._settings, self._shown, self._line = job.settings, shown, line

    @property
    def open(self) -> int:
        """Number of images of which nothing is known yet."""
        return self.count - len(self.found)

    @property
    def status(self) -> int:
        """HTTP status of the whole: 200 if any image was drawn, else that of the first error."""
        if len(self.found) > len(self.errors):
            return 200
        return _STATUS.get(self.errors[0].code, 422)

    @property
    def data(self) -> list[dict[str, Any]]:
        """All items, once none is open."""
        return [self.found[place] for place in range(self.count)]

    @property
    def usage(self) -> dict[str, float]:
        """The evaluations of all images, what they would have cost alone, and the fraction saved."""
        return usage(self.evaluations, self.alone)

    def name(self, place: int) -> str:
        """The name of an image in its metadata: its number, in a batch after that of its line."""
        return str(place) if self._line is None else f"{self._line}.{place}"

    def draw(
        self,
        place: int,
        event: Drawn,
        shared_with: list[int],
        model: Model,
        beyond: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        """Take a finished image.

        place, event  its number, and what the model process says of it
        shared_with   the images of this answer with which it shared
        model         that drew it
        beyond        prompts of images of the batch's other lines with which it shared, by name
        more          further facts for its item
        """
        self.evaluations += event.evaluations
        self.alone += event.alone
        mates = {self.name(other): self.prompts[other] for other in shared_with} | dict(beyond or {})
        self.found[place] = self._shown(metadata.added(event.png, self._facts(place, event, mates, model))) | {
            "revised_prompt": self.prompts[place],
            "seed": event.seed,
            "evaluations": event.evaluations,
            "evaluations_alone": event.alone,
            "shared_with": shared_with,
            "shared_with_other_requests": event.others,
            "prefix": event.prefix,
            "truncated_tokens": event.truncated_tokens,
            **more,
        }

    def _facts(self, place: int, event: Drawn, mates: Mapping[str, str], model: Model) -> dict[str, Any]:
        """Return the metadata of an image; its group has the name of its first image."""
        name, settings = self.name(place), self._settings | {"image_steps": event.image_steps}
        group = min((name, *mates), key=lambda one: [int(part) for part in one.split(".")])
        scheduler = model.settings.get("scheduler", "unknown")
        prompt, steps, truncated = self.prompts[place], event.steps, event.truncated_tokens
        found = metadata.facts(
            name, prompt, event.seed, group, mates, steps, settings, scheduler, model.sha256, truncated
        )
        if event.others:
            found["plan"]["share_ratio"] = settings["share_ratio"]
            found["shared_with_other_requests"] = event.others
        if event.prefix:
            found["prefix"] = event.prefix
        if loras := settings.get("lora"):
            found["loras"] = {name: weight for name, weight, _ in loras}
        return found

    def forget(self) -> None:
        """Drop the content of the items; it is still known which there are."""
        self.found = {place: {} for place in self.found}

    def fail(self, event: Failed, places: Sequence[int]) -> None:
        """Take an error for some images."""
        self.found |= {place: _error(event) for place in places}
        self.errors += [event] * len(places)


def usage(evaluations: float, alone: float) -> dict[str, float]:
    """Return what images cost together, what they would have cost alone, and the fraction saved."""
    saved = 1 - evaluations / alone if alone else 0.0
    return {"evaluations": round(evaluations, 6), "evaluations_alone": alone, "saved": round(saved, 6)}


def _error(event: Failed) -> dict[str, Any]:
    return {"b64_json": None, "error": {"code": event.code, "message": event.message}}
