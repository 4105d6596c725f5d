"""How far generated pictures lie from real ones: the Frechet and the kernel distance between their features.

clean-fid's `frechet_distance` and `kernel_distance` define what is computed here, as the tests prove. They are not
called, for two reasons. Its kernel distance draws random subsets, unseeded; here stands the whole unbiased sum, which
has no draw and can be reweighted, so a thousand bootstrap draws take a second. Its Frechet distance takes the root of
a covariance product, which is singular at fewer pictures than features and takes seconds each time; here the same
trace comes from singular values of the features themselves.
"""

from collections.abc import Sequence

import numpy as np

from sage.evaluation.bootstrap import Array, Statistic, pair_ratio

Groups = Sequence[Sequence[int]]
_ROWS = 1024  # rows of the kernel matrix at a time, so that memory does not grow with the square of the prompts


def frechet_distance(x: Array, y: Array, repeats: Array | None = None) -> float:
    """Return the Frechet distance of two feature sets, each (n, width), as of Gaussians (Heusel et al., 2017).

    |mean_x - mean_y|^2 + Tr(C_x + C_y - 2 (C_x C_y)^(1/2)), where the last trace is the sum of the singular values of
    A B^T for centred features A and B with C = A^T A. Biased upward at small n: compare at equal n only. `repeats`,
    of shape (n,), counts each row of both sets so many times.
    """
    (mean_x, a), (mean_y, b) = (_centred(features, repeats) for features in (x, y))
    shared = np.linalg.svd(_short(a) @ _short(b).T, compute_uv=False).sum()
    return float(np.square(mean_x - mean_y).sum() + np.square(a).sum() + np.square(b).sum() - 2 * shared)


def frechet_statistic(real: Array, generated: Array, groups: Groups) -> Statistic:
    """Return the mean over seeds of the Frechet distance: real (prompts, width), generated (prompts, seeds, width)."""
    group_of = _group_of(groups)

    def statistic(counts: Array) -> Array:
        def one(count: Array) -> float:
            repeats = count[group_of]
            kept = repeats > 0
            if repeats.sum() < 2:
                return float("nan")
            seeds = (generated[kept, seed] for seed in range(generated.shape[1]))
            return float(np.mean([frechet_distance(real[kept], y, repeats[kept]) for y in seeds]))

        return np.array([one(count) for count in counts])

    return Statistic(statistic, np.ones(len(groups), bool))


def kernel(x: Array, y: Array) -> Array:
    """Return the polynomial kernel (x . y / width + 1)^3 of rows (Binkowski et al., 2018)."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def kernel_statistic(real: Array, generated: Array, groups: Groups) -> Statistic:
    """Return the kernel distance (KID) of real (prompts, width) and generated (prompts, seeds, width) features.

    The mean over pairs of different prompts i, j of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j), which is the
    unbiased estimate of Gretton et al. (2012, lemma 6) for paired samples; k(y, .) is the mean over the seeds. It can
    be negative. clean-fid also counts k(x_i, y_i); here x_i and y_i share a prompt, so that would flatter.
    """
    x, y = real.astype(float), generated.astype(float)
    prompts, seeds, _ = y.shape
    group_of, sizes = _group_of(groups), np.array([len(group) for group in groups], float)
    member = np.zeros((prompts, len(groups)))
    member[np.arange(prompts), group_of] = 1
    sums = np.zeros((len(groups), len(groups)))
    for start in range(0, prompts, _ROWS):
        rows = np.arange(start, min(start + _ROWS, prompts))
        h = kernel(x[rows], x)
        for s in range(seeds):
            h -= (kernel(x[rows], y[:, s]) + kernel(y[rows, s], x)) / seeds
            for other in range(seeds):
                h += kernel(y[rows, s], y[:, other]) / seeds**2
        h[np.arange(len(rows)), rows] = 0
        sums += member[rows].T @ (h @ member)
    return pair_ratio(sums, np.outer(sizes, sizes) - np.diag(sizes))


def _group_of(groups: Groups) -> Array:
    """Return the number of each prompt's group, of shape (prompts,)."""
    group_of = np.empty(sum(map(len, groups)), int)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    return group_of


def _centred(features: Array, repeats: Array | None) -> tuple[Array, Array]:
    """Return the mean, and rows A with A^T A the covariance."""
    x = features.astype(float)
    repeats = np.ones(len(x)) if repeats is None else repeats
    mean = repeats @ x / repeats.sum()
    return mean, (x - mean) * np.sqrt(repeats / (repeats.sum() - 1))[:, None]


def _short(a: Array) -> Array:
    """Return rows with the same A^T A, no more of them than columns: a large set costs no more than its width."""
    return a if len(a) <= a.shape[1] else np.asarray(np.linalg.qr(a, mode="r"))
