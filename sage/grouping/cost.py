"""Damage: how much sharing degrades the images of one model, by the similarity of the group.

`sage calibrate` measures it (`sage.evaluation.damage`, which defines it) and writes it as JSON into the model's folder,
or beside a model that is a file; `Damage.threshold` turns a bound on damage into a similarity threshold.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from sage.errors import ConfigurationError
from sage.files import digest, sha256, sha256_tree
from sage.grouping.thresholds import damage_curve, threshold_for_damage

FILE = "damage.json"


@dataclass(frozen=True)
class Point:
    """Damage to groups of about the same similarity, with its confidence interval (low, high).

    `similarity` is the mean cosine of the groups' least similar pairs; `groups` and `prompts` count what was measured.
    """

    similarity: float
    damage: float
    low: float
    high: float
    groups: int
    prompts: int


@dataclass(frozen=True)
class Damage:
    """Damage measured at a share ratio, in groups of at most `max_size`; valid for that much sharing or less."""

    share_ratio: float
    max_size: int
    points: list[Point]

    def threshold(self, at_most: float) -> float:
        """Return the lowest similarity from which on damage stays at or below `at_most`.

        Decides on the upper ends of the intervals, made monotone by isotonic regression. Raises ConfigurationError if
        damage exceeds the bound even at the highest similarity measured.
        """
        curve = damage_curve([point.similarity for point in self.points], [point.high for point in self.points])
        return threshold_for_damage(curve, at_most)


def kept_at(model: Path) -> Path:
    """Return the file with a model's damage: in its folder, or beside a model that is a file or a pin."""
    return model / FILE if model.is_dir() else model.with_name(f"{model.name}.{FILE}")


def model_digest(model: Path) -> str:
    """Return a SHA-256 of a file or pin, or of a folder's parts: subfolders, and if these hold no weights, the files.

    Other files beside them, as damage.json, do not count.
    """
    if model.is_file():
        return sha256(model)
    parts = [part for part in model.iterdir() if part.is_dir()]
    if not any(model.glob("*/*.safetensors")):
        parts += model.glob("*.safetensors")
    return digest({part.name: sha256_tree(part) for part in parts})


def read_damage(model: Path, share_ratio: float, max_size: int, space: str = "minilm") -> Damage:
    """Return the damage measured on a model: a folder, a file, or a pin.

    Raises ConfigurationError if there is no measurement, or if it is damaged, of other weights, of a lower share ratio,
    of smaller groups than asked for, or of groups formed in another space than `space` (`Policy.space`).
    """
    path = kept_at(model)
    remedy = "Run `sage calibrate`, or give group.threshold instead of group.max_damage."
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist, so the damage of sharing is unknown. {remedy}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        damage = Damage(stored["share_ratio"], stored["max_size"], [Point(**point) for point in stored["points"]])
        measured_on = stored["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is damaged: {error!r}. {remedy}") from error
    if measured_on != model_digest(model):
        raise ConfigurationError(f"{path} was measured on other weights than {model} has now. {remedy}")
    if stored.get("encoder", space) != space:
        raise ConfigurationError(
            f"{path} was measured on groups by {stored['encoder']}, but prompts are grouped by {space}. {remedy}"
        )
    if share_ratio > damage.share_ratio or max_size > damage.max_size:
        raise ConfigurationError(
            f"{path} was measured at share ratio {damage.share_ratio} in groups of at most {damage.max_size}, "
            f"less than the {share_ratio:.4g} and {max_size} asked for. {remedy}"
        )
    return damage


def kept_form(damage: Damage, model: Path, how: dict[str, object]) -> dict[str, object]:
    """Return the JSON value that `read_damage` reads; `how` adds the settings of the measurement, for the record."""

    def rounded(point: Point) -> dict[str, float]:
        return {name: round(value, 4) for name, value in vars(point).items()}

    points = [rounded(point) for point in damage.points]
    measured = {"share_ratio": damage.share_ratio, "max_size": damage.max_size, "points": points}
    return {"model": model_digest(model)} | how | measured
