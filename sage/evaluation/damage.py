"""What sharing costs, by how alike the prompts of a group are: measured once for a model and kept in its folder.

| symbol | meaning |
|---|---|
| x[i, s] | features of the independent picture of prompt i from seed s |
| y[i, s] | the same, of the picture that took its first steps together with a group |
| damage | sum of |y[i, s] - x[i, t]| over sum of |x[i, s] - x[i, t]|, less 1, over prompts i and seeds s != t |

Seeds are crossed so that a picture which sharing merely changed, as another seed would, is no damage. 0: shared
pictures are as near to the prompt's own as these are to each other; 0.1: they lie a tenth further off.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sage.errors import ConfigurationError, DataError
from sage.evaluation import bootstrap
from sage.files import digest, sha256_tree
from sage.grouping.thresholds import damage_curve, threshold_for_damage

FILE = "sharing.json"


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


def distances(shared: np.ndarray, independent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each prompt the two sums of a damage, each of shape (n,), from features of shape (n, seeds, width)."""
    seeds = independent.shape[1]
    crossed = [(s, t) for s in range(seeds) for t in range(seeds) if s != t]
    if not crossed:
        raise DataError("damage is measured across seeds; give at least 2")
    above = sum(np.linalg.norm(shared[:, s] - independent[:, t], axis=1) for s, t in crossed)
    below = sum(np.linalg.norm(independent[:, s] - independent[:, t], axis=1) for s, t in crossed)
    return np.asarray(above), np.asarray(below)


def by_similarity(
    similarity: np.ndarray,
    above: np.ndarray,
    below: np.ndarray,
    sizes: np.ndarray,
    *,
    parts: int,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Point]:
    """Return the damage in parts of about equally many groups, from the least alike on.

    All arrays have shape (groups,): the worst pair's similarity, both sums of `distances` and the number of prompts.
    Intervals are a bootstrap over groups; raises DataError if a part has too few groups for one.
    """
    if (least := len(similarity) // parts) < bootstrap.LEAST_GROUPS:
        raise DataError(
            f"{len(similarity)} groups in {parts} parts are {least} a part; an interval needs at least "
            f"{bootstrap.LEAST_GROUPS}. Measure more prompts, or fewer parts."
        )
    points = []
    for part in np.array_split(np.argsort(similarity, kind="stable"), parts):
        statistic = bootstrap.ratio(above[part], below[part])
        counts = bootstrap.resamples(len(part), draws, seed)
        low, high = bootstrap.percentiles(statistic(counts) - 1, confidence, statistic.groups())
        value = bootstrap.value(statistic, len(part)) - 1
        prompts = int(sizes[part].sum())
        points.append(Point(float(similarity[part].mean()), value, low, high, len(part), prompts))
    return points


def model_digest(model: Path) -> str:
    """Return what names a model in its measurements: its parts (folders), whatever else lies beside them."""
    return digest({part.name: sha256_tree(part) for part in sorted(model.iterdir()) if part.is_dir()})


def read_damage(model: Path, share_ratio: float, max_size: int) -> Damage:
    """Return what was measured on a model.

    Raises ConfigurationError where it was not, or was on other weights, for less sharing or for smaller groups.
    """
    path, remedy = (
        model / FILE,
        "Run `sage calibrate`, or give group.threshold instead of group.quality.",
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
