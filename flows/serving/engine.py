"""The engine of the model process: a queue of jobs, drawn together by continuous batching.

A *unit* is what is admitted at once: one image, or a group of images that share early steps.
Units are admitted in order of arrival as rows of the running batch become free.
"""

import functools
import itertools
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flows import drawing
from flows.serving.encoder import Embedded
from flows.serving.prefixes import Prefixes
from flows.serving.requests import Drawn, Failed, Job, Progress
from sage.data.images import is_blank
from sage.errors import ConfigurationError, DivergedError
from sage.grouping.auto import DEFAULT
from sage.grouping.embedding import embed
from sage.grouping.online import StreamingGrouper
from sage.grouping.policy import Policy
from sage.sampling.adapters import Worn
from sage.sampling.branch_noise import begins_as_noise
from sage.sampling.continuous import Call, Continuous, Finished, Prefix, Start
from sage.sampling.partition import equal
from sage.sampling.plan import shared_steps

if TYPE_CHECKING:
    from sage.grouping.distilled import Distilled

_HOLD = 0.05  # seconds that an image waits at most for others of its tenant to share with
_WINDOW = 1024  # images of one kind that wait so


@dataclass(eq=False)
class _Member:
    """One image of a job."""

    job: Job
    index: int
    done: bool = False  # finished, failed or cancelled

    @property
    def prompt(self) -> str:
        """Its prompt."""
        return self.job.prompts[self.index]


@dataclass(eq=False)
class _Unit:
    """Images that share early steps; those of different prompts until step `until`.

    With the mean `embedding` of its prompts it may begin from a similar prefix, or leave one at step `until`.
    """

    members: tuple[_Member, ...]
    until: int
    steps: int
    embedding: np.ndarray | None = None
    start: Start | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What units must have in common to share anything: the tenant and all settings."""
        job = self.members[0].job
        return (job.tenant, *sorted(job.settings.items()))


@dataclass
class _Forming:
    """Images of one kind that wait for others to share with, those of a prompt together, by number of arrival."""

    grouper: StreamingGrouper[int]
    members: dict[int, tuple[tuple[_Member, ...], np.ndarray]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)


Event = Drawn | Failed | Progress


class Engine:
    """Draws the images of jobs; every image of an accepted job ends as one `Drawn` or one `Failed`, or is cancelled.

    The images in `Drawn` are not encoded yet: `png` holds the PIL image, for the sender to encode.
    """

    def __init__(
        self,
        pipe: Any,
        policy: Policy,
        batch_size: int,
        deterministic: bool = False,
        model: Path = Path(),
        prefixes: Prefixes | None = None,
        across_tenants: bool = False,
        distilled: "Distilled | None" = None,
    ) -> None:
        """Take what draws and what groups.

        pipe            pipeline for shared sampling
        policy          how the prompts of a request are grouped
        batch_size      blocks that run at a time
        deterministic   whether a network call evaluates one block, so that images do not depend on their company at all
        model           path of the model, for a policy with `max_damage`
        prefixes        prefixes of earlier requests; by default none, and 64 MiB of memory for those to come
        across_tenants  whether tenants use each other's prefixes
        distilled       encoder of the model's first predictions, for a policy by it
        """
        if policy.by == "prediction" or (policy.by == "distilled") != (distilled is not None):
            raise ConfigurationError(
                "the server groups prompts by their texts, as it does not know them beforehand, but group.by is "
                f"{policy.by}; set it to text, or to distilled after `sage distil`"
            )
        self.distilled = distilled
        self._made_for = functools.lru_cache(1024)(pipe.made_for)
        self._pipe, self._policy, self._model = pipe, policy, model
        self._evaluations = functools.lru_cache(1024)(pipe.evaluations)  # it sets a scheduler, for every image
        self.batch_size = batch_size
        self._rows = 1 if deterministic else batch_size
        self._running = Continuous(pipe, self._rows)
        self._queue: deque[_Unit] = deque()
        self._later: deque[_Unit] = deque()  # of jobs in the background
        self._members: dict[str, list[_Member]] = {}
        self._calls: dict[Call, list[tuple[_Member, _Unit]]] = {}
        self.prefixes = Prefixes(64 << 20) if prefixes is None else prefixes
        self._across_tenants = across_tenants
        self._forming: dict[tuple[Any, ...], _Forming] = {}
        self._pace = _HOLD  # seconds of a step

    @property
    def busy(self) -> bool:
        """Whether a step has something to do, besides releasing images that wait for others to share with."""
        return bool(self._queue or self._later) or self._running.tracks > 0

    @property
    def wait(self) -> float | None:
        """Seconds until `step` must be called for images that wait for others; None if there are none."""
        due = [one.grouper.deadline for one in self._forming.values() if one.grouper.deadline is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def compares(self, job: Job) -> bool:
        """Return whether the prompts of a job are compared with others, so that `submit` needs their embeddings.

        Raises ConfigurationError if they cannot be, because the distilled encoder is for other settings than the job's.
        """
        alike = job.groups is None and job.share != "none" and len(set(job.prompts)) > 1
        among_themselves = alike and bool(self._steps(job.settings)[1])
        found = among_themselves or self._shares(job)
        if found:
            self._check(job.settings)
        return found

    def submit(self, job: Job, embeddings: Embedded | None = None) -> list[Event]:
        """Queue the images of a job; return errors of those that cannot be drawn at all.

        `embeddings` are those of its prompts, or the error that they gave; by default they are computed here if
        needed.
        """
        members = [_Member(job, index) for index in range(len(job.prompts))]
        self._members[job.id] = list(members)
        try:
            if embeddings is None and self.compares(job):
                embeddings = self._embed(job.prompts)
            if isinstance(embeddings, Exception):
                raise embeddings
            if embeddings is not None and self._shares(job):
                self._form(job, members, embeddings)
            else:
                (self._later if job.background else self._queue).extend(list(self._units(job, members, embeddings)))
        except Exception as error:
            return [self._failed(member, error) for member in members]
        return []

    def cancel(self, job: str) -> None:
        """Forget a job: its images are not drawn further, and nothing more is said about them."""
        for member in self._members.pop(job, []):
            member.done = True
        for queue in (self._queue, self._later):
            left = [unit for unit in queue if not all(member.done for member in unit.members)]
            queue.clear()
            queue.extend(left)
        for call in self._calls:
            self._drop_done(call)
        self._forget()

    def step(self) -> list[Event]:
        """Admit what there is room for, run one step of one batch, and return what finished."""
        self._release()
        events = self._admit()
        before = {call: call.evaluations for call in self._calls}
        began = time.monotonic()
        try:
            finished = self._running.step()
        except Exception as error:
            return events + self._abandon(error)
        self._pace = 0.9 * self._pace + 0.1 * (time.monotonic() - began)
        self._keep()
        events += [self._drawn(one) for one in finished]
        self._forget()
        changed = {call for call, evaluations in before.items() if call.evaluations != evaluations}
        return events + list(self._progress(changed))

    def groups(self, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[list[int]]:
        """Return the groups of prompts, by number, that share their early steps; threads may ask."""
        alike = len(set(prompts)) > 1 and self._steps(settings)[1]
        if alike:
            self._check(settings)
        return self._grouped(prompts, settings, self._embed(prompts) if alike else None)

    def _embed(self, prompts: Sequence[str]) -> np.ndarray:
        return embed(prompts) if self.distilled is None else self.distilled.embed(prompts)

    def _check(self, settings: Mapping[str, Any]) -> None:
        """Raise ConfigurationError if the distilled encoder was made for other settings."""
        if self.distilled is not None:
            asked = (settings[name] for name in ("steps", "guidance_scale", "height", "width"))
            self.distilled.check(self._made_for(*asked))

    def _grouped(
        self, prompts: Sequence[str], settings: Mapping[str, Any], embeddings: np.ndarray | None
    ) -> list[list[int]]:
        """Return the groups of images, by number; without embeddings only images of one prompt share."""
        images = self._images(prompts, settings)
        groups = [[number] for number in range(len(images))]
        if embeddings is not None:
            steps, until = self._steps(settings)
            first = [numbers[0] for numbers in images]
            texts, rows = [prompts[number] for number in first], embeddings[first]
            threshold = self._policy.choose_threshold(rows, until / steps, self._model, texts)
            groups = self._policy.form(texts, rows, threshold)
        return [sorted(image for prompt in group for image in images[prompt]) for group in groups]

    def _images(self, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[list[int]]:
        """Return the images that are grouped as one: those of a prompt if they share steps, else each alone."""
        together = drawing.image_steps(self._pipe, settings)
        return equal(prompts) if together else [[number] for number in range(len(prompts))]

    def _steps(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        """Return the number of steps of images with these settings, and at which of them a group branches."""
        steps = self._evaluations(settings["steps"], settings["height"], settings["width"])
        return steps, shared_steps(settings["share_ratio"], steps)

    def _shares(self, job: Job) -> bool:
        """Whether a job's images may share with other requests of its tenant; it takes branch noise to differ."""
        return (
            job.share == "tenant" and bool(self._steps(job.settings)[1]) and job.settings.get("branch_noise", 0.0) > 0
        )

    def _units(self, job: Job, members: Sequence[_Member], embeddings: np.ndarray | None) -> Iterator[_Unit]:
        steps, until = self._steps(job.settings)
        groups = job.groups
        if groups is None and job.share == "none":
            groups = [[index] for index in range(len(members))]
        if groups is None:
            groups = self._grouped(job.prompts, job.settings, embeddings)
        for group in groups:
            yield _Unit(tuple(members[index] for index in group), until if len(group) > 1 else 0, steps)

    def _threshold(self, job: Job) -> float:
        """Return the cosine that prompts of different requests need to share."""
        if self._policy.saving is not None:  # it follows from a set of prompts, which nobody has here
            return float(DEFAULT.threshold or 0) if self.distilled is None else self.distilled.threshold
        return self._policy.choose_threshold(np.zeros((0, 0)), job.settings["share_ratio"], self._model)

    def _form(self, job: Job, members: Sequence[_Member], embeddings: np.ndarray) -> None:
        """Queue images that can begin from a prefix; let the others wait for company, no longer than it can gain."""
        steps, until = self._steps(job.settings)
        for numbers in self._images(job.prompts, job.settings):
            images, embedding = tuple(members[number] for number in numbers), embeddings[numbers[0]]
            unit = _Unit(images, until, steps, embedding)
            if self._similar(unit) is not None:
                self._queued(unit)
                continue
            if unit.kind not in self._forming:
                grouper: StreamingGrouper[int] = StreamingGrouper(
                    self._threshold(job), self._policy.max_size, wait=_HOLD, window=_WINDOW
                )
                self._forming[unit.kind] = _Forming(grouper)
            forming = self._forming[unit.kind]
            forming.grouper.wait = min(_HOLD, until * self._pace)
            number = next(forming.numbers)
            forming.grouper.add(number, embedding, time.monotonic())
            forming.members[number] = (images, embedding)

    def _release(self) -> None:
        """Queue the images that have waited enough, as groups by the same policy as those of one request."""
        now = time.monotonic()
        for kind, forming in list(self._forming.items()):
            for numbers in forming.grouper.release(now):
                released = [forming.members.pop(number) for number in numbers]
                left = [(tuple(one for one in images if not one.done), embedding) for images, embedding in released]
                found = [(images, embedding) for images, embedding in left if images]
                if not found:
                    continue
                steps, until = self._steps(found[0][0][0].job.settings)
                embeddings = np.stack([embedding for _, embedding in found])
                prompts = [images[0].prompt for images, _ in found]
                for group in self._policy.form(prompts, embeddings, forming.grouper.threshold):
                    mean = embeddings[group].mean(0)
                    members = tuple(member for index in group for member in found[index][0])
                    self._queued(_Unit(members, until, steps, mean / np.linalg.norm(mean)))
            if not forming.grouper.waiting:
                del self._forming[kind]

    def _cached_as(self, unit: _Unit) -> tuple[Any, ...]:
        """Return the kind of a unit's prefixes."""
        return (None, *unit.kind[1:]) if self._across_tenants else unit.kind

    def _similar(self, unit: _Unit) -> Prefix | None:
        if unit.embedding is None or len(unit.members) > 1:
            return None
        member, policy = unit.members[0], self._policy
        low, high = self._threshold(member.job), policy.near_duplicate
        guard = policy.guard or ()
        return self.prefixes.similar(self._cached_as(unit), member.prompt, unit.embedding, low, high, guard)

    def _begin(self, unit: _Unit) -> Start | None:
        """Return how a unit begins from an earlier request's prefix, if it may and there is one."""
        job = unit.members[0].job
        if len(unit.members) > 1 or job.share == "none":
            return None
        if similar := self._similar(unit):
            return Start(similar, own_noise=False)
        if not job.seeded and (first := self.prefixes.first(self._cached_as(unit), unit.members[0].prompt)):
            return Start(first, own_noise=True)
        return None

    def _keep(self) -> None:
        """Keep the prefixes that the last step left, for the tenant of each."""
        for call, places in self._calls.items():
            for images, prefix in call.kept:
                unit = places[images[0]][1]
                prompts = list(dict.fromkeys(places[image][0].prompt for image in images))
                whole = set(prompts) == {member.prompt for member in unit.members}
                job = unit.members[0].job
                if unit.start is not None or (job.tenant == job.id and not self._across_tenants):
                    continue
                if unit.embedding is not None and prefix.step == unit.until and whole:
                    self.prefixes.put(self._cached_as(unit), prompts, prefix, unit.embedding)
                elif prefix.step == 1 and len(prompts) == 1:
                    self.prefixes.put(self._cached_as(unit), prompts, prefix)
            call.kept.clear()

    def _queued(self, unit: _Unit) -> None:
        """Queue a unit; one with a single image that somebody waits for is in the foreground."""
        background = all(member.job.background for member in unit.members)
        (self._later if background else self._queue).append(unit)

    def _admit(self) -> list[Event]:
        """Move units from the queues into the running batch.

        Those in the foreground do not wait until rows of the background are free, but run before them.
        """
        events = self._admit_from(self._queue, lambda: self.batch_size - self._running.foreground)
        return events + self._admit_from(self._later, lambda: self.batch_size - self._running.tracks)

    def _admit_from(self, queue: deque[_Unit], free: Callable[[], int]) -> list[Event]:
        """Move units from a queue into the running batch while rows are free, those of equal settings as one call."""
        events: list[Event] = []
        while queue and (room := free()) > 0:
            units = [queue.popleft()]
            settings = units[0].members[0].job.settings
            while queue and len(units) < room and queue[0].members[0].job.settings == settings:
                units.append(queue.popleft())
            try:
                self._start(units, background=queue is self._later)
            except Exception:
                # One of them is at fault: it alone fails.
                singles = [_Unit((member,), 0, unit.steps) for unit in units for member in unit.members]
                for single in singles:
                    try:
                        self._start([single], background=queue is self._later)
                    except Exception as error:
                        events += [self._failed(member, error) for member in single.members if not member.done]
        return events

    def _start(self, units: Sequence[_Unit], background: bool) -> None:
        places = [(member, unit) for unit in units for member in unit.members]
        settings = units[0].members[0].job.settings
        starts = {}
        groups: list[list[int]] = []
        number = 0
        for unit in units:
            unit.start = self._begin(unit)
            if unit.start is not None:
                starts[number] = unit.start
            groups.append(list(range(number, number + len(unit.members))))
            number += len(unit.members)
        texts, image_steps = [member.prompt for member, _ in places], drawing.image_steps(self._pipe, settings)
        stream = self._pipe.stream(
            texts,
            plan=drawing.planned(groups, texts, units[0].steps, settings["share_ratio"], image_steps),
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            branch_noise=settings.get("branch_noise", 0.0),
            negative_prompt=settings["negative_prompt"] or None,
            height=settings["height"],
            width=settings["width"],
            seed=[member.job.seeds[member.index] for member, _ in places],
            batch_size=self._rows,
        )
        first = [1] if begins_as_noise(stream._pipe.scheduler) else []
        keep = {*first, *(unit.until for unit in units)} - {0}
        call = self._running.admit(stream, keep, starts, background, _worn(settings))
        self._calls[call] = places
        self._drop_done(call)

    def _drawn(self, one: Finished) -> Drawn | Failed:
        member, unit = self._calls[one.call][one.index]
        if one.image is None:
            return self._failed(member, DivergedError("the image holds values that are not finite"))
        if is_blank(one.image):
            return self._failed(member, DivergedError("the image is a single colour, as an overflow leaves it"))
        self._finish(member)
        stream, job = one.call.stream, member.job
        mates = [other for other in unit.members if other is not member]
        return Drawn(
            job.id,
            member.index,
            one.image,
            one.seed,
            evaluations=round(one.evaluations, 6),
            alone=stream.cost.independent // stream.plan.prompts,
            shared_with=[other.index for other in mates if other.job is job],
            others=sum(other.job is not job for other in mates),
            prefix=None if unit.start is None else "exact" if unit.start.own_noise else "similar",
            truncated_tokens=stream.truncated_tokens[one.index],
            steps=unit.steps,
            image_steps=0 if job.share == "none" else drawing.image_steps(self._pipe, job.settings),
        )

    def _progress(self, calls: set[Call]) -> Iterator[Progress]:
        for call in calls:
            for job in {
                member.job.id for member, _ in self._calls.get(call, []) if member.job.progress and not member.done
            }:
                yield Progress(job, call.evaluations, call.planned)

    def _abandon(self, error: Exception) -> list[Event]:
        """Give up everything that runs, after an error that no single image can be blamed for."""
        for call in self._calls:
            self._running.cancel(call)
        left = [member for places in self._calls.values() for member, _ in places if not member.done]
        self._calls.clear()
        return [self._failed(member, error) for member in left]

    def _failed(self, member: _Member, error: Exception) -> Failed:
        traceback.print_exception(error)
        self._finish(member)
        return Failed(member.job.id, member.index, "generation_failed", f"{type(error).__name__}: {error}"[:500])

    def _finish(self, member: _Member) -> None:
        member.done = True
        if all(other.done for other in self._members.get(member.job.id, [])):
            self._members.pop(member.job.id, None)

    def _drop_done(self, call: Call) -> None:
        self._running.cancel(call, [place for place, (member, _) in enumerate(self._calls[call]) if member.done])

    def _forget(self) -> None:
        """Drop the calls that nobody waits for."""
        self._calls = {
            call: places for call, places in self._calls.items() if not all(member.done for member, _ in places)
        }


def _worn(settings: Mapping[str, Any]) -> Worn | None:
    """Return the LoRAs of images with these settings; None if the model has none."""
    return tuple((name, weight) for name, weight, _ in settings["lora"]) if "lora" in settings else None
