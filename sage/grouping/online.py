"""Groups of prompts that arrive one by one and cannot wait: a window in time and in size."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sage.errors import ConfigurationError, DataError
from sage.grouping.groups import Groups, group


@dataclass
class _Open:
    """A group that may still grow; `due` is when its first member must go."""

    number: int
    due: float
    members: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)


class StreamingGrouper:
    """Takes prompts in order of arrival, says at once which group each joins, and lets groups go in time.

    A prompt joins the open group that it keeps most alike, if every pair reaches `threshold` and there is room; else it
    opens one. A group goes when it is full, when its first member has waited `wait` seconds, or when more than `window`
    prompts wait: then the oldest goes. Time is the caller's: any clock that does not run backwards, in seconds.
    """

    def __init__(self, threshold: float, max_size: int, *, wait: float, window: int) -> None:
        """Raise ConfigurationError for a threshold outside [-1, 1] or a size, wait or window that holds nothing."""
        if not -1 <= threshold <= 1:
            raise ConfigurationError(f"threshold is {threshold}, but a cosine lies in [-1, 1]")
        if max_size < 1 or window < 1 or not wait >= 0:
            raise ConfigurationError(
                f"max_size {max_size}, window {window} and wait {wait}: the first two are at least 1, the last 0"
            )
        self.threshold = threshold
        self.max_size = max_size
        self.wait = wait
        self.window = window
        self.prompts = 0
        self.groups = 0
        self._open: dict[int, _Open] = {}  # by age: a group's number rises with the arrival of its first member
        self._gone: Groups = []
        self._now = -np.inf

    @property
    def waiting(self) -> int:
        """How many prompts are held."""
        return sum(len(group.members) for group in self._open.values())

    @property
    def deadline(self) -> float | None:
        """When `release` must next be called, or None while nothing waits."""
        return next((group.due for group in self._open.values()), None)

    @property
    def saving(self) -> float:
        """The share of the network evaluations saved at share ratio 1: 1 - groups / prompts."""
        return 1 - self.groups / self.prompts if self.prompts else 0.0

    def add(self, embedding: np.ndarray, now: float) -> int:
        """Take the next prompt and return the number of the group that it joins; prompts are numbered from 0.

        What is due by `now` no longer takes anyone. An embedding that is zero or not finite is alone.
        """
        self._pass(now)
        row = np.asarray(embedding, np.float64)
        if row.ndim != 1:
            raise DataError(f"an embedding has one dimension, this one has shape {row.shape}")
        norm = np.linalg.norm(row)
        chosen = None
        if np.isfinite(norm) and norm > 0:
            row = row / norm
            chosen = self._most_alike(row)
        if chosen is None:
            chosen = self._open[self.groups] = _Open(self.groups, now + self.wait)
            self.groups += 1
        chosen.members.append(self.prompts)
        chosen.rows.append(row)
        self.prompts += 1
        if len(chosen.members) == self.max_size or not np.isfinite(norm) or norm == 0:
            self._let_go(chosen)
        while self.waiting > self.window:
            self._let_go(next(iter(self._open.values())))
        return chosen.number

    def release(self, now: float) -> Groups:
        """Return the groups, as numbers of prompts, that went since the last call or are due by `now`."""
        self._pass(now)
        gone, self._gone = self._gone, []
        return gone

    def close(self) -> Groups:
        """Return all groups that were not returned yet; nothing waits afterwards."""
        for held in list(self._open.values()):
            self._let_go(held)
        return self.release(self._now)

    def _most_alike(self, row: np.ndarray) -> _Open | None:
        held = list(self._open.values())
        if not held:
            return None
        if len(held[0].rows[0]) != len(row):
            raise DataError(f"an embedding has width {len(row)}, those before it {len(held[0].rows[0])}")
        cosine = np.array([other for group in held for other in group.rows]) @ row
        worst = np.minimum.reduceat(cosine, np.cumsum([0, *(len(group.rows) for group in held[:-1])]))
        best = int(worst.argmax())  # the oldest of equals
        return held[best] if worst[best] >= self.threshold else None

    def _pass(self, now: float) -> None:
        if not now >= self._now:
            raise ConfigurationError(f"the clock went from {self._now} to {now}; it must not run backwards")
        self._now = now
        for held in list(self._open.values()):
            if held.due <= now:
                self._let_go(held)

    def _let_go(self, held: _Open) -> None:
        del self._open[held.number]
        self._gone.append(held.members)


def replay(
    embeddings: np.ndarray, arrivals: Sequence[float], threshold: float, max_size: int, *, wait: float, window: int
) -> tuple[Groups, float, float]:
    """Return the groups of prompts that arrived at these times, their saving, and that of grouping the whole set."""
    stream = StreamingGrouper(threshold, max_size, wait=wait, window=window)
    groups: Groups = []
    for row, now in zip(embeddings, arrivals, strict=True):
        stream.add(row, now)
        groups += stream.release(now)
    groups += stream.close()
    whole = group(embeddings, threshold, max_size)
    return groups, stream.saving, 1 - len(whole) / max(len(embeddings), 1)
