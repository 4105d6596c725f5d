"""One training loop for every network of this project; it resumes where it was killed and reports through a callback.

The loss of step k draws order and noise from (seed, k) alone, so a resumed run is the uninterrupted one, bit for bit on
the same build and thread count.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sage import checkpoint
from sage.errors import DivergedError

Losses = Mapping[str, Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: linear warm-up, constant, then linear decay to zero over the last `decay` steps.

    The steps before the decay do not depend on `steps`, so a run can be lengthened while it has not begun to decay.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    decay: int = 0
    ema: float = 0.999
    weight_decay: float = 0.0
    max_norm: float = 1.0
    checkpoint_every: int = 250

    def rate(self, step: int) -> float:
        """Return the learning rate of a step counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = min(1.0, (self.steps - step) / self.decay) if self.decay else 1.0
        return self.learning_rate * min(rise, fall)


def fit(
    network: nn.Module,
    loss: Callable[[int], Losses],
    schedule: Schedule,
    *,
    work: Path,
    identity: Mapping[str, Any],
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
) -> dict[str, float]:
    """Train `network` in place and leave it with its averaged (EMA) weights; return the last step's losses.

    `loss(step)` returns named scalars, of which "loss" is minimised. `work` keeps resumable state; `identity` names
    the configuration it belongs to. Raises DivergedError within a step of a loss or gradient that is not finite.
    """
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    # fused: one kernel for all parameters, several times faster than the loop on a CPU.
    optimizer = torch.optim.AdamW(
        parameters.values(), schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
    )
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    start, values = _resume(work, identity, parameters, ema, optimizer)
    network.train()
    for step in range(start, schedule.steps):
        for settings in optimizer.param_groups:
            settings["lr"] = schedule.rate(step)
        values = _step(network, loss(step), optimizer, schedule.max_norm, step, work)
        # A short run's average must not remember the start: the decay grows with the step (as in EMA of diffusers).
        decay = min(schedule.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in parameters.values()], 1 - decay)
        done = step + 1
        if done % schedule.checkpoint_every == 0 or done == schedule.steps:
            checkpoint.save(work, done, _tensors(parameters, ema, optimizer), {"losses": values}, identity)
        on_step(done, values)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(ema[name])
    network.eval()
    return values


def _step(
    network: nn.Module, losses: Losses, optimizer: torch.optim.Optimizer, max_norm: float, step: int, work: Path
) -> dict[str, float]:
    losses["loss"].backward()
    norm = nn.utils.clip_grad_norm_([p for p in network.parameters() if p.grad is not None], max_norm)
    values = {name: float(value.detach()) for name, value in losses.items()} | {"gradient_norm": float(norm)}
    if not all(map(math.isfinite, values.values())):
        raise DivergedError(
            f"step {step}: not finite: {values}. Lower the learning rate; the last checkpoints are in {work}."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return values


def _tensors(
    parameters: Mapping[str, nn.Parameter], ema: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    tensors = {f"weights.{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"ema.{name}": average for name, average in ema.items()}
    for name, p in parameters.items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items()}
    return tensors


def _resume(
    work: Path,
    identity: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    ema: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[int, dict[str, float]]:
    saved = checkpoint.latest(work, identity)
    if saved is None:
        return 0, {}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved.tensors[f"weights.{name}"])
            ema[name].copy_(saved.tensors[f"ema.{name}"])
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): value for key, value in saved.tensors.items() if key.startswith(prefix)}
            optimizer.state[p].update(state)
    return saved.step, dict(saved.state["losses"])
