"""How the timesteps of plain diffusion are drawn in training."""

from typing import Any, Literal

import torch
from torch import Tensor

from sage import diffusion
from sage.errors import UnsupportedError
from sage.randomness import stratified_uniform

Sampling = Literal["uniform", "logit_normal"]


def check(sampling: Sampling, scheduler: Any) -> None:
    """Raise UnsupportedError if timesteps cannot be drawn in this way for a network with this diffusers scheduler."""
    kind = diffusion.prediction_type(scheduler)
    if sampling == "logit_normal" and kind != "flow_prediction":
        raise UnsupportedError(
            f"finetune.timesteps logit_normal is for flow matching, but {type(scheduler).__name__} has prediction type "
            f"{kind}; set it to uniform (min_snr weighs the timesteps of such a network)"
        )


def drawn(sampling: Sampling, n: int, total: int, random: torch.Generator) -> Tensor:
    """Return n timesteps below `total`, stratified and shuffled, shape (n,).

    uniform       each timestep equally often
    logit_normal  t / total = sigmoid(u), u standard normal: the middle more often than the ends, as Stable Diffusion 3
                  was trained (Esser et al., 2024, section 3.1). The scheduler's shift is part of its noise levels, so
                  it applies on top, as there.
    """
    place = stratified_uniform(n, random)
    if sampling == "logit_normal":
        place = torch.special.ndtri(place).sigmoid()
    return (place * total).long()
