"""Another scheduler for a pipeline, by the name of its class in diffusers."""

import inspect
from typing import Any

import sage.torchvision_ops  # noqa: F401

import diffusers
import torch

from sage.errors import UnsupportedError

_FLOW = "FlowMatchEulerDiscreteScheduler"
# Classes have other defaults for these, and `from_config` takes a class's own default for what was not written down.
_NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def exchanged(scheduler: Any, name: str | None) -> Any:
    """Return a scheduler of the class `name` with the configuration of `scheduler`; None: the scheduler itself.

    Latents are not clipped unless the configuration says so; some classes would do it by default. Raises
    UnsupportedError if one of the two is for flow matching and the other is not, or if the noise schedule would change.
    """
    found = type(scheduler).__name__
    if name in (None, found):
        return scheduler
    if _FLOW in (name, found):
        raise UnsupportedError(f"{name} cannot replace {found}: networks that predict a flow need {_FLOW}, others not.")
    kind, config = getattr(diffusers, name), scheduler.config
    takes = inspect.signature(kind).parameters
    changes = {key: config[key] for key in _NOISE if key in takes and key in config}
    if "clip_sample" in takes and "clip_sample" not in config:
        changes["clip_sample"] = False
    other = kind.from_config(config, **changes)
    if not torch.allclose(other.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-6):
        raise UnsupportedError(
            f"{name} cannot replace {found}: it has no way to this noise schedule, for example no zero terminal SNR."
        )
    return other
