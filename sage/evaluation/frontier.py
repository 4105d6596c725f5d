"""How many network evaluations a quality costs: what sharing reaches, read on the frontier of independent sampling.

A frontier is a set of points (evaluations per image, distance). What it costs to reach a distance is read from its
lower envelope: the best that so many evaluations or fewer buy, between points linear in the logarithm of evaluations.
"""

import numpy as np

from sage.errors import MetricError
from sage.evaluation.bootstrap import Array


def evaluations_for(distance: Array, nfe: Array, frontier: Array) -> Array:
    """Return the evaluations per image at which a frontier reaches a distance, for each draw, of shape (draws,).

    `distance` (draws,), lower is better; `nfe` (points,); `frontier` (draws, points), the distances there. NaN if
    even the cheapest point is better; the evaluations of the most expensive point if no point is as good, so that the
    result is then a lower bound. Raises MetricError for evaluations that are not positive or a frontier of one point.
    """
    if len(nfe) < 2 or (nfe <= 0).any():
        raise MetricError(f"a frontier needs two points of more than 0 evaluations each, found {nfe.tolist()}")
    order = np.argsort(nfe, kind="stable")
    dear = np.log(nfe[order])
    envelope = np.minimum.accumulate(frontier[:, order], axis=1)
    # The first point at which the envelope is as good; the number of points if none is.
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
    """Return the iso-quality saving for each draw: 1 - sharing's cost / independent sampling's at equal distance."""
    return np.asarray(1 - shared_nfe / evaluations_for(distance, nfe, frontier))
