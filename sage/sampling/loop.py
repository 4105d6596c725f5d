"""The one denoising loop: it follows a plan, whatever the network, the scheduler and the plan.

A *pack* is up to `batch_size` blocks of the plan that are at the same step: one network call evaluates them together.
A pack runs until its first block branches; what comes out is packed again, depth first, so finished images leave early
and memory is that of a few packs, however many prompts there are.

Where random numbers come from, so that an image depends on its own prompt, seed and group and on nothing else:

- A block's leader is its member of lowest `rank`: the block starts from its noise and draws from its generator.
- At a branch, the child that contains the block's leader (or a member with the same seed) continues the leader's random
  stream; every other child starts its own. So a prompt alone, and equal prompts of equal seed, get exactly their
  independent image, also with schedulers that draw noise.
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
from sage.diffusion import NoiseSchedule
from sage.errors import PlanError, UnsupportedError
from sage.sampling.branch_noise import check_branch_noise, predicted_x_0, recentred, rotated
from sage.sampling.conditions import Condition, block_conditions
from sage.sampling.plan import Block, Node, Plan, leaves_of

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


def check_scheduler(scheduler: Any, branch_noise: float = 0.0) -> None:
    """Raise UnsupportedError, naming what is supported, for a scheduler that cannot be branched like this.

    Raises ConfigurationError for branch noise outside [0, 1].
    """
    check_branch_noise(scheduler, branch_noise)
    name = type(scheduler).__name__
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
        blocks = [list(leaves_of((node,))) for node in pack.nodes]
        condition = block_conditions(blocks, encode, rank, batch_size, medoid)
        kwargs = dict(step_kwargs or {}) | ({"generator": pack.generators} if takes_generator else {})
        end = min(node.until if isinstance(node, Block) else plan.steps for node in pack.nodes)

        for step in range(pack.step, end):
            if interrupted():
                break
            t = timesteps[step]
            x = pack.scheduler.scale_model_input(pack.latents, t) if scales else pack.latents
            output = predict(x, t, condition)
            if branch_noise and step == end - 1 < plan.steps - 1:
                pack.clean = predicted_x_0(pack.scheduler, step, pack.latents, output)
            if pack.inherited is not None:
                (rows, x_0), pack.inherited = pack.inherited, None
                pack.latents, output = recentred(pack.scheduler, step, pack.latents, output, rows, x_0, branch_noise)
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
            latents[i] = rotated(parent.scheduler, parent.step, latents[i], x_0, xi, branch_noise)
        inherited = noisy, clean
    child = branched(parent.scheduler, rows)
    return _Pack(task.nodes, leaders, parent.step, latents, child, generators, inherited=inherited)


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


@torch.no_grad()
def rollout(
    schedule: NoiseSchedule,
    network: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    eps: Tensor,
    steps: int,
    total_steps: int,
) -> Tensor:
    """Return the x_0 that a network predicts at the last of the first `steps` of `total_steps` sampler steps.

    The clear version of the loop above for one block a row, which training runs on its own network: deterministic
    (DDIM, Song et al., 2021), without guidance, with trailing spacing, from noise eps (n, ...). Costs `steps`
    evaluations an item. Raises ValueError below one step.
    """
    if steps < 1:
        raise ValueError(f"{steps} shared steps predict nothing; give at least 1")
    x_t = x_0 = eps
    for step in range(steps):
        t, after = (schedule.timestep_after(torch.full((len(eps),), k / total_steps)) for k in (step, step + 1))
        level = schedule.at(t)
        x_0 = diffusion.predicted_sample(schedule.kind, network(x_t, t, condition).to(x_t), x_t, *level)
        x_t = diffusion.add_noise(x_0, diffusion.implied_noise(x_t, x_0, *level), *schedule.at(after))
    return x_0
