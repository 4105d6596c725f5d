"""Intervals from a cluster bootstrap: images of one group are dependent, so whole groups are resampled.

| symbol | meaning |
|---|---|
| K | groups |
| counts | (draws, K): how often each group stands in a draw; the data themselves are all ones |
| Statistic | counts of shape (draws, K) to values of shape (draws,); NaN if a draw leaves nothing to measure |

Statistics of two arms under the same counts are paired: their difference has the interval of the difference.

Few groups resemble each other by chance, and a single group is drawn again and again, so that the interval would be
too narrow. Below LEAST_GROUPS there is none.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

Array = np.ndarray
# Chosen by `python -m benchmarks.gates`: a model that is worse by exactly as much as a gate allows passes it in at most
# 5 of 100 trials (a 95% interval promises 2.5). That holds from 12 groups on; 20 leave room for losses that few groups
# bear alone: then 5.2 of 100 pass (standard error 0.7), and 3.6 otherwise.
LEAST_GROUPS = 20


@dataclass(frozen=True)
class Statistic:
    """What is measured: `compute` takes counts of shape (draws, K), `measured` (K,) names the groups that count."""

    compute: Callable[[Array], Array]
    measured: Array

    def __call__(self, counts: Array) -> Array:
        """Return the values of draws."""
        return self.compute(counts)

    def groups(self, part: Array | None = None) -> int:
        """Return how many groups, or groups of a part, have something to measure."""
        return int((self.measured if part is None else self.measured & part).sum())


def resamples(groups: int, draws: int, seed: int) -> Array:
    """Return counts of shape (draws, groups): each draw takes as many groups as there are, with replacement."""
    chances = np.full(groups, 1 / groups)
    counts: Array = np.random.default_rng(seed).multinomial(groups, chances, size=draws).astype(float)
    return counts


def within(counts: Array, part: Array) -> Array:
    """Return counts with nothing outside a part of the groups; `part` is boolean of shape (groups,)."""
    return np.asarray(counts * part)


def ratio(sums: Array, numbers: Array) -> Statistic:
    """Return the mean as a statistic: sums of values and their number, each of shape (groups,)."""

    def statistic(counts: Array) -> Array:
        return _divide(counts @ sums, counts @ numbers)

    return Statistic(statistic, numbers > 0)


def pair_ratio(sums: Array, numbers: Array) -> Statistic:
    """Return the mean over pairs as a statistic: sums over the pairs of two groups, and their number, each (K, K).

    A group drawn twice pairs with other groups twice, but with itself only inside each copy: pairs across the copies
    would compare prompts with themselves, which no two prompts of the data do, and would bias every draw.
    """

    def total(matrix: Array, counts: Array) -> Array:
        inside = np.diag(matrix)
        across = np.einsum("dk,dk->d", counts @ matrix, counts)
        return np.asarray(across - counts**2 @ inside + counts @ inside)

    def statistic(counts: Array) -> Array:
        return _divide(total(sums, counts), total(numbers, counts))

    return Statistic(statistic, numbers.sum(1) > 0)


def value(statistic: Statistic, groups: int) -> float:
    """Return the statistic of the data themselves."""
    return float(statistic(np.ones((1, groups)))[0])


def percentiles(draws: Array, confidence: float, groups: int) -> tuple[float, float]:
    """Return the ends of the middle share of the draws; NaN if a draw is NaN or the draws are from too few groups."""
    if groups < LEAST_GROUPS:
        return np.nan, np.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def jackknife(statistic: Statistic, groups: int, confidence: float, seed: int, blocks: int = 20) -> tuple[float, float]:
    """Return a normal interval from leaving out one block of groups after another.

    For statistics that a repeated picture biases, as it does the Frechet distance, so that all bootstrap draws would
    lie to one side of the value. NaN if there are too few groups.
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
    """Return the quotient, NaN if the denominator is 0."""
    quotient = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient
