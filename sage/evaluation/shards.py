"""Figures of pictures that no one machine sees together: each part gives sums over its groups, and sums give figures.

Of what needs no real pictures: how well they fit their prompts, and how much they differ within groups. One picture a
prompt. The figures do not depend on how the groups were parted.
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
    """What a group adds: its number, its prompts, sums of alignment and of distances, and pictures that have others."""

    group: int
    prompts: int
    alignment: float
    distances: float
    differing: int


def sums(numbers: Sequence[int], groups: Groups, features: Array, alignment: Array) -> list[Sums]:
    """Return the sums of some groups: `features` (prompts, width) and `alignment` (prompts,) are of their pictures."""
    distances, differing = group_diversity(features[:, None], groups)
    return [
        Sums(number, len(group), float(alignment[list(group)].sum()), float(distance), int(count))
        for number, group, distance, count in zip(numbers, groups, distances, differing, strict=True)
    ]


def figures(parts: Sequence[Sums], groups: int, *, draws: int, confidence: float, seed: int) -> dict[str, Figure]:
    """Return alignment and diversity within groups, with intervals from `draws` over groups.

    Raises DataError if the parts are not each of the groups once.
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
    # A draw at a time: all draws over a million groups would not fit in memory.
    values = np.concatenate([statistic(resamples(groups, 1, seed + draw)) for draw in range(draws)])
    return percentiles(values, confidence, statistic.groups())
