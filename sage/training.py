"""One training loop for every network of this project; it resumes where it was killed and reports through a callback.

The loss of step k draws order and noise from (seed, k) alone, so a resumed run is the uninterrupted one, bit for bit on
the same build and thread count.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def generator(*key: int | str) -> torch.Generator:
    """Return the source of all randomness that belongs to a key, such as (seed, step); another key, another stream."""
    # Hashed, for torch's generator of the CPU reads only the low 32 bits of a seed: `seed << 32` would change nothing.
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4]))


def spaced(n: int, random: torch.Generator) -> Tensor:
    """Return n numbers in [0, 1), one in each n-th, in random order: the mean of independent ones, less variance."""
    # In double: 63 plus a float just below 1 is 64 in single precision, and a timestep T does not exist.
    return (torch.randperm(n, generator=random) + torch.rand(n, generator=random, dtype=torch.float64)) / n


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

    `loss(step)` returns named scalars, of which "loss" is minimised. `work` keeps resumable state, written every
    `schedule.checkpoint_every` steps and at the end; `identity` names the configuration that it belongs to.
    `on_step(done, values)` follows each step, in a resumed run those after the checkpoint.
    Raises DivergedError at the first loss or gradient that is not finite, before the weights that gave it are stored.
    """
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    # fused: one kernel for all parameters, several times faster than the loop on a CPU.
    optimizer = torch.optim.AdamW(
        parameters.values(), schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
    )
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    start, values = _resume(work, identity, parameters, ema, optimizer)

    def save(step: int) -> None:
        tensors = _tensors(parameters, ema, optimizer)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise _diverged(step, "the weights or their averages", work)
        checkpoint.save(work, step, tensors, {"losses": values}, identity)

    network.train()
    for step in range(start, schedule.steps):
        with _attention(parameters.values()):
            found = _gradient(loss(step), parameters.values(), schedule.max_norm, step, work)
        # The state after `step` steps is stored only now that it gave a finite loss: what lies on disk is good.
        if step > start and step % schedule.checkpoint_every == 0:
            save(step)
        for settings in optimizer.param_groups:
            settings["lr"] = schedule.rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # A short run's average must not remember the start: the decay grows with the step (as in EMA of diffusers).
        decay = min(schedule.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in parameters.values()], 1 - decay)
        values = found
        on_step(step + 1, values)
    if start < schedule.steps:
        save(schedule.steps)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(ema[name])
    network.eval()
    return values


def _attention(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Return the attention to train with: on a CPU the plain one, for torch's fused one is slow backwards."""
    on_cpu = all(p.device.type == "cpu" for p in parameters)
    return sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()


def _gradient(
    losses: Losses, parameters: Iterable[nn.Parameter], max_norm: float, step: int, work: Path
) -> dict[str, float]:
    """Leave the clipped gradient in the parameters; return the losses and the gradient's norm as numbers."""
    torch.autograd.backward(losses["loss"])
    norm = nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], max_norm)
    values = {name: float(value.detach()) for name, value in losses.items()} | {"gradient_norm": float(norm)}
    if not all(map(math.isfinite, values.values())):
        raise _diverged(step, ", ".join(f"{name} {value:.4g}" for name, value in values.items()), work)
    return values


def _diverged(step: int, what: str, work: Path) -> DivergedError:
    saved = checkpoint.complete(work)
    good = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
    return DivergedError(f"step {step}: not finite: {what}. Lower the learning rate; {good}.")


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
            optimizer.state[p].update({key: value.to(p.device) for key, value in state.items()})
    return saved.step, dict(saved.state["losses"])
