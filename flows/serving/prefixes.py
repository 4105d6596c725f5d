"""Prefixes of earlier requests: what their shared steps ended with, by tenant; the least recently used go first."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from flows.serving.prefix_files import Key, PrefixFiles
from flows.serving.requests import Kept
from sage.grouping.guard import Kind, differences
from sage.sampling.continuous import Prefix

_INDEXED = 20_000  # prefixes whose embedding is in memory while they are on disk only


class Prefixes:
    """Prefixes by kind (tenant, schedule, size, guidance: whatever must be equal) and prompts, bounded in bytes.

    With `files`, each is also on disk, and what memory has no room for is read from there.
    """

    def __init__(self, limit: int, files: PrefixFiles | None = None) -> None:
        """`limit`: bytes of all prefixes in memory together; 0 keeps none."""
        self.limit, self.bytes = limit, 0
        self._files = files
        self._kept: OrderedDict[Key, tuple[Prefix, float]] = OrderedDict()  # with the time of its last use
        # Embeddings of all prefixes, None if no other prompt may begin from it; those on disk only are among them.
        self._known: OrderedDict[Key, np.ndarray | None] = OrderedDict()
        self._of_kind: dict[Hashable, dict[Key, None]] = {}
        for key, embedding in files.entries(_INDEXED) if files else ():
            self._learn(key, embedding)

    def __len__(self) -> int:
        """Return the number of prefixes in memory."""
        return len(self._kept)

    @property
    def figures(self) -> Kept:
        """What is kept, for the metrics."""
        oldest = next(iter(self._kept.values()))[1] if self._kept else None
        files = self._files
        on_disk = (files.files, files.bytes, files.damaged, files.failed) if files else (0, 0, 0, 0)
        return Kept(len(self), self.bytes, oldest, *on_disk)

    def notify(self, on_written: Callable[[], None]) -> None:
        """Call `on_written`, from another thread, whenever a prefix has been written to disk, so `figures` changed."""
        if self._files is not None:
            self._files.on_written = on_written

    def put(self, kind: Hashable, prompts: Sequence[str], prefix: Prefix, embedding: np.ndarray | None = None) -> None:
        """Keep a prefix; an earlier one of the same kind, prompts and step is replaced.

        With the mean `embedding` of its prompts, another prompt may begin from it.
        """
        key = (kind, tuple(prompts), prefix.step)
        if self._files is not None:
            self._files.put(key, prefix, embedding)
        self._remember(key, prefix, embedding)

    def first(self, kind: Hashable, prompt: str) -> Prefix | None:
        """Return what the same prompt had after its first step."""
        return self._used((kind, (prompt,), 1))

    def similar(
        self, kind: Hashable, prompt: str, embedding: np.ndarray, low: float, high: float, guard: Sequence[Kind] = ()
    ) -> Prefix | None:
        """Return the most similar block's prefix at its branch.

        kind, prompt, embedding  of the image; embeddings have length 1
        low, high                its cosine with the block's mean embedding must be in [low, high)
        guard                    kinds of difference that its prompt may have to none of the block's
        """
        rows = {key: row for key in self._of_kind.get(kind, ()) if (row := self._known[key]) is not None}
        if not rows:
            return None
        keys, cosines = list(rows), np.stack(list(rows.values())) @ embedding
        for place in np.argsort(-cosines):
            if cosines[place] < low:
                return None
            apart = any(differences(prompt, other) & set(guard) for other in keys[place][1])
            if cosines[place] < high and not apart and (found := self._used(keys[place])) is not None:
                return found
        return None

    def _used(self, key: Key) -> Prefix | None:
        if key in self._kept:
            prefix, _ = self._kept[key]
            self._remember(key, prefix, self._known[key])
            return prefix
        read = self._files.get(key) if self._files is not None else None
        if read is None:
            self._forget(key)  # it may have been deleted from the disk
            return None
        self._remember(key, *read)
        return read[0]

    def _remember(self, key: Key, prefix: Prefix, embedding: np.ndarray | None) -> None:
        self._forget(key)
        self._learn(key, embedding)
        self._kept[key] = (prefix, time.time())
        self.bytes += prefix.bytes
        while self.bytes > self.limit:
            oldest = next(iter(self._kept))
            self.bytes -= self._kept.pop(oldest)[0].bytes
            if self._files is None:
                self._forget(oldest)
        while len(self._known) > len(self._kept) + _INDEXED:
            self._forget(next(key for key in self._known if key not in self._kept))

    def _learn(self, key: Key, embedding: np.ndarray | None) -> None:
        self._known[key] = embedding
        self._of_kind.setdefault(key[0], {})[key] = None

    def _forget(self, key: Key) -> None:
        if key in self._kept:
            self.bytes -= self._kept.pop(key)[0].bytes
        if key in self._known:
            del self._known[key]
            del self._of_kind[key[0]][key]
            if not self._of_kind[key[0]]:
                del self._of_kind[key[0]]
