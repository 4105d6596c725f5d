"""Where to set the threshold: for a budget, for a bound on damage, or as strict as another encoder's.

A cosine means different things to different encoders and prompts, so each of these is read from the user's own prompts.
"""

import math
from collections.abc import Sequence

import numpy as np

from sage.errors import ConfigurationError
from sage.grouping.groups import Tree
from sage.grouping.neighbours import cosines

# Pairs drawn to estimate a distribution: a share of 1 in 10,000 then rests on some hundred pairs.
_PAIRS = 1_000_000


def threshold_for_saving(tree: Tree, saving: float, share_ratio: float) -> float:
    """Return the highest threshold at which one level of sharing saves this share of the network evaluations.

    K groups of M prompts save share_ratio (1 - K / M), and each merge makes one group fewer. `group` at the result
    saves at least as much. Raises ConfigurationError where the tree, down to its own threshold, does not allow it.
    """
    if not 0 <= saving < 1:
        raise ConfigurationError(f"saving is {saving}, but a share of the network evaluations lies in [0, 1)")
    if saving == 0:
        return 1.0
    most = share_ratio * len(tree.merges) / max(tree.size, 1)
    # A hair more, or a saving that was computed as share_ratio * k / M could ask for k + 1 merges.
    if most * (1 + 1e-9) < saving:
        raise ConfigurationError(
            f"a saving of {saving} was asked for, but these prompts allow {most:.4f} at share ratio {share_ratio}; "
            "ask for less, or raise the share ratio or the size of a group"
        )
    needed = math.ceil(saving / share_ratio * tree.size * (1 - 1e-9))
    return tree.merges[needed - 1][2]


def damage_curve(similarity: Sequence[float], damage: Sequence[float]) -> list[tuple[float, float]]:
    """Return (similarity, damage) points of the least-squares curve that never rises with similarity.

    Each measurement is the worst similarity of a group and what sharing cost it, in any unit (isotonic regression).
    """
    from sklearn.isotonic import IsotonicRegression

    if len(similarity) < 2 or not np.isfinite([*similarity, *damage]).all():
        raise ConfigurationError(f"a curve needs two or more finite measurements, found {len(similarity)}")
    curve = IsotonicRegression(increasing=False).fit(similarity, damage)
    return list(zip(curve.X_thresholds_.tolist(), curve.y_thresholds_.tolist(), strict=True))


def threshold_for_damage(curve: Sequence[tuple[float, float]], at_most: float) -> float:
    """Return the lowest similarity from which on damage stays within a bound, linear between the points of a curve.

    Below the least similarity that was measured nothing is known, so nothing is allowed; above 1 nothing can be. Raises
    ConfigurationError where the bound is not met even at the highest similarity measured.
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
    """Return the share of the pairs of these unit vectors, in [0, 1], whose cosine reaches the threshold."""
    return float((_sample(embeddings) >= threshold).mean())


def threshold_for_share(embeddings: np.ndarray, share: float) -> float:
    """Return the cosine that this share of the pairs of these unit vectors reaches.

    With `share_reaching` of one encoder's embeddings of the same prompts it says what is as strict for another's.
    """
    if not 0 <= share <= 1:
        raise ConfigurationError(f"share is {share}, but a share of the pairs lies in [0, 1]")
    return float(np.quantile(_sample(embeddings), 1 - share))


def _sample(embeddings: np.ndarray) -> np.ndarray:
    """Return the cosines of all pairs of a small set, or of seeded random ones of a large set."""
    n = len(embeddings)
    if n < 2:
        raise ConfigurationError(f"{n} prompt(s) have no pairs to learn from; give at least 2")
    if n * (n - 1) // 2 <= _PAIRS:
        a, b = np.triu_indices(n, 1)
    else:
        random = np.random.default_rng(0)
        a = random.integers(n, size=_PAIRS)
        b = (a + random.integers(1, n, size=_PAIRS)) % n
    return cosines(embeddings, a, b)
