"""How well a space of prompts stands for the model's own first predictions, by which groups are harmed least.

m of two prompts is the mean squared difference of their first predictions in latents, whose variance is about 1.
"""

from collections.abc import Sequence

import numpy as np

from sage.grouping.groups import Groups, Tree, cut, tree
from sage.grouping.thresholds import pair_cosines

# Lowest cosine of a merge: no group of any space is looser.
_FLOOR = 0.0


def variance_explained(real: np.ndarray, found: np.ndarray) -> float:
    """Return the share of the variance of predictions (n, d) that others, found for the same prompts, explain."""
    return float(1 - np.square(real - found).sum() / np.square(real - real.mean(0)).sum())


def rank_correlation(real: np.ndarray, rows: np.ndarray) -> float:
    """Return Spearman's correlation of the cosines of pairs of rows in two spaces; rows have length 1."""
    from scipy.stats import spearmanr

    return float(spearmanr(pair_cosines(real), pair_cosines(rows)).statistic)


def groups_by_count(rows: np.ndarray, count: int, max_size: int) -> tuple[Groups, float]:
    """Return `count` groups, or a few more if there are no more merges, and the threshold that gives them."""
    nested = tree(rows, _FLOOR, max_size)
    merges = nested.merges[: max(0, len(rows) - count)]
    return cut(Tree(nested.size, merges), -1.0), merges[-1][2] if merges else 1.0


def mean_difference(predictions: np.ndarray, groups: Sequence[Sequence[int]] | None = None) -> float:
    """Return the mean m of the pairs of prompts within groups, 0 without pairs; None: of all pairs."""
    total, pairs = 0.0, 0
    for members in [range(len(predictions))] if groups is None else groups:
        rows = predictions[list(members)].astype(np.float64)
        # The squared differences of all pairs are n times those to the mean.
        total += len(rows) * float(np.square(rows - rows.mean(0)).sum()) / rows.shape[1]
        pairs += len(rows) * (len(rows) - 1) // 2
    return total / pairs if pairs else 0.0
