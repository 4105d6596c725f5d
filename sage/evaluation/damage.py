"""What sharing costs, by how alike the prompts of a group are: measured once for a model and kept in its folder.

| symbol | meaning |
|---|---|
| x[i, s] | features of the independent picture of prompt i from seed s |
| y[i, s] | the same, of the picture that took its first steps together with a group |
| damage | sum of |y[i, s] - x[i, t]| over sum of |x[i, s] - x[i, t]|, less 1, over prompts i and seeds s != t |

Seeds are crossed so that a picture which sharing merely changed, as another seed would, is no damage. 0: shared
pictures are as near to the prompt's own as these are to each other; 0.1: they lie a tenth further off.
"""

import numpy as np

from sage.errors import DataError
from sage.evaluation import bootstrap
from sage.grouping.cost import Point


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
