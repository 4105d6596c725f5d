"""metrics/evaluate.json: its schema, its writer and its reader. Whoever judges or shows results reads them here.

The reader is strict: a file that lacks a figure, or holds a text or a NaN in the place of a number, is refused as a
whole, with one line for every problem. A figure that could not be measured is null. Unknown keys are ignored, so that
the results of an older or a newer version can still be compared.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sage.errors import MetricError
from sage.files import write_json

SINGLE_PROMPTS = "single prompts"  # the part of the groups of one prompt
_SHOWN = 8  # problems of a file that are listed


class _Strict(BaseModel):
    """What every part shares: no silent conversions, nothing that is not finite, no changes afterwards."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class Interval(_Strict):
    """A value with the ends of its interval; null if it cannot be measured, or has no interval."""

    value: float | None
    low: float | None
    high: float | None


class Figure(Interval):
    """A measured value with its interval and the number of images that it rests on."""

    n: Annotated[int, Field(ge=0)]


class Difference(Figure):
    """By how much the judged arm is worse than a reference (negative: better), also as a share of its value."""

    relative: Interval


class JudgedSet(_Strict):
    """What was judged: digest of prompts, real images, groups and seeds; hash of the manifest of generated images."""

    digest: str
    generated: str
    n_real: int
    n_prompts: int
    seeds: list[int]


class Part(_Strict):
    """Some of the groups, by the similarity of their worst pair, from the least to the most."""

    part: str
    similarity: Annotated[list[float], Field(min_length=2, max_length=2)]
    groups: int
    prompts: int
    saving: float
    arms: dict[str, dict[str, Figure]]


class Verdict(_Strict):
    """What a gate decided: by how much the model is worse (negative: better), the limit, and why."""

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

    features: name of the network whose features distances and diversities are measured on.
    confidence, resamples: of the bootstrap intervals.
    set: what was judged.
    saving: share of the network evaluations that the judged arm saves against independent sampling.
    arms: figures by arm and metric.
    real, floor: what real images reach, on their own and against other real images, by metric.
    worse_by: how much worse the judged arm is, by reference and metric.
    by_similarity: the same figures for parts of the groups.
    gates, passed: the verdicts, and whether all of them are favourable.
    """

    features: str
    confidence: Annotated[float, Field(gt=0, lt=1)]
    resamples: int
    set: JudgedSet
    saving: float
    arms: dict[str, dict[str, Figure]]
    real: dict[str, Figure]
    floor: dict[str, Figure]
    worse_by: dict[str, dict[str, Difference]]
    by_similarity: list[Part]
    gates: list[Verdict]
    passed: bool

    def groups(self, within: bool) -> int:
        """Return how many groups were judged; `within`: only those of two or more prompts."""
        return sum(part.groups for part in self.by_similarity if not (within and part.part == SINGLE_PROMPTS))


def write(path: Path, results: Results) -> None:
    """Write results, whole or not at all."""
    write_json(path, results.model_dump(exclude_unset=True))


def read(path: Path) -> Results:
    """Return the results of a file; raise MetricError if it is missing, damaged or of another form."""
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
    """Return the results of parsed JSON; raise MetricError with one line for each problem. `where` names the source."""
    try:
        return Results.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = [_line(problem) for problem in problems[:_SHOWN]]
        more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        head = f"{where} is damaged or not of this version, with {len(problems)} problem(s):"
        raise MetricError("\n".join([head, *lines, *more])) from error


def parse_figure(text: str) -> Figure | None:
    """Return a single figure from JSON, as a registered version keeps it; None if it is damaged."""
    try:
        return Figure.model_validate_json(text)
    except ValidationError:
        return None


def _line(problem: Mapping[str, Any]) -> str:
    place = ".".join(map(str, problem["loc"])) or "(top)"
    if problem["type"] == "missing":
        return f"  {place} is missing"
    return f"  {place}: {problem['msg']}, found {problem['input']!r}"
