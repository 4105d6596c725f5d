"""Fine-tuning for shared sampling: the loss of step k for `sage.training.loop.fit`.

All random draws of a step depend on (seed, step) alone. Latents and conditions are computed once, before training.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from sage import diffusion
from sage.diffusion import NoiseSchedule
from sage.errors import ConfigurationError, DataError
from sage.randomness import generator, stratified_uniform
from sage.sampling.conditions import Condition, merge, select
from sage.sampling.loop import rollout
from sage.sampling.plan import shared_steps
from sage.training import loss, timesteps
from sage.training.batches import Batches, Buckets
from sage.training.loop import Losses
from sage.training.loss import BranchStart, Network, Query, SoftTarget


@dataclass(frozen=True)
class TrainingSet:
    """Training images as latents, with their captions and groups.

    latents     scaled latents of the images, (n, ...)
    conditions  by name, conditions of m different captions and, last, of the empty prompt: (m + 1, ...)
    captions    row numbers in `conditions` of each image's k captions, (n, k); images were grouped by the first
    groups      partition of the image numbers 0 to n - 1
    mirrored    latents of the mirrored images, to train on half of the time; None: images are not mirrored
    encode      from row numbers in `conditions` to what they are by the text encoders as they are now, if these are
                trained; None: conditions stay as they are

    Raises DataError if there are no images, the sizes do not match or the groups are no partition.
    """

    latents: Tensor
    conditions: Condition
    captions: Tensor
    groups: tuple[tuple[int, ...], ...]
    mirrored: Tensor | None = None
    encode: Callable[[list[int]], Condition] | None = None

    def __post_init__(self) -> None:
        """Check that the sizes match and the groups are a partition."""
        n = len(self.latents)
        if n == 0:
            raise DataError("there are no pictures to train on.")
        if self.mirrored is not None and self.mirrored.shape != self.latents.shape:
            raise DataError(
                f"latents of shape {tuple(self.latents.shape)} need as many mirrored ones; found "
                f"{tuple(self.mirrored.shape)}."
            )
        if len(self.captions) != n:
            raise DataError(f"{n} pictures need as many rows of captions; found {len(self.captions)}.")
        for name, values in self.conditions.items():
            if len(values) < int(self.captions.max()) + 2:
                raise DataError(
                    f"caption {int(self.captions.max())} and the empty prompt after it need at least "
                    f"{int(self.captions.max()) + 2} rows of {name}; found {len(values)}."
                )
        if sorted(row for group in self.groups for row in group) != list(range(n)):
            raise DataError(f"the groups are no partition of the {n} training pictures; run the group stage again.")

    @cached_property
    def group_members(self) -> Tensor:
        """The members of each row's group, itself included: (n, N of the largest group), padded with -1."""
        table = torch.full((len(self.latents), max(map(len, self.groups))), -1)
        for group in self.groups:
            table[list(group), : len(group)] = torch.tensor(group)
        return table

    def latents_of(self, rows: Tensor, flips: Tensor | None) -> Tensor:
        """Return the latents of rows (n, ...), mirrored if `flips` (n,) says so; None: none are."""
        if self.mirrored is None or flips is None:
            return self.latents[rows]
        flips = flips.reshape(-1, *[1] * (rows.ndim + self.latents.ndim - 2))
        return torch.where(flips, self.mirrored[rows], self.latents[rows])

    def conditions_of(self, rows: Tensor) -> Condition:
        """Return the conditions of the captions by which these rows were grouped."""
        return select(self.conditions, self.captions[rows, 0])

    @property
    def empty(self) -> int:
        """The number of the empty prompt in `conditions`."""
        return len(next(iter(self.conditions.values()))) - 1

    def now(self, rows: Tensor) -> "TrainingSet":
        """Return the set with the conditions as they are now, of these rows, of their groups and of the empty prompt.

        Other rows have none. Without text encoders that are trained it is the set itself.
        """
        if self.encode is None:
            return self
        members = self.group_members[rows]
        needed = torch.cat([torch.unique(self.captions[members[members >= 0]]), torch.tensor([self.empty])])
        place = torch.zeros(self.empty + 1, dtype=torch.long)
        place[needed] = torch.arange(len(needed))
        return replace(self, conditions=self.encode(needed.tolist()), captions=place[self.captions])


def finetuning_loss(
    network: nn.Module,
    scheduler: Any,
    data: TrainingSet | Sequence[TrainingSet],
    batches: Batches | Buckets,
    *,
    share_ratios: tuple[float, float],
    soft_target: SoftTarget,
    branch_start: BranchStart,
    sampler_steps: int,
    drop_text: float,
    seed: int,
    min_snr: float | None = None,
    guidance_scale: float = 1.0,
    branch_noise: float = 1.0,
    timestep_sampling: timesteps.Sampling = "uniform",
) -> Callable[..., Losses]:
    """Return a function from a step to its losses: the mean of each term, and their weighted sum as "loss".

    The function takes (step) or (step, part, parts). With parts, the step's items are split among them, and the losses
    of the parts add up to the loss of the step.

    network        a `training.denoiser.Denoiser`, or one that accelerate has prepared, with the base weights loaded;
                   if consistency has a weight, the frozen base is taken from it now. It compares under the conditions
                   in `data`, those of the text encoders as they were
    scheduler      the base's diffusers scheduler, for the noise schedule and the prediction type
    data           the training set; or one for each size of images, in the order of `batches.parts`
    batches        the rows of each step and the weights of the terms
    share_ratios   the range from which share ratios are drawn, so that one model serves them all
    soft_target    how the soft target weighs the members, see `training.loss.member_weights`
    branch_start   the start x_t* of the branch phase:
                   "sampled": the x_0 that the current network predicts in the last shared step, its noise rotated
                   towards fresh noise of each member, as branch noise does in sampling;
                   "mixture": `training.loss.mixture_start`;
                   "plain": no bridge, ordinary noised latents of each member, as a baseline
    sampler_steps  number of sampler steps; the branch times are the ones of the scheduler at this number of steps
    drop_text      fraction of the plain diffusion items with an empty prompt, for classifier-free guidance
    seed           seed of all draws
    min_snr        gamma of `training.loss.min_snr`; None weighs all timesteps equally
    guidance_scale, branch_noise  those of sampling, for the shared steps of "sampled"; a denoiser with guidance as an
                   input has its own scale
    timestep_sampling   how plain diffusion draws its timesteps, see `training.timesteps.drawn`

    Plain diffusion draws from all captions of an image; the other terms use the captions by which images were grouped.
    Raises UnsupportedError for a scheduler that is neither variance-preserving nor flow matching and for text states
    that the network cannot read. The function raises ConfigurationError for more parts than items.
    """
    denoiser = extract_model_from_parallel(network)
    sets = [data] if isinstance(data, TrainingSet) else list(data)
    for one in sets:
        denoiser.check_width(one.conditions)
    timesteps.check(timestep_sampling, scheduler)
    frozen = denoiser.frozen() if batches.weights["consistency"] else None
    schedule = NoiseSchedule.of(scheduler)
    times = diffusion.network_times(scheduler)
    # Of each size, because the times of some models depend on it; their number does not.
    visited = [denoiser.times(scheduler, sampler_steps, one.latents, one.conditions) for one in sets]
    scale = 1.0 if denoiser.embeds_guidance else guidance_scale

    def at_times(function: Network) -> Network:
        return lambda x_t, t, condition: function(x_t, times[t], condition)

    def draws_from(number: int, some: TrainingSet) -> _Draws:
        return _Draws(
            schedule,
            some,
            guided(at_times(denoiser), select(some.conditions, slice(-1, None)), scale),
            share_ratios,
            soft_target,
            branch_start,
            visited[number],
            drop_text,
            branch_noise,
            timestep_sampling,
        )

    def weight(t: Tensor) -> Tensor:
        return torch.ones_like(t) if min_snr is None else loss.min_snr(schedule, t, min_snr)

    def step_loss(step: int, part: int = 0, parts: int = 1) -> Losses:
        if parts > batches.batch_size:
            raise ConfigurationError(
                f"{batches.batch_size} items of a step cannot be split into {parts} parts (processes times "
                "finetune.accumulate); raise finetune.batch_size"
            )
        number, own, own_step = batches.turn(step)
        chosen, rows = sets[number], own.rows(own_step)
        count = {term: len(term_rows) for term, term_rows in rows.items()}
        mine = split_items(count, rows, part, parts)
        k = drawn_shared_steps(share_ratios, len(visited[number]), seed, step)

        def drawn(draw: _Draws, terms: Iterable[str]) -> dict[str, Query]:
            """Draw all items of the step, so that the draws do not depend on the number of parts; return mine."""
            random = generator(seed, step)
            found = {term: draw.query(term, rows[term], random, mine.get(term, slice(0)), k) for term in terms}
            return {term: query for term, query in found.items() if term in mine}

        draw = draws_from(number, chosen.now(torch.cat([*rows.values()])))
        queries = drawn(draw, rows)
        anchors = {}
        if frozen is not None:
            count["consistency"] = count["diffusion"] + count.get("shared", 0)
            base, before = at_times(frozen), draws_from(number, chosen)
            asked = queries if draw.data is chosen else drawn(before, [term for term in rows if term != "branch"])
            if "diffusion" in asked:
                anchors["diffusion"] = loss.anchor(base, asked["diffusion"])
            if "shared" in asked:
                c, item = before.members(rows["shared"][mine["shared"]])
                anchors["shared"] = loss.shared_anchor(base, asked["shared"], c, item)
        values = loss.terms(at_times(network), queries, anchors, weight)
        means = {name: values[name].sum() / n if name in values else torch.zeros(()) for name, n in count.items()}
        return {"loss": loss.total({name: means[name] for name in values}, batches.weights)} | means

    return step_loss


def drawn_shared_steps(share_ratios: tuple[float, float], evaluations: int, seed: int, step: int) -> int:
    """Return the number of shared evaluations in a training step, drawn uniformly between the two share ratios.

    `evaluations` is the number of a sampler's evaluations per image, the length of `sage.diffusion.visited`.
    """
    fewest, most = (max(1, shared_steps(ratio, evaluations)) for ratio in share_ratios)
    return int(torch.randint(fewest, most + 1, (), generator=generator(seed, "shared steps", step)))


def guided(network: Network, empty: Condition, scale: float) -> Network:
    """Return the network under classifier-free guidance, at twice the evaluations; up to scale 1 the network itself.

    `empty` is the condition of the empty prompt, one row (Ho & Salimans, 2022).
    """
    if scale <= 1:
        return network

    def function(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        both = {name: torch.cat([empty[name].expand_as(values), values]) for name, values in condition.items()}
        without, with_text = network(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return without + scale * (with_text - without)

    return function


def within_reach(x_0: Tensor, z: Tensor) -> Tensor:
    """Return predictions x_0, shape (n, ...), each scaled down to at most twice the largest of the latents z, (m, ...).

    Size is the root mean square. A denoiser that fits its data predicts means of images, which are no larger than
    images; guidance may overshoot, hence twice. But x_0 = (x_t - sigma eps) / alpha of a base that does not fit is in
    error by 1 / alpha, 15 at the first step of Stable Diffusion 1.5, and would dominate the branch term's gradient.
    """
    size, largest = (values.square().flatten(1).mean(1).sqrt() for values in (x_0, z))
    return diffusion.spread((2 * largest.max() / size).clamp(max=1), x_0) * x_0


def sampling_cost(batches: Batches | Buckets, share_ratios: tuple[float, float], evaluations: int, step: int) -> int:
    """Return the evaluations, without gradient, that a step with `branch_start` "sampled" spends on its starts x_t*.

    Guidance doubles them.
    """
    _, own, own_step = batches.turn(step)
    rows = set(own.rows(own_step).get("branch", torch.empty(0)).tolist())
    groups = sum(not rows.isdisjoint(group) for group in own.groups)
    return groups * drawn_shared_steps(share_ratios, evaluations, batches.seed, step)


def split_items(count: Mapping[str, int], terms: Iterable[str], part: int, parts: int) -> dict[str, slice]:
    """Return the items of each term that belong to a part; items are assigned round-robin across all terms."""
    items, place = {}, 0
    for term in terms:
        first = (part - place) % parts
        place += count[term]
        if first < count[term]:
            items[term] = slice(first, None, parts)
    return items


@dataclass(frozen=True)
class _Draws:
    """Draws the noise, timestep, member and branch time of a step's items, on the CPU from one generator."""

    schedule: NoiseSchedule
    data: TrainingSet
    network: Network
    share_ratios: tuple[float, float]
    soft_target: SoftTarget
    branch_start: BranchStart
    visited: Tensor
    drop_text: float
    branch_noise: float
    timestep_sampling: timesteps.Sampling

    def query(self, term: str, rows: Tensor, random: torch.Generator, items: slice, steps: int) -> Query:
        """Return the selected items of a term for these rows; `steps` is the number of shared steps (see `sampled`)."""
        if term == "branch" and self.branch_start == "sampled":
            return self.sampled(rows, random, items, steps)
        return {"diffusion": self.diffusion, "shared": self.shared, "branch": self.branch}[term](rows, random).select(
            items
        )

    def diffusion(self, rows: Tensor, random: torch.Generator) -> Query:
        """Plain diffusion on single images, each with a random one of its captions or the empty prompt."""
        data = self.data
        dropped = torch.rand(len(rows), generator=random) < self.drop_text
        drawn = data.captions[rows, torch.randint(data.captions.shape[1], (len(rows),), generator=random)]
        c = select(data.conditions, torch.where(dropped, data.empty, drawn))
        t = timesteps.drawn(self.timestep_sampling, len(rows), len(self.schedule), random)
        eps = self._noise(rows, random)
        return loss.diffusion_query(self.schedule, data.latents_of(rows, self._flips(rows, random)), c, t, eps)

    def shared(self, rows: Tensor, random: torch.Generator) -> Query:
        """The shared phase, with the row's own image as the random member; groups are mirrored as a whole."""
        flips = self._flips(rows, random)
        z, present = self._group(rows, flips)
        t_star = self._branch_time(rows, random)
        above = len(self.schedule) - 1 - t_star
        t = (t_star + 1 + (stratified_uniform(len(rows), random) * above).long()).clamp(max=len(self.schedule) - 1)
        c_bar, eps = self._merged(rows), self._noise(rows, random)
        z_m = self.data.latents_of(rows, flips)
        return loss.shared_query(self.schedule, self.soft_target, z_m, z, present, c_bar, t, eps)

    def branch(self, rows: Tensor, random: torch.Generator) -> Query:
        """The branch phase; rows of one group start from the same shared latent, as without branch noise.

        If `branch_start` is "plain", it is ordinary diffusion at the timesteps of the branch phase, as a baseline.
        """
        # One draw per group: every row uses the draws of the first row of its group in the batch.
        first = self._first(rows)
        flips = self._flips(rows, random, first)
        z, present = self._group(rows, flips)
        t_star = self._branch_time(rows, random)[first]
        eps = self._noise(rows, random)[first]
        place = (torch.rand(len(rows), generator=random)[first] * present.sum(1)).long()
        z_m = z[torch.arange(len(rows)), place]
        x_star = loss.mixture_start(self.schedule, self.soft_target, z_m, z, present, t_star, eps)
        t = (stratified_uniform(len(rows), random) * (t_star + 1)).long()
        own, c = self.data.latents_of(rows, flips), self.data.conditions_of(rows)
        if self.branch_start == "plain":
            return loss.diffusion_query(self.schedule, own, c, t, eps)
        return loss.branch_query(self.schedule, own, c, t, x_star, t_star)

    def sampled(self, rows: Tensor, random: torch.Generator, items: slice, steps: int) -> Query:
        """The branch phase from the network's own shared steps, each member with its own branch noise."""
        first = self._first(rows)
        flips = self._flips(rows, random, first)
        shared_noise, own_noise = self._noise(rows, random), self._noise(rows, random)
        t_star = self.visited[steps].expand(len(rows))
        t = (stratified_uniform(len(rows), random) * (t_star + 1)).long()
        # Only the groups of these items are sampled, each once.
        leaders, place = torch.unique(first[items], return_inverse=True)
        if not len(leaders):
            return Query(shared_noise[items], t[items], self.data.conditions_of(rows[items]), own_noise[items])
        c_bar, eps = self._merged(rows[leaders]), shared_noise[leaders]
        x_0, eps = rollout(self.schedule, self.network, c_bar, eps, self.visited[:steps])
        s = self.branch_noise
        noise = s * own_noise[items] + (1 - s**2) ** 0.5 * eps[place]
        x_0 = within_reach(x_0, self.data.latents[rows])[place]
        x_star = diffusion.add_noise(x_0, noise, *self.schedule.at(t_star[items]))
        mine = rows[items]
        own = self.data.latents_of(mine, None if flips is None else flips[items])
        c = self.data.conditions_of(mine)
        return loss.branch_query(self.schedule, own, c, t[items], x_star, t_star[items])

    def members(self, rows: Tensor) -> tuple[Condition, Tensor]:
        """Return the conditions of all members of the rows' groups, and for each its index in `rows`."""
        members = self.data.group_members[rows]
        item, member = (members >= 0).nonzero(as_tuple=True)
        return self.data.conditions_of(members[item, member]), item

    def _merged(self, rows: Tensor) -> Condition:
        """Return the merged condition of each row's group, as in sampling."""
        merged: dict[int, Condition] = {}
        for group in self.data.group_members[rows]:
            if int(group[0]) not in merged:
                members = self.data.conditions_of(group[group >= 0])
                merged[int(group[0])] = merge({name: values[:, None] for name, values in members.items()})
        leaders = self.data.group_members[rows, 0].tolist()
        return {name: torch.cat([merged[row][name][:, 0] for row in leaders]) for name in self.data.conditions}

    def _first(self, rows: Tensor) -> Tensor:
        """Return for each row the index of the first of these rows in the same group."""
        group = self.data.group_members[rows, 0]
        return (group[:, None] == group).int().argmax(1)

    def _group(self, rows: Tensor, flips: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the latents of each row's group, padded to (n, N, ...), and the mask of members, (n, N)."""
        members = self.data.group_members[rows]
        return self.data.latents_of(members.clamp(min=0), flips), members >= 0

    def _flips(self, rows: Tensor, random: torch.Generator, first: Tensor | None = None) -> Tensor | None:
        """Return which rows are mirrored; those with the same `first` alike. None, without a draw, if none ever is."""
        if self.data.mirrored is None:
            return None
        flips = torch.rand(len(rows), generator=random) < 0.5
        return flips if first is None else flips[first]

    def _branch_time(self, rows: Tensor, random: torch.Generator) -> Tensor:
        low, high = self.share_ratios
        share_ratio = low + (high - low) * torch.rand(len(rows), generator=random)
        return diffusion.timestep_after(self.visited, share_ratio)

    def _noise(self, rows: Tensor, random: torch.Generator) -> Tensor:
        return torch.randn((len(rows), *self.data.latents.shape[1:]), generator=random)
