"""Stage group: the prompts of each split to groups of similar prompts."""

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import progress, run
from flows.tracking import stage_run
from sage.config import load_params
from sage.data import SPLITS, read_split
from sage.embedding import embed
from sage.files import new_folder, sha256_tree, write_json
from sage.grouping import Groups, group, worst_similarity

ENCODER = "minilm"


def main(
    data: Annotated[Path, typer.Option(help="Prepared data.")],
    out: Annotated[Path, typer.Option(help="One JSON file of groups a split.")],
    metrics: Annotated[Path, typer.Option(help="Where the figures go.")],
) -> None:
    """Group the prompts of every split and write groups and figures."""
    settings = load_params().group
    results = {}
    with stage_run("group", settings.model_dump()) as record, new_folder(out) as folder:
        record.dataset("prepared", sha256_tree(data), "grouping")
        for split in SPLITS:
            examples = read_split(data, split)
            with progress(len(examples), f"embedding {split}") as advance:
                embeddings = embed([example.text for example in examples], ENCODER, cache=cache(), progress=advance)
            groups = group(embeddings, settings.threshold, settings.max_size)
            worst = worst_similarity(embeddings, groups)
            write_json(
                folder / f"{split}.json",
                {
                    "encoder": ENCODER,
                    "threshold": settings.threshold,
                    "max_size": settings.max_size,
                    # Rounded: the encoder's last bits depend on which prompts it met together.
                    "groups": [
                        {"ids": [examples[member].id for member in members], "similarity": round(similarity, 4)}
                        for members, similarity in zip(groups, worst, strict=True)
                    ],
                },
            )
            results[split] = _figures(groups, worst)
        flat = {f"{split}.{name}": value for split, values in results.items() for name, value in values.items()}
        record.metrics(flat)
        write_json(metrics, results | {"run_id": record.id})


def cache() -> Path:
    """Return where this machine keeps embeddings: in the folder SAGE_CACHE, or work/cache."""
    return Path(os.environ.get("SAGE_CACHE", "work/cache")) / "embeddings.sqlite"


def _figures(groups: Groups, worst: list[float]) -> dict[str, float]:
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
