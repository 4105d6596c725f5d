"""Diversity: distances between the images of one group, and between the images of one prompt from different seeds.

A sampler may produce good images although every group collapses to one image; distances to real images do not show
that. Both functions return sums and numbers of images per group, the arguments of `bootstrap.ratio`.
"""

import numpy as np

from sage.evaluation.bootstrap import Array
from sage.evaluation.distances import Groups


def group_diversity(features: Array, groups: Groups) -> tuple[Array, Array]:
    """Return, per group, the sum over images of the mean distance to the group's other images of the same seed.

    Returns also the number of these images, 0 for a group of one prompt; both have shape (groups,). `features` has
    shape (prompts, seeds, width).
    """
    seeds = features.shape[1]
    sums = [sum(_mean_distances(features[list(group), s]) for s in range(seeds)) for group in groups]
    numbers = [len(group) * seeds if len(group) > 1 else 0 for group in groups]
    return np.array(sums, float), np.array(numbers, float)


def seed_diversity(features: Array, groups: Groups) -> tuple[Array, Array]:
    """Return, per group, the sum over images of the mean distance to the images of the same prompt from other seeds.

    Returns also the number of these images, 0 for a single seed; both have shape (groups,). `features` has shape
    (prompts, seeds, width).
    """
    seeds = features.shape[1]
    sums = [sum(_mean_distances(features[prompt]) for prompt in group) for group in groups]
    numbers = [len(group) * seeds if seeds > 1 else 0 for group in groups]
    return np.array(sums, float), np.array(numbers, float)


def _mean_distances(rows: Array) -> float:
    """Return the sum over rows of the mean Euclidean distance to the other rows; 0 for a single row."""
    x = rows.astype(float)
    if len(x) < 2:
        return 0.0
    return float(np.linalg.norm(x[:, None] - x[None], axis=-1).sum() / (len(x) - 1))
