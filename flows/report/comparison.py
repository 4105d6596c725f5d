"""The page of `sage compare RUN RUN`: two runs side by side in one self-contained HTML file."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flows.report.page import number, percent
from flows.tracking.recorded import Recorded
from sage.evaluation import arms
from sage.evaluation.arms import INDEPENDENT, JUDGED
from sage.evaluation.registry import METRICS
from sage.evaluation.results import Figure

_Arms = Mapping[str, Mapping[str, Figure]]
_COLUMNS = (INDEPENDENT, JUDGED)  # arms whose images are shown next to the real image


def build(first: Recorded, second: Recorded) -> str:
    """Return the page as HTML; all text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "percent": percent, "arm": arms.label}
    left, right = first.evaluate, second.evaluate
    rows, why_not = images(first.samples, second.samples)
    return environment.get_template("comparison.html.j2").render(
        runs=[facts(first), facts(second)],
        same_set=left.set.digest == right.set.digest,
        params=differing(first.params, second.params),
        figures=list(figures(left.arms, right.arms)),
        gates=[run.gates for run in (left, right)],
        metrics=METRICS,
        judged=JUDGED,
        rows=rows,
        why_not=why_not,
        columns=_COLUMNS,
    )


def facts(run: Recorded) -> dict[str, str]:
    """Return id, start, duration and tags of a run, as text by heading."""
    started = datetime.fromtimestamp(run.start, UTC).strftime("%Y-%m-%d %H:%M UTC")
    known = {"Run": run.id, "Started": started}
    if run.seconds is not None:
        known["Took"] = f"{run.seconds:.0f} s"
    return known | {key.removeprefix("mlflow.source."): value for key, value in sorted(run.tags.items())}


def differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return name and both values of every parameter that differs, or that only one run has."""
    none = "\N{EN DASH}"
    return [
        (key, first.get(key, none), second.get(key, none))
        for key in sorted({*first, *second})
        if first.get(key) != second.get(key)
    ]


def figures(first: _Arms, second: _Arms) -> Iterator[tuple[str, str, Figure, Figure, str]]:
    """Yield (arm, metric, figure, figure, verdict) for each figure that either run measured; the judged arm first."""
    nothing = Figure(value=None, low=None, high=None, n=0)
    for arm in sorted(dict.fromkeys((*first, *second)), key=lambda arm: arm != JUDGED):
        for metric in METRICS:
            a, b = (run.get(arm, {}).get(metric, nothing) for run in (first, second))
            if a.value is not None or b.value is not None:
                yield arm, metric, a, b, verdict(a, b)


def verdict(first: Figure, second: Figure) -> str:
    """Compare two figures by their intervals: "equal" values, intervals "apart", or "overlap"; "" without intervals."""
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return ""
    if first.value == second.value:
        return "equal"
    return "apart" if first.high < second.low or second.high < first.low else "overlap"


def images(first: Any, second: Any) -> tuple[list[dict[str, Any]], str]:
    """Return a row for each prompt with images in both runs, and "", or no rows and the reason."""
    if first is None or second is None:
        return [], "A run keeps no pictures of its prompts; runs of older versions keep none."
    if first["seed"] != second["seed"]:
        return [], f"The pictures kept are of seed {first['seed']} and seed {second['seed']}: they cannot be compared."
    drawn = [_by_prompt(samples) for samples in (first, second)]
    rows = [
        {
            "text": text,
            "real": kept.get("real"),
            "images": [[side[text].get(arm) for arm in _COLUMNS] for side in drawn],
        }
        for text, kept in drawn[0].items()
        if text in drawn[1]
    ]
    return rows, "" if rows else "The runs share no prompt among the pictures that they keep."


def _by_prompt(samples: Any) -> dict[str, dict[str, str]]:
    return {
        prompt["text"]: dict(zip(samples["columns"], prompt["images"], strict=True))
        for group in samples["groups"]
        for prompt in group
    }
