"""Draw docs/strip.png for the README: real, independent and shared pictures of the same held-out prompts.

    scripts/run                   makes data/generated
    python -m benchmarks.strip

The groups are chosen by their captions alone, before any picture is looked at. Eligible is a group of three prompts
whose captions fit below the pictures, so that a reader can check each picture by eye.
Ordered by similarity, the groups at the three quartiles are drawn, with the first seed of section `generate`.
"""

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont

from flows.terminal import run
from sage.config import Generate, load_params
from sage.data.dataset import Example, read_split
from sage.data.shards import rgb
from sage.files import new_file

MEMBERS = 3
QUARTILES = (0.25, 0.5, 0.75)
TILE, GAP, GUTTER, MARGIN, LABELS = 128, 6, 30, 20, 210  # pixels
LINE = 20
LINES, LETTERS = 5, 16  # lines of a caption, and letters of a line
INK, GREY, ACCENT = "#1f2328", "#57606a", "#bc4c00"


def main(
    data: Annotated[Path, typer.Option(help="Prepared data.")] = Path("data/prepared"),
    groups: Annotated[Path, typer.Option(help="The groups of stage group.")] = Path("data/groups"),
    generated: Annotated[Path, typer.Option(help="The pictures of stage generate.")] = Path("data/generated"),
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("docs/strip.png"),
) -> None:
    """Choose the groups and draw the strip."""
    settings = load_params().generate
    chosen = choose(read_split(data, settings.split), groups / f"{settings.split}.json")
    for group in chosen:
        typer.echo(", ".join(member.text for member in group))
    with new_file(out) as temporary:
        draw(chosen, generated, settings).save(temporary, "PNG", optimize=True)
    typer.echo(f"wrote {out}")


def choose(examples: Sequence[Example], groups: Path) -> list[list[Example]]:
    """Return the eligible groups at the quartiles of similarity."""
    members = {example.id: example for example in examples}
    formed = json.loads(groups.read_text(encoding="utf-8"))["groups"]
    ordered = sorted(formed, key=lambda group: (group["similarity"], group["ids"]))
    found = [[members[id] for id in group["ids"]] for group in ordered]
    eligible = [
        group for group in found if len(group) == MEMBERS and all(len(lines(member.text)) <= LINES for member in group)
    ]
    return [eligible[int(quartile * len(eligible))] for quartile in QUARTILES]


def lines(caption: str) -> list[str]:
    """Return a caption in lines that are no wider than a picture."""
    return textwrap.wrap(caption, LETTERS)


def draw(groups: Sequence[Sequence[Example]], generated: Path, settings: Generate) -> Image.Image:
    """Return the strip: columns are prompts, rows are arms, captions and network evaluations below."""
    steps, seed = settings.steps, f"seed-{settings.seeds[0]}"
    shared = math.floor(settings.share_ratio * steps)
    cost = shared + MEMBERS * (steps - shared)
    arms = [
        (["real picture"], None),
        (["independent", f"{steps} steps each"], "independent"),
        (["shared, SAGE", f"{shared} shared steps,", f"{steps - shared} own steps each"], "sage"),
    ]
    width = MEMBERS * TILE + (MEMBERS - 1) * GAP
    left = [MARGIN + LABELS + place * (width + GUTTER) for place in range(len(groups))]
    bottom = MARGIN + len(arms) * (TILE + GAP)
    image = Image.new("RGB", (left[-1] + width + MARGIN, bottom + (LINES + 2) * LINE + MARGIN + 6), "white")
    canvas = ImageDraw.Draw(image)
    words, bold = ImageFont.load_default(16), ImageFont.load_default(22)

    for row, (label, arm) in enumerate(arms):
        top = MARGIN + row * (TILE + GAP)
        colour = ACCENT if arm == "sage" else INK
        for line, text in enumerate(label):
            y = top + TILE // 2 + LINE * (line - (len(label) - 1) / 2)
            canvas.text((MARGIN, y), text, GREY if line else colour, words if line else bold, anchor="lm")
        for start, group in zip(left, groups, strict=True):
            for place, member in enumerate(group):
                found = rgb(member.image if arm is None else generated / arm / seed / f"{member.id}.png")
                tile = found.resize((TILE, TILE), Image.Resampling.BICUBIC)
                image.paste(tile, (start + place * (TILE + GAP), top))

    canvas.text((MARGIN, bottom + LINE), "prompt", GREY, words, anchor="lm")
    canvas.text((MARGIN, bottom + (LINES + 2) * LINE), "network evaluations", GREY, words, anchor="lm")
    for start, group in zip(left, groups, strict=True):
        for place, member in enumerate(group):
            for line, text in enumerate(lines(member.text)):
                middle = start + place * (TILE + GAP) + TILE // 2
                canvas.text((middle, bottom + (line + 1) * LINE), text, INK, words, anchor="mm")
        rule = bottom + (LINES + 1) * LINE + 4
        canvas.line((start, rule, start + width, rule), "#d0d7de", 2)
        alone = MEMBERS * steps
        said = f"{alone} independent, {cost} shared ({1 - cost / alone:.0%} fewer)"
        canvas.text((start + width // 2, bottom + (LINES + 2) * LINE), said, INK, words, anchor="mm")
    return image


if __name__ == "__main__":
    run(main)
