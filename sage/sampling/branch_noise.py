"""Branch noise: at a branch, each child draws part of its noise anew, so that the members of a group differ more.

With x_0 what the block predicts at its branch, and x = alpha x_0 + sigma eps, each child continues from

    eps' = sqrt(1 - s^2) eps + s xi

with its own draw xi: the same amount of noise, rotated by arcsin(s). s = 0 is off.

A child then predicts an x_0 of its own, x_0', and to its first step alpha (x_0 - x_0') would look like noise, which it
would carry on. But the share of the noise's variance that was drawn is known, s^2, so that step is made from
x + s^2 alpha (x_0' - x_0): at s = 1 from x_0' under exactly the noise that was drawn. It costs no evaluation.
"""

from typing import Any

import torch
from torch import Tensor

from sage import diffusion
from sage.errors import ConfigurationError, UnsupportedError

# The schedulers whose history holds no noise, or only predictions of x_0, which branch noise leaves as they are.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)


def check_branch_noise(scheduler: Any, s: float) -> None:
    """Raise ConfigurationError for s outside [0, 1], UnsupportedError for a scheduler that branch noise cannot use."""
    if not 0 <= s <= 1:
        raise ConfigurationError(f"branch_noise {s} is outside [0, 1]; 0 adds none, 1 replaces all noise")
    if not s:
        return
    name = type(scheduler).__name__
    if name not in SCHEDULERS or "++" not in scheduler.config.get("algorithm_type", "++"):
        raise UnsupportedError(
            f"branch noise needs one of {', '.join(SCHEDULERS)} (dpmsolver++), not {name}; or give branch_noise=0"
        )
    diffusion.prediction_type(scheduler)  # x_0 is read from the network's output


def rotated(scheduler: Any, step: int, x: Tensor, x_0: Tensor, xi: Tensor, s: float) -> Tensor:
    """Return the latents x that enter a step, with their noise rotated towards xi; all of one shape."""
    alpha, sigma = (float(level) for level in _levels(scheduler, step))
    eps = (x - alpha * x_0) / sigma
    turned: Tensor = alpha * x_0 + sigma * ((1 - s**2) ** 0.5 * eps + s * xi)
    return turned.to(x.dtype)


def recentred(
    scheduler: Any, step: int, x: Tensor, output: Tensor, rows: list[int], x_0: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    """Return the latents that enter a step and the network's output, moved to what the children predict.

    `rows` are those that drew noise at the branch, and `x_0` (len(rows), ...) what their parents predicted there. The
    new outputs mean the same x_0' at the new latents.
    """
    x, output = x.clone(), output.clone()
    own = predicted_x_0(scheduler, step, x[rows], output[rows])
    alpha = float(_levels(scheduler, step)[0])
    x[rows] += (s**2 * alpha * (own - x_0)).to(x.dtype)
    kind, level, x_t = _normalised(scheduler, step, x[rows])
    eps = diffusion.implied_noise(x_t, own, *level)
    output[rows] = diffusion.target(kind, own, eps, *level).to(output.dtype)
    return x, output


def predicted_x_0(scheduler: Any, step: int, x: Tensor, output: Tensor) -> Tensor:
    """Return the x_0 that a network output means for the latents x that enter a step."""
    kind, level, x_t = _normalised(scheduler, step, x)
    return diffusion.predicted_sample(kind, output.float(), x_t, *level)


def _normalised(scheduler: Any, step: int, x: Tensor) -> tuple[diffusion.PredictionType, tuple[Tensor, Tensor], Tensor]:
    """Return the prediction type, (alpha, sigma) and latents of a step in the convention of `sage.diffusion`.

    Euler schedulers keep latents divided by alpha.
    """
    kind = diffusion.prediction_type(scheduler)
    alpha, sigma = (torch.as_tensor(level, dtype=torch.float32) for level in _levels(scheduler, step))
    norm = torch.ones(()) if kind == "flow_prediction" else torch.hypot(alpha, sigma)
    return kind, (alpha / norm, sigma / norm), x.float() / norm.to(x.device)


def _levels(scheduler: Any, step: int) -> tuple[Any, Any]:
    """Return alpha and sigma of the latents that enter a step."""
    name = type(scheduler).__name__
    if name in ("DDIMScheduler", "DDPMScheduler"):
        signal = scheduler.alphas_cumprod[int(scheduler.timesteps[step])]
        return signal.sqrt(), (1 - signal).sqrt()
    sigma = scheduler.sigmas[step]
    if name == "FlowMatchEulerDiscreteScheduler":
        return 1 - sigma, sigma
    return scheduler._sigma_to_alpha_sigma_t(sigma) if name == "DPMSolverMultistepScheduler" else (1.0, sigma)
