"""Where more steps stop to buy quality: the base model's distances against steps, on the validation split.

    python -m benchmarks.knee --steps 1,2,4,8,20 --guidance-scale 3

Chosen on validation, never on the held-out test split. State is kept, so a second call makes only what is missing.
"""

from pathlib import Path
from typing import Annotated

import sage.torchvision_ops  # noqa: F401

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from rich.console import Console
from rich.table import Table

from benchmarks.judged import Seen
from flows.drawing import open_pipeline
from flows.terminal import progress, run
from sage.config import load_params
from sage.data.dataset import Example, load_pixels, read_split
from sage.evaluation.bootstrap import value
from sage.evaluation.distances import frechet_statistic, kernel_statistic
from sage.evaluation.registry import METRICS
from sage.files import new_file
from sage.grouping.cost import model_digest
from sage.sampling.seeds import prompt_seed
from sage.training.pretraining import restored

SEEDS = (0, 1)


def main(
    model: Annotated[Path, typer.Option(help="A model folder.")] = Path("models/base"),
    data: Annotated[Path, typer.Option(help="Prepared data.")] = Path("data/prepared"),
    steps: Annotated[str, typer.Option(help="Numbers of steps.")] = "1,2,3,4,6,8,10,14,20",
    guidance_scale: Annotated[float, typer.Option(help="Guidance scale.")] = 1.0,
    work: Annotated[Path, typer.Option(help="Where features are kept.")] = Path("work/knee"),
) -> None:
    """Print kernel distance, Frechet distance and attributes right of independent sampling for each number of steps."""
    examples = read_split(data, "validation")
    see = Seen()
    real = see.real(examples)
    each = [[place] for place in range(len(examples))]
    names = [*(METRICS[name].label for name in ("kernel_distance", "frechet_distance")), "attributes right"]
    table = Table("steps", *names, title=f"n = {len(examples)}")
    scheduler = load_params().generate.scheduler
    digest = f"{model_digest(model)[:16]}-{scheduler or 'own'}"

    def row(name: str, rows: np.ndarray) -> None:
        features = rows[:, :-1].reshape(len(examples), -1, rows.shape[-1] - 1)
        kernel, frechet = (
            value(statistic(real[:, None, :-1], features, each), len(each))
            for statistic in (kernel_statistic, frechet_statistic)
        )
        table.add_row(name, f"{kernel:.4g}", f"{frechet:.4g}", f"{rows[:, -1].mean():.4f}")

    row("the pictures themselves", real)
    row("through the autoencoder", see(examples, through_autoencoder(model, examples)))
    for count in map(int, steps.split(",")):
        kept = work / f"{digest}-{guidance_scale}-{count}.npy"
        if not kept.exists():
            each_seed = [example for example in examples for _ in SEEDS]
            rows = see(each_seed, sample(model, examples, count, guidance_scale, scheduler))
            with new_file(kept) as temporary, temporary.open("wb") as file:
                np.save(file, rows)
        row(str(count), np.load(kept))
    Console().print(table)


def through_autoencoder(model: Path, examples: list[Example]) -> list[np.ndarray]:
    """Return the real pictures after encoding and decoding: no steps can do better."""
    network = AutoencoderKL.from_pretrained(model / "vae").eval()
    x = restored(network, torch.from_numpy(load_pixels(examples)))
    return list(((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())


def sample(
    model: Path, examples: list[Example], steps: int, guidance_scale: float, scheduler: str | None
) -> list[np.ndarray]:
    """Return pictures of shape (height, width, 3), prompt by prompt, every prompt's seeds together."""
    pipe = open_pipeline(model, scheduler=scheduler)
    images: dict[tuple[int, int], np.ndarray] = {}
    with progress(len(examples) * len(SEEDS), f"{steps} steps") as advance:
        for seed in SEEDS:
            stream = pipe.stream(
                [example.text for example in examples],
                share_ratio=0,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                seed=[prompt_seed(seed, example.id) for example in examples],
                batch_size=64,
            )
            for result in stream:
                images[result.index, seed] = np.asarray(result.image)
                advance(1)
    return [images[place, seed] for place in range(len(examples)) for seed in SEEDS]


if __name__ == "__main__":
    run(main)
