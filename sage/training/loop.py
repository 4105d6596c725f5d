"""One training loop for every network of this project; it resumes after a kill and reports through callbacks.

The loss of step k draws order and noise from (seed, k) alone, so a resumed run equals an uninterrupted one, bit for bit
with the same build and thread count. With several processes (`accelerate launch`) each computes a part of every step.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from sage.errors import DivergedError
from sage.training import checkpoint, optimizers
from sage.training.selection import Measured, Validation

Losses = Mapping[str, Tensor]


@dataclass(frozen=True)
class Schedule:
    """Learning rate and intervals: linear warm-up, constant, then linear decay to zero over the last `decay` steps.

    The steps before the decay do not depend on `steps`, so a run can be lengthened until its decay begins.

    steps, warmup, decay     number of steps in all, of warm-up and of decay
    learning_rate            the constant rate
    ema                      decay rate of the exponential moving average of the weights
    weight_decay, max_norm   of the optimizer, and the gradient norm above which gradients are clipped
    checkpoint_every, report_every, watch_every   intervals in steps, see `fit`; watch_every 0: never
    optimizer                its name, see `sage.training.optimizers`
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    decay: int = 0
    ema: float = 0.999
    weight_decay: float = 0.0
    max_norm: float = 1.0
    checkpoint_every: int = 250
    report_every: int = 10
    watch_every: int = 0
    optimizer: optimizers.Name = "adamw"

    def rate(self, step: int) -> float:
        """Return the learning rate of a step counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = min(1.0, (self.steps - step) / self.decay) if self.decay else 1.0
        return self.learning_rate * min(rise, fall)


def processes() -> tuple[int, int]:
    """Return the rank of this process and the number of processes: (0, 1) without `accelerate launch` or `torchrun`."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@dataclass(frozen=True)
class Trained:
    """What a run was.

    losses   of the last step
    seconds  duration, the time before it was resumed included
    steps    number of finished steps; fewer than scheduled if it stopped early
    history  held-out measurements, in order
    reports  means of the losses, each with the step that it was reported at; the last one ends with the last step
    """

    losses: dict[str, float]
    seconds: float
    steps: int
    history: list[Measured]
    reports: list[tuple[int, dict[str, float]]]


@dataclass
class _Log:
    """The reports so far and the values since; kept in checkpoints, so that a resumed run makes the same reports."""

    every: int
    reports: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    recent: list[dict[str, float]] = field(default_factory=list)
    history: list[Measured] = field(default_factory=list)

    def add(self, step: int, values: dict[str, float]) -> bool:
        """Add a step's values; return whether they completed a report."""
        self.recent.append(values)
        if step % self.every:
            return False
        self.reports.append((step, self._means()))
        self.recent = []
        return True

    def whole(self, step: int) -> list[tuple[int, dict[str, float]]]:
        """Return the reports and, if steps came after the last one, their means, at `step`."""
        reports = [(at, means) for at, means in self.reports]
        return [*reports, (step, self._means())] if self.recent else reports

    def _means(self) -> dict[str, float]:
        return {name: sum(v[name] for v in self.recent) / len(self.recent) for name in self.recent[0]}

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes, a JSON object."""
        measured = [[one.step, dict(one.values)] for one in self.history]
        return {"reports": self.reports, "recent": self.recent, "history": measured}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self.reports, self.recent = state["reports"], state["recent"]
        self.history = [Measured(step, values) for step, values in state.get("history", [])]


def fit(
    network: nn.Module,
    loss: Callable[..., Losses],
    schedule: Schedule,
    *,
    work: Path,
    identity: Mapping[str, Any],
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    on_report: Callable[[int, dict[str, float]], None] = lambda step, means: None,
    on_watch: Callable[[int], None] = lambda step: None,
    accumulate: int = 1,
    validation: Validation | None = None,
) -> Trained:
    """Train `network` in place and leave it with its averaged (EMA) weights.

    network     the module to train, or one that accelerate has prepared
    loss        `loss(step)` returns named scalars, of which "loss" is minimised; with several parts (`accumulate` times
                the processes), `loss(step, part, parts)` returns one part's share of them, and the parts add up
    schedule    learning rate and intervals
    work        folder of the checkpoints, written every `schedule.checkpoint_every` steps and at the end
    identity    the configuration that the checkpoints belong to; another one cannot resume from them
    on_step     called with (done, values) after each step, `done` the number of finished steps; a resumed run calls it
                for the steps after its checkpoint only
    on_report   called with (done, means) every `schedule.report_every` steps, and with the held-out values after each
                measurement; a resumed run first repeats earlier calls
    on_watch    called with (done) every `schedule.watch_every` steps except the last, with the averaged weights loaded
    accumulate  number of parts that a process computes one after another to save memory
    validation  when to measure the averaged weights on held-out data, when to stop, and which weights to keep

    Raises DivergedError at the first loss, gradient or weight that is not finite, before the weights that caused it are
    saved, and CheckpointError if `work` holds checkpoints of another configuration.
    """
    begin = time.monotonic()
    model = extract_model_from_parallel(network)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizers.optimizer(
        schedule.optimizer, parameters.values(), schedule.learning_rate, schedule.weight_decay
    )
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    start, values, log, before = 0, {}, _Log(schedule.report_every), 0.0
    best: dict[str, Tensor] = {}
    saved = checkpoint.latest(work, identity)
    if saved is not None:
        start, values, before = saved.step, saved.state["losses"], saved.state["seconds"]
        log.restore(saved.state)
        _restore(saved.tensors, parameters, ema, optimizer)
        best = {name: saved.tensors[f"best.{name}"] for name in parameters if f"best.{name}" in saved.tensors}
        measured = [(one.step, dict(one.values)) for one in log.history]
        for step, means in sorted([*log.reports, *measured], key=lambda report: report[0]):
            on_report(step, means)

    def seconds() -> float:
        return before + time.monotonic() - begin

    def save(step: int) -> None:
        tensors = _tensors(parameters, ema, optimizer) | {f"best.{name}": tensor for name, tensor in best.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise _diverged(step, "the weights or their averages", work)
        if processes()[0] == 0:
            state = {"losses": values, "seconds": seconds(), **log.state()}
            checkpoint.save(work, step, tensors, state, identity)

    def validate(step: int) -> None:
        if validation is None or not validation.due(step, schedule.steps):
            return
        with _averaged(network, parameters, ema):
            found = dict(validation.measure())
        if not all(map(math.isfinite, found.values())):
            raise _diverged(step, ", ".join(f"{name} {value:.4g}" for name, value in found.items()), work)
        log.history.append(Measured(step, found))
        if validation.keep == "best" and validation.kept(log.history).step == step:
            # On the CPU: it is read once, at the end, and a device's memory is scarce.
            best.update({name: average.to("cpu", copy=True) for name, average in ema.items()})
        on_report(step, found)

    network.train()
    if saved is None:
        validate(0)
    done = start
    for step in range(start, schedule.steps):
        if validation is not None and validation.ended(log.history):
            break
        found = _gradient(network, loss, step, accumulate)
        found["gradient_norm"] = float(
            nn.utils.clip_grad_norm_([p for p in parameters.values() if p.grad is not None], schedule.max_norm)
        )
        if not all(map(math.isfinite, found.values())):
            raise _diverged(step, ", ".join(f"{name} {value:.4g}" for name, value in found.items()), work)
        # Save the state after `step` steps only now that it gave a finite loss, so that all checkpoints are good.
        if step > start and step % schedule.checkpoint_every == 0:
            save(step)
        for settings in optimizer.param_groups:
            settings["lr"] = schedule.rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Let the EMA decay grow with the step (as in diffusers), or the average of a short run is mostly its start.
        decay = min(schedule.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in parameters.values()], 1 - decay)
        values = found
        on_step(step + 1, values)
        if log.add(step + 1, values):
            on_report(*log.reports[-1])
        if schedule.watch_every and (step + 1) % schedule.watch_every == 0 and step + 1 < schedule.steps:
            with _averaged(network, parameters, ema):
                on_watch(step + 1)
        validate(step + 1)
        done = step + 1
    if start < done:
        save(done)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(best.get(name, ema[name]))
    network.eval()
    return Trained(values, seconds(), done, log.history, log.whole(done))


@contextmanager
def _averaged(network: nn.Module, parameters: Mapping[str, nn.Parameter], ema: Mapping[str, Tensor]) -> Iterator[None]:
    """Put the averaged weights into the network within the context."""
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(ema[name])
        network.eval()
        yield
        for name, p in parameters.items():
            p.copy_(weights[name])
        network.train()


def _attention(network: nn.Module) -> AbstractContextManager[Any]:
    """Return the attention context: plain attention on a CPU, whose fused attention has a slow backward pass."""
    on_cpu = all(p.device.type == "cpu" for p in network.parameters())
    return sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()


def _gradient(network: nn.Module, loss: Callable[..., Losses], step: int, accumulate: int) -> dict[str, float]:
    """Compute the full gradient of a step's loss, on every process the same, and return the losses as numbers."""
    rank, world = processes()
    parts = accumulate * world
    sums: dict[str, Tensor] = {}
    for number in range(accumulate):
        part = rank * accumulate + number
        waits = isinstance(network, DistributedDataParallel) and number + 1 < accumulate
        with _attention(network), cast(Any, network).no_sync() if waits else nullcontext():
            losses = loss(step) if parts == 1 else loss(step, part, parts)
            # DistributedDataParallel averages gradients over processes, but the parts must add up.
            torch.autograd.backward(losses["loss"] * world)
        for name, value in losses.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    device = sums["loss"].device
    totals = torch.stack([value.to(device, torch.float32) for value in sums.values()])
    if world > 1:
        distributed.all_reduce(totals)
    return dict(zip(sums, totals.tolist(), strict=True))


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


def _restore(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    ema: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"weights.{name}"])
            ema[name].copy_(tensors[f"ema.{name}"])
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            optimizer.state[p].update({key: value.to(p.device) for key, value in state.items()})
