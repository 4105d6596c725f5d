"""Stage group: the prompts of each split to groups of similar prompts."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from flows.terminal import progress, run
from flows.tracking.runs import stage_run
from sage.config import Group, load_params
from sage.data.dataset import SPLITS, read_split
from sage.data.groups import write_groups
from sage.evaluation.damage import read_damage
from sage.files import new_folder, sha256_tree, write_json
from sage.grouping.embedding import embed
from sage.grouping.groups import Groups, group, tree, usable, worst_similarity
from sage.grouping.guard import guard
from sage.grouping.thresholds import threshold_for_saving

ENCODER = "minilm"
# A budget takes no pair below: unrelated prompts of MiniLM lie around 0.
FLOOR = 0.0


def main(
    data: Annotated[Path, typer.Option(help="Prepared data.")],
    base: Annotated[Path, typer.Option(help="The model whose measured damage a quality bound reads.")],
    out: Annotated[Path, typer.Option(help="One JSON file of groups a split.")],
    metrics: Annotated[Path, typer.Option(help="Where the figures go.")],
) -> None:
    """Group the prompts of every split and write groups and figures."""
    params = load_params()
    settings = params.group
    results = {}
    with stage_run("group", settings.model_dump(exclude_none=True)) as record, new_folder(out) as folder:
        record.dataset("prepared", sha256_tree(data), "grouping")
        for split in SPLITS:
            examples = read_split(data, split)
            texts = [example.text for example in examples]
            with progress(len(examples), f"embedding {split}") as advance:
                embeddings = embed(texts, ENCODER, cache=cache(), progress=advance)
            threshold = choose_threshold(settings, embeddings, params.generate.share_ratio, base)
            groups = form(settings, texts, embeddings, threshold)
            worst = worst_similarity(embeddings, groups)
            path, size = folder / f"{split}.json", settings.max_size
            write_groups(path, groups, worst, examples, encoder=ENCODER, threshold=threshold, max_size=size)
            results[split] = figures(groups, worst) | {"unusable": int((~usable(embeddings)).sum())}
        flat = {f"{split}.{name}": value for split, values in results.items() for name, value in values.items()}
        record.metrics(flat)
        write_json(metrics, results | {"run_id": record.id})


def cache() -> Path:
    """Return where this machine keeps embeddings: in the folder SAGE_CACHE, or work/cache."""
    return Path(os.environ.get("SAGE_CACHE", "work/cache")) / "embeddings.sqlite"


def choose_threshold(
    settings: Group, embeddings: np.ndarray, share_ratio: float, model: Path = Path("models/base")
) -> float:
    """Return the threshold that the settings give, or that their budget or their bound on a model's damage asks for."""
    if settings.saving is not None:
        nested = tree(embeddings, FLOOR, settings.max_size, settings.near_duplicate)
        return threshold_for_saving(nested, settings.saving, share_ratio)
    if settings.quality is not None:
        return read_damage(model, share_ratio, settings.max_size).threshold(settings.quality)
    assert settings.threshold is not None  # the configuration has exactly one of the three
    return settings.threshold


def form(settings: Group, texts: Sequence[str], embeddings: np.ndarray, threshold: float) -> Groups:
    """Return the groups of some prompts under the settings' cap, rule for near-duplicates and guard."""
    groups = group(embeddings, threshold, settings.max_size, settings.near_duplicate)
    return guard(texts, groups, settings.guard) if settings.guard else groups


def figures(groups: Groups, worst: list[float]) -> dict[str, float]:
    """Return how many groups of what size, how unlike inside, and the saving at share ratio 1."""
    prompts = sum(map(len, groups))
    return {
        "prompts": prompts,
        "groups": len(groups),
        "mean_size": round(prompts / max(len(groups), 1), 4),
        "worst_similarity": round(min(worst, default=1.0), 4),
        "saving": round(1 - len(groups) / max(prompts, 1), 4),
    }


if __name__ == "__main__":
    run(main)
