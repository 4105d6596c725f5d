"""The figures (value, interval and n) of every arm, computed from features.

All arms use the same prompts, seeds and bootstrap draws over groups, so comparisons of two arms are paired.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sage.evaluation.bootstrap import Array, Statistic, jackknife, percentiles, ratio, resamples, value, within
from sage.evaluation.distances import Groups, frechet_statistic, kernel_statistic
from sage.evaluation.diversity import group_diversity, seed_diversity
from sage.evaluation.registry import BOOTSTRAPPED, BY_SIMILARITY, METRICS
from sage.evaluation.results import SINGLE_PROMPTS, Difference, Figure, Interval, Part

_PARTS = ("loosest third", "middle third", "tightest third")


@dataclass(frozen=True)
class ImageFeatures:
    """The images of an arm: features (prompts, seeds, width) and alignment with their prompts (prompts, seeds).

    `attributes` tells, if the judge does, whether an image shows an attribute that was asked for: 1 or 0, NaN if it was
    not asked for, (prompts, seeds) by attribute.
    """

    features: Array
    alignment: Array
    attributes: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Bootstrap:
    """The settings of all intervals.

    counts: bootstrap draws over groups, (draws, groups).
    confidence: of the intervals, such as 0.95.
    seed: of the draws, and of the blocks of the jackknife.
    """

    counts: Array
    confidence: float
    seed: int

    @classmethod
    def over(cls, groups: Groups, draws: int, confidence: float, seed: int) -> "Bootstrap":
        """Return `draws` bootstrap draws over groups."""
        return cls(resamples(len(groups), draws, seed), confidence, seed)

    def figure(self, statistic: Statistic, n: int, part: Array | None = None) -> Figure:
        """Return the figure of a statistic of n images; `part`, boolean (groups,), restricts it to some groups."""
        part = np.ones(self.counts.shape[1], bool) if part is None else part
        ends = percentiles(statistic(within(self.counts, part)), self.confidence, statistic.groups(part))
        return figure(float(statistic(part[None].astype(float))[0]), *ends, n)


def figure(value: float, low: float | None, high: float | None, n: int) -> Figure:
    """Return a figure; numbers that are not finite become None, and no gate passes on None."""
    return Figure(value=_finite(value), low=_finite(low), high=_finite(high), n=n)


def _finite(number: float | None) -> float | None:
    return float(number) if number is not None and math.isfinite(number) else None


def _difference(absolute: Figure, relative: Figure) -> Difference:
    share = Interval(value=relative.value, low=relative.low, high=relative.high)
    return Difference(value=absolute.value, low=absolute.low, high=absolute.high, n=absolute.n, relative=share)


def statistics(real: ImageFeatures, arm: ImageFeatures, groups: Groups) -> dict[str, Statistic]:
    """Return the statistic of each metric for an arm; distances are to the real images of the same prompts."""
    return {
        "kernel_distance": kernel_statistic(real.features, arm.features, groups),
        "frechet_distance": frechet_statistic(real.features, arm.features, groups),
    } | _means(arm, groups)


def _means(images: ImageFeatures, groups: Groups) -> dict[str, Statistic]:
    cosines = np.array([images.alignment[list(group)].sum() for group in groups], float)
    numbers = np.array([images.alignment[list(group)].size for group in groups], float)
    return {
        "alignment": ratio(cosines, numbers),
        "group_diversity": ratio(*group_diversity(images.features, groups)),
        "seed_diversity": ratio(*seed_diversity(images.features, groups)),
    }


def attribute_figures(images: ImageFeatures, groups: Groups, bootstrap: Bootstrap) -> dict[str, Figure]:
    """Return for each attribute the share of the images that show it, of those whose prompt asks for it."""
    found = {}
    for name, shown in images.attributes.items():
        right = np.array([np.nansum(shown[list(group)]) for group in groups])
        asked = np.array([np.isfinite(shown[list(group)]).sum() for group in groups], float)
        found[name] = bootstrap.figure(ratio(right, asked), int(asked.sum()))
    return found


def real_figures(real: ImageFeatures, groups: Groups, bootstrap: Bootstrap) -> dict[str, Figure]:
    """Return alignment and diversity within groups of the real images, for comparison with the arms."""
    measured = _means(real, groups)
    return {name: bootstrap.figure(measured[name], real.alignment.size) for name in ("alignment", "group_diversity")}


def other_captions(
    own: Array, other: Array, differs: Array, groups: Groups, bootstrap: Bootstrap
) -> tuple[Figure, str | None]:
    """Return the alignment of the real images with other captions, and a warning unless their own captions fit better.

    own, other  alignment of each real image with its caption and with another image's, (prompts,)
    differs     whether the two captions differ, (prompts,); other pairs are not counted
    """
    numbers = np.array([differs[list(group)].sum() for group in groups], float)

    def mean(values: Array) -> Figure:
        sums = np.array([(values * differs)[list(group)].sum() for group in groups], float)
        return bootstrap.figure(ratio(sums, numbers), int(numbers.sum()))

    found, right, better = mean(other), mean(own), mean(own - other)
    least = better.value if better.low is None else better.low
    if least is not None and least > 0:
        return found, None
    if right.value is None or found.value is None:
        return found, "No two captions differ, so whether the judge of alignment tells captions apart is not known."
    return found, (
        f"The judge of alignment does not tell captions apart: {found.n} real pictures score {right.value:.3g} with "
        f"their own captions and {found.value:.3g} with other pictures'. Choose another judge (evaluate.alignment)."
    )


def floor(real: Array, others: Array, groups: Groups, bootstrap: Bootstrap) -> dict[str, Figure]:
    """Return the kernel and the Frechet distance between references and other real images: a floor for the arms.

    `real` has shape (prompts, references, width). `others` has shape (n, width); row i is for prompt i. If n is below
    the number of prompts, only the first n are compared, and the figures have that n.
    """
    n = len(others)
    kept = [kept for group in groups if (kept := [prompt for prompt in group if prompt < n])]
    again = Bootstrap.over(kept, len(bootstrap.counts), bootstrap.confidence, bootstrap.seed)
    frechet = frechet_statistic(real[:n], others[:, None], kept)
    ends = jackknife(frechet, len(kept), bootstrap.confidence, bootstrap.seed)
    return {
        "kernel_distance": again.figure(kernel_statistic(real[:n], others[:, None], kept), n),
        "frechet_distance": figure(value(frechet, len(kept)), *ends, n),
    }


def arm_figures(measured: Mapping[str, Statistic], images: ImageFeatures, bootstrap: Bootstrap) -> dict[str, Figure]:
    """Return the figures of an arm; n counts all images, except for the Frechet distance: the images of one seed."""
    prompts, n = len(images.alignment), images.alignment.size
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
    """Return by how much an arm is worse than a reference (negative: better), by metric, with paired intervals.

    `relative` is the difference divided by the reference's value. The kernel distance may be near 0, so it is divided
    by `kernel_floor` if that is larger: the upper end of the interval of real images against other real images. `n` is
    the number of images.
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
    """Return by how much a cost is higher than the reference's; costs are exact, so the interval is a point."""
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
    """Return the figures of each part of the groups: single prompts, then thirds from the least to the most similar.

    measured    statistic by arm and metric
    groups      row numbers of the prompts of each group
    similarity  cosine of the least similar pair of prompts in each group
    bootstrap   draws over the groups
    seeds       images per prompt
    saving      fraction of network evaluations saved on the whole set; at one share ratio the saving of a part is
                proportional to 1 - groups / prompts, so it is computed from this
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
