"""Branch noise: at a branch, each child replaces part of its noise by a fresh draw, so that group members differ more.

Let x_0 be the block's prediction at its branch point and x = alpha x_0 + sigma eps. Each child continues with the noise

    eps' = sqrt(1 - s^2) eps + s xi

for its own draw xi: the variance is kept, the noise is rotated by arcsin(s). s = 0 turns branch noise off.

At its first step a child predicts its own x_0', and the scheduler would mistake the difference alpha (x_0 - x_0') for
noise and carry it on. A fraction s^2 of the noise variance is freshly drawn, so this step instead starts from
x + s^2 alpha (x_0' - x_0): at s = 1 this is x_0' with exactly the drawn noise. It costs no network evaluation.

A block's first step is special if the latents are then noise alone (`begins_as_noise`): the prediction is E[x_0 | c],
whatever the noise, and at s = 1 a child continues with the noise that it begins with alone. A child of the same prompts
as its block is then where it is alone, and is not moved: for an ideal network, an image that shares this step with
others of its prompt is the image that it is alone.
"""

from typing import Any

import torch
from torch import Tensor

from sage import diffusion
from sage.errors import ConfigurationError, UnsupportedError

# Rotating the noise would invalidate a history of noise predictions. These schedulers keep no history, or only
# predictions of x_0.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)

# Largest alpha / sigma of a first step whose latents count as noise alone. Of n latents in a channel, what they have in
# common, such as brightness, is seen at a signal-to-noise ratio of n (alpha / sigma)^2: at most 0.016 for n = 128^2.
# Zero terminal SNR has 0, or 2^-12 in schedulers that avoid it, and flow matching 0; DDPM's linear schedule has 0.006
# and Stable Diffusion 1.5 has 0.068, a ratio of 19 for n = 64^2: there the noise decides the layout.
NOISE_ALONE = 1e-3


def begins_as_noise(scheduler: Any) -> bool:
    """Return whether the first step's latents are noise alone, so that its prediction depends on the condition only.

    False for schedulers without branch noise.
    """
    if type(scheduler).__name__ not in SCHEDULERS:
        return False
    alpha, sigma = levels(scheduler, 0)
    return float(alpha) <= NOISE_ALONE * float(sigma)


def safe_image_steps(scheduler: Any, s: float) -> int:
    """Return how many first steps the images of one prompt can share and be as diverse as alone: 1 or 0.

    The first if its latents are noise alone and branch noise s is 1; with less, images keep some of each other's noise.
    """
    return int(s == 1 and begins_as_noise(scheduler))


def check_branch_noise(scheduler: Any, s: float) -> None:
    """Raise ConfigurationError for s outside [0, 1], UnsupportedError for a scheduler that does not support it."""
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
    """Return the input latents x of a step with their noise rotated towards xi; x, x_0 and xi have one shape."""
    alpha, sigma = (float(level) for level in levels(scheduler, step))
    eps = (x - alpha * x_0) / sigma
    x_rotated: Tensor = alpha * x_0 + sigma * ((1 - s**2) ** 0.5 * eps + s * xi)
    return x_rotated.to(x.dtype)


def recentred(
    scheduler: Any, step: int, x: Tensor, output: Tensor, rows: list[int], x_0: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    """Return a step's input latents and network output, moved towards the children's own predictions x_0'.

    The new output predicts the same x_0' from the new latents.

    scheduler, step  scheduler with its timesteps set, and the index of the step
    x, output        input latents of the step and the network's output for them, (n, ...)
    rows             the rows that drew noise at the branch; the others stay unchanged
    x_0              prediction of their parents at the branch, (len(rows), ...)
    s                branch noise in [0, 1]
    """
    x, output = x.clone(), output.clone()
    own = predicted_x_0(scheduler, step, x[rows], output[rows])
    alpha = float(levels(scheduler, step)[0])
    x[rows] += (s**2 * alpha * (own - x_0)).to(x.dtype)
    output[rows] = output_for(scheduler, step, x[rows], own).to(output.dtype)
    return x, output


def output_for(scheduler: Any, step: int, x: Tensor, x_0: Tensor) -> Tensor:
    """Return the network output that predicts x_0 from the input latents x of a step; inverse of `predicted_x_0`."""
    kind, level, x_t = _normalised(scheduler, step, x)
    return diffusion.target(kind, x_0, diffusion.implied_noise(x_t, x_0, *level), *level)


def predicted_x_0(scheduler: Any, step: int, x: Tensor, output: Tensor) -> Tensor:
    """Return the x_0 that a network output predicts from the input latents x of a step."""
    kind, level, x_t = _normalised(scheduler, step, x)
    return diffusion.predicted_sample(kind, output.float(), x_t, *level)


def _normalised(scheduler: Any, step: int, x: Tensor) -> tuple[diffusion.PredictionType, tuple[Tensor, Tensor], Tensor]:
    """Return a step's prediction type, (alpha, sigma) and input latents in the convention of `sage.diffusion`.

    Euler schedulers keep latents divided by alpha, so variance-preserving ones are scaled to alpha^2 + sigma^2 = 1.
    """
    kind = diffusion.prediction_type(scheduler)
    alpha, sigma = (torch.as_tensor(level, dtype=torch.float32) for level in levels(scheduler, step))
    norm = torch.ones(()) if kind == "flow_prediction" else torch.hypot(alpha, sigma)
    return kind, (alpha / norm, sigma / norm), x.float() / norm.to(x.device)


def levels(scheduler: Any, step: int) -> tuple[Any, Any]:
    """Return alpha and sigma of a step's input latents, in the scheduler's own scaling."""
    name = type(scheduler).__name__
    if name in ("DDIMScheduler", "DDPMScheduler"):
        signal = scheduler.alphas_cumprod[int(scheduler.timesteps[step])]
        return signal.sqrt(), (1 - signal).sqrt()
    sigma = scheduler.sigmas[step]
    if name == "FlowMatchEulerDiscreteScheduler":
        return 1 - sigma, sigma
    return scheduler._sigma_to_alpha_sigma_t(sigma) if name == "DPMSolverMultistepScheduler" else (1.0, sigma)
