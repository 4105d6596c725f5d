"""The losses of a training by step, as a CSV file that `dvc plots` and the report draw: one line for each value.

    step,set,term,value
    10,training,diffusion,0.2214
    50,held-out,loss,0.3012
    50,held-out,t0_249,0.1103

`set` is "training" (means over the steps since the line before) or "held-out" (`sage.training.validation`, whose terms
by band of timesteps begin with t).
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sage.errors import MetricError
from sage.files import new_file
from sage.training.selection import Measured

TRAINING, HELD_OUT = "training", "held-out"
COLUMNS = ("step", "set", "term", "value")
_HELD_OUT = "validation_"  # prefix of the names of held-out values
_NO_LOSS = {"gradient_norm"}


@dataclass(frozen=True)
class Point:
    """The value of a term of the loss after `step` steps, in training or on held-out images (`set`)."""

    step: int
    set: str
    term: str
    value: float


def points(reports: Sequence[tuple[int, Mapping[str, float]]], history: Sequence[Measured]) -> list[Point]:
    """Return the points of a training: its reports, and the held-out measurements."""
    found = [
        Point(step, TRAINING, term, value)
        for step, means in reports
        for term, value in means.items()
        if term not in _NO_LOSS
    ]
    return found + [
        Point(one.step, HELD_OUT, term.removeprefix(_HELD_OUT), value)
        for one in history
        for term, value in one.values.items()
    ]


def write_curves(path: Path, found: Sequence[Point]) -> None:
    """Write points atomically, with six significant digits."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows((one.step, one.set, one.term, f"{one.value:.6g}") for one in found)


def read_curves(path: Path) -> list[Point]:
    """Return the points of a file; raise MetricError if it is missing or damaged."""
    if not path.is_file():
        raise MetricError(f"{path} does not exist. Run `dvc repro finetune`.")
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        try:
            return [Point(int(row["step"]), row["set"], row["term"], float(row["value"])) for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise MetricError(f"{path} is damaged: {error}. Run `dvc repro --force finetune`.") from error
