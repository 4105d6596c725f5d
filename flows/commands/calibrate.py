"""`sage calibrate`: damage of sharing by similarity, measured on the validation split, stored with the model.

`group.max_damage` in params.yaml and `sage.plan_for_budget` read it. An interrupted run resumes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from flows.machine import device, embedding_cache
from flows.terminal import progress, run
from sage.config import load_params
from sage.data.dataset import Example, read_split
from sage.errors import DataError
from sage.evaluation import bootstrap
from sage.evaluation.damage import by_similarity, distances
from sage.files import digest, new_file, sha256_tree, write_json
from sage.grouping.boilerplate import distinct
from sage.grouping.cost import Damage, kept_at, kept_form, model_digest
from sage.grouping.embedding import embed
from sage.grouping.groups import Groups, group, worst_similarity
from sage.grouping.policy import ENCODER, Policy
from sage.sampling.seeds import prompt_seed

SPLIT = "validation"
THRESHOLDS = {
    "minilm": (0.4, 0.5, 0.6, 0.7, 0.8),
    "prediction": (0.84, 0.88, 0.92, 0.95, 0.98),
    "distilled": (0.86, 0.9, 0.93, 0.96, 0.98),
}
SEEDS = (0, 1)
_PARTS = 8  # at most, and at least two: a relation of damage and similarity needs two points
_PIECE = 64  # prompts that are kept together


def main(
    model: Annotated[
        Path | None,
        typer.Option(help="Model to measure: a folder, a .safetensors file or a pin; default: the base."),
    ] = None,
    data: Annotated[Path, typer.Option(help="Prepared data.")] = Path("data/prepared"),
    work: Annotated[Path, typer.Option(help="Folder for the state of an interrupted run.")] = Path("work/calibrate"),
) -> None:
    """Generate validation images with and without sharing, measure the damage by similarity, and store it."""
    params = load_params()
    model = model or Path(params.base)
    settings, grouping = params.generate, params.group
    examples = read_split(data, SPLIT)
    if not model.exists():
        raise DataError(
            f"there is no {model}; give a folder, a .safetensors file, or the pin that `sage base` writes for a model "
            "on a hub"
        )
    device()  # a missing device fails here, not after the embedding

    from sage.evaluation.extractors import EfficientNetLite0

    texts = [example.text for example in examples]
    policy = Policy(**grouping.model_dump())
    if policy.by == "prediction":
        from flows.drawing import first_predictions, open_pipeline

        pipe = open_pipeline(model, scheduler=settings.scheduler)
        embeddings = first_predictions(pipe, texts, settings.model_dump()).embeddings()
    elif policy.by == "distilled":
        from flows.drawing import open_pipeline
        from sage.grouping.distilled import read_distilled

        encoder = read_distilled(model)
        made_for = open_pipeline(model, "cpu", settings.scheduler).made_for(settings.steps, settings.guidance_scale)
        embeddings = encoder.check(made_for).embed(texts)
    else:
        embeddings = embed(distinct(texts), ENCODER, cache=embedding_cache())
    groups = groups_at(THRESHOLDS[policy.space], embeddings, grouping.max_size, grouping.near_duplicate)
    # Before anything is drawn: each part gets an interval.
    parts = min(_PARTS, len(groups) // bootstrap.LEAST_GROUPS)
    if parts < 2:
        raise DataError(
            f"the {SPLIT} split forms {len(groups)} groups, too few to measure what sharing costs: two parts of at "
            f"least {bootstrap.LEAST_GROUPS} are needed"
        )
    how: dict[str, Any] = {
        "split": SPLIT,
        "data": sha256_tree(data),
        "encoder": policy.space,
        "features": EfficientNetLite0.name,
        "thresholds": list(THRESHOLDS[policy.space]),
        "seeds": list(SEEDS),
        "scheduler": settings.scheduler,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "branch_noise": settings.branch_noise,
    }
    named = {"model": model_digest(model), "share_ratio": settings.share_ratio, "groups": groups}
    folder = work / digest(how | named)[:16]
    each = [[number] for number in range(len(examples))]
    features = draw(model, examples, each + groups, settings, folder)
    independent = np.concatenate(features[: len(each)])
    sums = [
        distances(shared, independent[members]) for members, shared in zip(groups, features[len(each) :], strict=True)
    ]
    above, below = (np.array([side.sum() for side in sides]) for sides in zip(*sums, strict=True))
    worst, sizes = np.array(worst_similarity(embeddings, groups)), np.array([len(members) for members in groups])
    damage = Damage(settings.share_ratio, grouping.max_size, by_similarity(worst, above, below, sizes, parts=parts))
    write_json(kept_at(model), kept_form(damage, model, how))
    _show(damage)
    typer.echo(f"wrote {kept_at(model)}")


def groups_at(thresholds: Sequence[float], embeddings: np.ndarray, max_size: int, near_duplicate: float) -> Groups:
    """Return the distinct groups of two or more prompts that form at any of the thresholds."""
    found = {tuple(members) for at in thresholds for members in group(embeddings, at, max_size, near_duplicate)}
    return [list(members) for members in sorted(found) if len(members) > 1]


def draw(model: Path, examples: Sequence[Example], groups: Groups, settings: Any, folder: Path) -> list[np.ndarray]:
    """Return each group's image features, shape (members, seeds, width); `folder` caches them in files."""
    pieces: list[Groups] = [[]]
    for members in groups:
        if sum(map(len, pieces[-1])) >= _PIECE:
            pieces.append([])
        pieces[-1].append(members)
    from flows.drawing import open_pipeline
    from sage.evaluation.extractors import EfficientNetLite0

    extract, pipe = None, None
    found: list[np.ndarray] = []
    with progress(sum(map(len, groups)), "images with and without sharing") as advance:
        for number, piece in enumerate(pieces):
            path = folder / f"{number:04d}.npy"
            if not path.exists():
                pipe = pipe or open_pipeline(model, scheduler=settings.scheduler)
                extract = extract or EfficientNetLite0(device())
                features = extract(_images(pipe, examples, piece, settings))
                with new_file(path) as temporary, temporary.open("wb") as file:
                    np.save(file, features)
            sizes = [len(members) for members in piece]
            rows = np.load(path).reshape(sum(sizes), len(SEEDS), -1)
            found += np.split(rows, np.cumsum(sizes)[:-1])
            advance(sum(sizes))
    return found


def _images(pipe: Any, examples: Sequence[Example], groups: Groups, settings: Any) -> list[np.ndarray]:
    """Return images ordered by group, then member, then seed."""
    members = [examples[member] for group in groups for member in group]
    ends = np.cumsum([len(group) for group in groups]).tolist()
    blocks = [list(range(end - len(group), end)) for group, end in zip(groups, ends, strict=True)]
    images: dict[tuple[int, int], np.ndarray] = {}
    for seed in SEEDS:
        stream = pipe.stream(
            [example.text for example in members],
            groups=blocks,
            share_ratio=settings.share_ratio,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            branch_noise=settings.branch_noise,
            seed=[prompt_seed(seed, example.id) for example in members],
            batch_size=settings.batch_size,
        )
        for result in stream:
            images[result.index, seed] = np.asarray(result.image)
    return [images[place, seed] for place in range(len(members)) for seed in SEEDS]


def _show(damage: Damage) -> None:
    table = Table("worst pair", "damage", "interval", "groups", "prompts", title=f"share ratio {damage.share_ratio}")
    for point in damage.points:
        interval = f"{point.low:+.3f} to {point.high:+.3f}"
        table.add_row(
            f"{point.similarity:.3f}", f"{point.damage:+.3f}", interval, str(point.groups), str(point.prompts)
        )
    Console().print(table)


if __name__ == "__main__":
    run(main)
