"""The plots of the report: SVG whose colours are variables of the page, so that they follow its light or dark theme.

They hold numbers and fixed labels only, so nothing in them has to be escaped.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from markupsafe import Markup

from sage.evaluation.arms import ARMS, JUDGED
from sage.evaluation.registry import METRICS, Metric, named
from sage.evaluation.results import Figure, Results
from sage.training.curves import HELD_OUT, TRAINING, Point

# Placeholder colours, replaced by variables of the page.
_INK, _SOFT, _PAPER = "#010203", "#040506", "#070809"
_ARM_COLOURS = {arm: f"#0a0b{number:02x}" for number, arm in enumerate(ARMS, 1)}
# Lines of curves have the colours of the arms, then that of a failure.
_LINES = {name: f"#0c0d{number:02x}" for number, name in enumerate((*ARMS, "bad"), 1)}
# Colours of the arms in the light and the dark theme; arms without a colour are grey.
LIGHT = dict(zip(ARMS, ("#3c6fb4", "#c2741a", "#8a63b8", "#17794a"), strict=False))
DARK = dict(zip(ARMS, ("#7fb0f2", "#f0a856", "#c3a1ec", "#5fd39a"), strict=False))
_MOST_POINTS = 150  # of a line; more are averaged


def quality_plot(results: Results, metric: str) -> Markup:
    """Return a plot of a metric against cost: each arm is a point with its interval, real images are a band."""
    mark = (results.real | results.floor).get(metric)
    about = named(results.features, results.alignment)[metric]
    return _svg(metric, partial(_draw_quality, metric=about, measured=results.arms, mark=mark))


def curve_plots(points: Sequence[Point]) -> list[Markup]:
    """Return a plot of the training losses and, if there are any, of the held-out ones and of their timestep bands."""
    banded = [one for one in points if one.set == HELD_OUT and _band(one.term)]
    base = {one.term: one.value for one in reversed(banded)}  # the first measurement, before the first step
    relative = [replace(one, value=one.value / (base[one.term] or 1.0)) for one in banded]
    parts = {
        "Training loss": [one for one in points if one.set == TRAINING],
        "Held-out loss": [one for one in points if one.set == HELD_OUT and not _band(one.term)],
        "Held-out loss by timesteps (base model: 1)": relative,
    }
    return [_svg(title, partial(_draw_curves, title=title, points=part)) for title, part in parts.items() if part]


def _band(term: str) -> bool:
    """Return whether a held-out term is plain diffusion in a band of timesteps, such as t0_249."""
    return term[:1] == "t" and term[1:].replace("_", "").isdecimal()


def _svg(salt: str, draw: Callable[[Any], None]) -> Markup:
    """Return what a function draws on axes as SVG; ids in it differ if `salt` does."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "font.family": "sans-serif"}
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    with mpl.rc_context(settings):
        canvas = Canvas(figsize=(3.9, 2.9), layout="constrained")
        axes = canvas.subplots()
        axes.grid(color=_SOFT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(color=_SOFT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_SOFT)
        draw(axes)
        content = io.StringIO()
        canvas.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    colours = {_INK: "var(--ink)", _SOFT: "var(--line)", _PAPER: "var(--soft)"}
    colours |= {colour: f"var(--{name})" for name, colour in (*_ARM_COLOURS.items(), *_LINES.items())}
    for placeholder, colour in colours.items():
        svg = svg.replace(placeholder, colour)
    return Markup(svg)  # noqa: S704 - contains only numbers and fixed labels, no captions


def _draw_quality(axes: Any, metric: Metric, measured: Mapping[str, Mapping[str, Figure]], mark: Figure | None) -> None:
    axes.set_title(f"{metric.title} ({metric.direction})", fontsize=10, loc="left")
    axes.set_xlabel(METRICS["nfe_per_image"].label)
    if mark is not None and mark.low is not None:
        axes.axhspan(mark.low, mark.high, color=_PAPER, linewidth=0)
    for arm, figures in measured.items():
        figure = figures[metric.name]
        if figure.low is None:
            continue
        x, colour = figures["nfe_per_image"].value, _ARM_COLOURS.get(arm, _INK)
        axes.vlines(x, figure.low, figure.high, color=colour, linewidth=1.6)
        marker = "D" if arm == JUDGED else "o"
        axes.plot(x, figure.value, marker, color=colour, markersize=7, linestyle="none")
    axes.margins(x=0.25)


def _draw_curves(axes: Any, title: str, points: Sequence[Point]) -> None:
    """Draw a line for each term; the lowest held-out loss, where overfitting would begin, gets a mark."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("training step")
    colours = list(_LINES.values())
    for number, term in enumerate(dict.fromkeys(one.term for one in points)):
        line = [one for one in points if one.term == term]
        steps, values = zip(*thinned([(one.step, one.value) for one in line]), strict=True)
        colour = colours[number % len(colours)]
        mark = "o" if len(steps) < 20 else None
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=mark, markersize=3, label=_label(term))
        if term == "loss" and line[0].set == HELD_OUT:
            least = min(line, key=lambda one: one.value)
            axes.plot(least.step, least.value, "D", color=colour, markersize=7)
    axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)


def _label(term: str) -> str:
    if _band(term):
        first, last = term[1:].split("_")
        return f"timesteps {first} to {last}"
    return {"loss": "whole loss", "branch": "branch phase", "shared": "shared phase"}.get(term, term)


def thinned(line: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return at most `_MOST_POINTS` points of a line: means of equally many consecutive ones."""
    width = -(-len(line) // _MOST_POINTS)
    runs = (list(run) for _, run in groupby(enumerate(line), key=lambda numbered: numbered[0] // width))
    return [(_mean([at for _, (at, _) in run]), _mean([value for _, (_, value) in run])) for run in runs]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
