"""The one denoising loop: it follows a plan, whatever the network, the scheduler and the plan.

A *pack* is up to `batch_size` blocks of the plan that are at the same step: one network call evaluates them together.
A pack runs until its first block branches; what comes out is packed again and goes on depth first, so finished images
leave early, and memory is that of a few packs, however many prompts there are.

Where the draws come from, so that an image depends on its own prompt, seed and group and on nothing else:

- A block is led by its member of lowest `rank`. It starts from that member's noise and draws from its generator.
- At a branch, a child led by the same member, or by one of the same seed, goes on in that stream; any other
  child begins its own, of which nothing was used. So a prompt alone, and equal prompts of equal seed, are exactly the
  independent image, also with schedulers that draw.

Branch noise s, off at 0, makes children differ more: with x_0 what the block predicts at its branch, and
x = alpha x_0 + sigma eps, each child goes on from eps' = sqrt(1 - s^2) eps + s xi, its own draw xi: as much noise as
before, turned by arcsin(s).

A child then predicts an x_0 of its own, x_0', and to its first step alpha (x_0 - x_0') looks like noise, which it would
carry on. But how much of the noise was drawn is known, its share s^2 of the variance, so that step is made from
x + s^2 alpha (x_0' - x_0): at s = 1 from x_0' under the very noise that was drawn. It costs no evaluation.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from sage import diffusion
from sage.errors import ConfigurationError, PlanError, UnsupportedError
from sage.sampling.plan import Block, Node, Plan, leaves_of

# A network's conditions by name, each of shape (rows, g, ...): g = 2, without and with text, under guidance, else 1.
Condition = dict[str, Tensor]

# The schedulers that can be followed, and where each keeps what it remembers of every image in the batch.
HISTORY: dict[str, tuple[str, ...]] = {
    "DDIMScheduler": (),
    "DDPMScheduler": (),
    "EulerDiscreteScheduler": (),
    "EulerAncestralDiscreteScheduler": (),
    "HeunDiscreteScheduler": ("prev_derivative", "sample"),
    "DPMSolverMultistepScheduler": ("model_outputs",),
    "DPMSolverSinglestepScheduler": ("model_outputs", "sample"),
    "UniPCMultistepScheduler": ("model_outputs", "timestep_list", "last_sample"),
    "LMSDiscreteScheduler": ("derivatives",),
    "PNDMScheduler": ("ets", "cur_sample", "cur_model_output"),
    "FlowMatchEulerDiscreteScheduler": (),
}

# Those that remember no noise, or only predicted pictures, which branch noise leaves as they are.
TURNABLE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)


def check_scheduler(scheduler: Any, branch_noise: float = 0.0) -> None:
    """Raise UnsupportedError, naming what is supported, for a scheduler that cannot be branched like this.

    Raises ConfigurationError for branch noise outside [0, 1].
    """
    name = type(scheduler).__name__
    if not 0 <= branch_noise <= 1:
        raise ConfigurationError(f"branch_noise {branch_noise} is outside [0, 1]; 0 adds none, 1 replaces all noise")
    if branch_noise and (name not in TURNABLE or "++" not in scheduler.config.get("algorithm_type", "++")):
        raise UnsupportedError(f"branch noise needs one of {', '.join(TURNABLE)} (dpmsolver++), not {name}; or give 0")
    if branch_noise:
        diffusion.prediction_type(scheduler)  # what a block predicts is read from its output
    if name not in HISTORY or scheduler.config.get("solver_p") is not None:
        raise UnsupportedError(
            f"{name}{' with solver_p' if name in HISTORY else ''} cannot be shared; use one of "
            f"{', '.join(sorted(HISTORY))}: pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )


@dataclass
class _Pack:
    """Blocks on their way: everything with a first dimension has one row a block."""

    nodes: list[Node]
    leaders: list[int]
    step: int
    latents: Tensor
    scheduler: Any
    generators: list[Generator]
    # The x_0 that they predicted when they branched, and with branch noise that which their parents did: for each row
    # that drew noise, its place and the prediction.
    clean: Tensor | None = None
    inherited: tuple[list[int], Tensor] | None = None


@dataclass
class _Waiting:
    """Blocks that have not started, and the rows of the pack that they branch from."""

    nodes: list[Node]
    parent: _Pack | None = None
    rows: Sequence[int] = ()


@torch.no_grad()
def sample(
    plan: Plan,
    scheduler: Any,
    *,
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    encode: Callable[[list[int]], Condition],
    noise: Callable[[list[int], list[Generator]], Tensor],
    generator: Callable[[int], Generator],
    rank: Callable[[int], Any],
    batch_size: int,
    medoid: bool = False,
    branch_noise: float = 0.0,
    step_kwargs: dict[str, Any] | None = None,
    on_step: Callable[[int, Tensor, Tensor], Tensor] = lambda step, t, latents: latents,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield finished prompts and their latents, shape (n, ...), in the order in which the plan lets them finish.

    `scheduler` is a diffusers scheduler with its timesteps set, as many as the plan has steps. `predict(x, t, c)` is
    the guided prediction for scaled latents x of some blocks, their conditions joined to (g * rows, ...);
    `encode(prompts)` gives conditions (n, g, ...), `noise(prompts, generators)` the latents to start from; `rank`
    orders prompts whatever their place in the list; `on_step(step, t, x)` may change the latents after a step; once
    `interrupted()` is true no further step is made.
    Raises PlanError when plan and scheduler disagree about the steps, UnsupportedError for an unknown scheduler.
    """
    check_scheduler(scheduler, branch_noise)
    timesteps = scheduler.timesteps
    if len(timesteps) != plan.steps:
        raise PlanError(
            f"the plan has {plan.steps} steps, but {type(scheduler).__name__} evaluates the network {len(timesteps)} "
            f"times; build the plan for {len(timesteps)} steps"
        )
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    scales = hasattr(scheduler, "scale_model_input")

    # Roots that branch at the same step go together, or their pack would fall apart step by step.
    roots = sorted(plan.roots, key=lambda node: node.until if isinstance(node, Block) else plan.steps)
    waiting = [_Waiting([roots[i] for i in rows]) for rows in reversed(_packs(len(roots), batch_size))]
    while waiting:
        pack = _start(waiting.pop(), scheduler, noise, generator, rank, branch_noise)
        condition = _condition(pack.nodes, encode, rank, batch_size, medoid)
        kwargs = dict(step_kwargs or {}) | ({"generator": pack.generators} if takes_generator else {})
        end = min(node.until if isinstance(node, Block) else plan.steps for node in pack.nodes)

        for step in range(pack.step, end):
            if interrupted():
                break
            t = timesteps[step]
            x = pack.scheduler.scale_model_input(pack.latents, t) if scales else pack.latents
            output = predict(x, t, condition)
            if branch_noise and step == end - 1 < plan.steps - 1:
                pack.clean = _predicted(pack.scheduler, step, pack.latents, output)
            if pack.inherited is not None:
                pack.latents, output = _recentred(pack, output, branch_noise)
            stepped = pack.scheduler.step(output, t, pack.latents, **kwargs, return_dict=False)
            pack.latents = on_step(step, t, stepped[0])
        pack.step = end

        if end == plan.steps:
            yield list(leaves_of(pack.nodes)), pack.latents
            continue
        nodes, rows = _branches(pack.nodes, end)
        for part in reversed(_packs(len(nodes), batch_size)):
            waiting.append(_Waiting([nodes[i] for i in part], pack, [rows[i] for i in part]))


def _packs(rows: int, batch_size: int) -> list[range]:
    """Return as few ranges of at most `batch_size` as hold all rows, all of nearly the same length."""
    count = -(-rows // batch_size)
    edges = [rows * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def _branches(nodes: list[Node], step: int) -> tuple[list[Node], list[int]]:
    """Return the blocks after those that end at this step have branched, and the row that each comes from."""
    after: list[Node] = []
    rows: list[int] = []
    for row, node in enumerate(nodes):
        children = node.children if isinstance(node, Block) and node.until == step else (node,)
        after += children
        rows += [row] * len(children)
    return after, rows


def _start(
    task: _Waiting,
    scheduler: Any,
    noise: Callable[[list[int], list[Generator]], Tensor],
    generator: Callable[[int], Generator],
    rank: Callable[[int], Any],
    branch_noise: float,
) -> _Pack:
    """Return the blocks ready to run: fresh from noise, or from the rows of the pack that they branch from."""
    leaders = [min(leaves_of((node,)), key=rank) for node in task.nodes]
    parent = task.parent
    if parent is None:
        generators = [generator(leader) for leader in leaders]
        fresh = branched(scheduler, None)
        if hasattr(fresh, "set_begin_index"):
            fresh.set_begin_index(0)  # else it is looked up on the device, which waits for it
        return _Pack(task.nodes, leaders, 0, noise(leaders, generators), fresh, generators)
    rows = torch.tensor(task.rows, device=parent.latents.device)
    generators = []
    for leader, row in zip(leaders, task.rows, strict=True):
        before, own = parent.generators[row], generator(leader)
        same = leader == parent.leaders[row] or own.initial_seed() == before.initial_seed()
        generators.append(before.clone_state() if same else own)
    latents = parent.latents.index_select(0, rows)
    inherited = None
    if parent.clean is not None:
        pairs = enumerate(zip(task.nodes, task.rows, strict=True))
        noisy = [i for i, (node, row) in pairs if node is not parent.nodes[row]]
        clean = parent.clean.index_select(0, rows[noisy])
        for i, x_0 in zip(noisy, clean, strict=True):
            xi = torch.randn(latents.shape[1:], generator=generators[i], device=generators[i].device).to(latents)
            latents[i] = _turned(parent.scheduler, parent.step, latents[i], x_0, xi, branch_noise)
        inherited = noisy, clean
    child = branched(parent.scheduler, rows)
    return _Pack(task.nodes, leaders, parent.step, latents, child, generators, inherited=inherited)


def _turned(scheduler: Any, step: int, x: Tensor, x_0: Tensor, xi: Tensor, s: float) -> Tensor:
    """Return latents with their noise turned towards xi, as they enter a step."""
    alpha, sigma = (float(level) for level in _levels(scheduler, step))
    eps = (x - alpha * x_0) / sigma
    turned: Tensor = alpha * x_0 + sigma * ((1 - s**2) ** 0.5 * eps + s * xi)
    return turned.to(x.dtype)


def _recentred(pack: _Pack, output: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return a pack's latents around what its children predict, and the outputs that predict the same from there."""
    assert pack.inherited is not None
    (rows, inherited), pack.inherited = pack.inherited, None
    latents, output = pack.latents.clone(), output.clone()
    x_0 = _predicted(pack.scheduler, pack.step, latents[rows], output[rows])
    alpha = float(_levels(pack.scheduler, pack.step)[0])
    latents[rows] += (s**2 * alpha * (x_0 - inherited)).to(latents.dtype)
    kind, level, x_t = _normal(pack.scheduler, pack.step, latents[rows])
    eps = diffusion.implied_noise(x_t, x_0, *level)
    output[rows] = diffusion.target(kind, x_0, eps, *level).to(output.dtype)
    return latents, output


def _predicted(scheduler: Any, step: int, x: Tensor, output: Tensor) -> Tensor:
    """Return the x_0 that an output means for the latents that enter a step."""
    kind, level, x_t = _normal(scheduler, step, x)
    return diffusion.predicted_sample(kind, output.float(), x_t, *level)


def _normal(scheduler: Any, step: int, x: Tensor) -> tuple[diffusion.PredictionType, tuple[Tensor, Tensor], Tensor]:
    """Return what the network predicts, the levels that enter a step, and latents, all as `sage.diffusion` has them.

    Euler schedulers divide them by alpha.
    """
    kind = diffusion.prediction_type(scheduler)
    alpha, sigma = (torch.as_tensor(level, dtype=torch.float32) for level in _levels(scheduler, step))
    norm = torch.ones(()) if kind == "flow_prediction" else torch.hypot(alpha, sigma)
    return kind, (alpha / norm, sigma / norm), x.float() / norm.to(x.device)


def _levels(scheduler: Any, step: int) -> tuple[Any, Any]:
    """Return alpha and sigma, the levels of signal and noise of the latents that enter a step."""
    name = type(scheduler).__name__
    if name in ("DDIMScheduler", "DDPMScheduler"):
        signal = scheduler.alphas_cumprod[int(scheduler.timesteps[step])]
        return signal.sqrt(), (1 - signal).sqrt()
    sigma = scheduler.sigmas[step]
    if name == "FlowMatchEulerDiscreteScheduler":
        return 1 - sigma, sigma
    return scheduler._sigma_to_alpha_sigma_t(sigma) if name == "DPMSolverMultistepScheduler" else (1.0, sigma)


def branched(scheduler: Any, rows: Tensor | None) -> Any:
    """Return a scheduler that goes on from these rows of another's batch (None: all); the other stays as it is."""

    def taken(value: Any) -> Any:
        if isinstance(value, list):
            return [taken(item) for item in value]
        return value.index_select(0, rows) if rows is not None and torch.is_tensor(value) and value.ndim else value

    child = copy.copy(scheduler)
    for name in HISTORY[type(scheduler).__name__]:
        if hasattr(scheduler, name):
            setattr(child, name, taken(getattr(scheduler, name)))
    return child


def _condition(
    nodes: list[Node],
    encode: Callable[[list[int]], Condition],
    rank: Callable[[int], Any],
    batch_size: int,
    medoid: bool,
) -> Condition:
    """Return the blocks' conditions for the network: a prompt's as it is, a block's merged from its members'."""
    if all(isinstance(node, int) for node in nodes):
        return _joined(encode([node for node in nodes if isinstance(node, int)]))
    # In order of rank, so that not even rounding depends on the order of the prompts.
    members = [sorted(leaves_of((node,)), key=rank) for node in nodes]
    merged: list[Condition] = []
    while len(merged) < len(nodes):
        # Encode whole blocks together, about a batch of prompts at a time.
        some = [members[len(merged)]]
        while len(merged) + len(some) < len(nodes) and sum(map(len, some)) < batch_size:
            some.append(members[len(merged) + len(some)])
        rows = encode([member for block in some for member in block])
        sizes = [len(block) for block in some]
        parts = {name: torch.split(values, sizes) for name, values in rows.items()}
        merged += [merge({name: parts[name][i] for name in parts}, medoid) for i in range(len(some))]
    return _joined({name: torch.cat([block[name] for block in merged]) for name in merged[0]})


def _joined(condition: Condition) -> Condition:
    """Return conditions as the network takes them, (g * rows, ...): all without their text, then all with it."""
    return {name: rows.transpose(0, 1).flatten(0, 1) for name, rows in condition.items()}


def merge(members: Condition, medoid: bool = False) -> Condition:
    """Return one condition, (1, g, ...), for several members, (n, g, ...): their mean, or the member nearest to it.

    Equal members give exactly their own condition. With a "mask", a token's state is the mean over the members that
    have this token, and the merged mask has it if any has.
    """
    mask = members.get("mask")
    mean = {}
    for name, rows in members.items():
        if name == "mask":
            mean[name] = rows.amax(0, keepdim=True)
            continue
        # Around the first, not around zero: equal members differ by nothing, and nothing is rounded.
        first = rows[:1]
        difference = rows.float() - first.float()
        if mask is None or rows.ndim == mask.ndim:
            shift = difference.mean(0, keepdim=True)
        else:
            weight = mask.to(difference).reshape(*mask.shape, *[1] * (rows.ndim - mask.ndim))
            shift = (weight * difference).sum(0, keepdim=True) / weight.sum(0, keepdim=True).clamp(min=1)
        mean[name] = (first.float() + shift).to(rows.dtype)
    if not medoid:
        return mean
    distance = sum((rows.float() - mean[name].float()).flatten(1).square().sum(1) for name, rows in members.items())
    nearest = int(torch.as_tensor(distance).argmin())
    return {name: rows[nearest : nearest + 1] for name, rows in members.items()}
