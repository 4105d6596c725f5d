"""Diversity: how much the images of a group differ from each other, and the images of a prompt from seed to seed.

A sampler can keep its quality while every group collapses to one picture; no distance to real pictures shows that.
Both return, for each group, the sum over its pictures and their number, as `bootstrap.ratio` takes them.
"""

import numpy as np

from sage.evaluation.bootstrap import Array
from sage.evaluation.distances import Groups


def group_diversity(features: Array, groups: Groups) -> tuple[Array, Array]:
    """Return sums and numbers, each (groups,), of every picture's mean distance to the others of its group and seed.

    `features` have the shape (prompts, seeds, width); a group of one has nothing to differ from and counts 0 pictures.
    """
    seeds = features.shape[1]
    sums = [sum(_mean_distances(features[list(group), s]) for s in range(seeds)) for group in groups]
    numbers = [len(group) * seeds if len(group) > 1 else 0 for group in groups]
    return np.array(sums, float), np.array(numbers, float)


def seed_diversity(features: Array, groups: Groups) -> tuple[Array, Array]:
    """Return sums and numbers, each (groups,), of every picture's mean distance to its prompt's other seeds."""
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
