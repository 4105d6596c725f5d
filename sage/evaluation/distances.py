"""Frechet distance and kernel distance (KID) between the features of generated and real images.

Both follow the definitions of clean-fid's `frechet_distance` and `kernel_distance`, and tests compare the results.
clean-fid is not called, for two reasons. Its kernel distance averages over random, unseeded subsets; the full unbiased
sum used here has no randomness and can be reweighted, so a thousand bootstrap draws take a second. Its Frechet distance
needs the square root of a product of covariances, which is singular if there are fewer images than features and takes
seconds each time; here the same trace is computed from singular values of the features.
"""

from collections.abc import Sequence

import numpy as np

from sage.evaluation.bootstrap import Array, Statistic, pair_ratio

Groups = Sequence[Sequence[int]]
_ROWS = 1024  # rows of the kernel matrix computed at a time, so memory does not grow with the square of the prompts


def frechet_distance(x: Array, y: Array, of_x: Array | None = None, of_y: Array | None = None) -> float:
    """Return the Frechet distance of Gaussians fitted to feature sets (m, width) and (n, width) (Heusel et al., 2017).

    |mean_x - mean_y|^2 + Tr(C_x + C_y - 2 (C_x C_y)^(1/2)). Tr((C_x C_y)^(1/2)) is the sum of the singular values of
    A B^T, for scaled, centred features A and B with C_x = A^T A and C_y = B^T B. The distance is biased upward at small
    m and n, so compare it at equal numbers only. `of_x` (m,) and `of_y` (n,) tell how often each row counts, by default
    once.
    """
    (mean_x, a), (mean_y, b) = _centred(x, of_x), _centred(y, of_y)
    shared = np.linalg.svd(_short(a) @ _short(b).T, compute_uv=False).sum()
    return float(np.square(mean_x - mean_y).sum() + np.square(a).sum() + np.square(b).sum() - 2 * shared)


def frechet_statistic(real: Array, generated: Array, groups: Groups) -> Statistic:
    """Return the mean over seeds of the Frechet distance as a statistic.

    Features: `real` has shape (prompts, references, width), `generated` (prompts, seeds, width).
    """
    group_of, references = _group_of(groups), real.shape[1]

    def statistic(counts: Array) -> Array:
        def one(count: Array) -> float:
            repeats = count[group_of]
            kept = repeats > 0
            if repeats.sum() < 2:
                return float("nan")
            x, of_x = real[kept].reshape(-1, real.shape[-1]), np.repeat(repeats[kept], references)
            seeds = (generated[kept, seed] for seed in range(generated.shape[1]))
            return float(np.mean([frechet_distance(x, y, of_x, repeats[kept]) for y in seeds]))

        return np.array([one(count) for count in counts])

    return Statistic(statistic, np.ones(len(groups), bool))


def kernel(x: Array, y: Array) -> Array:
    """Return the polynomial kernel (x . y / width + 1)^3 of each row of x with each of y (Binkowski et al., 2018)."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def kernel_statistic(real: Array, generated: Array, groups: Groups) -> Statistic:
    """Return the kernel distance (KID) as a statistic.

    Features: `real` x has shape (prompts, references, width), `generated` y (prompts, seeds, width). The distance is
    the mean over pairs of different prompts i, j of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j), the unbiased
    estimate of Gretton et al. (2012, lemma 6) for paired samples; k(x, .) is the mean over references and k(y, .) over
    seeds. It can be negative. clean-fid also counts k(x_i, y_i); here x_i and y_i belong to the same prompt, so
    counting it would lower the distance.
    """
    x, y = real.astype(float), generated.astype(float)
    prompts, references, _ = x.shape
    seeds = y.shape[1]
    group_of, sizes = _group_of(groups), np.array([len(group) for group in groups], float)
    member = np.zeros((prompts, len(groups)))
    member[np.arange(prompts), group_of] = 1
    sums = np.zeros((len(groups), len(groups)))
    for start in range(0, prompts, _ROWS):
        rows = np.arange(start, min(start + _ROWS, prompts))
        h = np.zeros((len(rows), prompts))
        for one in range(references):
            for other in range(references):
                h += kernel(x[rows, one], x[:, other]) / references**2
            for s in range(seeds):
                h -= (kernel(x[rows, one], y[:, s]) + kernel(y[rows, s], x[:, one])) / (references * seeds)
        for s in range(seeds):
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
    """Return the weighted mean and the centred, scaled rows A, so that A^T A is the covariance."""
    x = features.astype(float)
    repeats = np.ones(len(x)) if repeats is None else repeats
    mean = repeats @ x / repeats.sum()
    return mean, (x - mean) * np.sqrt(repeats / (repeats.sum() - 1))[:, None]


def _short(a: Array) -> Array:
    """Return at most `width` rows with the same A^T A, so that the cost of the SVD does not grow with the set."""
    return a if len(a) <= a.shape[1] else np.asarray(np.linalg.qr(a, mode="r"))
