"""Schema, writer and reader of metrics/evaluate.json; gates, report and model registry all read results with it.

The reader is strict: it refuses a file that lacks a figure or has text or NaN instead of a number, and lists the
problems. A figure that could not be measured is null. Unknown keys are ignored, so that results of an older or a newer
version can still be compared.
"""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sage.errors import MetricError
from sage.evaluation import arms
from sage.evaluation.arms import INDEPENDENT, JUDGED
from sage.evaluation.registry import METRICS
from sage.files import new_file, write_json

_COST = "nfe_per_image"
SINGLE_PROMPTS = "single prompts"  # name of the part that holds all groups of one prompt
_SHOWN = 8  # at most so many problems of a file are listed


class _Strict(BaseModel):
    """Base of all models here: no type conversions, finite numbers only, immutable, unknown keys ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class Interval(_Strict):
    """A value and its interval; `value` is None if it cannot be measured, `low` and `high` if there is no interval."""

    value: float | None
    low: float | None
    high: float | None


class Figure(Interval):
    """A measured value with its interval and n, the number of images."""

    n: Annotated[int, Field(ge=0)]


_UNMEASURED = Interval(value=None, low=None, high=None)


class Difference(Figure):
    """How much worse the judged arm is than a reference (negative: better), absolute and relative to its value."""

    relative: Interval


class JudgedSet(_Strict):
    """Identity of the evaluated set.

    digest: hash of prompts, real images, groups and seeds.
    generated: SHA-256 of the manifest of the generated images.
    n_real, n_prompts: numbers of real images and of prompts.
    seeds: the seeds of each prompt.
    """

    digest: str
    generated: str
    n_real: int
    n_prompts: int
    seeds: list[int]


class Part(_Strict):
    """Figures of a part of the groups, chosen by the cosine of each group's least similar pair of prompts.

    part: its name.
    similarity: the least and the greatest such cosine in the part.
    groups, prompts: how many it has.
    saving: fraction of network evaluations saved.
    arms: figures by arm and metric.
    """

    part: str
    similarity: Annotated[list[float], Field(min_length=2, max_length=2)]
    groups: int
    prompts: int
    saving: float
    arms: dict[str, dict[str, Figure]]


class Verdict(_Strict):
    """The decision of a gate: how much worse the model is (negative: better), the interval, the limit, the reason."""

    metric: str
    reference: str
    limit: float
    relative: bool
    value: float | None
    low: float | None
    high: float | None
    passed: bool
    reason: str


class Results(_Strict):
    """The evaluation of a model.

    features: name of the network that computes the features for distances and diversities.
    alignment: name of the judge that says how well an image shows what its prompt says.
    measured_by: network, weights and resizing of the features, and the judge with its hash, by "features", "alignment".
    other_captions: alignment of the real images with captions of other images; a judge is of use if it is lower.
    blank: number of images of a single colour, by arm, of the arms that have any; no gate passes on such an arm.
    warnings: what makes the figures doubtful.
    confidence, resamples: confidence and number of draws of the bootstrap intervals.
    set: identity of the evaluated set.
    saving: fraction of the network evaluations that the judged arm saves compared with independent sampling.
    arms: figures by arm and metric.
    attributes: if the judge tells them apart, the share of images that show an attribute, by arm and attribute.
    real: alignment and diversity of the real images, by metric.
    floor: distances between real images and other real images, by metric.
    worse_by: how much worse the judged arm is, by reference and metric.
    by_similarity: figures of parts of the groups.
    gates, passed: the verdicts, and whether every gate passed.
    """

    features: str
    alignment: str
    measured_by: dict[str, str] = Field(default_factory=dict)
    other_captions: Figure | None = None
    blank: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    confidence: Annotated[float, Field(gt=0, lt=1)]
    resamples: int
    set: JudgedSet
    saving: float
    arms: dict[str, dict[str, Figure]]
    attributes: dict[str, dict[str, Figure]] = Field(default_factory=dict)
    real: dict[str, Figure]
    floor: dict[str, Figure]
    worse_by: dict[str, dict[str, Difference]]
    by_similarity: list[Part]
    gates: list[Verdict]
    passed: bool

    def groups(self, within: bool) -> int:
        """Return how many groups were evaluated; `within`: count only groups of two or more prompts."""
        return sum(part.groups for part in self.by_similarity if not (within and part.part == SINGLE_PROMPTS))


def write(path: Path, results: Results) -> None:
    """Write results atomically."""
    write_json(path, results.model_dump(exclude_unset=True))


def headline(results: Results) -> dict[str, float]:
    """Return the dozen figures that tell two models apart, flat: what was measured of the judged arm, and the verdicts.

    METRIC is the value of a metric, METRIC_worse_by how much worse it is than independent sampling's, as a fraction.
    """
    ours, differences = results.arms.get(JUDGED, {}), results.worse_by.get(INDEPENDENT, {})
    found = {name: ours[name].value for name in METRICS if name in ours}
    for name, metric in METRICS.items():
        if metric.gateable and not metric.cost and name in differences:
            found[f"{name}_worse_by"] = differences[name].relative.value
    measured = {name: value for name, value in found.items() if value is not None}
    passed = sum(gate.passed for gate in results.gates)
    counts = {"gates_passed": passed, "gates_failed": len(results.gates) - passed}
    return measured | {"saving": results.saving, "blank_images": results.blank.get(JUDGED, 0)} | counts


def write_frontier(path: Path, results: Results) -> None:
    """Write the arms as points of quality against cost, a CSV file that `dvc plots` draws.

    A line has the name of the arm, its network evaluations per image, and METRIC, METRIC_low and METRIC_high of each
    metric of quality; what was not measured is empty.
    """
    metrics = [name for name, metric in METRICS.items() if not metric.cost]
    ends = (("", "value"), ("_low", "low"), ("_high", "high"))
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["arm", _COST, *(name + end for name in metrics for end, _ in ends)])
        for arm, figures in results.arms.items():
            cells = [figures.get(name, _UNMEASURED) for name in metrics]
            rows.writerow(
                [arms.label(arm), figures[_COST].value, *(getattr(cell, key) for cell in cells for _, key in ends)]
            )


def read(path: Path) -> Results:
    """Return the results of a file; raise MetricError if it is missing, damaged or does not fit the schema."""
    if not path.is_file():
        raise MetricError(f"{path} does not exist. Run `sage run` first.")

    def refuse(constant: str) -> NoReturn:
        raise MetricError(f"{path} holds {constant}; a result that is not finite counts as none.")

    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise MetricError(f"{path} is not JSON: {error}") from error
    return parse(values, str(path))


def parse(values: Any, where: str) -> Results:
    """Return the results of parsed JSON; `where` names the source in messages.

    Raises MetricError if the values do not fit the schema, with one line for each problem.
    """
    try:
        return Results.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = [_line(problem) for problem in problems[:_SHOWN]]
        more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        head = f"{where} is damaged or not of this version, with {len(problems)} problem(s):"
        raise MetricError("\n".join([head, *lines, *more])) from error


def parse_figure(text: str) -> Figure | None:
    """Return a figure from JSON text, the form in tags of registered versions; None if it is damaged."""
    try:
        return Figure.model_validate_json(text)
    except ValidationError:
        return None


def _line(problem: Mapping[str, Any]) -> str:
    place = ".".join(map(str, problem["loc"])) or "(top)"
    if problem["type"] == "missing":
        return f"  {place} is missing"
    return f"  {place}: {problem['msg']}, found {problem['input']!r}"
