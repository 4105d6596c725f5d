"""Trees of groups, prompts and seeds: what each plan costs and how good its images are, on the validation split.

    python -m benchmarks.seeds                          the base model, 72 prompts with four seeds each
    python -m benchmarks.seeds --model models/sage --prompts 279

Both commands keep what was drawn in work/seeds, in files of a few groups, and go on from there when they are repeated.
Groups by text are those of params.yaml; groups by first prediction are as many, of the same prompts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import sage.torchvision_ops

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import sage
from benchmarks.judged import Seen, as_features
from flows.drawing import batches, first_predictions, open_pipeline
from flows.terminal import progress, run
from sage.config import load_params
from sage.data.dataset import Example, read_split
from sage.evaluation.figures import Bootstrap, arm_figures, statistics
from sage.evaluation.results import Figure
from sage.files import digest, new_file, sha256_tree
from sage.grouping.boilerplate import distinct
from sage.grouping.cost import model_digest
from sage.grouping.embedding import embed
from sage.grouping.groups import Groups
from sage.grouping.policy import Policy
from sage.sampling.first_prediction import FirstPredictions
from sage.sampling.plan import Plan
from sage.sampling.seeds import prompt_seed

METRICS = ("kernel_distance", "alignment", "group_diversity", "seed_diversity")
_PIECE = 12  # prompts that are drawn and kept together


@dataclass(frozen=True)
class Point:
    """A plan: steps, the steps that groups and that images of a prompt share, and what the groups are formed by."""

    name: str
    steps: int
    group_steps: int = 0
    image_steps: int = 0
    by: str = "text"


POINTS = (
    Point("independent", 6),
    Point("independent", 5),
    Point("independent", 4),
    Point("a prompt's seeds share step 1", 6, image_steps=1),
    Point("a prompt's seeds share 2 steps", 6, image_steps=2),
    Point("groups share 2 steps, each seed apart", 6, group_steps=2),
    Point("groups share 2 steps, seeds step 1", 6, group_steps=2, image_steps=1),
    Point("groups with seeds share step 1, seeds 2 steps", 6, group_steps=1, image_steps=2),
    Point("groups with seeds share 2 steps", 6, group_steps=2, image_steps=2),
    Point("groups share 2 steps, seeds step 1", 6, group_steps=2, image_steps=1, by="prediction"),
    Point("groups with seeds share step 1, seeds 2 steps", 6, group_steps=1, image_steps=2, by="prediction"),
)


def main(
    model: Annotated[Path, typer.Option(help="A model folder.")] = Path("models/base"),
    data: Annotated[Path, typer.Option(help="Prepared data.")] = Path("data/prepared"),
    prompts: Annotated[int, typer.Option(min=12, help="Prompts, drawn once with seed 0.")] = 72,
    seeds: Annotated[int, typer.Option(min=2, help="Images of each prompt.")] = 4,
    work: Annotated[Path, typer.Option(help="Where features are kept.")] = Path("work/seeds"),
) -> None:
    """Print evaluations, distance, alignment and diversity of every plan, with 95% intervals over groups."""
    settings = load_params().generate
    everything = read_split(data, "validation")
    order = np.random.default_rng(0).permutation(len(everything))[:prompts]
    examples = [everything[place] for place in sorted(order.tolist())]
    texts = [example.text for example in examples]
    pipe = open_pipeline(model, scheduler=settings.scheduler)
    how = {"steps": 6, "guidance_scale": settings.guidance_scale, "batch_size": settings.batch_size}
    first = first_predictions(pipe, texts, how)
    groups = {"text": by_text(texts), "prediction": []}
    groups["prediction"] = by_prediction(texts, first, len(groups["text"]))
    see = Seen()
    bootstrap = Bootstrap.over(groups["text"], 1000, 0.95, 0)
    real = as_features(see.real(examples)[:, None])
    names = ["evaluations an image", *(name.replace("_", " ") for name in METRICS)]
    title = f"{len(texts)} prompts, {seeds} seeds, {len(groups['text'])} groups by text"
    table = Table("plan", "by", "steps", *names, title=title)
    identity: dict[str, Any] = {"model": model_digest(model), "data": sha256_tree(data / "validation")}
    identity |= {"prompts": texts, "seeds": seeds, "settings": settings.model_dump(), "code": _code()}
    for point in POINTS:
        found = groups[point.by]
        folder = work / digest(identity | asdict(point) | {"groups": found})[:16]
        images = as_features(draw(pipe, point, examples, found, first, seeds, settings, see, folder))
        values = arm_figures(statistics(real, images, groups["text"]), images, bootstrap)
        cells = [written(values[name]) for name in METRICS]
        nfe = evaluations(point, found, first, seeds) / (len(texts) * seeds)
        table.add_row(point.name, point.by, str(point.steps), f"{nfe:.2f}", *cells)
    Console(width=200).print(table)


def written(figure: Figure) -> str:
    """Return a figure with its interval; with too few groups it has none."""
    interval = "" if figure.low is None else f" ({figure.low:.4g} to {figure.high:.4g})"
    return f"{figure.value:.4g}{interval}"


def by_text(texts: Sequence[str]) -> Groups:
    """Return the groups of params.yaml, by text."""
    policy = Policy(**load_params().group.model_dump() | {"by": "text"})
    embeddings = embed(distinct(texts))
    return policy.form(texts, embeddings, policy.choose_threshold(embeddings, 1 / 3, Path("models/base"), texts))


def by_prediction(texts: Sequence[str], first: FirstPredictions, count: int) -> Groups:
    """Return about `count` groups by first prediction."""
    shipped = load_params().group
    policy = Policy(shipped.max_size, shipped.near_duplicate, saving=1 - count / len(texts), by="prediction")
    embeddings = first.embeddings()
    threshold = policy.choose_threshold(embeddings, 1.0)
    typer.echo(f"by text {count} groups; by prediction as many or fewer at cosine {threshold:.3f}")
    return policy.form(texts, embeddings, threshold)


def planned(point: Point, groups: Groups, seeds: int) -> Plan:
    """Return the plan of a point for these groups, which partition the prompts from 0 on."""
    return Plan.shared(groups, point.steps, point.group_steps / point.steps).repeat(seeds, point.image_steps)


def evaluations(point: Point, groups: Groups, first: FirstPredictions, seeds: int) -> int:
    """Return the network evaluations, without guidance, of all images, first predictions counted."""
    plan = planned(point, groups, seeds)
    extra = first.network_evaluations - len(plan.roots) * first.reusable if point.by == "prediction" else 0
    return plan.nfe(guidance=False) + extra


def draw(
    pipe: Any,
    point: Point,
    examples: Sequence[Example],
    groups: Groups,
    first: FirstPredictions,
    seeds: int,
    settings: Any,
    see: Seen,
    folder: Path,
) -> np.ndarray:
    """Return what is seen in all images of a point, (prompts, seeds, width + 1).

    pipe         pipeline for shared sampling
    point        the plan
    examples     the prompts
    groups       their groups
    first        their first predictions
    seeds        images of each prompt
    settings     the section generate of params.yaml
    see          what sees
    folder       where each piece is kept
    """
    found: dict[int, np.ndarray] = {}
    with progress(len(examples), f"{point.name}, by {point.by}, {point.steps} steps") as advance:
        for number, piece in enumerate(batches(groups, _PIECE)):
            members = [member for group in piece for member in group]
            path = folder / f"{number:04d}.npy"
            if not path.exists():
                place = {member: i for i, member in enumerate(members)}
                plan = Plan.shared(
                    [[place[m] for m in group] for group in piece], point.steps, point.group_steps / point.steps
                )
                stream = pipe.stream(
                    [examples[member].text for member in members],
                    plan=plan,
                    num_images_per_prompt=seeds,
                    image_steps=point.image_steps,
                    predictions=first.of(members) if point.by == "prediction" else None,
                    num_inference_steps=point.steps,
                    guidance_scale=settings.guidance_scale,
                    branch_noise=1.0,
                    seed=[prompt_seed(seed, examples[member].id) for member in members for seed in range(seeds)],
                    batch_size=settings.batch_size,
                )
                images = {result.index: np.asarray(result.image) for result in stream}
                each = [examples[member] for member in members for _ in range(seeds)]
                rows = see(each, [images[index] for index in range(len(images))])
                with new_file(path) as temporary, temporary.open("wb") as file:
                    np.save(file, rows.reshape(len(members), seeds, -1))
            found |= zip(members, np.load(path), strict=True)
            advance(len(members))
    return np.stack([found[member] for member in range(len(examples))])


def _code() -> str:
    return sha256_tree(Path(sage.__file__).parent / "sampling")


if __name__ == "__main__":
    run(main)
