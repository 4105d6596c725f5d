"""Batches for fine-tuning: the training images of each step, a function of (seed, step) alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sage.errors import DataError
from sage.randomness import generator, stratified_uniform

_BLOCK = 256  # steps in which each bucket has its share


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

    def turn(self, step: int) -> tuple[int, "Batches", int]:
        """Return the number of the training set of a step, its batches, and the step among those of that set."""
        return 0, self, step

    def rows(self, step: int) -> dict[str, Tensor]:
        """Return the row numbers of each term that has rows: "diffusion", "shared", "branch"."""
        terms = self._terms
        k = self._grouped
        plain = self._plain.rows(step * (self.batch_size - k), self.batch_size - k)
        grouped = self._grouped_order.rows(step * k, k)
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
    def _plain(self) -> "Endless":
        return Endless([(row,) for group in self.groups for row in group], self.seed)

    @cached_property
    def _grouped_order(self) -> "Endless":
        return Endless(self._shareable, self.seed)

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


@dataclass(frozen=True)
class Buckets:
    """The rows of each step if images have several sizes: a step has images of one size, its training set.

    parts  batches of each training set, of the same weights, batch size and seed

    In the long run a set has as many steps as it has images in proportion, so that all images count alike. A set with
    fewer images than a step has rows repeats them in its steps.
    """

    parts: Sequence[Batches]

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        return self.parts[0].batch_size

    @property
    def weights(self) -> Mapping[str, float]:
        """Weights of the loss terms."""
        return self.parts[0].weights

    @property
    def seed(self) -> int:
        """Seed of all draws."""
        return self.parts[0].seed

    def turn(self, step: int) -> tuple[int, Batches, int]:
        """Return the number of the training set of a step, its batches, and the step among those of that set."""
        if len(self.parts) == 1:
            return self.parts[0].turn(step)
        block, place = divmod(step, _BLOCK)
        drawn = self._block(block)
        number = int(drawn[place])
        return number, self.parts[number], int(self._before(block)[number] + (drawn[:place] == number).sum())

    def cost(self, step: int) -> tuple[int, int]:
        """Return the evaluations of the trained network and of the frozen base in a step."""
        _, batches, own = self.turn(step)
        return batches.cost(own)

    @cached_property
    def _ends(self) -> Tensor:
        sizes = torch.tensor([sum(map(len, part.groups)) for part in self.parts], dtype=torch.float64)
        return (sizes / sizes.sum()).cumsum(0)[:-1]

    @cached_property
    def _counts(self) -> list[Tensor]:
        """For each block that was asked for, how many steps each set has before it."""
        return [torch.zeros(len(self.parts), dtype=torch.long)]

    def _block(self, block: int) -> Tensor:
        """Return the numbers of the sets of a block's steps."""
        uniform = stratified_uniform(_BLOCK, generator(self.seed, "buckets", block))
        return torch.bucketize(uniform, self._ends, right=True)

    def _before(self, block: int) -> Tensor:
        while len(self._counts) <= block:
            drawn = self._block(len(self._counts) - 1)
            self._counts.append(self._counts[-1] + drawn.bincount(minlength=len(self.parts)))
        return self._counts[block]


def groups_of_parts(
    groups: Sequence[Sequence[int]], parts: Sequence[Sequence[int]]
) -> list[tuple[tuple[int, ...], ...]]:
    """Return the groups of each part of the rows, as places in the part.

    Raises DataError if a group has rows of several parts.
    """
    place = {row: (number, index) for number, part in enumerate(parts) for index, row in enumerate(part)}
    found: list[list[tuple[int, ...]]] = [[] for _ in parts]
    for group in groups:
        numbers = {place[row][0] for row in group}
        if len(numbers) > 1:
            raise DataError("a group has images of several sizes, which share no latents. Run `dvc repro group`.")
        found[numbers.pop()].append(tuple(place[row][1] for row in group))
    return [tuple(own) for own in found]


def batches_of_parts(
    groups: Sequence[Sequence[int]],
    parts: Sequence[Sequence[int]],
    weights: Mapping[str, float],
    batch_size: int,
    seed: int,
) -> Buckets:
    """Return the batches of a set whose images lie in parts, each of one size; rows are places in their part.

    Raises DataError as `groups_of_parts` and `Batches` do.
    """
    return Buckets([Batches(own, weights, batch_size, seed) for own in groups_of_parts(groups, parts)])


@dataclass(frozen=True)
class Endless:
    """An endless sequence of the rows of groups, the members of a group side by side.

    Each epoch is a permutation of the groups drawn from (seed, epoch).
    """

    groups: Sequence[Sequence[int]]
    seed: int

    def rows(self, start: int, count: int) -> Tensor:
        """Return the rows from `start` to before `start + count`; a group can be split between two slices."""
        if count == 0:
            return torch.empty(0, dtype=torch.long)
        size = int(self._sizes.sum())
        rows: list[int] = []
        for epoch in range(start // size, (start + count - 1) // size + 1):
            low, high = max(start - epoch * size, 0), min(start + count - epoch * size, size)
            order = torch.randperm(len(self.groups), generator=generator(self.seed, "order", epoch))
            ends = self._sizes[order].cumsum(0)
            # Of an epoch only these groups are listed: a set may have millions of images.
            first, last = torch.searchsorted(ends, torch.tensor([low, high - 1]), right=True).tolist()
            listed = [row for place in order[first : last + 1].tolist() for row in self.groups[place]]
            skipped = low - int(ends[first - 1] if first else 0)
            rows += listed[skipped : skipped + high - low]
        return torch.tensor(rows)

    @cached_property
    def _sizes(self) -> Tensor:
        return torch.tensor(list(map(len, self.groups)))
