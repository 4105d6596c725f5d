"""Stage group: form groups of similar prompts in each split."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows import preflight
from flows.machine import embedding_cache
from flows.terminal import progress, run
from flows.tracking.runs import stage_run
from sage.config import load_params
from sage.data.dataset import SPLITS, load_pixels, read_split
from sage.data.groups import write_groups
from sage.files import new_folder, sha256_tree, write_json
from sage.grouping.boilerplate import distinct
from sage.grouping.doubts import doubts
from sage.grouping.embedding import embed
from sage.grouping.groups import usable, worst_similarity
from sage.grouping.policy import ENCODER, Policy, figures
from sage.sampling.plan import shared_steps


def main(
    data: Annotated[Path, typer.Option(help="Prepared data.")],
    base: Annotated[Path, typer.Option(exists=True, help="The model whose measured damage group.max_damage reads.")],
    out: Annotated[Path, typer.Option(help="Folder to write: a JSON file of groups for each split.")],
    metrics: Annotated[Path, typer.Option(help="JSON file of figures to write.")],
) -> None:
    """Group the prompts of every split; write groups and figures."""
    params = load_params()
    preflight.check_judging(params, data)
    settings = params.group
    policy = Policy(**settings.model_dump())
    steps = params.generate.steps
    shared = shared_steps(params.generate.share_ratio, steps)
    results = {}
    pipe: Any = None
    drawing = {"steps": steps, "guidance_scale": params.generate.guidance_scale}
    drawing["batch_size"] = params.generate.batch_size
    if policy.by == "distilled":
        from sage.grouping.distilled import read_distilled

        encoder = read_distilled(base)
    if policy.by in ("prediction", "distilled"):
        from flows.drawing import first_predictions, open_pipeline  # late: groups by text need no network

        # Nothing is evaluated for a distilled encoder, but the pipeline tells whether it was made for this scheduler.
        on = "cpu" if policy.by == "distilled" else None
        pipe = open_pipeline(base, on, params.generate.scheduler, params.generate.precision)
    with stage_run("group", settings.model_dump(exclude_none=True)) as record, new_folder(out) as folder:
        record.dataset("prepared", sha256_tree(data), "grouping")
        for split in SPLITS:
            examples = read_split(data, split)
            texts = [example.text for example in examples]
            keys = [example.image.bucket for example in examples]  # a group shares latents, so its images have one size
            evaluations = {}
            with progress(len(examples), f"embedding {split}") as advance:
                if pipe is not None:
                    pixels = dict(zip(("height", "width"), load_pixels(examples[:1]).shape[1:3], strict=True))
                if policy.by == "distilled":
                    made_for = pipe.made_for(steps, params.generate.guidance_scale, **pixels)
                    embeddings = encoder.check(made_for).embed(texts, progress=advance)
                elif policy.by == "prediction":
                    found = first_predictions(pipe, texts, drawing, pixels)
                    embeddings, evaluations = found.embeddings(), {"network_evaluations": found.network_evaluations}
                    advance(len(examples))
                else:
                    embeddings = embed(distinct(texts), ENCODER, cache=embedding_cache(), progress=advance)
            threshold = policy.choose_threshold(embeddings, shared / steps, base, texts, keys)
            for doubt in doubts(texts, embeddings, threshold, policy.by):
                typer.echo(f"{split}: {doubt}")
            groups = policy.form(texts, embeddings, threshold, keys)
            worst = worst_similarity(embeddings, groups)
            path, size = folder / f"{split}.json", settings.max_size
            write_groups(path, groups, worst, examples, encoder=policy.space, threshold=threshold, max_size=size)
            results[split] = figures(groups, worst) | {"unusable": int((~usable(embeddings)).sum())} | evaluations
        flat = {f"{split}.{name}": value for split, values in results.items() for name, value in values.items()}
        record.metrics(flat)
        write_json(metrics, results)
        _table(results, shared, steps)
        for doubt in preflight.cost_doubts(params, {split: found["saving"] for split, found in results.items()}):
            typer.echo(f"warning: {doubt}", err=True)
        record.result(metrics)


def _table(results: dict[str, dict[str, float]], shared: int, steps: int) -> None:
    """Print the figures of each split, and the saving of a model that shares `shared` of its `steps`."""
    names = {"prompts": "prompts", "groups": "groups", "mean_size": "mean size", "worst_similarity": "worst pair"}
    table = Table("split", *names.values(), "saving", title=f"groups, and what sharing {shared} of {steps} steps saves")
    for split, found in results.items():
        table.add_row(split, *(f"{found[name]:g}" for name in names), f"{found['saving'] * shared / steps:.1%}")
    Console().print(table)


if __name__ == "__main__":
    run(main)
