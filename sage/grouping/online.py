"""Groups for prompts that arrive one by one and may wait only for a limited time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sage.errors import ConfigurationError, DataError
from sage.grouping.groups import Groups, group
from sage.numbers import real, whole


@dataclass
class _Open:
    """A group that may still grow, at the latest until time `due`."""

    number: int
    due: float
    members: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)


class StreamingGrouper:
    """Assigns each arriving prompt to a group at once; groups are released when they are full or have waited enough.

    threshold  lowest cosine that a pair in a group may have
    max_size   largest number of prompts in a group
    wait       seconds that the first member of a group waits at most
    window     largest number of prompts that wait; above it, the oldest group is released

    A prompt joins the open group whose least similar member is most similar to it, if that cosine reaches `threshold`;
    otherwise it opens a new group. A group is released when it is full, when its first member has waited for `wait`
    seconds, or when the window overflows. The caller passes the time, seconds of any clock that never runs backwards.
    There is no timer: call `release(now)` no later than `deadline`. Copies of a prompt may share a group.

        number = grouper.add(embedding, now)      # prompts are numbered from 0
        for group in grouper.release(now):        # lists of prompt numbers
            ...
    """

    def __init__(self, threshold: float, max_size: int, *, wait: float, window: int) -> None:
        """Raise ConfigurationError if threshold is outside [-1, 1], max_size or window below 1, or wait negative."""
        threshold, max_size = real("threshold", threshold), whole("max_size", max_size)
        wait, window = real("wait", wait), whole("window", window)
        if not -1 <= threshold <= 1:
            raise ConfigurationError(f"threshold is {threshold}; give a cosine in [-1, 1]")
        if max_size < 1 or window < 1 or not wait >= 0:
            raise ConfigurationError(
                f"max_size is {max_size}, window {window}, wait {wait}; give max_size and window of at least 1 and a "
                "wait of at least 0 seconds"
            )
        self.threshold = threshold
        self.max_size = max_size
        self.wait = wait
        self.window = window
        self.prompts = 0
        self.groups = 0
        self._open: dict[int, _Open] = {}  # oldest first: group numbers ascend with the arrival of the first member
        self._released: Groups = []
        self._now = -np.inf

    @property
    def waiting(self) -> int:
        """Number of prompts in groups that are not released yet."""
        return sum(len(group.members) for group in self._open.values())

    @property
    def deadline(self) -> float | None:
        """Time at which `release` must be called next, or None if no prompt waits."""
        return next((group.due for group in self._open.values()), None)

    @property
    def saving(self) -> float:
        """Fraction of the network evaluations saved at share ratio 1: 1 - groups / prompts."""
        return 1 - self.groups / self.prompts if self.prompts else 0.0

    def add(self, embedding: np.ndarray, now: float) -> int:
        """Assign the next prompt to a group and return the group's number; prompts are numbered from 0.

        `embedding` has shape (d,); if it is zero or not finite, the prompt forms a group of its own. Groups that are
        due by `now` take no more members. Raises DataError if the embedding has another shape or width than those
        before, ConfigurationError if `now` is earlier than in the last call.
        """
        self._advance(now)
        row = np.asarray(embedding, np.float64)
        if row.ndim != 1:
            raise DataError(f"the embedding has shape {row.shape}; give one row of shape (width,)")
        norm = np.linalg.norm(row)
        chosen = None
        if np.isfinite(norm) and norm > 0:
            row = row / norm
            chosen = self._most_similar(row)
        if chosen is None:
            chosen = self._open[self.groups] = _Open(self.groups, now + self.wait)
            self.groups += 1
        chosen.members.append(self.prompts)
        chosen.rows.append(row)
        self.prompts += 1
        if len(chosen.members) == self.max_size or not np.isfinite(norm) or norm == 0:
            self._release(chosen)
        while self.waiting > self.window:
            self._release(next(iter(self._open.values())))
        return chosen.number

    def release(self, now: float) -> Groups:
        """Return the groups, as lists of prompt numbers, that were released since the last call or are due by `now`.

        Raises ConfigurationError if `now` is earlier than in the last call.
        """
        self._advance(now)
        released, self._released = self._released, []
        return released

    def close(self) -> Groups:
        """Release all groups and return those that `release` has not returned yet."""
        for waiting in list(self._open.values()):
            self._release(waiting)
        return self.release(self._now)

    def _most_similar(self, row: np.ndarray) -> _Open | None:
        groups = list(self._open.values())
        if not groups:
            return None
        if len(groups[0].rows[0]) != len(row):
            raise DataError(
                f"the embedding has width {len(row)}, but earlier ones have width {len(groups[0].rows[0])}; "
                "use one encoder for all prompts"
            )
        cosine = np.array([other for group in groups for other in group.rows]) @ row
        worst = np.minimum.reduceat(cosine, np.cumsum([0, *(len(group.rows) for group in groups[:-1])]))
        best = int(worst.argmax())  # of equally similar groups, the oldest
        return groups[best] if worst[best] >= self.threshold else None

    def _advance(self, now: float) -> None:
        if not now >= self._now:
            raise ConfigurationError(f"the clock went from {self._now} to {now}; it must not run backwards")
        self._now = now
        for waiting in list(self._open.values()):
            if waiting.due <= now:
                self._release(waiting)

    def _release(self, finished: _Open) -> None:
        del self._open[finished.number]
        self._released.append(finished.members)


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
    stream = StreamingGrouper(threshold, max_size, wait=wait, window=window)
    groups: Groups = []
    for row, now in zip(embeddings, arrivals, strict=True):
        stream.add(row, now)
        groups += stream.release(now)
    groups += stream.close()
    whole = group(embeddings, threshold, max_size)
    return groups, stream.saving, 1 - len(whole) / max(len(embeddings), 1)
