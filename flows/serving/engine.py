"""The engine of the model process: a queue of jobs, drawn together by continuous batching.

A *unit* is what is admitted at once: one image, or a group of images of one request that share their early steps.
Units are admitted in order of arrival as rows of the running batch become free.
"""

import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.serving.requests import Drawn, Failed, Job, Progress
from sage.grouping.embedding import embed
from sage.grouping.policy import Policy
from sage.sampling.continuous import Call, Continuous, Finished
from sage.sampling.plan import Block, Node, Plan, shared_steps


@dataclass(eq=False)
class _Member:
    """One image of a job."""

    job: Job
    index: int
    done: bool = False  # finished, failed or cancelled


@dataclass(frozen=True)
class _Unit:
    """Images that share early steps until step `until`; a single image shares none."""

    members: tuple[_Member, ...]
    until: int
    steps: int


Event = Drawn | Failed | Progress


class Engine:
    """Draws the images of jobs; every image of an accepted job ends as one `Drawn` or one `Failed`, or is cancelled.

    The images in `Drawn` are not encoded yet: `png` holds the PIL image, for the sender to encode.
    """

    def __init__(
        self, pipe: Any, policy: Policy, batch_size: int, deterministic: bool = False, model: Path = Path()
    ) -> None:
        """Take what draws and what groups.

        pipe           pipeline for shared sampling
        policy         how the prompts of a request are grouped
        batch_size     blocks that run at a time
        deterministic  whether a network call evaluates one block, so that images do not depend on their company at all
        model          folder of the model, for a policy with `max_damage`
        """
        self._pipe, self._policy, self._model = pipe, policy, model
        self.batch_size = batch_size
        self._rows = 1 if deterministic else batch_size
        self._running = Continuous(pipe, self._rows)
        self._queue: deque[_Unit] = deque()
        self._members: dict[str, list[_Member]] = {}
        self._calls: dict[Call, list[tuple[_Member, _Unit]]] = {}

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._queue) or self._running.tracks > 0

    def submit(self, job: Job) -> list[Event]:
        """Queue the images of a job; return errors of those that cannot be drawn at all."""
        members = [_Member(job, index) for index in range(len(job.prompts))]
        self._members[job.id] = list(members)
        try:
            self._queue.extend(list(self._units(job, members)))
        except Exception as error:
            return [self._failed(member, error) for member in members]
        return []

    def cancel(self, job: str) -> None:
        """Forget a job: its images are not drawn further, and nothing more is said about them."""
        for member in self._members.pop(job, []):
            member.done = True
        self._queue = deque(unit for unit in self._queue if not all(member.done for member in unit.members))
        for call in self._calls:
            self._drop_done(call)
        self._forget()

    def step(self) -> list[Event]:
        """Admit what there is room for, run one step of one batch, and return what finished."""
        events = self._admit()
        before = {call: call.evaluations for call in self._calls}
        try:
            finished = self._running.step()
        except Exception as error:
            return events + self._abandon(error)
        events += [self._drawn(one) for one in finished]
        self._forget()
        changed = {call for call, evaluations in before.items() if call.evaluations != evaluations}
        return events + list(self._progress(changed))

    def _units(self, job: Job, members: Sequence[_Member]) -> Iterator[_Unit]:
        settings = job.settings
        self._pipe._set_timesteps(settings["steps"], settings["height"], settings["width"])
        steps = len(self._pipe.scheduler.timesteps)
        until = shared_steps(settings["share_ratio"], steps)
        groups: Sequence[Sequence[int]] = [[index] for index in range(len(members))]
        if job.share != "none" and until and len(set(job.prompts)) > 1:
            embeddings = embed(job.prompts)
            threshold = self._policy.choose_threshold(embeddings, settings["share_ratio"], self._model)
            groups = self._policy.form(job.prompts, embeddings, threshold)
        for group in groups:
            yield _Unit(tuple(members[index] for index in group), until if len(group) > 1 else 0, steps)

    def _admit(self) -> list[Event]:
        """Move units from the queue into the running batch, those of equal settings as one call."""
        events: list[Event] = []
        while self._queue and (room := self.batch_size - self._running.tracks) > 0:
            units = [self._queue.popleft()]
            settings = units[0].members[0].job.settings
            while self._queue and len(units) < room and self._queue[0].members[0].job.settings == settings:
                units.append(self._queue.popleft())
            try:
                self._start(units)
            except Exception:
                # One of them is at fault: it alone fails.
                for unit in units:
                    try:
                        self._start([unit])
                    except Exception as error:
                        events += [self._failed(member, error) for member in unit.members if not member.done]
        return events

    def _start(self, units: Sequence[_Unit]) -> None:
        places = [(member, unit) for unit in units for member in unit.members]
        settings = units[0].members[0].job.settings
        roots: list[Node] = []
        number = 0
        for unit in units:
            numbers = tuple(range(number, number + len(unit.members)))
            roots.append(Block(unit.until, numbers) if len(numbers) > 1 else number)
            number += len(numbers)
        stream = self._pipe.stream(
            [member.job.prompts[member.index] for member, _ in places],
            plan=Plan(units[0].steps, tuple(roots)),
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            branch_noise=settings.get("branch_noise", 0.0),
            negative_prompt=settings["negative_prompt"] or None,
            height=settings["height"],
            width=settings["width"],
            seed=[member.job.seeds[member.index] for member, _ in places],
            batch_size=self._rows,
        )
        call = self._running.admit(stream)
        self._calls[call] = places
        self._drop_done(call)

    def _drawn(self, one: Finished) -> Drawn:
        member, unit = self._calls[one.call][one.index]
        self._finish(member)
        stream, job = one.call.stream, member.job
        mates = [other for other in unit.members if other is not member]
        return Drawn(
            job.id,
            member.index,
            one.image,
            one.seed,
            evaluations=round(one.evaluations, 6),
            alone=unit.steps * (2 if job.settings["guidance_scale"] > 1 else 1),
            shared_with=[other.index for other in mates if other.job is job],
            others=sum(other.job is not job for other in mates),
            truncated_tokens=stream.truncated_tokens[one.index],
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
