"""Batches for fine-tuning: the training images of each step, a function of (seed, step) alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sage.errors import DataError
from sage.randomness import generator


@dataclass(frozen=True)
class Batches:
    """The rows (training images) of each loss term in each step, `batch_size` rows per step in all.

    With all terms, a third of the rows are drawn from all images, for plain diffusion, and two thirds from groups of
    two or more, for the shared and the branch phase. A term with weight 0 gives its rows to plain diffusion, so arms
    with different weights see the same images equally often. Without plain diffusion all rows come from such groups;
    without such groups all rows are plain diffusion.
    Raises DataError if there are no such groups and plain diffusion and consistency have weight 0.
    """

    groups: Sequence[Sequence[int]]
    weights: Mapping[str, float]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        """Check that at least one term has rows."""
        if not self._terms:
            raise DataError(
                "no two training prompts are in one group, and only the terms of shared sampling have a weight. Lower "
                "group.threshold or give finetune.weights.diffusion a weight."
            )

    def rows(self, step: int) -> dict[str, Tensor]:
        """Return the row numbers of each term that has rows: "diffusion", "shared", "branch"."""
        terms = self._terms
        singles = [(row,) for group in self.groups for row in group]
        k = self._grouped
        plain = endless(singles, step * (self.batch_size - k), self.batch_size - k, self.seed)
        grouped = endless(self._shareable, step * k, k, self.seed)
        parts = {"diffusion": plain, "shared": grouped[: k // 2], "branch": grouped[k // 2 :]}
        found: dict[str, list[Tensor]] = {}
        for term, rows in parts.items():
            found.setdefault(term if term in terms else terms[0], []).append(rows)
        joined = {term: torch.cat(found[term]) for term in parts if term in found}
        return {term: rows for term, rows in joined.items() if len(rows)}

    def cost(self, step: int) -> tuple[int, int]:
        """Return the evaluations of the trained network and of the frozen base in a step."""
        if not self.weights["consistency"]:
            return self.batch_size, 0
        rows = self.rows(step)
        size = {row: len(group) for group in self.groups for row in group}
        shared = sum(size[int(row)] for row in rows.get("shared", ()))
        return self.batch_size, len(rows["diffusion"]) + shared

    @cached_property
    def _shareable(self) -> list[Sequence[int]]:
        return [group for group in self.groups if len(group) > 1]

    @cached_property
    def _terms(self) -> list[str]:
        """The terms that need rows; the first of them also gets the rows of terms that need none."""
        weight = self.weights
        needed = {
            "diffusion": weight["diffusion"] + weight["consistency"] > 0,
            "branch": weight["branch"] > 0 and bool(self._shareable),
            "shared": weight["shared"] + weight["consistency"] > 0 and bool(self._shareable),
        }
        return [term for term, wanted in needed.items() if wanted]

    @cached_property
    def _grouped(self) -> int:
        """The number of a step's rows that come from groups of two or more."""
        if not self._shareable:
            return 0
        return 2 * (self.batch_size // 3) if "diffusion" in self._terms else self.batch_size


def endless(groups: Sequence[Sequence[int]], start: int, count: int, seed: int) -> Tensor:
    """Return rows `start` to `start + count` of an endless sequence of groups, the members of a group side by side.

    Each epoch is a permutation of the groups drawn from (seed, epoch). A group can be split between two slices.
    """
    if count == 0:
        return torch.empty(0, dtype=torch.long)
    size = sum(map(len, groups))
    first, last = start // size, (start + count - 1) // size
    rows: list[int] = []
    for epoch in range(first, last + 1):
        order = torch.randperm(len(groups), generator=generator(seed, "order", epoch))
        for place in order.tolist():
            rows.extend(groups[place])
    return torch.tensor(rows[start - first * size :][:count])
