"""Choosing the cosine threshold: for a target saving, for a bound on damage, or as strict as with another encoder.

Cosines are not comparable between encoders or sets of prompts, so all of these work on the user's own prompts.
"""

import math
from collections.abc import Sequence

import numpy as np

from sage.errors import ConfigurationError
from sage.grouping.groups import Tree
from sage.grouping.neighbours import cosines

# Sampled pairs for a distribution of cosines: a fraction of 1 in 10,000 is then estimated from about 100 pairs.
_PAIRS = 1_000_000


def threshold_for_saving(tree: Tree, saving: float, share_ratio: float) -> float:
    """Return the highest threshold at which one level of sharing saves this fraction of the network evaluations.

    K groups of M prompts save share_ratio (1 - K / M), and each merge in the tree lowers K by one. `group` at the
    returned threshold saves at least as much. Raises ConfigurationError if `saving` is outside [0, 1) or more than the
    whole tree allows.
    """
    if not 0 <= saving < 1:
        raise ConfigurationError(f"saving is {saving}; give a fraction of the network evaluations in [0, 1)")
    if saving == 0:
        return 1.0
    most = share_ratio * len(tree.merges) / max(tree.size, 1)
    # Tolerate rounding: a saving computed as share_ratio * k / M must not need k + 1 merges.
    if most * (1 + 1e-9) < saving:
        raise ConfigurationError(
            f"a saving of {saving} was asked for, but these prompts allow {most:.4f} at share ratio {share_ratio:.4g}, "
            "counted in whole steps; "
            "ask for less, or raise the share ratio or the maximum group size"
        )
    needed = math.ceil(saving / share_ratio * tree.size * (1 - 1e-9))
    return tree.merges[needed - 1][2]


def damage_curve(similarity: Sequence[float], damage: Sequence[float]) -> list[tuple[float, float]]:
    """Return the points (similarity, damage) of a non-increasing least-squares curve (isotonic regression).

    `similarity` and `damage`, of equal length, are measurements of groups; damage may be in any unit. Raises
    ConfigurationError unless there are two or more measurements, all finite.
    """
    from sklearn.isotonic import IsotonicRegression

    if len(similarity) < 2 or not np.isfinite([*similarity, *damage]).all():
        raise ConfigurationError(
            f"a damage curve needs two or more measurements, all finite; found similarity {list(similarity)} "
            f"and damage {list(damage)}"
        )
    curve = IsotonicRegression(increasing=False).fit(similarity, damage)
    return list(zip(curve.X_thresholds_.tolist(), curve.y_thresholds_.tolist(), strict=True))


def threshold_for_damage(curve: Sequence[tuple[float, float]], at_most: float) -> float:
    """Return the lowest similarity from which on damage is at most `at_most`, with linear interpolation of the curve.

    The result is never below the lowest similarity measured, as nothing is known there. Raises ConfigurationError if
    damage exceeds the bound even at the highest similarity measured.
    """
    points = sorted(curve)
    if not points or points[-1][1] > at_most:
        best = f"{points[-1][1]:.4g} at {points[-1][0]:.4g}" if points else "nothing"
        raise ConfigurationError(f"damage of at most {at_most} was asked for, but the least measured is {best}")
    threshold = points[-1][0]
    for (low, worse), (high, better) in zip(reversed(points[:-1]), reversed(points), strict=False):
        if worse > at_most:
            return high - (at_most - better) / (worse - better) * (high - low)
        threshold = low
    return threshold


def share_reaching(embeddings: np.ndarray, threshold: float) -> float:
    """Return the fraction of all pairs of rows whose cosine reaches the threshold; rows have length 1."""
    return float((pair_cosines(embeddings) >= threshold).mean())


def threshold_for_share(embeddings: np.ndarray, share: float) -> float:
    """Return the cosine that a fraction `share` of all pairs of rows reaches; rows have length 1.

    `threshold_for_share(other, share_reaching(one, threshold))` converts a threshold between two encoders' embeddings
    of the same prompts. Raises ConfigurationError if `share` is outside [0, 1] or there are fewer than two rows.
    """
    if not 0 <= share <= 1:
        raise ConfigurationError(f"share is {share}; give a fraction of the pairs in [0, 1]")
    return float(np.quantile(pair_cosines(embeddings), 1 - share))


def pair_cosines(embeddings: np.ndarray) -> np.ndarray:
    """Return the cosines of all pairs of rows, or of _PAIRS pairs drawn with a fixed seed if there are more."""
    n = len(embeddings)
    if n < 2:
        raise ConfigurationError(f"{n} prompt(s) make no pair to choose a threshold from; give at least 2")
    if n * (n - 1) // 2 <= _PAIRS:
        a, b = np.triu_indices(n, 1)
    else:
        random = np.random.default_rng(0)
        a = random.integers(n, size=_PAIRS)
        b = (a + random.integers(1, n, size=_PAIRS)) % n
    return cosines(embeddings, a, b)
