"""Builds report/index.html, one self-contained page without scripts and external resources."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from flows.report.groups_page import groups_image
from flows.report.plots import DARK, LIGHT, curve_plots, quality_plot
from flows.report.sheet import sheet
from sage.data.accounting import Accounting
from sage.data.shards import ImageFile, rgb
from sage.evaluation import arms
from sage.evaluation.arms import ARMS, INDEPENDENT, JUDGED, SAME_NFE
from sage.evaluation.registry import BY_SIMILARITY, named
from sage.evaluation.registry import label as metric_label
from sage.evaluation.results import Results
from sage.evaluation.samples import Judged
from sage.training.curves import Point

_ACROSS, _HARDEST = 24, 6  # groups shown: a sample over all similarities, and those that lose most
_WORST, _UNREAD, _EXAMPLES = 12, 12, 3  # prompts shown, prompts of cut texts shown, files named for a rejection
_DASH = "\N{EN DASH}"
_THUMBNAIL = 128  # pixels at most


@dataclass(frozen=True)
class GroupRow:
    """One group as shown on the page.

    similarity: cosine of its least similar pair of prompts.
    saving: fraction of network evaluations saved.
    lost: loss of alignment compared with independent sampling.
    columns: headings of the images: "real", then the arms.
    prompts: for each prompt its text and one image per column.
    """

    similarity: float
    saving: float
    lost: float
    columns: list[str]
    prompts: list[tuple[str, list[Image.Image]]]


@dataclass(frozen=True)
class GroupRows:
    """All that the page shows of the groups.

    across: a sample of groups, from the least to the most similar.
    hardest: the groups that lose most alignment.
    sizes: for each group size, the numbers of groups and prompts, and the saving.
    seed: seed of the images.
    shareable: number of groups of two or more prompts.
    map: SVG map of all prompts.
    """

    across: list[GroupRow]
    hardest: list[GroupRow]
    sizes: list[dict[str, float]]
    seed: int
    shareable: int
    map: Markup


@dataclass(frozen=True)
class PromptRow:
    """One prompt as shown on the page.

    text: the prompt.
    score: alignment of the judged arm's images with it, the mean over seeds.
    columns: headings of the images: "real", then the arms.
    images: one image per column.
    """

    text: str
    score: float
    columns: list[str]
    images: list[Image.Image]


@dataclass(frozen=True)
class RunRows:
    """What the page shows of data and training, beside the results.

    accounting: what became of the input rows.
    unread: prompts that the text encoder does not read to their end, with the number of tokens left out, most first.
    worst: the prompts that the judged arm's images fit least.
    curves: plots of the losses of training; empty if they are not known.
    """

    accounting: Accounting
    unread: list[tuple[str, int]]
    worst: list[PromptRow]
    curves: list[Markup]


def run_rows(judged: Judged, fit: np.ndarray | None, accounting: Accounting, losses: Sequence[Point]) -> RunRows:
    """Return what the page shows of a run.

    judged      the images that were evaluated
    fit         alignment of the judged arm's images, (prompts, seeds); None if it was not drawn
    accounting  what became of the input rows
    losses      the losses of training, empty if they are not known
    """
    columns, scores = ["real", *judged.arms], np.empty(0) if fit is None else fit.mean(1)

    def row(k: int) -> PromptRow:
        images = [_open(judged.examples[k].image), *(_open(paths[k][0]) for paths in judged.arms.values())]
        return PromptRow(judged.examples[k].text, float(scores[k]), columns, images)

    text_of = {example.id: example.text for example in judged.examples}
    unread = sorted(((text_of[id], tokens) for id, tokens in judged.unread.items()), key=lambda pair: -pair[1])
    worst = np.argsort(scores, kind="stable")[:_WORST]
    return RunRows(accounting, unread, [row(int(k)) for k in worst], curve_plots(losses))


def group_rows(judged: Judged, saving: float, lost: Sequence[float], texts: np.ndarray) -> GroupRows:
    """Return the groups to show: every k-th group by similarity, and the groups that lose most alignment.

    `saving` is the fraction of network evaluations saved on the whole set. `lost` is the loss of alignment of each
    group compared with independent sampling. `texts` are the embeddings of the prompts, (prompts, width).
    """
    sizes = [len(group) for group in judged.groups]
    shareable = 1 - len(sizes) / sum(sizes)
    ratio = saving / shareable if shareable > 0 else 0.0
    several = sorted((k for k, size in enumerate(sizes) if size > 1), key=lambda k: judged.similarity[k])
    step = max(len(several) - 1, 1) / max(_ACROSS - 1, 1)
    across = sorted({round(place * step) for place in range(_ACROSS)} & set(range(len(several))))
    hardest = sorted(several, key=lambda k: -lost[k])[:_HARDEST]
    columns = ["real", *judged.arms]

    def row(k: int) -> GroupRow:
        members = judged.groups[k]
        images = [
            (
                judged.examples[m].text,
                [_open(judged.examples[m].image), *(_open(p[m][0]) for p in judged.arms.values())],
            )
            for m in members
        ]
        return GroupRow(judged.similarity[k], ratio * (1 - 1 / len(members)), lost[k], columns, images)

    by_size = [
        {"size": size, "groups": groups, "prompts": size * groups, "saving": ratio * (1 - 1 / size)}
        for size, groups in sorted(Counter(sizes).items())
    ]
    return GroupRows(
        [row(several[place]) for place in across],
        [row(k) for k in hardest],
        by_size,
        judged.seeds[0],
        len(several),
        groups_image([example.text for example in judged.examples], texts, judged.groups, judged.similarity),
    )


def build(results: Results, rows: GroupRows, run: RunRows) -> str:
    """Return the report page as HTML; all text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "percent": percent, "image": data_uri, "arm": arm_name}
    return environment.get_template("report.html.j2").render(
        r=results,
        rows=rows,
        run=run,
        most={"unread": _UNREAD, "examples": _EXAMPLES},
        metrics={
            name: metric
            for name, metric in named(results.features, results.alignment).items()
            if any(name in found for found in results.arms.values())
        },
        arms=ARMS.values(),
        judged=JUDGED,
        headline=headline(results),
        comparison=comparison(results),
        plots=[quality_plot(results, metric) for metric in BY_SIMILARITY],
        split=BY_SIMILARITY,
        independent=INDEPENDENT,
        light=LIGHT,
        dark=DARK,
    )


def samples(rows: Sequence[GroupRow], seed: int) -> dict[str, Any]:
    """Return the images of some groups as JSON values, which `sage compare` reads to show two runs side by side."""
    groups = [[{"text": text, "images": list(map(data_uri, images))} for text, images in row.prompts] for row in rows]
    return {"seed": seed, "columns": rows[0].columns if rows else [], "groups": groups}


def headline(results: Results) -> str:
    """Return the result in one sentence."""
    failed = [gate for gate in results.gates if not gate.passed]
    cost = f"{abs(results.saving):.0%} {'fewer' if results.saving >= 0 else 'more'} network evaluations"
    if results.passed:
        return f"SAGE draws these pictures with {cost}, and passes every gate."
    names = ", ".join(dict.fromkeys(metric_label(gate.metric, results.features, results.alignment) for gate in failed))
    return f"SAGE draws these pictures with {cost}, but fails {len(failed)} of {len(results.gates)} gates: {names}."


def comparison(results: Results) -> str | None:
    """Return a sentence that compares SAGE with independent sampling at the same cost; None if it was not measured."""
    figure = results.worse_by.get(SAME_NFE, {}).get("kernel_distance")
    if figure is None or figure.low is None or figure.high is None:
        return None
    distance = metric_label("kernel_distance", results.features)
    against = "independent sampling cut to the same number of evaluations"
    if figure.high < 0:
        return f"By {distance} it is better than {against}."
    if figure.low > 0:
        return f"By {distance} it is worse than {against}: fewer steps would have served better."
    return f"By {distance} there is no significant difference from {against}."


def number(value: float | None) -> str:
    """Return a number with about three significant digits, or a dash for None."""
    if value is None:
        return _DASH
    size = abs(value)
    digits = 1 if size >= 100 else 2 if size >= 1 else 3 if size >= 0.1 else 4
    return _typeset(f"{value:.{digits}f}")


def percent(value: float | None) -> str:
    """Return a fraction as a whole percentage, or a dash for None."""
    return _DASH if value is None else _typeset(f"{value:.0%}")


def _typeset(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def arm_name(arm: str) -> str:
    """Return the label of an arm, or of the real images."""
    return "Real" if arm == "real" else arms.label(arm)


def data_uri(image: Image.Image) -> str:
    """Return an image as a data URI of lossless WebP."""
    content = io.BytesIO()
    image.save(content, "WEBP", lossless=True, quality=60, method=4)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def group_sheet(row: GroupRow, scale: int = 2) -> Image.Image:
    """Return a group as one image, with a row per prompt and a column for the real image and each arm."""
    width, height = row.prompts[0][1][0].size
    headings = [arm_name(arm) for arm in row.columns]
    size = width * scale, height * scale
    return sheet([images for _, images in row.prompts], size=size, gap=6, headings=headings)


def _open(image: ImageFile) -> Image.Image:
    small = rgb(image)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return small
