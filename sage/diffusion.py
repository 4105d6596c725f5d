"""Noise schedules, prediction types, and the conversions between x_t, x_0, eps and v.

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
# The prediction types that the configuration of a variance-preserving scheduler can hold.
_NAMED = ("epsilon", "v_prediction", "sample")


def noise_levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Return (alpha, sigma), each of shape (T,), of a variance-preserving or flow-matching diffusers scheduler.

    Raises UnsupportedError if the scheduler is neither.
    """
    if type(scheduler).__name__ == _FLOW:
        # A fresh scheduler, because after set_timesteps `sigmas` holds only the levels of the sampling steps.
        sigmas = type(scheduler).from_config(scheduler.config).sigmas.flip(0)
        return 1 - sigmas, sigmas
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UnsupportedError(
            f"{type(scheduler).__name__} has no alphas_cumprod; use a variance-preserving scheduler or {_FLOW}."
        )
    alphas_cumprod = scheduler.alphas_cumprod.double()
    return alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float()


def network_times(scheduler: Any) -> Tensor:
    """Return the network's time input at each timestep, shape (T,): t itself, or T sigma_t under flow matching."""
    alphas, sigmas = noise_levels(scheduler)
    return sigmas * len(sigmas) if type(scheduler).__name__ == _FLOW else torch.arange(len(alphas))


def check_start(scheduler: Any) -> None:
    """Raise UnsupportedError if a scheduler with its timesteps set starts where eps says nothing about x_0.

    x_0 = (x_t - sigma_t eps) / alpha_t has no meaning at zero terminal SNR, alpha_t = 0 (Lin et al., 2023), for which
    some schedulers put 2^-12.
    """
    config = scheduler.config
    if config.get("prediction_type") != "epsilon" or not hasattr(scheduler, "alphas_cumprod"):
        return  # without alphas_cumprod (EDM, flow matching) the first noise level is finite
    t = round(float(scheduler.timesteps[0]))
    signal = float(scheduler.alphas_cumprod[t])
    if signal == 0 or (config.get("rescale_betas_zero_snr") and signal <= 2**-24):
        raise UnsupportedError(
            f"{type(scheduler).__name__} has prediction type epsilon and zero terminal SNR: at its first timestep, "
            f"{t}, there is only noise, and a prediction of noise gives no image. Set rescale_betas_zero_snr to false, "
            "timestep_spacing to leading, or, for a network that was trained on it, prediction_type to v_prediction."
        )


def visited(scheduler: Any) -> Tensor:
    """Return the training timesteps at which a sampler evaluates the network, shape (evaluations,).

    `scheduler` has its timesteps set, as the sampler sets them for its steps and the size of its images. Times between
    two training timesteps are rounded to the nearer one. Some schedulers evaluate more than once a step.
    Raises UnsupportedError as `check_start` does.
    """
    check_start(scheduler)
    times = scheduler.timesteps.cpu()
    nearest: Tensor = (network_times(scheduler) - times[:, None]).abs().argmin(1)
    return nearest


def timestep_after(visited: Tensor, share: Tensor) -> Tensor:
    """Return the training timestep, shape (n,), that a sampler reaches after a fraction of its evaluations.

    `visited` is the sampler's, see there; `share` in [0, 1) has shape (n,), and 0 gives the first timestep. Fractions
    between two evaluations are interpolated linearly.
    """
    times = torch.cat([visited, visited.new_zeros(1)]).double()
    place = share.double() * len(visited)
    k = place.long()
    return torch.lerp(times[k], times[k + 1], place - k).round().long()


def prediction_type(scheduler: Any) -> PredictionType:
    """Return the prediction type that this scheduler expects of its network.

    Raises UnsupportedError if it is none of `PredictionType`.
    """
    if type(scheduler).__name__ == _FLOW:
        return "flow_prediction"
    kind: PredictionType = scheduler.config.get("prediction_type")
    if kind not in _NAMED:
        raise UnsupportedError(
            f"{type(scheduler).__name__} has prediction type {kind!r}; use one of {', '.join(_NAMED)}."
        )
    return kind


def spread(level: Tensor, like: Tensor) -> Tensor:
    """Return `level`, one value per item, reshaped from (n,) to (n, 1, 1, ...) to multiply `like` of shape (n, ...)."""
    return level.to(like).reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return x_t = alpha x_0 + sigma eps; alpha and sigma have shape (n,), x_0 and eps shape (n, ...)."""
    return spread(alpha, x_0) * x_0 + spread(sigma, x_0) * eps


def target(kind: PredictionType, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the regression target of a network of this prediction type; shapes as in `add_noise`."""
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x_0
    if kind == "flow_prediction":
        return eps - x_0
    return spread(alpha, x_0) * eps - spread(sigma, x_0) * x_0


def implied_noise(x_t: Tensor, x_0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return eps = (x_t - alpha x_0) / sigma, the noise that takes x_0 to x_t.

    Needs sigma > 0. If x_t was not made from this x_0, eps is not standard normal: it grows as 1 / sigma.
    """
    return (x_t - spread(alpha, x_0) * x_0) / spread(sigma, x_0)


def predicted_sample(kind: PredictionType, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the x_0 that follows from a network output at x_t; prediction type epsilon needs alpha > 0."""
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
        """Return the training schedule of a diffusers scheduler; raise UnsupportedError if it is of another kind."""
        return cls(prediction_type(scheduler), *noise_levels(scheduler))

    def __len__(self) -> int:
        """Return T, the number of timesteps."""
        return len(self.alphas)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma), each of shape (n,), at timesteps t of shape (n,)."""
        return self.alphas[t], self.sigmas[t]

    def target(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """Return the network output that corresponds to predicting x_0 at x_t; t has shape (n,).

        Needs sigma_t > 0; it is finite at alpha_t = 0 too.
        """
        alpha, sigma = self.at(t)
        return target(self.kind, x_0, implied_noise(x_t, x_0, alpha, sigma), alpha, sigma)
