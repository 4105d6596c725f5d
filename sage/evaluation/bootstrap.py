"""Intervals from a cluster bootstrap: images of one group are dependent, so whole groups are resampled.

| symbol | meaning |
|---|---|
| K | groups |
| counts | (draws, K): how often each draw contains each group; the original data are a row of ones |
| Statistic | maps counts (draws, K) to values (draws,); NaN if a draw contains nothing to measure |

Two arms are compared under the same counts, which makes the bootstrap paired: the difference of their statistics in
each draw gives the interval of the difference.

With few groups a bootstrap interval is too narrow, so there is none below LEAST_GROUPS groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

Array = np.ndarray
# Chosen by `python -m benchmarks.gates`: a model that is worse by exactly the limit of a gate should pass it in at most
# 5 of 100 trials (a 95% interval promises 2.5). That holds from 12 groups on. 20 leave a margin for skewed losses: if
# only a few groups lose, 5.2 of 100 pass at 20 groups (standard error 0.7); otherwise 3.6.
LEAST_GROUPS = 20


@dataclass(frozen=True)
class Statistic:
    """A statistic that can be computed under any resampling of the groups.

    compute: maps counts of shape (draws, K) to values of shape (draws,).
    measured: boolean of shape (K,), whether a group has anything to measure.
    """

    compute: Callable[[Array], Array]
    measured: Array

    def __call__(self, counts: Array) -> Array:
        """Return the value of each draw, of shape (draws,)."""
        return self.compute(counts)

    def groups(self, part: Array | None = None) -> int:
        """Return how many groups have something to measure; `part`, boolean (K,), restricts the count."""
        return int((self.measured if part is None else self.measured & part).sum())


def resamples(groups: int, draws: int, seed: int) -> Array:
    """Return counts of shape (draws, groups): each draw samples `groups` groups with replacement."""
    chances = np.full(groups, 1 / groups)
    counts: Array = np.random.default_rng(seed).multinomial(groups, chances, size=draws).astype(float)
    return counts


def within(counts: Array, part: Array) -> Array:
    """Return the counts, set to 0 for groups outside a part; `part` is boolean of shape (groups,)."""
    return np.asarray(counts * part)


def ratio(sums: Array, numbers: Array) -> Statistic:
    """Return the mean as a statistic; `sums` of values and `numbers` of values per group have shape (groups,)."""

    def statistic(counts: Array) -> Array:
        return _divide(counts @ sums, counts @ numbers)

    return Statistic(statistic, numbers > 0)


def pair_ratio(sums: Array, numbers: Array) -> Statistic:
    """Return the mean over pairs as a statistic.

    `sums` and `numbers` have shape (K, K): entry (a, b) is the sum over the pairs of group a with group b, and their
    number. A group that is drawn twice forms pairs with other groups twice, but pairs with itself only within each
    copy. A pair across two copies could compare a prompt with itself, which never happens in the original data, so it
    would bias every draw.
    """

    def total(matrix: Array, counts: Array) -> Array:
        inside = np.diag(matrix)
        across = np.einsum("dk,dk->d", counts @ matrix, counts)
        return np.asarray(across - counts**2 @ inside + counts @ inside)

    def statistic(counts: Array) -> Array:
        return _divide(total(sums, counts), total(numbers, counts))

    return Statistic(statistic, numbers.sum(1) > 0)


def value(statistic: Statistic, groups: int) -> float:
    """Return the statistic of the original data: every one of the `groups` groups counts once."""
    return float(statistic(np.ones((1, groups)))[0])


def percentiles(draws: Array, confidence: float, groups: int) -> tuple[float, float]:
    """Return the percentile interval of the draws, which have shape (draws,).

    Both ends are NaN if a draw is NaN or if `groups` is below LEAST_GROUPS.
    """
    if groups < LEAST_GROUPS:
        return np.nan, np.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def jackknife(statistic: Statistic, groups: int, confidence: float, seed: int, blocks: int = 20) -> tuple[float, float]:
    """Return a normal interval from a jackknife, which leaves out one of `blocks` random blocks of groups at a time.

    It serves statistics that duplicates bias, such as the Frechet distance: every bootstrap draw repeats images, so
    all draws would lie on one side of the value. Both ends are NaN if there are fewer than LEAST_GROUPS groups.
    """
    if statistic.groups() < LEAST_GROUPS:
        return np.nan, np.nan
    blocks = min(blocks, groups)
    block = np.random.default_rng(seed).permutation(groups) % blocks
    left_out = statistic((block[None, :] != np.arange(blocks)[:, None]).astype(float))
    error = np.sqrt((blocks - 1) / blocks * np.square(left_out - left_out.mean()).sum())
    reach = float(norm.ppf((1 + confidence) / 2) * error)
    middle = value(statistic, groups)
    return middle - reach, middle + reach


def _divide(numerator: Array, denominator: Array) -> Array:
    """Return the element-wise quotient; NaN if a denominator is 0."""
    quotient = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient
