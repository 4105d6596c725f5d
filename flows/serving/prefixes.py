"""Prefixes of earlier requests: what their shared steps ended with, by tenant; the least recently used go first."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from sage.grouping.guard import Kind, differences
from sage.sampling.continuous import Prefix


@dataclass(frozen=True)
class _Kept:
    """A prefix, the prompts of its block, and their mean embedding if another prompt may begin from it."""

    prefix: Prefix
    prompts: tuple[str, ...]
    embedding: np.ndarray | None


class Prefixes:
    """Prefixes by kind (tenant, schedule, size, guidance: whatever must be equal) and prompts, bounded in bytes."""

    def __init__(self, limit: int) -> None:
        """`limit`: bytes of all prefixes together; 0 keeps none."""
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._of_kind: dict[Hashable, list[Hashable]] = {}

    def __len__(self) -> int:
        """Return the number of prefixes."""
        return len(self._kept)

    def put(self, kind: Hashable, prompts: Sequence[str], prefix: Prefix, embedding: np.ndarray | None = None) -> None:
        """Keep a prefix; an earlier one of the same kind, prompts and step is replaced."""
        key = (kind, tuple(prompts), prefix.step)
        self._drop(key)
        self._kept[key] = _Kept(prefix, tuple(prompts), embedding)
        self._of_kind.setdefault(kind, []).append(key)
        self.bytes += prefix.bytes
        while self.bytes > self.limit:
            self._drop(next(iter(self._kept)))

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
        keys = [key for key in self._of_kind.get(kind, []) if self._kept[key].embedding is not None]
        if not keys:
            return None
        cosines = np.stack([np.asarray(self._kept[key].embedding) for key in keys]) @ embedding
        for place in np.argsort(-cosines):
            if cosines[place] < low:
                return None
            apart = any(differences(prompt, other) & set(guard) for other in self._kept[keys[place]].prompts)
            if cosines[place] < high and not apart:
                return self._used(keys[place])
        return None

    def _used(self, key: Hashable) -> Prefix | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key].prefix

    def _drop(self, key: Hashable) -> None:
        found = self._kept.pop(key, None)
        if found is None:
            return
        self.bytes -= found.prefix.bytes
        kind = key[0]  # type: ignore[index]
        self._of_kind[kind].remove(key)
        if not self._of_kind[kind]:
            del self._of_kind[kind]
