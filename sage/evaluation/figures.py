"""Every figure of every arm, each with its interval and its n, from features alone.

All arms are judged on the same prompts and seeds and under the same bootstrap draws over groups, so what is said of the
difference of two arms is paired.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sage.evaluation.bootstrap import Array, Statistic, jackknife, percentiles, ratio, resamples, value, within
from sage.evaluation.distances import Groups, frechet_statistic, kernel_statistic
from sage.evaluation.diversity import group_diversity, seed_diversity
from sage.evaluation.registry import BOOTSTRAPPED, BY_SIMILARITY, METRICS
from sage.evaluation.results import SINGLE_PROMPTS, Difference, Figure, Interval, Part

_PARTS = ("loosest third", "middle third", "tightest third")


@dataclass(frozen=True)
class ImageFeatures:
    """An arm's pictures: features (prompts, seeds, width), and cosines to their prompts (prompts, seeds)."""

    features: Array
    alignment: Array


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: draws over groups of shape (draws, groups), their middle share, and the seed."""

    counts: Array
    confidence: float
    seed: int

    @classmethod
    def over(cls, groups: Groups, draws: int, confidence: float, seed: int) -> "Bootstrap":
        """Return the draws for a partition."""
        return cls(resamples(len(groups), draws, seed), confidence, seed)

    def figure(self, statistic: Statistic, n: int, part: Array | None = None) -> Figure:
        """Return value, interval and n; `part`, boolean (groups,), selects some of the groups."""
        part = np.ones(self.counts.shape[1], bool) if part is None else part
        ends = percentiles(statistic(within(self.counts, part)), self.confidence, statistic.groups(part))
        return figure(float(statistic(part[None].astype(float))[0]), *ends, n)


def figure(value: float, low: float | None, high: float | None, n: int) -> Figure:
    """Return a figure; what is not finite becomes None, which no gate passes."""
    return Figure(value=_finite(value), low=_finite(low), high=_finite(high), n=n)


def _finite(number: float | None) -> float | None:
    return float(number) if number is not None and math.isfinite(number) else None


def _difference(absolute: Figure, relative: Figure) -> Difference:
    share = Interval(value=relative.value, low=relative.low, high=relative.high)
    return Difference(value=absolute.value, low=absolute.low, high=absolute.high, n=absolute.n, relative=share)


def statistics(real: ImageFeatures, arm: ImageFeatures, groups: Groups) -> dict[str, Statistic]:
    """Return what is measured of an arm against the real pictures of the same prompts, by name."""
    return {
        "kernel_distance": kernel_statistic(real.features[:, 0], arm.features, groups),
        "frechet_distance": frechet_statistic(real.features[:, 0], arm.features, groups),
    } | _means(arm, groups)


def _means(pictures: ImageFeatures, groups: Groups) -> dict[str, Statistic]:
    cosines = np.array([pictures.alignment[list(group)].sum() for group in groups], float)
    numbers = np.array([pictures.alignment[list(group)].size for group in groups], float)
    return {
        "alignment": ratio(cosines, numbers),
        "group_diversity": ratio(*group_diversity(pictures.features, groups)),
        "seed_diversity": ratio(*seed_diversity(pictures.features, groups)),
    }


def real_figures(real: ImageFeatures, groups: Groups, bootstrap: Bootstrap) -> dict[str, Figure]:
    """Return what the real pictures themselves reach in alignment and diversity: a mark to read the arms' against."""
    measured = _means(real, groups)
    return {name: bootstrap.figure(measured[name], real.alignment.size) for name in ("alignment", "group_diversity")}


def floor(real: Array, siblings: Array, groups: Groups, bootstrap: Bootstrap) -> dict[str, Figure]:
    """Return both distances between real pictures and as many other real ones, row by row of the same kind.

    `siblings` of shape (n, width) may be fewer than the real pictures: then the first n are compared, and n says so.
    """
    n = len(siblings)
    kept = [kept for group in groups if (kept := [prompt for prompt in group if prompt < n])]
    again = Bootstrap.over(kept, len(bootstrap.counts), bootstrap.confidence, bootstrap.seed)
    frechet = frechet_statistic(real[:n], siblings[:, None], kept)
    ends = jackknife(frechet, len(kept), bootstrap.confidence, bootstrap.seed)
    return {
        "kernel_distance": again.figure(kernel_statistic(real[:n], siblings[:, None], kept), n),
        "frechet_distance": figure(value(frechet, len(kept)), *ends, n),
    }


def arm_figures(measured: Mapping[str, Statistic], pictures: ImageFeatures, bootstrap: Bootstrap) -> dict[str, Figure]:
    """Return the figures of an arm; the Frechet distance is a mean over seeds, so its n is that of one seed."""
    prompts, n = len(pictures.alignment), pictures.alignment.size
    groups = bootstrap.counts.shape[1]
    frechet = measured["frechet_distance"]
    ends = jackknife(frechet, groups, bootstrap.confidence, bootstrap.seed)
    figures = {name: bootstrap.figure(measured[name], n) for name in BOOTSTRAPPED}
    return figures | {"frechet_distance": figure(value(frechet, groups), *ends, prompts)}


def worse_by(
    arm: Mapping[str, Statistic],
    reference: Mapping[str, Statistic],
    bootstrap: Bootstrap,
    n: int,
    kernel_floor: float,
) -> dict[str, Difference]:
    """Return by how much an arm is worse than a reference (negative: better), with the interval of the difference.

    `relative` is a share of the reference's value. A kernel distance near 0 has no meaningful share, so there the share
    is of `kernel_floor` if that is larger: what real pictures may score against real ones.
    """
    groups = bootstrap.counts.shape[1]
    counts = np.vstack([np.ones((1, groups)), bootstrap.counts])
    result = {}
    for name in BOOTSTRAPPED:
        ours, theirs = arm[name](counts), reference[name](counts)
        worse = METRICS[name].worse(ours, theirs)
        least = max(kernel_floor, 0.0) if name == "kernel_distance" else 0.0
        scale = np.maximum(np.abs(theirs), least)
        share = np.divide(worse, scale, out=np.full(len(worse), np.nan), where=scale > 0)
        absolute, relative = (
            figure(float(draws[0]), *percentiles(draws[1:], bootstrap.confidence, arm[name].groups()), n)
            for draws in (worse, share)
        )
        result[name] = _difference(absolute, relative)
    return result


def cost_worse_by(ours: float, theirs: float, n: int) -> Difference:
    """Return by how much a counted cost is higher; it is counted, not sampled, so its interval is a point."""
    worse = ours - theirs
    share = worse / theirs if theirs > 0 else math.nan
    return _difference(figure(worse, worse, worse, n), figure(share, share, share, n))


def by_similarity(
    measured: Mapping[str, Mapping[str, Statistic]],
    groups: Groups,
    similarity: Sequence[float],
    bootstrap: Bootstrap,
    seeds: int,
    saving: float,
) -> list[Part]:
    """Return the figures of each part of the groups: single prompts, then thirds from the loosest to the tightest.

    `saving` is the whole set's, counted; a part's follows from it, as under one share ratio a saving is proportional to
    1 - groups / prompts.
    """
    sizes = np.array([len(group) for group in groups])
    shareable = 1 - len(groups) / sizes.sum()
    order = [number for number in np.argsort(similarity, kind="stable") if sizes[number] > 1]
    parts = [(SINGLE_PROMPTS, np.flatnonzero(sizes == 1)), *zip(_PARTS, np.array_split(order, 3), strict=True)]
    result = []
    for name, numbers in parts:
        if len(numbers) == 0:
            continue
        part = np.isin(np.arange(len(groups)), numbers)
        prompts = int(sizes[part].sum())
        result.append(
            Part(
                part=name,
                similarity=[min(similarity[k] for k in numbers), max(similarity[k] for k in numbers)],
                groups=len(numbers),
                prompts=prompts,
                saving=float(saving * (1 - len(numbers) / prompts) / shareable) if shareable > 0 else 0.0,
                arms={
                    arm: {
                        metric: bootstrap.figure(statistic[metric], prompts * seeds, part) for metric in BY_SIMILARITY
                    }
                    for arm, statistic in measured.items()
                },
            )
        )
    return result
