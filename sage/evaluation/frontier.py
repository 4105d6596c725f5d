"""Iso-quality saving: the evaluations that independent sampling needs for the distance that sharing reaches.

A frontier is a set of points (network evaluations per image, distance). Its lower envelope is the best distance at a
given number of evaluations or fewer. Between points it is interpolated linearly in the logarithm of evaluations.
"""

import numpy as np

from sage.errors import MetricError
from sage.evaluation.bootstrap import Array


def evaluations_for(distance: Array, nfe: Array, frontier: Array) -> Array:
    """Return, for each draw, the evaluations per image at which a frontier reaches a distance; shape (draws,).

    `distance` has shape (draws,), lower is better; `nfe` (points,); `frontier` (draws, points), the distance at each
    point. The result is NaN if the cheapest point is already better. If no point is as good, it is the evaluations of
    the most expensive point, a lower bound. Raises MetricError if evaluations are not positive or there are fewer than
    two points.
    """
    if len(nfe) < 2 or (nfe <= 0).any():
        raise MetricError(f"a frontier needs two points of more than 0 evaluations each, found {nfe.tolist()}")
    order = np.argsort(nfe, kind="stable")
    dear = np.log(nfe[order])
    envelope = np.minimum.accumulate(frontier[:, order], axis=1)
    # Index of the first point at which the envelope is as good, or the number of points if there is none.
    after = (envelope > distance[:, None]).sum(1)
    right = after.clip(1, len(nfe) - 1)
    rows = np.arange(len(distance))
    above, below = envelope[rows, right - 1], envelope[rows, right]
    fall = above - below
    part = np.divide(above - distance, fall, out=np.ones_like(fall), where=fall > 0)
    found = np.exp(dear[right - 1] + part.clip(0, 1) * (dear[right] - dear[right - 1]))
    found[distance > envelope[:, 0]] = np.nan
    found[after == len(nfe)] = nfe[order[-1]]
    return np.asarray(found)


def saving(shared_nfe: float, distance: Array, nfe: Array, frontier: Array) -> Array:
    """Return the iso-quality saving of each draw, of shape (draws,).

    It is 1 - `shared_nfe` / evaluations of independent sampling at equal distance; other arguments as in
    `evaluations_for`.
    """
    return np.asarray(1 - shared_nfe / evaluations_for(distance, nfe, frontier))
