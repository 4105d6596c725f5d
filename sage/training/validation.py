"""The held-out loss: L_SAGE and, by band of timesteps, plain diffusion, on images that training never sees.

Rows, timesteps and noise are the same in every measurement, so two measurements differ by the weights alone, and their
difference shows what the noise of the training loss hides.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import distributed, nn

from sage import diffusion
from sage.diffusion import NoiseSchedule
from sage.randomness import generator, stratified_uniform
from sage.training import loss
from sage.training.batches import Batches
from sage.training.finetuning import TrainingSet
from sage.training.loop import Losses, processes
from sage.training.selection import LOSS

# Bands of equally many timesteps: the first has the least noise, the last almost only noise.
BANDS = 4


def held_out_batches(
    groups: Sequence[Sequence[int]], weights: Mapping[str, float], batch_size: int, seed: int
) -> Batches:
    """Return the held-out rows of each term: the trained terms but consistency, which compares with no image.

    Without groups of two or more, or if only consistency is trained, that leaves plain diffusion.
    """
    grouped = any(len(group) > 1 for group in groups)
    terms = {"diffusion"} | ({"shared", "branch"} if grouped else set())
    kept = {name: weight if name in terms else 0.0 for name, weight in weights.items()}
    return Batches(groups, kept if any(kept.values()) else kept | {"diffusion": 1.0}, batch_size, seed)


def held_out_loss(
    network: nn.Module,
    scheduler: Any,
    data: TrainingSet,
    batches: Batches,
    step_loss: Callable[[int], Losses],
) -> Callable[[], dict[str, float]]:
    """Return a function that measures the network as it is: named means over the held-out images.

    network    a `training.denoiser.Denoiser`, or one that accelerate has prepared
    scheduler  the base's diffusers scheduler
    data       held-out images as latents, with their captions and groups
    batches    their rows, see `held_out_batches`
    step_loss  `training.finetuning.finetuning_loss` of these data and batches

    "validation_loss" is L_SAGE, and "validation_diffusion", "validation_shared" and "validation_branch" are its terms,
    over as many batches as the images fill. "validation_t0_249" and so on are the squared error of plain diffusion in a
    band of timesteps, every image once a band, not weighted. Several processes share the work and get the same values.
    """
    denoiser = extract_model_from_parallel(network)
    schedule, times = NoiseSchedule.of(scheduler), diffusion.network_times(scheduler)
    steps = -(-len(data.latents) // batches.batch_size)
    terms = ["loss", *batches.rows(0)]
    edges = [len(schedule) * band // BANDS for band in range(BANDS + 1)]
    bands = list(pairwise(edges))

    def band_error(rows: torch.Tensor, place: int) -> float:
        low, high = bands[place]
        random = generator(batches.seed, "validation", place, int(rows[0]))
        t = low + (stratified_uniform(len(rows), random) * (high - low)).long()
        noise = torch.randn((len(rows), *data.latents.shape[1:]), generator=random)
        query = loss.diffusion_query(schedule, data.latents[rows], data.now(rows).conditions_of(rows), t, noise)
        errors = loss.terms(lambda x_t, t, c: denoiser(x_t, times[t], c), {"band": query}, {})
        return float(errors["band"].sum()) / len(data.latents)

    @torch.no_grad()
    def measure() -> dict[str, float]:
        rank, world = processes()
        sums = torch.zeros(len(terms) + len(bands), dtype=torch.float64)
        for step in range(rank, steps, world):
            means = step_loss(step)
            sums[: len(terms)] += torch.tensor([float(means.get(name, 0.0)) / steps for name in terms]).double()
        parts = torch.split(torch.arange(len(data.latents)), batches.batch_size)
        for rows in parts[rank::world]:
            sums[len(terms) :] += torch.tensor([band_error(rows, place) for place in range(BANDS)]).double()
        if world > 1:
            everywhere = sums.to(next(denoiser.parameters()).device)
            distributed.all_reduce(everywhere)
            sums = everywhere.cpu()
        names = [LOSS, *(f"validation_{name}" for name in terms[1:])]
        names += [f"validation_t{low}_{high - 1}" for low, high in bands]
        return dict(zip(names, sums.tolist(), strict=True))

    return measure
