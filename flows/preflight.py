"""What a run would fail at, or mislead with, in a later stage: found before it trains or draws.

Nothing here changes a result: a run is refused, or a warning names both values.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sage.config import Evaluate, Gate, Params
from sage.data.dataset import Example, load_pixels, read_split
from sage.data.groups import read_groups
from sage.errors import ConfigurationError, UnsupportedError
from sage.evaluation.arms import INDEPENDENT
from sage.evaluation.bootstrap import LEAST_GROUPS
from sage.evaluation.registry import METRICS
from sage.sampling.plan import Plan, shared_steps

SHIPPED_JUDGE = "models/alignment"  # a dep of stage evaluate in dvc.yaml

log = logging.getLogger(__name__)


def check(pipe: Any, params: Params, data: Path, groups: Path) -> None:
    """Check that what is trained can be drawn and judged, and log a warning for each setting that is likely a mistake.

    pipe    the model, with the scheduler that it is sampled with
    params  the whole configuration
    data    prepared data
    groups  folder with a JSON file of groups for each split

    Raises ConfigurationError or UnsupportedError if stage generate would raise, draw images of another size than the
    prepared ones, or share no step.
    """
    from flows.drawing import image_steps  # late: stage group imports this module and needs no pipeline

    settings = params.generate
    examples = read_split(data, settings.split)
    check_judges(params.evaluate, examples)
    _check_size(pipe, load_pixels(examples[:1]).shape[1:3])
    try:
        # As stage generate calls it; nothing is drawn before the first result is asked for.
        pipe.stream(
            ["one", "two"],
            groups=[[0, 1]],
            num_inference_steps=settings.steps,
            share_ratio=settings.share_ratio,
            guidance_scale=settings.guidance_scale,
            branch_noise=settings.branch_noise,
            image_steps=settings.image_steps,
            seed=[0, 1],
            batch_size=settings.batch_size,
        )
    except UnsupportedError as error:
        raise UnsupportedError(
            f"stage generate cannot draw with this model: {error}. In params.yaml: generate.scheduler, "
            "generate.branch_noise."
        ) from error
    evaluations = pipe.evaluations(settings.steps)
    _check_sharing(settings.share_ratio, evaluations)
    shared = image_steps(pipe, settings.model_dump())
    for problem in doubts(params, evaluations, read_groups(groups / f"{settings.split}.json", examples)[0], shared):
        log.warning(problem)


def check_judging(params: Params, data: Path) -> None:
    """Check, before anything is grouped or trained, what stage evaluate judges with (`check_judges`)."""
    check_judges(params.evaluate, read_split(data, params.generate.split))


def check_judges(settings: Evaluate, examples: Sequence[Example]) -> None:
    """Check that what stage evaluate judges with is at hand: CheckpointError, or MetricError if it cannot judge these.

    DVC itself names the shipped judge if it is missing.
    """
    from sage.evaluation.extractors import find_extractor  # late: stage group imports this module
    from sage.evaluation.judges import find_judge

    find_extractor(settings.features)
    if settings.alignment != SHIPPED_JUDGE:
        find_judge(settings.alignment, examples)


def _check_size(pipe: Any, size: Sequence[int]) -> None:
    """Raise ConfigurationError if the model draws images of another size than the prepared ones."""
    height, width = drawn = pipe._size(None, None, dict(pipe._options))
    if drawn != tuple(size):
        raise ConfigurationError(
            f"the prepared images have {size[0]}x{size[1]} pixels, but the model draws {height}x{width}; set "
            f"prepare.image_size to {height} or take a model for {size[0]} pixels"
        )


def _check_sharing(share_ratio: float, evaluations: int) -> None:
    """Raise ConfigurationError if a share ratio above 0 is less than one step."""
    if share_ratio > 0 and not shared_steps(share_ratio, evaluations):
        raise ConfigurationError(
            f"generate.share_ratio {share_ratio} of {evaluations} steps is less than one step, so no step would be "
            f"shared; give 0, or at least {1 / evaluations:.2g}, or raise generate.steps"
        )


def doubts(params: Params, evaluations: int, groups: Sequence[Sequence[int]], image_steps: int = 0) -> Iterator[str]:
    """Yield a sentence for each setting that is likely a mistake, with both values.

    params       the whole configuration
    evaluations  network evaluations of one image, as the scheduler counts them
    groups       groups of the split that is drawn
    image_steps  first steps that the images of a prompt share
    """
    tuning, drawing = params.finetune, params.generate
    low, high = (max(1, shared_steps(ratio, evaluations)) for ratio in tuning.share_ratios)
    shared = shared_steps(drawing.share_ratio, evaluations)
    if shared and not low <= shared <= high:
        yield (
            f"generate.share_ratio {drawing.share_ratio} shares {shared} of {evaluations} steps, but training covers "
            f"{low} to {high} (finetune.share_ratios {tuning.share_ratios})"
        )
    plain = tuning.weights.diffusion + tuning.weights.consistency > 0
    if drawing.guidance_scale > 1 and not (tuning.drop_text and plain):
        yield (
            f"generate.guidance_scale {drawing.guidance_scale} needs a model that knows the empty prompt, but training "
            f"never sees it (finetune.drop_text {tuning.drop_text}, weights.diffusion {tuning.weights.diffusion})"
        )
    yield from _too_few(params.evaluate.gates, groups)
    if len(drawing.seeds) < 2 and any(gate.metric == "seed_diversity" for gate in params.evaluate.gates):
        yield f"the gate on seed_diversity cannot pass: generate.seeds {drawing.seeds} are fewer than two"
    plan = Plan.shared(groups, evaluations, drawing.share_ratio).repeat(len(drawing.seeds), image_steps)
    for gate in params.evaluate.gates:
        if METRICS[gate.metric].cost and gate.reference == INDEPENDENT:
            yield from _out_of_reach(gate, plan, drawing.guidance_scale > 1)


def cost_doubts(params: Params, saving: Mapping[str, float]) -> Iterator[str]:
    """Yield a sentence for each cost gate that no model can pass with the groups of the split that is judged.

    params  the whole configuration
    saving  saving of each split's groups at share ratio 1
    """
    drawing = params.generate
    if drawing.image_steps != 0:
        return  # the images of a prompt save more than its group does
    saved = saving[drawing.split] * shared_steps(drawing.share_ratio, drawing.steps) / drawing.steps
    for gate in params.evaluate.gates:
        asked = -gate.worse_by_at_most
        if METRICS[gate.metric].cost and gate.reference == INDEPENDENT and gate.relative and saved < asked:
            yield (
                f"the {drawing.split} prompts save {saved:.1%}, but a gate asks for {asked:.1%}, so no model can pass "
                "it; lower group.threshold, raise generate.share_ratio, or change the gate"
            )


def _too_few(gates: Sequence[Gate], groups: Sequence[Sequence[int]]) -> Iterator[str]:
    """Yield a sentence for each gate whose interval needs more groups than are drawn."""
    for metric in dict.fromkeys(gate.metric for gate in gates if METRICS[gate.metric].interval == "bootstrap"):
        within = METRICS[metric].within_groups
        found = sum(len(group) > 1 for group in groups) if within else len(groups)
        if found < LEAST_GROUPS:
            yield (
                f"the gate on {metric} cannot pass: its interval needs {LEAST_GROUPS} groups"
                f"{' of two or more prompts' if within else ''}, and the split that is drawn has {found}"
            )


def _out_of_reach(gate: Gate, plan: Plan, guided: bool) -> Iterator[str]:
    """Yield a sentence if the groups of a plan save too little for a gate on the evaluations per image."""
    ours, alone = plan.nfe(guided) / plan.prompts, float((2 if guided else 1) * plan.steps)
    worse = (ours - alone) / (alone if gate.relative else 1)
    if worse > gate.worse_by_at_most:
        unit = "of the evaluations" if gate.relative else "evaluations per image"
        yield (
            f"the gate on {gate.metric} cannot pass: the groups that are drawn save {-worse:.3g} {unit}, and the gate "
            f"needs {-gate.worse_by_at_most:.3g}; lower group.threshold, raise generate.share_ratio or change the gate"
        )
