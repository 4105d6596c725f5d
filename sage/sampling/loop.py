"""The denoising loop: it runs any plan with any network and any supported scheduler.

A *pack* is up to `batch_size` blocks of the plan that are at the same step: one network call evaluates them together.
A pack runs until its first block branches. Its blocks are then packed again and continue depth first, so images finish
early, and memory holds a few packs, however many prompts there are.

An image depends only on its own prompt, seed and group, because random numbers are assigned as follows:

- The leader of a block is its member of lowest `rank`. The block starts from the leader's noise and draws from the
  leader's generator.
- At a branch, the child that contains the block's leader (or a member with the same seed) continues the leader's random
  stream; every other child starts its own. So a prompt in a group of its own, and equal prompts with equal seeds, get
  exactly their independent image, even with schedulers that draw noise.
- With full branch noise after a first step from noise alone, every child continues with the noise that it begins with
  alone (`sage.sampling.branch_noise`).
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from sage import diffusion
from sage.diffusion import NoiseSchedule
from sage.errors import PlanError, UnsupportedError
from sage.sampling.branch_noise import (
    begins_as_noise,
    check_branch_noise,
    levels,
    output_for,
    predicted_x_0,
    recentred,
    rotated,
)
from sage.sampling.conditions import Condition, block_conditions
from sage.sampling.plan import Block, Node, Plan, leaves_of

# The supported schedulers, with the attributes in which each keeps per-image state between steps.
HISTORY: dict[str, tuple[str, ...]] = {
    "DDIMScheduler": (),
    "DDPMScheduler": (),
    "EulerDiscreteScheduler": (),
    "EulerAncestralDiscreteScheduler": (),
    "HeunDiscreteScheduler": ("prev_derivative", "sample"),
    "DPMSolverMultistepScheduler": ("model_outputs",),
    "EDMEulerScheduler": (),
    "EDMDPMSolverMultistepScheduler": ("model_outputs",),
    "CosineDPMSolverMultistepScheduler": ("model_outputs",),
    "DPMSolverSinglestepScheduler": ("model_outputs", "sample"),
    "UniPCMultistepScheduler": ("model_outputs", "timestep_list", "last_sample"),
    "LMSDiscreteScheduler": ("derivatives",),
    "PNDMScheduler": ("ets", "cur_sample", "cur_model_output"),
    "FlowMatchEulerDiscreteScheduler": (),
    "FlowMatchHeunDiscreteScheduler": ("prev_derivative", "sample"),
}
# These have no step for networks that predict x_0.
_WITHOUT_SAMPLE = ("EulerAncestralDiscreteScheduler", "PNDMScheduler")


def check_scheduler(scheduler: Any, branch_noise: float = 0.0) -> None:
    """Raise UnsupportedError, naming the supported ones, for a scheduler that cannot branch or use the branch noise.

    The same for one that has no step for its prediction type.
    Raises ConfigurationError for branch noise outside [0, 1].
    """
    check_branch_noise(scheduler, branch_noise)
    name = type(scheduler).__name__
    if name not in HISTORY or scheduler.config.get("solver_p") is not None:
        raise UnsupportedError(
            f"{name}{' with solver_p' if name in HISTORY else ''} cannot be shared; use one of "
            f"{', '.join(sorted(HISTORY))}: pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    if name in _WITHOUT_SAMPLE and scheduler.config.get("prediction_type") == "sample":
        raise UnsupportedError(f"{name} has no step for prediction type sample; use another, for example DDIMScheduler")


@dataclass
class Pack:
    """Blocks that run together; lists and tensors have one row per block, conditions g of them.

    `guidance`: the guidance scale, which blocks keep when they branch.
    `diverged`: the first step with values that are not finite, or the plan's number of steps if there is none.
    """

    nodes: list[Node]
    leaders: list[int]
    step: int
    latents: Tensor
    scheduler: Any
    generators: list[Generator]
    guidance: float
    diverged: Tensor
    condition: Condition = field(default_factory=dict)
    # Only with branch noise: the blocks' own x_0 predictions at their last step (`clean`), and, until the first step
    # after a branch, the rows that drew noise there and are recentred, with their parents' predictions (`inherited`).
    # `begun`: the initial latents, until the first step, if children continue with theirs.
    clean: Tensor | None = None
    begun: Tensor | None = None
    inherited: tuple[list[int], Tensor] | None = None


@dataclass
class _Waiting:
    """Blocks that have not started, and the rows of the parent pack that they continue."""

    nodes: list[Node]
    parent: Pack | None = None
    rows: Sequence[int] = ()


@dataclass(frozen=True)
class Sampled:
    """Prompt numbers and their latents, (n, ...); not `finished` if the sampling was interrupted on their way.

    `diverged`: the step at which a prompt's values were first not finite, or None.
    """

    prompts: list[int]
    latents: Tensor
    finished: bool
    diverged: list[int | None]


@torch.no_grad()
def sample(
    plan: Plan,
    scheduler: Any,
    *,
    predict: Callable[[Tensor, Tensor, Condition, float], Tensor],
    encode: Callable[[list[int]], Condition],
    noise: Callable[[list[int], list[Generator]], Tensor],
    generator: Callable[[int], Generator],
    rank: Callable[[int], Any],
    prompt_of: Callable[[int], Any] = lambda prompt: prompt,
    first: Callable[[list[int]], Tensor] | None = None,
    batch_size: int,
    guidance: float = 1.0,
    medoid: bool = False,
    branch_noise: float = 0.0,
    step_kwargs: dict[str, Any] | None = None,
    fill: bool = False,
    begin: Callable[[int], None] | None = None,
    on_step: Callable[[int, Tensor, Pack], None] = lambda step, t, pack: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Sampled]:
    """Yield prompt numbers and their latents as soon as each pack is finished.

    plan                        which prompts share which steps
    scheduler                   a diffusers scheduler with its timesteps set, as many as the plan has steps
    predict(x, t, c, w)         returns the prediction for scaled latents (rows, ...), conditions (g * rows, ...) and
                                guidance scale w
    encode(prompts)             returns the prompts' conditions (n, g, ...)
    noise(prompts, generators)  returns their initial latents (n, ...)
    generator(prompt)           returns the prompt's random generator
    rank(prompt)                returns a sort key that does not depend on the prompt's place in the list
    prompt_of(prompt)           returns a key that images of one prompt have in common, if the plan is one of images;
                                it counts once in the condition of a block
    first(prompts)              returns the x_0 that a block of these prompts predicts at its first step, which is then
                                not evaluated; None: it is evaluated
    batch_size                  the largest number of blocks in a network call
    guidance                    the guidance scale from which every pack starts
    medoid                      give a block the condition of the member nearest to the mean instead of the mean
    branch_noise                s in [0, 1] of `sage.sampling.branch_noise`
    step_kwargs                 further arguments of `scheduler.step`
    fill                        packs are as large as they can be, instead of nearly equal
    begin(step)                 called before the first step of each pack, whose blocks then all branch at one step
    on_step(step, t, pack)      called after each step of each pack; may change its latents and guidance
    interrupted()               once it returns true, no further steps run: the pack under way is yielded unfinished,
                                and packs that wait are not

    Raises PlanError if the plan and the scheduler differ in the number of steps, UnsupportedError for an unsupported
    scheduler and ConfigurationError for branch noise outside [0, 1].
    """
    check_scheduler(scheduler, branch_noise)
    diffusion.check_start(scheduler)
    timesteps = scheduler.timesteps
    if len(timesteps) != plan.steps:
        raise PlanError(
            f"the plan has {plan.steps} steps, but {type(scheduler).__name__} evaluates the network {len(timesteps)} "
            f"times; build the plan for {len(timesteps)} steps"
        )
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    scales = hasattr(scheduler, "scale_model_input")

    packs = partial(_packs, steps=plan.steps, batch_size=batch_size, fill=fill, apart=begin is not None)
    first_ones = first_packs(plan, batch_size, fill, apart=begin is not None)
    waiting = [_Waiting([plan.roots[number] for number in numbers]) for numbers in reversed(first_ones)]
    while waiting:
        pack = _start(waiting.pop(), plan.steps, scheduler, noise, generator, rank, prompt_of, branch_noise, guidance)
        blocks = [one_of_each(node, rank, prompt_of) for node in pack.nodes]
        pack.condition = block_conditions(blocks, encode, rank, batch_size, medoid)
        kwargs = dict(step_kwargs or {}) | ({"generator": pack.generators} if takes_generator else {})
        end = min(_end(node, plan.steps) for node in pack.nodes)
        if begin is not None:
            begin(pack.step)

        for step in range(pack.step, end):
            if interrupted():
                if step:
                    yield _sampled(pack, plan.steps, finished=False)
                return
            t = timesteps[step]
            x = pack.scheduler.scale_model_input(pack.latents, t) if scales else pack.latents
            if first is None or step:
                output = predict(x, t, pack.condition, pack.guidance)
            else:
                x_0 = torch.stack([first(block) for block in blocks]).to(pack.latents)
                output = output_for(pack.scheduler, step, pack.latents, x_0).to(pack.latents.dtype)
            if branch_noise and step == end - 1 < plan.steps - 1:
                pack.clean = predicted_x_0(pack.scheduler, step, pack.latents, output)
            if pack.inherited is not None:
                (noisy, x_0), pack.inherited = pack.inherited, None
                pack.latents, output = recentred(pack.scheduler, step, pack.latents, output, noisy, x_0, branch_noise)
            pack.latents = pack.scheduler.step(output, t, pack.latents, **kwargs, return_dict=False)[0]
            on_step(step, t, pack)
            _note_divergence(pack, step, output)
            if step:
                pack.begun = None
        pack.step = end

        if end == plan.steps:
            yield _sampled(pack, plan.steps, finished=True)
            continue
        nodes, rows = _branches(pack.nodes, end)
        for part in reversed(packs(nodes)):
            waiting.append(_Waiting([nodes[i] for i in part], pack, [rows[i] for i in part]))


def first_packs(plan: Plan, batch_size: int, fill: bool = False, apart: bool = False) -> list[list[int]]:
    """Return the numbers of the roots of a plan that `sample` starts together, in its order.

    What becomes of one such pack does not depend on the others. The parameters are those of `sample`; `apart`: roots
    that branch at different steps are in different packs.
    """
    # Sort by branch point, so that a pack's blocks branch together and the pack is rarely split.
    order = sorted(range(len(plan.roots)), key=lambda number: _end(plan.roots[number], plan.steps))
    rows = _packs([plan.roots[number] for number in order], plan.steps, batch_size, fill, apart)
    return [[order[row] for row in pack] for pack in rows]


def _note_divergence(pack: Pack, step: int, output: Tensor) -> None:
    """Note which rows of a step's output or latents are not finite; the device is not waited for."""
    # The largest value of each row is not finite if any is not: several times faster than to look at each.
    output, latents = (values.flatten(1).abs().amax(1) for values in (output, pack.latents))
    finite = output.maximum(latents).isfinite()
    pack.diverged = pack.diverged.where(finite, pack.diverged.clamp(max=step))


def _sampled(pack: Pack, steps: int, finished: bool) -> Sampled:
    """Return the prompts of a pack, each with the latents of its block."""
    members = [list(leaves_of((node,))) for node in pack.nodes]
    rows = [row for row, block in enumerate(members) for _ in block]
    diverged = [None if step == steps else int(step) for step in pack.diverged[rows].tolist()]
    latents = pack.latents if len(rows) == len(members) else pack.latents[rows]
    return Sampled([prompt for block in members for prompt in block], latents, finished, diverged)


def _end(node: Node, steps: int) -> int:
    return node.until if isinstance(node, Block) else steps


def _packs(nodes: Sequence[Node], steps: int, batch_size: int, fill: bool, apart: bool) -> list[list[int]]:
    """Split the numbers of nodes into the fewest packs of at most `batch_size`, nearly equal or, with `fill`, full.

    With `apart`, nodes that branch at different steps are in different packs.
    """
    ends = [_end(node, steps) if apart else steps for node in nodes]
    packs = []
    for end in sorted(set(ends)):
        rows = [row for row, own in enumerate(ends) if own == end]
        count = -(-len(rows) // batch_size)
        edges = [min(len(rows), batch_size * i) if fill else len(rows) * i // count for i in range(count + 1)]
        packs += [rows[a:b] for a, b in itertools.pairwise(edges)]
    return packs


def _branches(nodes: list[Node], step: int) -> tuple[list[Node], list[int]]:
    """Replace the blocks that end at this step by their children; return the blocks and the old row of each."""
    after: list[Node] = []
    rows: list[int] = []
    for row, node in enumerate(nodes):
        children = node.children if isinstance(node, Block) and node.until == step else (node,)
        after += children
        rows += [row] * len(children)
    return after, rows


def _start(
    task: _Waiting,
    steps: int,
    scheduler: Any,
    noise: Callable[[list[int], list[Generator]], Tensor],
    generator: Callable[[int], Generator],
    rank: Callable[[int], Any],
    prompt_of: Callable[[int], Any],
    branch_noise: float,
    guidance: float,
) -> Pack:
    """Return a pack that is ready to run but for its condition, from initial noise or from the rows of its parent pack.

    `steps` is the plan's number of steps; the other parameters are as in `sample`.
    """
    leaders = [min(leaves_of((node,)), key=rank) for node in task.nodes]
    parent = task.parent
    if parent is None:
        generators = [generator(leader) for leader in leaders]
        fresh = branched(scheduler, None)
        if hasattr(fresh, "set_begin_index"):
            fresh.set_begin_index(0)  # else the scheduler looks it up on the device, which synchronises
        latents = noise(leaders, generators)
        fine = torch.full((len(leaders),), steps, device=latents.device)
        begun = latents if branch_noise == 1 and begins_as_noise(fresh) else None
        return Pack(task.nodes, leaders, 0, latents, fresh, generators, guidance, fine, begun=begun)
    rows = torch.tensor(task.rows, device=parent.latents.device)
    generators, started = [], []
    for leader, row in zip(leaders, task.rows, strict=True):
        old, own = parent.generators[row], generator(leader)
        same = leader == parent.leaders[row] or own.initial_seed() == old.initial_seed()
        if parent.begun is not None:
            started.append(parent.begun[row] if leader == parent.leaders[row] else noise([leader], [own])[0])
        generators.append(old.clone_state() if same else own)
    latents = parent.latents.index_select(0, rows)
    inherited = None
    if parent.clean is not None:
        pairs = enumerate(zip(task.nodes, task.rows, strict=True))
        noisy = [i for i, (node, row) in pairs if node is not parent.nodes[row]]
        for i in noisy:
            x_0 = parent.clean[task.rows[i]]
            if parent.begun is not None:
                xi = started[i] / levels(parent.scheduler, 0)[1]
            else:
                xi = torch.randn(latents.shape[1:], generator=generators[i], device=generators[i].device).to(latents)
            latents[i] = rotated(parent.scheduler, parent.step, latents[i], x_0, xi, branch_noise)
        moved = noisy
        if parent.begun is not None:  # the first step of a child of the same prompts is the one that it has alone
            before = {row: prompts_of(parent.nodes[row], prompt_of) for row in {task.rows[i] for i in noisy}}
            moved = [i for i in noisy if prompts_of(task.nodes[i], prompt_of) != before[task.rows[i]]]
        inherited = (moved, parent.clean.index_select(0, rows[moved])) if moved else None
    child = branched(parent.scheduler, rows)
    diverged = parent.diverged.index_select(0, rows)
    return Pack(
        task.nodes,
        leaders,
        parent.step,
        latents,
        child,
        generators,
        parent.guidance,
        diverged,
        inherited=inherited,
    )


def one_of_each(node: Node, rank: Callable[[int], Any], prompt_of: Callable[[int], Any]) -> list[int]:
    """Return an image of each prompt of a node: the one of lowest rank."""
    found: dict[Any, int] = {}
    for image in sorted(leaves_of((node,)), key=rank):
        found.setdefault(prompt_of(image), image)
    return list(found.values())


def prompts_of(node: Node, prompt_of: Callable[[int], Any]) -> frozenset[Any]:
    """Return the prompts of a node's images; nodes with the same ones have the same condition."""
    return frozenset(prompt_of(image) for image in leaves_of((node,)))


def branched(scheduler: Any, rows: Tensor | None) -> Any:
    """Return a copy of a scheduler with the state of these rows of its batch (None: all rows)."""

    def selected(value: Any) -> Any:
        if isinstance(value, list):
            return [selected(item) for item in value]
        return value.index_select(0, rows) if rows is not None and torch.is_tensor(value) and value.ndim else value

    child = copy.copy(scheduler)
    for name in HISTORY[type(scheduler).__name__]:
        if hasattr(scheduler, name):
            setattr(child, name, selected(getattr(scheduler, name)))
    if "noise_sampler" in vars(child):
        # A Brownian path for each row: the next step makes them again from the seeds of the pack's generators.
        child.noise_sampler = None
    return child


@torch.no_grad()
def rollout(
    schedule: NoiseSchedule,
    network: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    eps: Tensor,
    times: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the x_0 and the noise that a network predicts at the last of these timesteps, from pure noise on.

    This is the loop above in its simplest form, for training: deterministic (DDIM, Song et al., 2021) and without
    branches. It costs a call of the network per timestep.

    schedule        noise schedule of the network
    network         (x_t, t, condition) to the network output, under guidance to the guided one
    condition, eps  conditions and initial noise of the items, each (n, ...)
    times           the sampler's first timesteps (`sage.diffusion.visited`), shape (steps,)

    Raises ValueError if there is no timestep.
    """
    if not len(times):
        raise ValueError("0 shared steps predict nothing; give at least 1")

    def predicted(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        output = network(x_t, t, condition).to(x_t)
        x_0 = diffusion.predicted_sample(schedule.kind, output, x_t, *schedule.at(t))
        return x_0, diffusion.implied_noise(x_t, x_0, *schedule.at(t))

    x_t, rows = eps, [t.expand(len(eps)) for t in times]
    for t, after in itertools.pairwise(rows):
        x_t = diffusion.add_noise(*predicted(x_t, t), *schedule.at(after))
    return predicted(x_t, rows[-1])
