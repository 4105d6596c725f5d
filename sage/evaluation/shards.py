"""Figures of an image set that is spread over several machines: each shard yields sums per group, which are combined.

Only metrics that need no real images are supported: alignment, and diversity within groups. Each prompt has one image.
The figures do not depend on how the groups were divided into shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sage.errors import DataError
from sage.evaluation.bootstrap import Array, Statistic, percentiles, ratio, resamples, value
from sage.evaluation.distances import Groups
from sage.evaluation.diversity import group_diversity
from sage.evaluation.figures import figure
from sage.evaluation.results import Figure

MEASURES = ("alignment", "group_diversity")


@dataclass(frozen=True)
class Sums:
    """The sums of one group.

    group: its number.
    prompts: how many it has whose images are not blank.
    alignment: sum of alignment over its images.
    distances: sum over its images of the mean distance to the others.
    differing: number of images that have others in the group; 0 for a group of one.
    """

    group: int
    prompts: int
    alignment: float
    distances: float
    differing: int


def sums(numbers: Sequence[int], groups: Groups, features: Array, alignment: Array) -> list[Sums]:
    """Return the sums of some groups.

    numbers    number of each group in the whole set
    groups     row numbers in `features` of each group
    features   image features, (prompts, width)
    alignment  alignment of each image with its prompt, (prompts,)
    """
    distances, differing = group_diversity(features[:, None], groups)
    return [
        Sums(number, len(group), float(alignment[list(group)].sum()), float(distance), int(count))
        for number, group, distance, count in zip(numbers, groups, distances, differing, strict=True)
    ]


def figures(parts: Sequence[Sums], groups: int, *, draws: int, confidence: float, seed: int) -> dict[str, Figure]:
    """Return alignment and diversity within groups, with intervals from a bootstrap over groups.

    Raises DataError if `parts` do not hold each of the `groups` groups exactly once.

    parts       sums of all groups, in any order
    groups      number of groups
    draws       bootstrap draws
    confidence  of the intervals
    seed        of the bootstrap
    """
    rows = sorted(parts, key=lambda part: part.group)
    if [row.group for row in rows] != list(range(groups)):
        raise DataError(f"there are figures of {len(rows)} groups, but {groups} groups were drawn: judge all shards")
    prompts = np.array([row.prompts for row in rows], float)
    differing = np.array([row.differing for row in rows], float)
    totals = np.array([[row.alignment, row.distances] for row in rows]).T
    found = {}
    for name, total, n in zip(MEASURES, totals, (prompts, differing), strict=True):
        statistic = ratio(total, n)
        ends = _interval(statistic, groups, draws, confidence, seed)
        found[name] = figure(value(statistic, groups), *ends, int(n.sum()))
    return found


def _interval(statistic: Statistic, groups: int, draws: int, confidence: float, seed: int) -> tuple[float, float]:
    # Compute one draw at a time: all draws over a million groups would not fit in memory.
    values = np.concatenate([statistic(resamples(groups, 1, seed + draw)) for draw in range(draws)])
    return percentiles(values, confidence, statistic.groups())
