"""First predictions: what the model expects of each prompt at its first step, as a space to group prompts in.

If the first step's latents are noise alone (`sage.sampling.branch_noise.begins_as_noise`), an ideal network predicts
E[x_0 | c], the mean of all images of the prompt, and the noise does not matter. Two prompts with the same first
prediction then have the same first step. All prompts get the same noise, so that only they make the difference; noise
and not zeros, because networks are trained on noise.

The prediction is the prompt's own first step and need not be computed again: a block's first step takes the mean of
its prompts' predictions, which is what an ideal network predicts of their mixture.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage.errors import UnsupportedError
from sage.grouping.sphere import on_sphere
from sage.sampling.branch_noise import SCHEDULERS, begins_as_noise, predicted_x_0
from sage.sampling.conditions import block_conditions


@dataclass(frozen=True)
class FirstPredictions:
    """First predictions of some prompts.

    x_0                  one row for each prompt, (n, ...), single precision on the CPU
    network_evaluations  what they cost; copies of a prompt count once
    reusable             whether the first step begins with noise alone, so that it can be taken from here
    made_for             scheduler, first timestep and guidance scale
    """

    x_0: Tensor
    network_evaluations: int
    reusable: bool
    made_for: tuple[str, float, float]

    def embeddings(self) -> np.ndarray:
        """Return rows of length 1, (n, d + 1), whose cosine is 1 - m / 4 for prompts of mean squared difference m.

        See `sage.grouping.sphere`.
        """
        rows = self.x_0.flatten(1).numpy()
        return on_sphere(rows, rows.shape[1])

    def of(self, prompts: list[int]) -> "FirstPredictions":
        """Return the predictions of these prompts, by number."""
        return replace(self, x_0=self.x_0[prompts])

    def mean(self, prompts: list[int]) -> Tensor:
        """Return the first prediction of a block of prompts, (...)."""
        return self.x_0[prompts].mean(0)


def made_for(scheduler: Any, guidance_scale: float) -> tuple[str, float, float]:
    """Return what first predictions depend on besides the prompts and the network; timesteps of `scheduler` are set."""
    return type(scheduler).__name__, round(float(scheduler.timesteps[0]), 3), float(guidance_scale)


@torch.no_grad()
def first_predictions(stream: Any) -> FirstPredictions:
    """Return the first predictions of the prompts of a stream that was not iterated, from the noise of seed 0.

    They do not depend on the order of the prompts, and on batches only in rounding. Raises UnsupportedError for a
    scheduler whose predictions cannot be read.
    """
    pipe, scheduler = stream._pipe, stream._pipe.scheduler
    if type(scheduler).__name__ not in SCHEDULERS:
        raise UnsupportedError(
            f"first predictions need one of {', '.join(SCHEDULERS)}, not {type(scheduler).__name__}; group by text"
        )
    if stream._caches:
        raise UnsupportedError(
            "first predictions are made before a step cache begins; group by text, or call disable_cache() of the "
            "transformer"
        )
    count = stream.plan.prompts
    # Batch composition changes the rounding, so sort: the result must not depend on the order of the prompts.
    first: dict[Any, int] = {}
    for image in range(count):
        first.setdefault(stream.prompt_of(image), image)
    order = [first[key] for key in sorted(first, key=lambda key: (len(str(key)), str(key)))]
    before = pipe._evaluations
    found: dict[int, Tensor] = {}
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    t = scheduler.timesteps[0]
    for start in range(0, len(order), stream._batch_size):
        images = order[start : start + stream._batch_size]
        blocks = [[image] for image in images]
        condition = block_conditions(blocks, stream._encode, lambda image: image, len(images), False)
        latents = stream._noise(images, [torch.Generator().manual_seed(0) for _ in images])
        x = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        x_0 = predicted_x_0(scheduler, 0, latents, stream._predict(x, t, condition, stream._scale))
        found.update(zip(images, x_0.float().cpu(), strict=True))
    rows = torch.stack([found[first[stream.prompt_of(image)]] for image in range(count)])
    pipe._end_call()
    return FirstPredictions(
        rows, pipe._evaluations - before, begins_as_noise(scheduler), made_for(scheduler, stream._scale)
    )
