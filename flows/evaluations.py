"""Network evaluations of a run before it begins, counted by the functions that its stages count with."""

from collections.abc import Sequence
from dataclasses import dataclass

from flows.preflight import Job
from sage.data.dataset import in_buckets
from sage.evaluation.arms import INDEPENDENT, SAGE, SAME_NFE, SHARED
from sage.sampling.plan import Plan, fewer_steps
from sage.training.batches import batches_of_parts
from sage.training.finetuning import sampling_cost

_COUNTED = 200  # steps of a training that are counted, evenly spaced; their mean stands for the others


@dataclass(frozen=True)
class Training:
    """Evaluations of the trained network, the frozen base, and the sampler's shared steps; `exact` if all counted."""

    trained: int
    frozen: int
    sampled: int
    exact: bool


def training(job: Job) -> Training:
    """Return the evaluations of stage finetune; raises DataError if the training split has no groups yet."""
    settings, drawing = job.params.finetune, job.params.generate
    parts, weights = in_buckets(job.examples("train")), settings.weights.model_dump()
    batches = batches_of_parts(job.grouped("train"), parts, weights, settings.batch_size, settings.seed)
    chosen = range(0, settings.steps, -(-settings.steps // _COUNTED))
    costs = [batches.cost(step) for step in chosen]
    low, high = settings.share_ratios
    sampled = chosen if settings.branch_start == "sampled" else ()
    shared = [sampling_cost(batches, (low, high), job.evaluations, step) for step in sampled]
    guidance = job.pipe.evaluations_a_step(drawing.guidance_scale)

    def whole(counts: Sequence[int]) -> int:
        return round(sum(counts) * settings.steps / len(chosen))

    trained, frozen = zip(*costs, strict=True)
    return Training(whole(trained), whole(frozen), guidance * whole(shared), len(chosen) == settings.steps)


def drawing(job: Job) -> dict[str, int]:
    """Return the evaluations of each arm in stage generate; raises DataError if its split has no groups yet."""
    settings, evaluations = job.params.generate, job.evaluations
    count, seeds = len(job.drawn), len(settings.seeds)
    plan = Plan.shared(job.grouped(settings.split), evaluations, settings.share_ratio).repeat(seeds, job.image_steps)
    shared = plan.nfe(guidance=False)
    if job.params.group.by == "prediction":
        # A first prediction of each text, from which every block then takes its first step if that begins with noise.
        reused = len(plan.roots) if job.pipe.safe_image_steps(settings.steps, 1.0) else 0
        shared += len({example.text for example in job.drawn}) - reused
    fewer = fewer_steps(settings.steps, job.pipe.evaluations, count * seeds, shared)
    found = {
        INDEPENDENT: count * seeds * evaluations,
        SAME_NFE: count * seeds * int(job.pipe.evaluations(fewer)),
        SHARED: shared,
        SAGE: shared,
    }
    guidance = job.pipe.evaluations_a_step(settings.guidance_scale)
    return {arm: guidance * nfe for arm, nfe in found.items()}
