"""Fine-tuning for shared sampling: batches of groups, and the loss of step k for `sage.training.fit`.

Everything drawn in a step comes from (seed, step) alone. Latents and text states are computed once, before training.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sage import diffusion, loss
from sage.errors import DataError, UnsupportedError
from sage.loss import BranchNoise, Network, Process, Query, SoftTarget
from sage.training import Losses, generator, spaced


@dataclass(frozen=True)
class TrainingSet:
    """Pictures with their captions and groups, ready for the network.

    `latents` are scaled, of shape (n, ...); `states` are those of the n captions and, last, of the empty prompt, of
    shape (n + 1, tokens, width); `groups` are a partition of the row numbers. Raises DataError where they do not fit.
    """

    latents: Tensor
    states: Tensor
    groups: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Check what the losses rely on."""
        n = len(self.latents)
        if n == 0:
            raise DataError("there are no pictures to train on.")
        if len(self.states) != n + 1:
            raise DataError(
                f"{n} pictures need {n + 1} text states, the empty prompt's last; found {len(self.states)}."
            )
        if sorted(row for group in self.groups for row in group) != list(range(n)):
            raise DataError(f"the groups are no partition of the {n} training pictures; run the group stage again.")

    @cached_property
    def mates(self) -> Tensor:
        """The rows of each row's group, itself included: (n, N of the largest group), -1 where there are fewer."""
        table = torch.full((len(self.latents), max(map(len, self.groups))), -1)
        for group in self.groups:
            table[list(group), : len(group)] = torch.tensor(group)
        return table


@dataclass(frozen=True)
class Batches:
    """Which rows each term gets in a step: `evaluations` rows a step together, whatever the sizes of the groups.

    With all terms, a third are any pictures, for plain diffusion, and two thirds are pictures of groups of two or more,
    for the shared and the branch phase. A term whose weight is 0 leaves its rows to plain diffusion, so whatever the
    weights, the same pictures are seen equally often, and arms differ in nothing else. Where no group has two, all rows
    are plain diffusion; raises DataError where that has no weight.
    """

    groups: Sequence[Sequence[int]]
    weights: Mapping[str, float]
    evaluations: int
    seed: int

    def __post_init__(self) -> None:
        """Check that there is something to train on."""
        if not self._terms:
            raise DataError(
                "no two training prompts are in one group, and only the terms of shared sampling have a weight. Lower "
                "group.threshold or give finetune.weights.diffusion a weight."
            )

    def rows(self, step: int) -> dict[str, Tensor]:
        """Return the row numbers of each term that has any: "diffusion", "shared", "branch"."""
        terms = self._terms
        singles = [(row,) for group in self.groups for row in group]
        k = self._grouped
        plain = endless(singles, step * (self.evaluations - k), self.evaluations - k, self.seed)
        grouped = endless(self._shareable, step * k, k, self.seed)
        parts = {"diffusion": plain, "shared": grouped[: k // 2], "branch": grouped[k // 2 :]}
        found: dict[str, list[Tensor]] = {}
        for term, rows in parts.items():
            found.setdefault(term if term in terms else terms[0], []).append(rows)
        joined = {term: torch.cat(found[term]) for term in parts if term in found}
        return {term: rows for term, rows in joined.items() if len(rows)}

    def cost(self, step: int) -> tuple[int, int]:
        """Return how many evaluations of the network and of the frozen base a step costs."""
        if not self.weights["consistency"]:
            return self.evaluations, 0
        rows = self.rows(step)
        size = {row: len(group) for group in self.groups for row in group}
        shared = sum(size[int(row)] for row in rows.get("shared", ()))
        return self.evaluations, len(rows["diffusion"]) + shared

    @cached_property
    def _shareable(self) -> list[Sequence[int]]:
        return [group for group in self.groups if len(group) > 1]

    @cached_property
    def _terms(self) -> list[str]:
        """The terms that need rows, those that take another's rows first."""
        weight = self.weights
        needed = {
            "diffusion": weight["diffusion"] + weight["consistency"] > 0,
            "branch": weight["branch"] > 0 and bool(self._shareable),
            "shared": weight["shared"] + weight["consistency"] > 0 and bool(self._shareable),
        }
        return [term for term, wanted in needed.items() if wanted]

    @cached_property
    def _grouped(self) -> int:
        """How many of a step's rows come from groups of two or more."""
        if not self._shareable:
            return 0
        return 2 * (self.evaluations // 3) if "diffusion" in self._terms else self.evaluations


def endless(groups: Sequence[Sequence[int]], start: int, count: int, seed: int) -> Tensor:
    """Return `count` rows from place `start` of an endless order of groups, the members of a group side by side.

    Each epoch is a permutation of the groups drawn from (seed, epoch). Groups that do not fit go on in the next slice.
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


def finetuning_loss(
    network: nn.Module,
    scheduler: Any,
    data: TrainingSet,
    batches: Batches,
    *,
    share_ratios: tuple[float, float],
    soft_target: SoftTarget,
    branch_noise: BranchNoise,
    drop_text: float,
    seed: int,
) -> Callable[[int], Losses]:
    """Return the loss of step k: each term's mean, and their weighted sum as "loss".

    `network` is the base that will be trained; where consistency has a weight, a frozen copy is taken now. The share
    ratio of each group is drawn between `share_ratios`, so that one model serves them all. A share `drop_text` of the
    plain diffusion items loses its caption, for classifier-free guidance. Raises UnsupportedError for a scheduler that
    is not variance-preserving and for text states that the network cannot read.
    """
    _check_width(network, data.states)
    frozen = copy.deepcopy(network).requires_grad_(False).eval() if batches.weights["consistency"] else None
    process = Process(diffusion.prediction_type(scheduler), *diffusion.noise_levels(scheduler))
    draw = _Draws(process, data, share_ratios, soft_target, branch_noise, drop_text)

    def step_loss(step: int) -> Losses:
        random = generator(seed, step)
        rows = batches.rows(step)
        queries = {term: draw.query(term, rows[term], random) for term in rows}
        anchors = {}
        if frozen is not None:
            base = _ask(frozen)
            anchors["diffusion"] = loss.anchor(base, queries["diffusion"])
            if "shared" in queries:
                anchors["shared"] = loss.shared_anchor(base, queries["shared"], *draw.conditions(rows["shared"]))
        values = loss.terms(_ask(network), queries, anchors)
        return {"loss": loss.total(values, batches.weights)} | {name: value.mean() for name, value in values.items()}

    return step_loss


@dataclass(frozen=True)
class _Draws:
    """Noise, time, member and branch time of a step's items, drawn on the CPU from one generator."""

    process: Process
    data: TrainingSet
    share_ratios: tuple[float, float]
    soft_target: SoftTarget
    branch_noise: BranchNoise
    drop_text: float

    def query(self, term: str, rows: Tensor, random: torch.Generator) -> Query:
        """Return a term's items for these rows."""
        return {"diffusion": self.diffusion, "shared": self.shared, "branch": self.branch}[term](rows, random)

    def diffusion(self, rows: Tensor, random: torch.Generator) -> Query:
        """Plain diffusion on single pictures, some without their caption."""
        data = self.data
        dropped = torch.rand(len(rows), generator=random) < self.drop_text
        c = data.states[torch.where(dropped, len(data.latents), rows)]
        t = (spaced(len(rows), random) * len(self.process.alphas)).long()
        return loss.diffusion_query(self.process, data.latents[rows], c, t, self._noise(rows, random))

    def shared(self, rows: Tensor, random: torch.Generator) -> Query:
        """The shared phase, with the row's own picture as the random member."""
        z, present = self._group(self.data.latents, rows)
        c, _ = self.conditions(rows)
        t_star = self._branch_time(rows, random)
        above = len(self.process.alphas) - 1 - t_star
        t = (t_star + 1 + (spaced(len(rows), random) * above).long()).clamp(max=len(self.process.alphas) - 1)
        c_bar = torch.einsum("nm,nm...->n...", present / present.sum(1, keepdim=True), c)
        eps = self._noise(rows, random)
        return loss.shared_query(self.process, self.soft_target, self.data.latents[rows], z, present, c_bar, t, eps)

    def branch(self, rows: Tensor, random: torch.Generator) -> Query:
        """The branch phase; members of one group in a batch branch off the same shared latent, as in sampling.

        With plain branch noise it is ordinary diffusion at the branch phase's times, what the bridge is compared with.
        """
        data = self.data
        # One draw a group: every row takes that of the first of its group in the batch.
        group = data.mates[rows, 0]
        first = (group[:, None] == group).int().argmax(1)
        z, present = self._group(data.latents, rows)
        t_star = self._branch_time(rows, random)[first]
        eps = self._noise(rows, random)[first]
        place = (torch.rand(len(rows), generator=random)[first] * present.sum(1)).long()
        z_m = z[torch.arange(len(rows)), place]
        x_star = loss.branch_start(self.process, self.soft_target, z_m, z, present, t_star, eps)
        t = (spaced(len(rows), random) * (t_star + 1)).long()
        if self.branch_noise == "plain":
            return loss.diffusion_query(self.process, data.latents[rows], data.states[rows], t, eps)
        return loss.branch_query(self.process, data.latents[rows], data.states[rows], t, x_star, t_star)

    def conditions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the text states of each row's group, (n, N, tokens, width), padded, and which are present, (n, N)."""
        return self._group(self.data.states, rows)

    def _group(self, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        mates = self.data.mates[rows]
        return values[mates.clamp(min=0)], mates >= 0

    def _branch_time(self, rows: Tensor, random: torch.Generator) -> Tensor:
        low, high = self.share_ratios
        share_ratio = low + (high - low) * torch.rand(len(rows), generator=random)
        return loss.branch_time(share_ratio, len(self.process.alphas))

    def _noise(self, rows: Tensor, random: torch.Generator) -> Tensor:
        return torch.randn((len(rows), *self.data.latents.shape[1:]), generator=random)


def _ask(network: nn.Module) -> Network:
    """Return the network as a function in mixed precision; the data stay on the CPU, where all is drawn."""
    device = next(network.parameters()).device

    def ask(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            output: Tensor = network(x_t.to(device), t.to(device), condition.to(device)).sample
        return output.float().to(x_t.device)

    return ask


def _check_width(network: nn.Module, states: Tensor) -> None:
    expected, found = getattr(network, "config", {}).get("cross_attention_dim"), states.shape[-1]
    if expected != found:
        raise UnsupportedError(f"the base reads text states {expected} wide, but its text encoder gives {found}.")
