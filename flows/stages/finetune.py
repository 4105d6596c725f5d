"""Stage finetune: train the base model for sampling with shared early steps.

On several devices: `accelerate launch -m flows.stages.finetune` with the arguments of the stage's command in dvc.yaml.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import sage.torchvision_ops  # noqa: F401

import torch
import typer
from accelerate.utils import extract_model_from_parallel

from flows import machine
from flows.drawing import open_pipeline
from flows.preflight import check, check_trainable
from flows.report.sheet import sheet
from flows.terminal import progress, run
from flows.tracking.runs import Run, stage_run
from sage.config import Finetune, Params, load_params
from sage.data.dataset import Example, captions_of, check_sums, in_buckets, load_pixels, read_split
from sage.data.groups import read_groups
from sage.data.tags import tag_orders
from sage.errors import ConfigurationError
from sage.files import digest, new_folder, sha256, sha256_tree, write_json
from sage.randomness import generator
from sage.sampling import adapters
from sage.sampling import base as base_model
from sage.sampling.conditions import Condition
from sage.sampling.seeds import prompt_seed
from sage.sampling.weights import Precision, store
from sage.training import curves, lora
from sage.training.batches import Batches, Buckets, batches_of_parts
from sage.training.denoiser import Denoiser
from sage.training.finetuning import TrainingSet, finetuning_loss, sampling_cost
from sage.training.loop import Losses, Schedule, Trained, fit, processes
from sage.training.selection import LOSS, Measured, Validation
from sage.training.stored import stored
from sage.training.validation import held_out_batches, held_out_loss

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

REPORT_EVERY = 10
# Settings that change no weight, except for rounding (`accumulate`): they may differ between a killed run and the run
# that resumes it, and dvc.yaml does not name them, so that a change of them makes no stage stale.
WITHOUT_EFFECT = {"accumulate", "checkpoint_every", "gradient_checkpointing", "watch_every"}
# Images are shown for the first groups of the validation split and the first members of each. They are sampled without
# branch noise, which some schedulers do not support, and which would hide what a group shares.
GROUPS, MEMBERS = 4, 4
GUIDANCE = 1.0


def main(
    base: Annotated[Path, typer.Option(exists=True, help="The base model: a folder, a .safetensors file or a pin.")],
    data: Annotated[Path, typer.Option(help="Prepared data.")],
    groups: Annotated[Path, typer.Option(help="Folder with a JSON file of groups for each split.")],
    out: Annotated[Path, typer.Option(help="Folder for the fine-tuned model.")],
    metrics: Annotated[Path, typer.Option(help="JSON file for the figures.")],
    work: Annotated[Path, typer.Option(help="Folder for resumable state, removed at the end.")] = Path("work/finetune"),
    losses: Annotated[Path | None, typer.Option(help="CSV file for the losses by step.")] = None,
) -> None:
    """Fine-tune the base model on the groups of the training split; a killed run resumes from its last checkpoint."""
    params = load_params()
    settings, sampler_steps = params.finetune, params.generate.steps
    # What stage generate does in the steps that a group shares.
    sampling = {"guidance_scale": params.generate.guidance_scale, "branch_noise": params.generate.branch_noise}
    accelerator = machine.accelerator()
    check_trainable(base)
    check_sums(data)
    # A frozen base is kept on the CPU; the denoiser takes its parts to the device when they are needed.
    on = accelerator.device if settings.kept_in == "fp32" else "cpu"
    kept_in: Precision = "fp32" if settings.kept_in == "fp32" else "bf16"  # in 8 bits once its adapter is there
    pipeline = open_pipeline(base, on, params.generate.scheduler, kept_in)
    check(pipeline, params, data, groups, trains=True)
    examples = read_split(data, "train")
    members = read_groups(groups / "train.json", examples)[0]
    buckets = in_buckets(examples)
    batches = batches_of_parts(members, buckets, settings.weights.model_dump(), settings.batch_size, settings.seed)
    if not any(len(group) > 1 for group in members):
        log.warning("no two training prompts are in one group, so this is plain fine-tuning; see group.threshold")

    sources = {"base_sha256": sha256_tree(base), "data_digest": sha256_tree(data)}
    if settings.init is not None:
        sources["init_sha256"] = adapters.digest(Path(settings.init))
    identity = identity_of(params, sources, groups) | sampling
    state = work / digest(identity)[:16]
    with _main_run(accelerator, settings) as record:
        record.dataset("prepared", sources["data_digest"], "training")
        watched = watch(data, groups)
        denoiser = Denoiser(
            pipeline,
            settings.precision,
            frozen=settings.kept_in != "fp32",
            guidance_scale=params.generate.guidance_scale,
            device=accelerator.device,
        )
        show(record, denoiser, pipeline, watched, settings, sampler_steps, 0)
        inputs = [
            training_set(denoiser, [examples[row] for row in rows], part.groups, sources, settings)
            for rows, part in zip(buckets, batches.parts, strict=True)
        ]
        adapt(denoiser, pipeline, settings)
        if settings.gradient_checkpointing:
            denoiser.network.enable_gradient_checkpointing()
        network = accelerator.prepare(denoiser)
        validation = held_out(denoiser, pipeline, data, groups, settings, sampler_steps, sampling, sources)
        trained = train(
            network,
            pipeline,
            inputs,
            batches,
            settings,
            sampler_steps,
            sampling,
            state,
            identity,
            record,
            watched,
            validation,
        )
        show(record, denoiser, pipeline, watched, settings, sampler_steps, trained.steps)
        accelerator.end_training()
        if not accelerator.is_main_process:
            return
        save(pipeline, base, out, params.generate.scheduler, settings)
        figures = {
            "steps": trained.steps,
            **evaluations_of(pipeline, params, batches, trained.steps),
            "images": len(examples),
            "groups": len(members),
            "losses": {name: round(value, 6) for name, value in trained.losses.items()},
            "model_sha256": sha256_tree(out),
            **sources,
        }
        if validation is not None:
            figures["validation"] = measurements(validation, trained.history)
        record.metrics({name: value for name, value in figures.items() if isinstance(value, (int, float))})
        record.tags({name: value for name, value in figures.items() if isinstance(value, str)})
        record.metrics({"seconds": round(trained.seconds, 1)})
        if losses is not None:
            curves.write_curves(losses, curves.points(trained.reports, trained.history))
        write_json(metrics, figures)
        record.result(metrics)
    shutil.rmtree(state)


def identity_of(params: Params, sources: Mapping[str, str], groups: Path) -> dict[str, Any]:
    """Return what checkpoints belong to: settings that change weights, and hashes of base, data and groups."""
    settings = params.finetune
    identity = settings.model_dump(exclude=WITHOUT_EFFECT) | {"groups": sha256(groups / "train.json")} | dict(sources)
    if settings.validation is not None:
        identity["validation_groups"] = sha256(groups / "validation.json")
    return identity | {"sampler_steps": params.generate.steps, "scheduler": params.generate.scheduler}


def evaluations_of(pipeline: Any, params: Params, batches: Buckets, steps: int) -> dict[str, int]:
    """Return how often these training steps evaluate the network, the frozen base, and the steps that groups share."""
    settings, costs = params.finetune, [batches.cost(step) for step in range(steps)]
    low, high = settings.share_ratios
    sampled = range(steps if settings.branch_start == "sampled" else 0)
    evaluations = pipeline.evaluations(params.generate.steps)
    shared = sum(sampling_cost(batches, (low, high), evaluations, step) for step in sampled)
    return {
        "evaluations": sum(trained for trained, _ in costs),
        "base_evaluations": sum(frozen for _, frozen in costs),
        "sampling_evaluations": shared * pipeline.evaluations_a_step(params.generate.guidance_scale),
    }


@contextmanager
def _main_run(accelerator: "Accelerator", settings: Finetune) -> Iterator[Run]:
    """Yield the tracking record of this run; of several processes only the main one records."""
    if not accelerator.is_main_process:
        yield Run()
        return
    with stage_run("finetune", settings.model_dump()) as record:
        yield record


def training_set(
    denoiser: Denoiser,
    examples: Sequence[Example],
    members: Sequence[Sequence[int]],
    sources: Mapping[str, str],
    settings: Finetune,
) -> TrainingSet:
    """Return the latents of all images and the conditions of all captions, computed once and kept in files.

    If text encoders are trained, the conditions are those of the frozen base, and training reads the captions anew.

    denoiser  the base, before it is trained
    examples  images of one size
    members   groups of their places
    sources   hashes of the base and of the prepared data
    settings  what to vary (`flip`, `shuffle_tags`), and how the base is kept
    """
    height, width = load_pixels(examples[:1]).shape[1:3]
    texts, captions = captions_of([varied_texts(example, settings) for example in examples])
    texts.append("")
    trains_texts = bool(settings.adapter and settings.adapter.text_encoders)
    key: dict[str, Any] = {"base": sources["base_sha256"], "size": [height, width], "torch": torch.__version__}
    key |= {"device": denoiser.device.type, "frozen": settings.kept_in}
    if trains_texts:  # held-out captions are read when an earlier adapter is in the text encoders
        key["init"] = sources.get("init_sha256")

    def encoded_images(mirrored: bool) -> torch.Tensor:
        def encode(start: int, stop: int) -> dict[str, torch.Tensor]:
            pixels = torch.from_numpy(load_pixels(examples[start:stop]))
            return {"latents": denoiser.encode_images(pixels.flip(2) if mirrored else pixels)}

        ids = [example.id for example in examples]
        own = key | {"data": sources["data_digest"], "ids": ids, "mirrored": mirrored}
        return _encoded("mirrored images" if mirrored else "images", len(examples), own, encode)["latents"]

    def encode_texts(start: int, stop: int) -> dict[str, torch.Tensor]:
        return denoiser.encode_texts(texts[start:stop], (height, width))

    # Named as the stock call names them; earlier versions kept them under other names.
    captioned = key | {"texts": texts, "names": "stock"}
    conditions = _encoded("captions", len(texts), captioned, encode_texts)
    mirrored = encoded_images(mirrored=True) if settings.flip else None

    def read(rows: list[int]) -> Condition:
        return denoiser.current_texts([texts[row] for row in rows], (height, width))

    return TrainingSet(
        encoded_images(mirrored=False),
        conditions,
        torch.from_numpy(captions),
        tuple(map(tuple, members)),
        mirrored,
        read if trains_texts else None,
    )


def varied_texts(example: Example, settings: Finetune) -> list[str]:
    """Return the captions to train an image with, first the one by which it was grouped."""
    chosen = settings.shuffle_tags
    if chosen is None:
        return list(example.texts)
    return [order for text in example.texts for order in tag_orders(text, chosen.keep, chosen.orders, settings.seed)]


def _encoded(
    what: str, count: int, key: Mapping[str, Any], encode: Callable[[int, int], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    folder = machine.encoded_cache() / digest(key)[:16]
    with _shown(count, f"encoding {what}") as advance:
        return stored(folder, count, encode, advance)


def adapt(denoiser: Denoiser, pipeline: Any, settings: Finetune) -> None:
    """Add the adapter to train, if there is to be one, or load the earlier one; then store what is frozen."""
    chosen = settings.adapter
    if chosen is None:
        return
    encoders = lora.trainable_encoders(pipeline) if chosen.text_encoders else {}
    if encoders and processes()[1] > 1:
        raise ConfigurationError(
            f"finetune.adapter.text_encoders is for one process, but there are {processes()[1]}; leave it out, or "
            "train on one device"
        )
    if settings.init is not None:
        lora.resume(pipeline, Path(settings.init), chosen.rank, chosen.alpha, bool(encoders))
    else:
        lora.add(denoiser.network, chosen.rank, settings.seed, alpha=chosen.alpha, targets=chosen.targets)
        lora.add_to_texts(encoders, chosen.rank, settings.seed, alpha=chosen.alpha)
    denoiser.train_texts(encoders)
    if settings.kept_in == "fp8":
        store(denoiser.network)


def held_out(
    denoiser: Denoiser,
    pipeline: Any,
    data: Path,
    groups: Path,
    settings: Finetune,
    sampler_steps: int,
    sampling: Mapping[str, float],
    sources: Mapping[str, str],
) -> Validation | None:
    """Return when and on which images of split validation to measure the held-out loss; None if that is not set.

    Whole groups are taken in random order until there are as many images as asked for, or none left. Text is never
    dropped.
    """
    chosen = settings.validation
    if chosen is None:
        return None
    examples = read_split(data, "validation")
    partition = read_groups(groups / "validation.json", examples)[0]
    rows: list[int] = []
    members: list[tuple[int, ...]] = []
    for place in torch.randperm(len(partition), generator=generator(settings.seed, "held out")).tolist():
        if len(rows) < chosen.images:
            members.append(tuple(range(len(rows), len(rows) + len(partition[place]))))
            rows += partition[place]
    plain = settings.model_copy(update={"flip": False, "shuffle_tags": None})
    inputs = training_set(denoiser, [examples[row] for row in rows], members, sources, plain)
    batches = held_out_batches(members, settings.weights.model_dump(), settings.batch_size, settings.seed)
    loss = loss_of(denoiser, pipeline, inputs, batches, settings, sampler_steps, sampling, drop_text=0.0)
    measure = held_out_loss(denoiser, pipeline.scheduler, inputs, batches, loss)
    return Validation(measure, chosen.every, chosen.patience, chosen.keep)


def measurements(validation: Validation, history: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Return the held-out values of the base, of the last step and of the kept weights; warn if the base was best."""
    first, last, kept = history[0], history[-1], validation.kept(history)
    if min(history, key=lambda one: one.values[LOSS]) is first:
        log.warning(
            "the held-out loss was never below the base's %.4g; train longer or with another learning rate",
            first.values[LOSS],
        )
    found = {"base": first, "last": last, "kept": kept}
    return {
        name: {"step": one.step}
        | {key.removeprefix("validation_"): round(value, 6) for key, value in one.values.items()}
        for name, one in found.items()
    }


def _shown(total: int, what: str) -> AbstractContextManager[Callable[[int], None]]:
    """Return a progress display; of several processes only the first shows it."""
    return progress(total, what) if processes()[0] == 0 else nullcontext(lambda n: None)


def train(
    network: torch.nn.Module,
    pipeline: Any,
    data: Sequence[TrainingSet],
    batches: Buckets,
    settings: Finetune,
    sampler_steps: int,
    sampling: dict[str, float],
    state: Path,
    identity: dict[str, Any],
    record: Run,
    watched: list[list[Example]],
    validation: Validation | None,
) -> Trained:
    """Train the pipeline's network in place.

    network        the denoiser on that network, prepared by accelerate
    pipeline       the pipeline, for its scheduler and the images to watch
    data, batches  the training sets, each of images of one size, and the rows of each step
    settings       the section finetune of params.yaml
    sampler_steps  number of sampler steps, of which groups share a part
    sampling       guidance scale and branch noise of these steps
    state          folder of the checkpoints
    identity       the configuration that the checkpoints belong to
    record         the tracking record
    watched        groups whose images are recorded during training
    validation     the held-out loss, and what it decides
    """
    loss = loss_of(network, pipeline, data, batches, settings, sampler_steps, sampling, settings.drop_text)
    schedule = Schedule(
        settings.steps,
        settings.learning_rate,
        warmup=settings.warmup,
        decay=settings.decay,
        ema=settings.ema,
        checkpoint_every=settings.checkpoint_every,
        report_every=REPORT_EVERY,
        watch_every=settings.watch_every,
        optimizer=settings.optimizer,
    )
    at = 0
    with _shown(settings.steps, "fine-tuning") as advance:

        def on_step(step: int, values: dict[str, float]) -> None:
            nonlocal at
            advance(step - at)
            at = step

        return fit(
            network,
            loss,
            schedule,
            work=state,
            identity=identity,
            on_step=on_step,
            on_report=lambda step, means: record.metrics(means, step),
            on_watch=lambda step: show(
                record, extract_model_from_parallel(network), pipeline, watched, settings, sampler_steps, step
            ),
            accumulate=settings.accumulate,
            validation=validation,
        )


def loss_of(
    network: torch.nn.Module,
    pipeline: Any,
    data: TrainingSet | Sequence[TrainingSet],
    batches: Batches | Buckets,
    settings: Finetune,
    sampler_steps: int,
    sampling: Mapping[str, float],
    drop_text: float,
) -> Callable[..., Losses]:
    """Return the loss of these settings on a set of images; the parameters are those of `train`."""
    low, high = settings.share_ratios
    return finetuning_loss(
        network,
        pipeline.scheduler,
        data,
        batches,
        share_ratios=(low, high),
        soft_target=settings.soft_target,
        branch_start=settings.branch_start,
        sampler_steps=sampler_steps,
        drop_text=drop_text,
        seed=settings.seed,
        min_snr=settings.min_snr,
        timestep_sampling=settings.timesteps,
        **sampling,
    )


def save(pipeline: Any, base: Path, out: Path, scheduler: str | None, settings: Finetune) -> None:
    """Write the pipeline in the format of the base; an adapter is merged, and also saved as a file of its own.

    It is merged into float32 weights: those of a base that was frozen in less are read again, on the CPU.
    """
    parts = lora.trained(pipeline)
    alpha = lora.alpha_of(pipeline._network) if parts else None
    with new_folder(out) as temporary, tempfile.TemporaryDirectory() as between:
        if settings.kept_in != "fp32":
            lora.save(pipeline, parts, Path(between), alpha)
            pipeline = open_pipeline(base, "cpu", scheduler, lora=Path(between) / adapters.FILE)
        lora.fuse(pipeline, trained=True)
        if base_model.is_own(base):
            base_model.save(pipeline, temporary)
        else:
            pipeline.save_pretrained(temporary)
        if parts:
            lora.save(pipeline, parts, temporary, alpha)


def watch(data: Path, groups: Path) -> list[list[Example]]:
    """Return the first groups of the validation split, whose images are recorded during training."""
    examples = read_split(data, "validation")
    shareable = [group for group in read_groups(groups / "validation.json", examples)[0] if len(group) > 1]
    return [[examples[row] for row in group[:MEMBERS]] for group in shareable[:GROUPS]]


def show(
    record: Run,
    denoiser: Denoiser,
    pipeline: Any,
    watched: list[list[Example]],
    settings: Finetune,
    sampler_steps: int,
    step: int,
) -> None:
    """Record images of the watched groups, one row per group, sampled with shared steps and fixed seeds.

    record         the tracking record; without a run nothing is sampled
    denoiser       the denoiser on the pipeline's network
    pipeline       the pipeline with the current weights
    watched        groups of examples, whose prompts are sampled at the size of their images
    settings       the section finetune of params.yaml; the share ratio is the middle of its range
    sampler_steps  number of sampler steps
    step           the training step to record them under
    """
    if record.id is None or not watched:
        return
    examples = [example for group in watched for example in group]
    height, width = load_pixels(examples[:1]).shape[1:3]
    numbers = iter(range(len(examples)))
    with denoiser.drawing(pipeline):
        images = pipeline(
            [example.text for example in examples],
            groups=[[next(numbers) for _ in group] for group in watched],
            share_ratio=sum(settings.share_ratios) / 2,
            num_inference_steps=sampler_steps,
            guidance_scale=denoiser.guidance_scale if denoiser.embeds_guidance else GUIDANCE,
            height=height,
            width=width,
            seed=[prompt_seed(0, example.id) for example in examples],
        ).images
    remaining = iter(images)
    grid = sheet([[next(remaining) for _ in group] for group in watched])
    record.image(grid, "shared", step)


if __name__ == "__main__":
    run(main)
