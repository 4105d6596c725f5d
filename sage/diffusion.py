"""Noise schedules and prediction types: x_t, x_0, eps and v, and the conversions between them.

Notation
    x_0, z   clean latents                      alpha_t, sigma_t   signal and noise level
    eps      standard normal noise              x_t  = alpha_t x_0 + sigma_t eps
    t        timestep, 0 (clean) to T - 1       v    = alpha_t eps - sigma_t x_0   (Salimans & Ho, 2022, appendix D)
                                                flow = eps - x_0                   (Lipman et al., 2023)

Variance-preserving schedules have alpha_t^2 + sigma_t^2 = 1, flow matching alpha_t + sigma_t = 1.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sage.errors import UnsupportedError

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
_FLOW = "FlowMatchEulerDiscreteScheduler"
# Those that a variance-preserving scheduler can name.
_NAMED = ("epsilon", "v_prediction", "sample")


def noise_levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Return (alpha, sigma), each of shape (T,), of a variance-preserving or flow-matching diffusers scheduler.

    Raises UnsupportedError for a scheduler of another kind.
    """
    if type(scheduler).__name__ == _FLOW:
        # From the configuration: sampling leaves the scheduler with the levels of its own few steps.
        sigmas = type(scheduler).from_config(scheduler.config).sigmas.flip(0)
        return 1 - sigmas, sigmas
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UnsupportedError(
            f"{type(scheduler).__name__} has no alphas_cumprod; use a variance-preserving scheduler or {_FLOW}."
        )
    alphas_cumprod = scheduler.alphas_cumprod.double()
    return alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float()


def network_times(scheduler: Any) -> Tensor:
    """Return what the network is told at each timestep, shape (T,): its number, or with flow matching T sigma_t."""
    alphas, sigmas = noise_levels(scheduler)
    return sigmas * len(sigmas) if type(scheduler).__name__ == _FLOW else torch.arange(len(alphas))


def prediction_type(scheduler: Any) -> PredictionType:
    """Return what a network of this scheduler predicts; raise UnsupportedError for a kind that is not known here."""
    if type(scheduler).__name__ == _FLOW:
        return "flow_prediction"
    kind: PredictionType = scheduler.config.get("prediction_type")
    if kind not in _NAMED:
        raise UnsupportedError(
            f"{type(scheduler).__name__} has prediction type {kind!r}, which is not one of {', '.join(_NAMED)}."
        )
    return kind


def spread(level: Tensor, like: Tensor) -> Tensor:
    """Return one level per item, shape (n,), as (n, 1, 1, ...) to multiply `like`, shape (n, ...)."""
    return level.to(like).reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return x_t = alpha x_0 + sigma eps, with alpha and sigma of shape (n,)."""
    return spread(alpha, x_0) * x_0 + spread(sigma, x_0) * eps


def target(kind: PredictionType, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return what a network of this prediction type is trained to answer for clean latents and noise."""
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x_0
    if kind == "flow_prediction":
        return eps - x_0
    return spread(alpha, x_0) * eps - spread(sigma, x_0) * x_0


def implied_noise(x_t: Tensor, x_0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return eps = (x_t - alpha x_0) / sigma, the noise that a deterministic sampler sees between x_t and x_0.

    Finite for sigma > 0; an x_0 other than the one in x_t makes it grow as 1 / sigma.
    """
    return (x_t - spread(alpha, x_0) * x_0) / spread(sigma, x_0)


def predicted_sample(kind: PredictionType, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the x_0 that a network output means at x_t; eps-prediction needs alpha > 0."""
    if kind == "epsilon":
        return (x_t - spread(sigma, x_t) * output) / spread(alpha, x_t)
    if kind == "sample":
        return output
    if kind == "flow_prediction":
        return x_t - spread(sigma, x_t) * output
    return spread(alpha, x_t) * x_t - spread(sigma, x_t) * output


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule that a network is trained on: alpha and sigma, each of shape (T,), and its prediction type."""

    kind: PredictionType
    alphas: Tensor
    sigmas: Tensor

    @classmethod
    def of(cls, scheduler: Any) -> "NoiseSchedule":
        """Return the schedule of a diffusers scheduler; raise UnsupportedError for one of another kind."""
        return cls(prediction_type(scheduler), *noise_levels(scheduler))

    def __len__(self) -> int:
        """Return T, the number of timesteps."""
        return len(self.alphas)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at timesteps of shape (n,)."""
        return self.alphas[t], self.sigmas[t]

    def target(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """Return the network output that means x_0 at x_t; finite at alpha_t = 0, needs sigma_t > 0."""
        alpha, sigma = self.at(t)
        return target(self.kind, x_0, implied_noise(x_t, x_0, alpha, sigma), alpha, sigma)

    def timestep_after(self, share: Tensor) -> Tensor:
        """Return the timestep at which a sampler with trailing spacing stands after this share of its steps, (n,).

        Share 0 gives T - 1, the start.
        """
        return ((1 - share) * len(self)).round().long().clamp(1, len(self)) - 1
