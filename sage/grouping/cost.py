"""The measured cost of sharing for one model, kept as JSON in the model's folder: damage by similarity of a group.

`sage calibrate` measures it (`sage.evaluation.damage`); a bound on damage becomes a similarity threshold here.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from sage.errors import ConfigurationError
from sage.files import digest, sha256_tree
from sage.grouping.thresholds import damage_curve, threshold_for_damage

FILE = "damage.json"


@dataclass(frozen=True)
class Point:
    """The damage to groups of about one similarity (of the worst pair), with its interval."""

    similarity: float
    damage: float
    low: float
    high: float
    groups: int
    prompts: int


@dataclass(frozen=True)
class Damage:
    """What sharing up to this share ratio, in groups up to this size, was measured to cost."""

    share_ratio: float
    max_size: int
    points: list[Point]

    def threshold(self, at_most: float) -> float:
        """Return the lowest similarity from which on the bad end of the interval, made monotone, keeps a bound.

        Raises ConfigurationError where no similarity that was measured does.
        """
        curve = damage_curve([point.similarity for point in self.points], [point.high for point in self.points])
        return threshold_for_damage(curve, at_most)


def model_digest(model: Path) -> str:
    """Return what names a model in its measurements: its parts (folders), whatever else lies beside them."""
    return digest({part.name: sha256_tree(part) for part in sorted(model.iterdir()) if part.is_dir()})


def read_damage(model: Path, share_ratio: float, max_size: int) -> Damage:
    """Return what was measured on a model.

    Raises ConfigurationError where it was not, or was on other weights, for less sharing or for smaller groups.
    """
    path, remedy = (
        model / FILE,
        "Run `sage calibrate`, or give group.threshold instead of group.max_damage.",
    )
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist, so what sharing costs is unknown. {remedy}")
    kept = json.loads(path.read_text(encoding="utf-8"))
    found = Damage(kept["share_ratio"], kept["max_size"], [Point(**point) for point in kept["points"]])
    if kept["model"] != model_digest(model):
        raise ConfigurationError(f"{path} was measured on other weights than those of {model}. {remedy}")
    if share_ratio > found.share_ratio or max_size > found.max_size:
        raise ConfigurationError(
            f"{path} was measured at share ratio {found.share_ratio} in groups of {found.max_size} at most, less than "
            f"the {share_ratio} and {max_size} asked for. {remedy}"
        )
    return found


def kept_form(damage: Damage, model: Path, how: dict[str, object]) -> dict[str, object]:
    """Return what `read_damage` reads, as JSON; `how` says more of how it was measured."""

    def rounded(point: Point) -> dict[str, float]:
        return {name: round(value, 4) for name, value in vars(point).items()}

    points = [rounded(point) for point in damage.points]
    measured = {"share_ratio": damage.share_ratio, "max_size": damage.max_size, "points": points}
    return {"model": model_digest(model)} | how | measured
