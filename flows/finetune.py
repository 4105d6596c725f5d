"""Stage finetune: the base model learns to share its early steps."""

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import sage.torchvision_ops  # noqa: F401

import torch
import typer
from diffusers import StableDiffusionPipeline
from PIL import Image

from flows.machine import device
from flows.terminal import progress, run
from flows.tracking import Run, stage_run
from sage import base as base_model
from sage.config import Finetune, load_params
from sage.data import Example, load_pixels, read_groups, read_split
from sage.files import digest, sha256, sha256_tree, write_json
from sage.finetuning import Batches, TrainingSet, finetuning_loss
from sage.pipeline import SharedSamplingPipeline, prompt_seed
from sage.pretraining import encode_pictures, encode_texts
from sage.training import Schedule, fit

log = logging.getLogger(__name__)

CHECKPOINT_EVERY = 50
REPORT_EVERY = 10
# The pictures to look at: so many groups of the validation split, so many of each, made as generate does by default.
GROUPS, MEMBERS = 4, 4
STEPS, GUIDANCE = 8, 3.0


def main(
    base: Annotated[Path, typer.Option(help="The base model.")],
    data: Annotated[Path, typer.Option(help="Prepared data.")],
    groups: Annotated[Path, typer.Option(help="One JSON file of groups a split.")],
    out: Annotated[Path, typer.Option(help="Where the fine-tuned model goes.")],
    metrics: Annotated[Path, typer.Option(help="Where the figures go.")],
    work: Annotated[Path, typer.Option(help="Where resumable state lives while it is needed.")] = Path("work/finetune"),
) -> None:
    """Fine-tune the base model on the groups of the training split; a killed run goes on where it was."""
    settings = load_params().finetune
    pipeline = base_model.load(base)
    examples = read_split(data, "train")
    members = tuple(map(tuple, read_groups(groups / "train.json", examples)[0]))
    batches = Batches(members, settings.weights.model_dump(), settings.evaluations, settings.seed)
    if not any(len(group) > 1 for group in members):
        log.warning("no two training prompts are in one group: this is plain fine-tuning")

    sources = {"base_sha256": sha256_tree(base), "data_digest": sha256_tree(data)}
    identity = settings.model_dump() | sources | {"groups": sha256(groups / "train.json")}
    state = work / digest(identity)[:16]
    with stage_run("finetune", settings.model_dump()) as record:
        record.dataset("prepared", sources["data_digest"], "training")
        watched = watch(data, groups)
        show(record, pipeline, watched, settings, 0)
        started = time.monotonic()
        losses = train(pipeline, training_set(pipeline, examples, members), batches, settings, state, identity, record)
        seconds = time.monotonic() - started
        show(record, pipeline, watched, settings, settings.steps)
        base_model.save(pipeline, out)
        costs = [batches.cost(step) for step in range(settings.steps)]
        figures = {
            "steps": settings.steps,
            "evaluations": sum(trained for trained, _ in costs),
            "base_evaluations": sum(frozen for _, frozen in costs),
            "pictures": len(examples),
            "groups": len(members),
            "losses": {name: round(value, 6) for name, value in losses.items()},
            "seconds": round(seconds, 1),
            "model_sha256": sha256_tree(out),
            **sources,
        }
        record.metrics({name: value for name, value in figures.items() if isinstance(value, (int, float))})
        record.tags({name: value for name, value in figures.items() if isinstance(value, str)})
        write_json(metrics, figures | {"run_id": record.id})
    shutil.rmtree(state)


def training_set(
    pipeline: StableDiffusionPipeline, examples: Sequence[Example], members: tuple[tuple[int, ...], ...]
) -> TrainingSet:
    """Return latents and text states of all pictures and captions, computed once."""
    pictures = torch.from_numpy(load_pixels(examples))
    latents = encode_pictures(pipeline.vae, pictures) * pipeline.vae.config.scaling_factor
    return TrainingSet(latents, encode_texts([*(example.text for example in examples), ""]), members)


def train(
    pipeline: StableDiffusionPipeline,
    data: TrainingSet,
    batches: Batches,
    settings: Finetune,
    state: Path,
    identity: dict[str, Any],
    record: Run,
) -> dict[str, float]:
    """Train the pipeline's U-Net in place; return the last losses."""
    network = pipeline.unet.to(device())
    low, high = settings.share_ratios
    loss = finetuning_loss(
        network,
        pipeline.scheduler,
        data,
        batches,
        share_ratios=(low, high),
        soft_target=settings.soft_target,
        branch_noise=settings.branch_noise,
        drop_text=settings.drop_text,
        seed=settings.seed,
    )
    schedule = Schedule(
        settings.steps,
        settings.learning_rate,
        warmup=settings.warmup,
        decay=settings.decay,
        ema=settings.ema,
        checkpoint_every=CHECKPOINT_EVERY,
    )
    at, recent = 0, []
    with progress(settings.steps, "fine-tuning") as advance:

        def on_step(step: int, values: dict[str, float]) -> None:
            nonlocal at
            advance(step - at)
            at = step
            recent.append(values)
            if step % REPORT_EVERY == 0:
                record.metrics({name: sum(v[name] for v in recent) / len(recent) for name in values}, step)
                recent.clear()

        return fit(network, loss, schedule, work=state, identity=identity, on_step=on_step)


def watch(data: Path, groups: Path) -> list[list[Example]]:
    """Return the first groups of the validation split, those whose pictures are looked at while training."""
    examples = read_split(data, "validation")
    shareable = [group for group in read_groups(groups / "validation.json", examples)[0] if len(group) > 1]
    return [[examples[row] for row in group[:MEMBERS]] for group in shareable[:GROUPS]]


def show(
    record: Run, pipeline: StableDiffusionPipeline, watched: list[list[Example]], settings: Finetune, step: int
) -> None:
    """Record shared pictures of the watched groups, a row each, from seeds that never change."""
    if record.id is None or not watched:
        return
    examples = [example for group in watched for example in group]
    places = iter(range(len(examples)))
    shared: Any = SharedSamplingPipeline.from_pipe(pipeline)
    images = shared(
        [example.text for example in examples],
        groups=[[next(places) for _ in group] for group in watched],
        share_ratio=sum(settings.share_ratios) / 2,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        seed=[prompt_seed(0, example.id) for example in examples],
    ).images
    width, height = images[0].size
    grid = Image.new("RGB", (MEMBERS * width, len(watched) * height), "white")
    remaining = iter(images)
    for row, group in enumerate(watched):
        for column in range(len(group)):
            grid.paste(next(remaining), (column * width, row * height))
    record.image(grid, "shared", step)


if __name__ == "__main__":
    run(main)
