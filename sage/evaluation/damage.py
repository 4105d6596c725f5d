"""Damage: how much sharing changes images, by the similarity of a group's prompts.

It is measured once per model and stored in the model's folder.

| symbol | meaning |
|---|---|
| x[i, s] | features of the image of prompt i and seed s, sampled independently |
| y[i, s] | the same, if the first steps were shared within the group |
| damage | sum of |y[i, s] - x[i, t]| / sum of |x[i, s] - x[i, t]| - 1; sums over prompts i and seeds s != t |

Images of different seeds are compared, so a change no larger than a change of the seed is no damage. 0: shared images
are as close to the prompt's independent images as these are to each other; 0.1: the mean distance is 10% larger.
"""

import numpy as np

from sage.errors import DataError
from sage.evaluation import bootstrap
from sage.grouping.cost import Point


def distances(shared: np.ndarray, independent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each prompt the numerator and the denominator of the damage, each of shape (n,).

    `shared` and `independent` are features of shape (n, seeds, width). Raises DataError for a single seed.
    """
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
    """Return the damage of each part of the groups, from the least to the most similar prompts.

    Raises DataError if a part has fewer than LEAST_GROUPS groups, too few for an interval.

    similarity  cosine of the least similar pair of prompts in each group, (groups,)
    above       numerator of the damage from `distances`, summed over each group, (groups,)
    below       denominator of the damage from `distances`, summed over each group, (groups,)
    sizes       prompts per group, (groups,)
    parts       number of parts, each with about the same number of groups
    draws       bootstrap draws over groups
    confidence  of the intervals
    seed        of the bootstrap
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
