"""`sage group PROMPTS`: the groups of a list of prompts, the saving at several share ratios, and a page with a map."""

from pathlib import Path
from typing import Annotated

import typer

from flows.machine import embedding_cache
from flows.prompts.files import Expand, Literal, Wildcards, read_prompts, syntax
from flows.report.groups_page import groups_page
from flows.terminal import finite, progress, run
from sage.config import load_params
from sage.errors import DataError
from sage.files import write_text
from sage.grouping.boilerplate import distinct
from sage.grouping.doubts import doubts
from sage.grouping.embedding import embed
from sage.grouping.groups import worst_similarity
from sage.grouping.guard import KINDS
from sage.grouping.policy import ENCODER, By, Policy, figures
from sage.sampling.plan import shared_steps

_RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6)
_WIDEST = 5


def main(
    prompts: Annotated[
        str, typer.Argument(help="A list of prompts: .txt, .jsonl, .csv, .tsv, or - for standard input.")
    ],
    page: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("work/groups.html"),
    threshold: Annotated[
        float | None, typer.Option(min=-1, max=1, callback=finite, help="Instead of what params.yaml asks for.")
    ] = None,
    max_size: Annotated[int | None, typer.Option(min=1, help="Instead of what params.yaml asks for.")] = None,
    by: Annotated[
        By | None,
        typer.Option(
            help="Compare texts, the model's first predictions, which cost an evaluation each, or what `sage distil` "
            "learned of these; else as params.yaml."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="The model that predicts, was distilled, or has the measured damage that group.max_damage reads; else "
            "base."
        ),
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Never group prompts that differ in this: {', '.join(KINDS)}. Can be repeated.",
            callback=lambda kinds: _known(kinds),
        ),
    ] = None,
    expand: Expand = None,
    wildcards: Wildcards = None,
    literal: Literal = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random prompts of --expand N.")] = 0,
) -> None:
    """Group the prompts of a file; print the saving and the least similar groups, and write a page with a map."""
    params = load_params()
    model = model or Path(params.base)
    items = read_prompts(prompts, syntax(expand, wildcards, literal, seed))
    for item in items:
        if item.error is not None:
            typer.echo(f"not grouped: {item.id}: {item.error}", err=True)
    texts = [item.prompt for item in items if item.error is None]
    keys = [item.share_key for item in items if item.error is None]
    if not texts:
        raise DataError(
            f"{prompts} has no prompt" + (f": {items[0].error}" if items else "; write one prompt per line")
        )
    given = {"max_size": max_size, "guard": guard, "by": by}
    settings = params.group.model_copy(update={name: value for name, value in given.items() if value is not None})
    policy = Policy(**settings.model_dump())
    if policy.by == "distilled":
        from flows.drawing import open_pipeline
        from sage.grouping.distilled import read_distilled

        encoder = read_distilled(model)
        pipe = open_pipeline(model, "cpu", params.generate.scheduler)
        encoder.check(pipe.made_for(params.generate.steps, params.generate.guidance_scale))
        with progress(len(texts), "embedding") as advance:
            embeddings = encoder.embed(texts, progress=advance)
    elif policy.by == "prediction":
        from flows.drawing import first_predictions, open_pipeline

        pipe = open_pipeline(model, scheduler=params.generate.scheduler)
        embeddings = first_predictions(pipe, texts, params.generate.model_dump()).embeddings()
    else:
        with progress(len(texts), "embedding") as advance:
            embeddings = embed(distinct(texts), ENCODER, cache=embedding_cache(), progress=advance)
    steps = params.generate.steps
    if threshold is None:
        ratio = shared_steps(params.generate.share_ratio, steps) / steps
        threshold = policy.choose_threshold(embeddings, ratio, model, texts, keys)
    groups = policy.form(texts, embeddings, threshold, keys)
    worst = worst_similarity(embeddings, groups)
    values = figures(groups, worst)
    summary = (
        f"{values['prompts']} prompts in {values['groups']} groups at cosine {threshold:.4g} "
        f"(mean size {values['mean_size']:.2f}, worst pair {values['worst_similarity']:.3f})"
    )
    typer.echo(summary)
    for doubt in doubts(texts, embeddings, threshold, policy.by):
        typer.echo(doubt)
    _tables(texts, groups, worst, values["saving"], sorted({*_RATIOS, params.generate.share_ratio}), steps)
    write_text(page, groups_page("Groups of prompts", summary, texts, embeddings, groups, worst))
    typer.echo(f"wrote {page}")


def _known(kinds: list[str] | None) -> list[str] | None:
    if unknown := sorted(set(kinds or ()) - set(KINDS)):
        raise typer.BadParameter(f"unknown kinds: {', '.join(unknown)}; the kinds are {', '.join(KINDS)}")
    return kinds


def _tables(
    texts: list[str], groups: list[list[int]], worst: list[float], saving: float, ratios: list[float], steps: int
) -> None:
    """Print what the groups save at several share ratios, in whole steps, their sizes, and the least similar ones."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    shared = {ratio: shared_steps(ratio, steps) for ratio in ratios}
    savings = Table("share ratio", *(f"{ratio:g}" for ratio in ratios), title="network evaluations saved")
    savings.add_row(f"steps of {steps}", *(str(count) for count in shared.values()))
    savings.add_row("saving", *(f"{count / steps * saving:.1%}" for count in shared.values()))
    console.print(savings)
    sizes = Table("prompts per group", "groups", title="sizes")
    counts: dict[int, int] = {}
    for members in groups:
        counts[len(members)] = counts.get(len(members), 0) + 1
    for size in sorted(counts):
        sizes.add_row(str(size), str(counts[size]))
    console.print(sizes)
    loose = sorted((value, members) for value, members in zip(worst, groups, strict=True) if len(members) > 1)
    if loose:
        widest = Table("worst pair", "prompts", title="the least similar groups")
        for value, members in loose[:_WIDEST]:
            # Text, not markup, because prompts may contain brackets; control characters could garble the terminal.
            lines = ("".join(c if c.isprintable() else " " for c in texts[member][:100]) for member in members)
            widest.add_row(f"{value:.3f}", Text("\n".join(lines)))
        console.print(widest)


if __name__ == "__main__":
    run(main)
