"""Groups for prompts that arrive one by one and may wait only for a limited time."""

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Generic, TypeVar

import numpy as np

from sage.errors import ConfigurationError, DataError
from sage.grouping.auto import DEFAULT
from sage.grouping.groups import Groups, group

Id = TypeVar("Id", bound=Hashable)


@dataclass
class _Member(Generic[Id]):
    id: Id
    row: np.ndarray
    due: float


@dataclass
class _Group(Generic[Id]):
    """A group that may still grow, at the latest until time `due`."""

    number: int
    share_key: Hashable
    members: list[_Member[Id]] = field(default_factory=list)
    due: float = math.inf


class StreamingGrouper(Generic[Id]):
    """Assigns each arriving prompt to a group at once; groups are released when they are full or have waited enough.

    threshold       lowest cosine that a pair in a group may have
    max_size        largest number of prompts in a group
    wait            seconds that a prompt waits at most
    window          largest number of prompts that wait; above it, the oldest group is released
    near_duplicate  pairs with this cosine or more never share a group; without branch noise they would give one image
                    twice. The default is that of the pipeline; math.inf lets copies share

    A prompt joins the open group whose least similar member is most similar to it, if that cosine reaches `threshold`
    and no member is a near-duplicate; otherwise it opens a new group. A group is released when it is full, when a
    member has waited for `wait` seconds, or when the window overflows. There is no timer: sleep until `deadline`, or
    until a prompt arrives, and call `release`. Threads may share a grouper.

    The caller names the prompts by ids and passes the time in seconds of any clock that never runs backwards
    (`time.monotonic()`). If threads call in another order than they read the clock, the latest time counts.

        number = grouper.add(id, embedding, now)
        for group in grouper.release(now):        # lists of ids
            ...
    """

    def __init__(
        self,
        threshold: float,
        max_size: int,
        *,
        wait: float,
        window: int,
        near_duplicate: float = DEFAULT.near_duplicate,
    ) -> None:
        """Raise ConfigurationError if threshold is outside [-1, 1], max_size or window below 1, or wait negative."""
        if not -1 <= threshold <= 1:
            raise ConfigurationError(f"threshold is {threshold}; give a cosine in [-1, 1]")
        if max_size < 1 or window < 1 or not wait >= 0:
            raise ConfigurationError(
                f"max_size is {max_size}, window {window}, wait {wait}; give max_size and window of at least 1 and a "
                "wait of at least 0 seconds"
            )
        if math.isnan(near_duplicate):
            raise ConfigurationError("near_duplicate is nan; give a cosine, or math.inf to let copies share")
        self.threshold = threshold
        self.max_size = max_size
        self.wait = wait
        self.window = window
        self.near_duplicate = near_duplicate
        self.prompts = 0
        self.groups = 0
        self._numbers = 0
        self._width: int | None = None
        self._open: dict[int, _Group[Id]] = {}  # groups that may still grow
        self._released: list[_Group[Id]] = []
        self._where: dict[Id, _Group[Id]] = {}
        self._now = -math.inf
        self._lock = RLock()

    @property
    def waiting(self) -> int:
        """Number of prompts in groups that may still grow."""
        with self._lock:
            return sum(len(group.members) for group in self._open.values())

    @property
    def deadline(self) -> float | None:
        """Time by which `release` must be called: now if a group is ready (the last time passed), None if none waits.

        It may become earlier with every `add`.
        """
        with self._lock:
            if self._released:
                return self._now
            return min((group.due for group in self._open.values()), default=None)

    @property
    def saving(self) -> float:
        """Fraction of the network evaluations saved at share ratio 1: 1 - groups / prompts, without those cancelled."""
        with self._lock:
            return 1 - self.groups / self.prompts if self.prompts else 0.0

    def add(self, id: Id, embedding: np.ndarray, now: float, *, share_key: Hashable = None) -> int:
        """Assign a prompt to a group and return the group's number.

        Prompts with different share keys never share (`sage.grouping.share_key` says what belongs into a key).
        `embedding` has shape (d,); if it is zero or not finite, the prompt forms a group of its own. Groups that are
        due by `now` take no more members. Raises DataError if a prompt of this id has not been handed out yet, or if
        the embedding has another shape or width than those before; ConfigurationError if `now` is no number. A prompt
        that raises is not added.
        """
        row = np.asarray(embedding, np.float64)
        if row.ndim != 1:
            raise DataError(f"the embedding has shape {row.shape}; give one row of shape (width,)")
        norm = np.linalg.norm(row)
        usable = bool(np.isfinite(norm) and norm > 0)
        with self._lock:
            self._advance(now)
            if id in self._where:
                raise DataError(f"a prompt with id {id!r} is waiting already; give each prompt an id of its own")
            if self._width not in (None, len(row)):
                raise DataError(
                    f"the embedding has width {len(row)}, but earlier ones have width {self._width}; "
                    "use one encoder for all prompts"
                )
            self._width = len(row)
            chosen = self._most_similar(row / norm, share_key) if usable else None
            if chosen is None:
                chosen = self._open[self._numbers] = _Group(self._numbers, share_key)
                self._numbers += 1
                self.groups += 1
            chosen.members.append(_Member(id, row / norm if usable else row, now + self.wait))
            chosen.due = min(chosen.due, now + self.wait)
            self._where[id] = chosen
            self.prompts += 1
            if len(chosen.members) == self.max_size or not usable:
                self._release(chosen)
            while self.waiting > self.window:
                self._release(min(self._open.values(), key=lambda group: group.due))
            return chosen.number

    def cancel(self, id: Id) -> bool:
        """Take out the prompt with this id; return False if it is unknown or `release` has handed it out already."""
        with self._lock:
            found = self._where.pop(id, None)
            if found is None:
                return False
            found.members = [member for member in found.members if member.id != id]
            found.due = min((member.due for member in found.members), default=math.inf)
            self.prompts -= 1
            if not found.members:
                self.groups -= 1
                self._open.pop(found.number, None)
                self._released = [group for group in self._released if group.members]
            return True

    def release(self, now: float) -> list[list[Id]]:
        """Return the groups, as lists of ids, that became ready since the last call or are due by `now`.

        Raises ConfigurationError if `now` is no number.
        """
        with self._lock:
            self._advance(now)
            return self._hand_out()

    def close(self) -> list[list[Id]]:
        """Release all groups and return those that `release` has not returned yet."""
        with self._lock:
            for waiting in list(self._open.values()):
                self._release(waiting)
            return self._hand_out()

    def _most_similar(self, row: np.ndarray, share_key: Hashable) -> _Group[Id] | None:
        groups = [group for group in self._open.values() if group.share_key == share_key]
        if not groups:
            return None
        cosine = np.array([member.row for group in groups for member in group.members]) @ row
        starts = np.cumsum([0, *(len(group.members) for group in groups[:-1])])
        worst = np.minimum.reduceat(cosine, starts)
        # A copy has cosine 1, but for rounding.
        alike = np.maximum.reduceat(cosine, starts) >= self.near_duplicate - 1e-12
        worst = np.where(alike, -np.inf, worst)
        best = int(worst.argmax())  # of equally similar groups, the oldest
        return groups[best] if worst[best] >= self.threshold else None

    def _advance(self, now: float) -> None:
        if not isinstance(now, (int, float, np.number)) or not math.isfinite(now):
            raise ConfigurationError(
                f"now is {now!r}; give a finite number of seconds, such as time.monotonic() or datetime.timestamp()"
            )
        self._now = max(self._now, float(now))
        for waiting in list(self._open.values()):
            if waiting.due <= self._now:
                self._release(waiting)

    def _release(self, finished: _Group[Id]) -> None:
        del self._open[finished.number]
        self._released.append(finished)

    def _hand_out(self) -> list[list[Id]]:
        released = [[member.id for member in group.members] for group in self._released]
        self._released = []
        for id in itertools.chain(*released):
            del self._where[id]
        return released


def replay(
    embeddings: np.ndarray, arrivals: Sequence[float], threshold: float, max_size: int, *, wait: float, window: int
) -> tuple[Groups, float, float]:
    """Run prompts with known arrival times through a StreamingGrouper and compare with grouping them all at once.

    embeddings           shape (n, d), in order of arrival
    arrivals             n times in seconds, ascending
    threshold, max_size  as for StreamingGrouper and `group`
    wait, window         as for StreamingGrouper

    Returns (groups, saving, saving of `group` on all prompts); both savings are at share ratio 1.
    """
    stream = StreamingGrouper[int](threshold, max_size, wait=wait, window=window)
    groups: Groups = []
    for number, (row, now) in enumerate(zip(embeddings, arrivals, strict=True)):
        stream.add(number, row, now)
        groups += stream.release(now)
    groups += stream.close()
    whole = group(embeddings, threshold, max_size, stream.near_duplicate)
    return groups, stream.saving, 1 - len(whole) / max(len(embeddings), 1)
