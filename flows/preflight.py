"""What a run would fail at, or mislead with, in a later stage: found before it trains or draws.

Nothing here changes a result: a run is refused, or a warning names both values. A check is a function of a `Job`: it
raises a SageError for what cannot work, and yields a sentence for each setting that is likely a mistake.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows import machine
from sage.config import Evaluate, Gate, Params
from sage.data.buckets import Size, named
from sage.data.dataset import Example, in_buckets, load_pixels, read_split
from sage.data.groups import read_groups
from sage.errors import ConfigurationError, DataError, SageError, UnsupportedError
from sage.evaluation.arms import ARMS, INDEPENDENT
from sage.evaluation.bootstrap import LEAST_GROUPS
from sage.evaluation.registry import METRICS
from sage.sampling.plan import Plan, shared_steps

if TYPE_CHECKING:
    from sage.training.memory import Memory

log = logging.getLogger(__name__)

_CHECKPOINTS = 3  # two are kept while another is written
_COPIES = 3  # of a model or of images: in the work tree, in DVC's cache and in MLflow


class NotMade(DataError):
    """Data or groups that a run makes, and that are not there yet."""


@dataclass(frozen=True)
class Job:
    """What a run starts from.

    pipe    the model, with the scheduler that it is sampled with
    params  the whole configuration
    data    prepared data
    groups  folder with a JSON file of groups for each split
    """

    pipe: Any
    params: Params
    data: Path
    groups: Path

    def examples(self, split: str) -> list[Example]:
        """Return the examples of a split; raises NotMade without data, DataError if the split is missing or empty."""
        if not self.data.is_dir():
            raise NotMade(f"{self.data} is not made yet; `sage run prepare` makes it")
        if split not in self._read:
            self._read[split] = read_split(self.data, split)
        if not self._read[split]:
            raise DataError(
                f"split {split} of {self.data} has no image; give more images, or raise prepare.{split} "
                "(families of fewer than four images are kept for training)"
            )
        return self._read[split]

    @property
    def drawn(self) -> list[Example]:
        """The examples of the split that stage generate draws."""
        return self.examples(self.params.generate.split)

    def grouped(self, split: str) -> list[list[int]]:
        """Return the groups of a split as places in its examples; raises NotMade if there are none."""
        if not self.groups.is_dir():
            raise NotMade(f"{self.groups} is not made yet; `sage run group` makes it")
        return read_groups(self.groups / f"{split}.json", self.examples(split))[0]

    @cached_property
    def _read(self) -> dict[str, list[Example]]:
        return {}

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the prepared images in pixels; of those to prepare, if there are none yet."""
        if not self.data.is_dir():
            return self.params.prepare.image_size, self.params.prepare.image_size
        height, width = load_pixels(self.drawn[:1]).shape[1:3]
        return height, width

    @cached_property
    def evaluations(self) -> int:
        """Evaluations of the network for one image alone, without guidance."""
        return int(self.pipe.evaluations(self.params.generate.steps))

    @cached_property
    def image_steps(self) -> int:
        """First steps that the images of a prompt share."""
        from flows.drawing import image_steps  # late: stage group imports this module and needs no pipeline

        return image_steps(self.pipe, self.params.generate.model_dump())

    @property
    def free_memory(self) -> tuple[int, int]:
        """Free and whole memory of the device in bytes; what the model takes there already counts as free."""
        on = machine.device()
        free, total = machine.memory(on)
        loaded = self.pipe._network.device.type == on.partition(":")[0]
        parts = [part for part in self.pipe.components.values() if hasattr(part, "parameters")] if loaded else []
        return free + sum(weight.nbytes for part in parts for weight in part.parameters()), total

    @cached_property
    def memory(self) -> "Memory":
        """The memory that fine-tuning takes; raises UnsupportedError for a model that cannot be fine-tuned."""
        from sage.training.memory import estimate

        _check_family(self.pipe)
        settings, train = self.params.finetune, self.examples("train")
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        return estimate(
            self.pipe,
            self.size,
            items=-(-settings.batch_size // (settings.accumulate * processes)),
            images=len(train) * (2 if settings.flip else 1),
            captions=_captions(self, train),
            rank=None if settings.adapter is None else settings.adapter.rank,
            consistency=settings.weights.consistency > 0,
            checkpointing=settings.gradient_checkpointing,
            precision=settings.precision,
            texts=bool(settings.adapter and settings.adapter.text_encoders),
        )


def _captions(job: Job, train: Sequence[Example]) -> int:
    """Return how many text states there are at most: distinct captions in each bucket, in all orders of their tags."""
    orders = 1 if job.params.finetune.shuffle_tags is None else job.params.finetune.shuffle_tags.orders
    found = [len({text for row in rows for text in train[row].texts}) for rows in in_buckets(train)]
    return orders * sum(found) + len(found)


Check = Callable[[Job], Iterator[str]]
State = Literal["ok", "warning", "failed", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """The result of a check: "failed" if a run would be refused, "unknown" without data or groups; `found` says why."""

    check: str
    state: State
    found: str = ""


def check(pipe: Any, params: Params, data: Path, groups: Path, trains: bool = False) -> None:
    """Check that what is trained can be drawn and judged, and log a warning for each setting that is likely a mistake.

    The arguments are those of `Job`; `trains`: training begins now, so that it is checked, too. Raises the error of the
    first check that fails.
    """
    job = Job(pipe, params, data, groups)
    for function in (DRAWING | TRAINING if trains else DRAWING).values():
        for problem in function(job):
            log.warning(problem)


def verdicts(job: Job) -> Iterator[Verdict]:
    """Yield the verdict of every check."""
    for name, function in (DRAWING | TRAINING).items():
        try:
            problems = list(function(job))
        except SageError as error:
            yield Verdict(name, "unknown" if isinstance(error, NotMade) else "failed", str(error))
        else:
            yield Verdict(name, "warning" if problems else "ok", "\n".join(problems))


def _splits(job: Job) -> Iterator[str]:
    """Refuse data in which a split that training or the evaluation reads is empty."""
    for split in dict.fromkeys(("train", "validation", job.params.generate.split)):
        job.examples(split)
    yield from ()


def _judges(job: Job) -> Iterator[str]:
    """Refuse judges that cannot be had, or that cannot judge these images."""
    check_judges(job.params.evaluate, job.drawn)
    yield from ()


def _size(job: Job) -> Iterator[str]:
    """Refuse a model that draws images of another size than the prepared ones, or that has no such size."""
    height, width = drawn = job.pipe.drawn_size()
    if height is None:  # a model of all sizes, which stage generate asks for the prepared one
        multiple = job.pipe.vae_scale_factor * (2 if hasattr(job.pipe, "_pack_latents") else 1)
        if any(side % multiple for side in job.size):
            raise ConfigurationError(
                f"the prepared images have {job.size[0]}x{job.size[1]} pixels, but the model's sides are multiples of "
                f"{multiple}; set prepare.image_size to {-(-job.size[0] // multiple) * multiple}"
            )
    elif drawn != job.size:
        raise ConfigurationError(
            f"the prepared images have {job.size[0]}x{job.size[1]} pixels, but the model draws {height}x{width}; set "
            f"prepare.image_size to {height} or take a model for {job.size[0]} pixels"
        )
    yield from ()


def _drawable(job: Job) -> Iterator[str]:
    """Refuse what stage generate would refuse: a scheduler, or branch noise that it does not take."""
    settings = job.params.generate
    try:
        # As stage generate calls it; nothing is drawn before the first result is asked for.
        job.pipe.stream(
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
    yield from ()


def check_judging(params: Params, data: Path) -> None:
    """Check, before anything is grouped or trained, what stage evaluate judges with (`check_judges`)."""
    check_judges(params.evaluate, read_split(data, params.generate.split))


def check_judges(settings: Evaluate, examples: Sequence[Example]) -> None:
    """Check what stage evaluate judges with: CheckpointError if it cannot be had, MetricError if it cannot judge."""
    from sage.evaluation.extractors import find_extractor  # late: stage group imports this module
    from sage.evaluation.judges import find_judge
    from sage.evaluation.references import check_references

    find_extractor(settings.features)
    check_references(examples, settings.references)
    find_judge(settings.alignment, examples)


def check_trainable(base: str | Path) -> None:
    """Raise UnsupportedError, before its weights are read, for a base model of a family that cannot be fine-tuned."""
    from sage.sampling import saved  # late, as above
    from sage.sampling.pipeline import is_trainable, trainable

    stock = saved.stock_class(base)
    if stock is not None and not is_trainable(stock):
        raise UnsupportedError(
            f"the base model {base} is a {stock.__name__}, which can be sampled (sage generate --model {base}), but "
            f"not fine-tuned; set base in params.yaml to one of {', '.join(trainable())}"
        )


def _one_step(job: Job) -> Iterator[str]:
    """Refuse a share ratio above 0 that is less than one step."""
    share_ratio, evaluations = job.params.generate.share_ratio, job.evaluations
    if share_ratio > 0 and not shared_steps(share_ratio, evaluations):
        raise ConfigurationError(
            f"generate.share_ratio {share_ratio} of {evaluations} steps is less than one step, so no step would be "
            f"shared; give 0, or at least {1 / evaluations:.2g}, or raise generate.steps"
        )
    yield from ()


def _texts(job: Job) -> Iterator[str]:
    """Warn of captions that the text encoder does not read to their end."""
    for split in dict.fromkeys(("train", job.params.generate.split)):
        texts = list(dict.fromkeys(text for example in job.examples(split) for text in example.texts))
        beyond = [count for count in job.pipe._count_truncated(texts, dict(job.pipe._options)) if count]
        if beyond:
            yield (
                f"the text encoder does not read {len(beyond)} of {len(texts)} captions of split {split} "
                f"({len(beyond) / len(texts):.1%}) to their end, but leaves out up to {max(beyond)} tokens; "
                "shorten them"
            )


def _trainable(job: Job) -> Iterator[str]:
    """Refuse a model or a scheduler that can be drawn with, but not trained with."""
    from sage import diffusion

    _check_family(job.pipe)
    diffusion.NoiseSchedule.of(job.pipe.scheduler)
    adapter = job.params.finetune.adapter
    if adapter is not None and adapter.text_encoders:
        from sage.training import lora

        lora.trainable_encoders(job.pipe)
    yield from ()


def _timesteps(job: Job) -> Iterator[str]:
    """Refuse timesteps that are drawn in a way that does not fit the scheduler."""
    from sage.training import timesteps

    timesteps.check(job.params.finetune.timesteps, job.pipe.scheduler)
    yield from ()


def _buckets(job: Job) -> Iterator[str]:
    """Refuse buckets of a size that the base cannot draw; warn of those with few images or without a group."""
    from sage.training.batches import groups_of_parts  # late, as above

    settings, train = job.params.finetune, job.examples("train")
    parts = in_buckets(train)
    sizes = [size for rows in parts if (size := train[rows[0]].image.bucket) is not None]
    if not sizes:
        return
    for size in sizes:
        yield from _bucket_size(job.pipe, size)
    grouped = groups_of_parts(job.grouped("train"), parts)
    counts = zip(sizes, map(len, parts), strict=True)
    few = [f"{named(size)} ({count})" for size, count in counts if count < settings.batch_size]
    if few:
        yield (
            f"{len(few)} of {len(sizes)} buckets have fewer images than a step has items (finetune.batch_size "
            f"{settings.batch_size}), so their steps repeat images: {', '.join(few)}; give more images of these "
            "shapes, a larger prepare.buckets.step, or a smaller prepare.buckets.max_aspect"
        )
    weights = settings.weights
    alone = [named(size) for size, own in zip(sizes, grouped, strict=True) if all(len(group) < 2 for group in own)]
    if alone and not weights.diffusion + weights.consistency:
        raise DataError(
            f"no two prompts of bucket {alone[0]} are in one group, and plain diffusion has no weight, so its images "
            "cannot be trained on; lower group.threshold or give finetune.weights.diffusion a weight"
        )
    if alone and weights.shared + weights.branch:
        yield (
            f"{len(alone)} of {len(sizes)} buckets have no group of two prompts, so plain diffusion alone trains their "
            f"images: {', '.join(alone)}; lower group.threshold, or give more images of these shapes"
        )


def _bucket_size(pipe: Any, size: Size) -> Iterator[str]:
    """Refuse a size that the base cannot draw; warn if it draws another one instead."""
    try:
        drawn = pipe.drawn_size(*size)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"the base cannot draw bucket {named(size)}: {error}; set prepare.buckets.step to such a multiple"
        ) from error
    config, patch = pipe._network.config, pipe._network.config.get("patch_size", 1)
    largest = config.get("pos_embed_max_size")
    if largest is not None and max(size) > largest * patch * pipe.vae_scale_factor:
        raise ConfigurationError(
            f"the base cannot draw bucket {named(size)}: its sides go up to {largest * patch * pipe.vae_scale_factor} "
            "pixels; lower prepare.image_size or prepare.buckets.max_aspect"
        )
    if drawn != size:
        yield f"the base draws {named(drawn)} if it is asked for bucket {named(size)}, and scales and crops the image"


def _check_family(pipe: Any) -> None:
    """Raise UnsupportedError for a family that can be sampled, but not fine-tuned."""
    from sage.sampling.pipeline import is_trainable, trainable

    if not is_trainable(type(pipe)):
        raise UnsupportedError(
            f"{pipe.family.stock} can be sampled, but not fine-tuned; fine-tune one of {', '.join(trainable())}"
        )


def _memory(job: Job) -> Iterator[str]:
    """Refuse training whose weights and states alone do not fit; warn if it may not fit with its activations."""
    on, needed, (free, total) = machine.device(), job.memory, job.free_memory
    remedy = "lower finetune.batch_size, raise finetune.accumulate, or set finetune.gradient_checkpointing"
    if needed.certain > total:
        raise ConfigurationError(
            f"weights and optimizer take {needed.certain / 1e9:.1f} GB, but {on} has {total / 1e9:.1f} GB; train "
            "an adapter (finetune.adapter), with finetune.precision fp8 if it must be, or a smaller base"
        )
    if needed.merged > (host := machine.memory("cpu")[1]):
        yield (
            f"the merged model is made in float32, which takes {needed.merged / 1e9:.1f} GB of the machine's memory, "
            f"but there are {host / 1e9:.1f} GB; add swap, or take a smaller base"
        )
    if needed.total > free:
        yield (
            f"training takes up to {needed.total / 1e9:.1f} GB, {needed.activations / 1e9:.1f} GB of them activations "
            f"by an upper estimate, but {on} has {free / 1e9:.1f} GB free; {remedy}"
        )


def _disk(job: Job) -> Iterator[str]:
    """Refuse a run whose latents, text states, checkpoints, model and images do not fit on the disk."""
    needed, free, kept = disk(job), shutil.disk_usage(Path.cwd()).free, machine.encoded_cache()
    data = job.memory.data
    # What is encoded already may be of this set, so it is not asked for twice.
    there = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
    if needed - min(data, there) > free:
        raise ConfigurationError(
            f"latents and text states ({data / 1e9:.1f} GB), checkpoints, model and images take up to "
            f"{needed / 1e9:.1f} GB, but {Path.cwd()} has {free / 1e9:.1f} GB free; make room ({kept} holds "
            f"{there / 1e9:.1f} GB of this and earlier sets), train an adapter, lower prepare.image_size or "
            "finetune.shuffle_tags.orders, or draw fewer seeds (generate.seeds)"
        )
    yield from ()


def disk(job: Job) -> int:
    """Return the bytes that latents, text states, checkpoints, model and the images of all arms take at most.

    Images are counted as uncompressed.
    """
    drawing, (height, width) = job.params.generate, job.size
    images = len(ARMS) * len(job.drawn) * len(drawing.seeds) * height * width * 3
    model = job.memory.merged or job.memory.weights
    return job.memory.data + _CHECKPOINTS * job.memory.training + _COPIES * (model + images)


def _shares(job: Job) -> Iterator[str]:
    yield from _outside_training(job.params, job.evaluations)


def _guidance(job: Job) -> Iterator[str]:
    if not job.pipe.embeds_guidance:
        yield from _unknown_empty_prompt(job.params)


def _gates(job: Job) -> Iterator[str]:
    groups = job.grouped(job.params.generate.split)
    guided = job.pipe.evaluations_a_step(job.params.generate.guidance_scale) == 2
    yield from _unreachable_gates(job.params, job.evaluations, groups, job.image_steps, guided)


DRAWING: dict[str, Check] = {
    "judges at hand": _judges,
    "image size": _size,
    "scheduler and branch noise": _drawable,
    "share ratio of at least one step": _one_step,
    "share ratio within the trained range": _shares,
    "empty prompt for guidance": _guidance,
    "gates that the groups can meet": _gates,
}
# Checked beside these before training begins.
TRAINING: dict[str, Check] = {
    "splits with images": _splits,
    "captions within the text encoder's limit": _texts,
    "base that can be trained": _trainable,
    "timesteps that fit the scheduler": _timesteps,
    "aspect-ratio buckets": _buckets,
    "memory": _memory,
    "disk": _disk,
}


def doubts(params: Params, evaluations: int, groups: Sequence[Sequence[int]], image_steps: int = 0) -> Iterator[str]:
    """Yield a sentence for each setting that is likely a mistake, with both values.

    params       the whole configuration
    evaluations  network evaluations of one image, as the scheduler counts them
    groups       groups of the split that is drawn
    image_steps  first steps that the images of a prompt share
    """
    yield from _outside_training(params, evaluations)
    yield from _unknown_empty_prompt(params)
    yield from _unreachable_gates(params, evaluations, groups, image_steps, params.generate.guidance_scale > 1)


def _outside_training(params: Params, evaluations: int) -> Iterator[str]:
    tuning, drawing = params.finetune, params.generate
    low, high = (max(1, shared_steps(ratio, evaluations)) for ratio in tuning.share_ratios)
    shared = shared_steps(drawing.share_ratio, evaluations)
    if shared and not low <= shared <= high:
        yield (
            f"generate.share_ratio {drawing.share_ratio} shares {shared} of {evaluations} steps, but training covers "
            f"{low} to {high} (finetune.share_ratios {tuning.share_ratios})"
        )


def _unknown_empty_prompt(params: Params) -> Iterator[str]:
    tuning, scale = params.finetune, params.generate.guidance_scale
    plain = tuning.weights.diffusion + tuning.weights.consistency > 0
    if scale > 1 and not (tuning.drop_text and plain):
        yield (
            f"generate.guidance_scale {scale} needs a model that knows the empty prompt, but training "
            f"never sees it (finetune.drop_text {tuning.drop_text}, weights.diffusion {tuning.weights.diffusion})"
        )


def _unreachable_gates(
    params: Params, evaluations: int, groups: Sequence[Sequence[int]], image_steps: int, guided: bool
) -> Iterator[str]:
    drawing = params.generate
    yield from _too_few(params.evaluate.gates, groups)
    if len(drawing.seeds) < 2 and any(gate.metric == "seed_diversity" for gate in params.evaluate.gates):
        yield f"the gate on seed_diversity cannot pass: generate.seeds {drawing.seeds} are fewer than two"
    plan = Plan.shared(groups, evaluations, drawing.share_ratio).repeat(len(drawing.seeds), image_steps)
    for gate in params.evaluate.gates:
        if METRICS[gate.metric].cost and gate.reference == INDEPENDENT:
            yield from _out_of_reach(gate, plan, guided)


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
