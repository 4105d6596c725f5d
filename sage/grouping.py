"""Groups of similar prompts: every pair of a group reaches the threshold, and no group exceeds a size.

Complete-linkage agglomeration: the two most similar clusters merge, again and again, where the similarity of two
clusters is that of their least similar pair. What merges is a tree, and groups are a cut of it. Rows are brought into
an order of their own first, so nothing depends on the order of the prompts.

| symbol | meaning |
|---|---|
| n, d | prompts and the width of their embeddings |
| a, b | two clusters, named by one of their members |
| M, K | prompts and groups: one level of sharing at share ratio beta saves beta (1 - K / M) |
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sage.errors import ConfigurationError, DataError
from sage.neighbours import similar_pairs

Groups = list[list[int]]


@dataclass(frozen=True)
class Tree:
    """Nested groups of `size` prompts as merges (a, b, similarity), most similar first.

    As in scipy's linkage, 0 to size - 1 are the prompts and size + k is what merge k made; `similarity` is the cosine
    of the least similar pair inside it. Unlike there, it may be a forest:
    prompts that nothing joins stay apart.
    """

    size: int
    merges: list[tuple[int, int, float]]


def group(embeddings: np.ndarray, threshold: float, max_size: int) -> Groups:
    """Return groups of rows, a partition: every pair has at least this cosine, no group more than `max_size` rows.

    `embeddings` has shape (n, d), of any length but zero; a row that is zero or not finite is alone. Members ascend,
    groups are ordered by their first member. Raises ConfigurationError for a threshold outside [-1, 1] or a cap below
    1, DataError for what is no matrix.
    """
    return cut(tree(embeddings, threshold, max_size), threshold)


def tree(embeddings: np.ndarray, threshold: float, max_size: int) -> Tree:
    """Return the merges down to a threshold; `cut` at any height above gives what `group` gives there.

    Arguments and errors are those of `group`.
    """
    if not -1 <= threshold <= 1:
        raise ConfigurationError(f"threshold is {threshold}, but a cosine lies in [-1, 1]")
    if max_size < 1:
        raise ConfigurationError(f"max_size is {max_size}, but a group has at least 1 member")
    rows, index = _canonical(embeddings)
    merges = _agglomerate(rows, threshold, max_size)
    # Name the clusters as scipy does: a merge's number instead of a member.
    name = {row: int(index[row]) for pair in merges for row in pair[:2]}
    named = []
    for k, (a, b, similarity) in enumerate(sorted(merges, key=lambda merge: -merge[2])):
        named.append((min(name[a], name[b]), max(name[a], name[b]), similarity))
        name[a] = name[b] = len(embeddings) + k
    return Tree(len(embeddings), named)


def cut(tree: Tree, threshold: float) -> Groups:
    """Return the groups of a tree at a height: what merged at this cosine or above."""
    members: dict[int, list[int]] = {prompt: [prompt] for prompt in range(tree.size)}
    for k, (a, b, similarity) in enumerate(tree.merges):
        if similarity >= threshold:
            members[tree.size + k] = members.pop(a) + members.pop(b)
    return sorted(sorted(group) for group in members.values())


def usable(embeddings: np.ndarray) -> np.ndarray:
    """Return which rows have a direction, shape (n,): all but those that are zero or not finite."""
    return np.isfinite(embeddings).all(axis=1) & (embeddings != 0).any(axis=1)


def worst_similarity(embeddings: np.ndarray, groups: Sequence[Sequence[int]]) -> list[float]:
    """Return for each group the cosine of its least similar pair; 1 for a single."""
    worst = []
    for members in groups:
        rows = _unit(_matrix(embeddings)[list(members)]) if len(members) > 1 else np.ones((1, 1), np.float32)
        worst.append(min(1.0, float((rows @ rows.T).min())))
    return worst


def _matrix(embeddings: np.ndarray) -> np.ndarray:
    try:
        matrix = np.asarray(embeddings, np.float32)
    except (ValueError, TypeError) as error:
        raise DataError(f"embeddings are no matrix of numbers: {error}. Give every prompt the same width.") from error
    if matrix.ndim != 2:
        raise DataError(f"embeddings have shape {matrix.shape}, but (prompts, width) is expected")
    return matrix


def _unit(rows: np.ndarray) -> np.ndarray:
    """Return the rows at length 1; scaled twice, so that neither tiny nor huge ones lose their direction."""
    rows = rows / np.abs(rows).max(axis=1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) + np.float32(0)  # -0.0 becomes 0.0


def _canonical(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the usable rows at length 1 in an order that depends on their values alone, and where each came from."""
    matrix = _matrix(embeddings)
    index = np.flatnonzero(usable(matrix))
    rows = _unit(matrix[index])
    # A 64-bit hash of each row: sums of its bits times odd constants, modulo 2^64.
    words = rows.view(np.uint32)
    factors = _scramble(np.arange(rows.shape[1], dtype=np.uint64)) | np.uint64(1)
    keys = np.zeros(len(rows), np.uint64)
    for column, factor in zip(words.T, factors, strict=True):
        keys += column.astype(np.uint64) * factor
    order = np.argsort(_scramble(keys), kind="stable")
    return np.ascontiguousarray(rows[order]), index[order]


def _scramble(x: np.ndarray) -> np.ndarray:
    """Return 64-bit numbers that look random and depend on x alone (splitmix64)."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _agglomerate(rows: np.ndarray, threshold: float, max_size: int) -> list[tuple[int, int, float]]:
    """Return the merges (a, b, similarity) of canonical rows; a cluster is named by its smallest row.

    All pairs of clusters that are each other's most similar merge at once. Complete linkage only ever lowers a
    similarity, so this gives the tree that merging one best pair at a time gives.
    """
    n = len(rows)
    if n < 2 or max_size < 2:
        return []
    a, b, similarity = similar_pairs(rows, threshold)
    sizes = np.ones(n, np.int64)
    merges: list[tuple[int, int, float]] = []
    while len(a):
        chosen = _mutual_best(a, b, similarity, n)
        kept, gone = a[chosen], b[chosen]
        merges += zip(kept.tolist(), gone.tolist(), similarity[chosen].tolist(), strict=True)
        sizes[kept] += sizes[gone]
        name = np.arange(n)
        name[gone] = kept
        merged = np.zeros(n, bool)
        merged[kept] = True
        a, b, similarity = _join(name[a], name[b], similarity, merged, sizes, max_size)
    return merges


def _mutual_best(a: np.ndarray, b: np.ndarray, similarity: np.ndarray, n: int) -> np.ndarray:
    """Return the pairs, at least one, in which each is the other's most similar; ties go by a hash."""
    best = np.full(n, -np.inf, np.float32)
    np.maximum.at(best, a, similarity)
    np.maximum.at(best, b, similarity)
    tied = np.flatnonzero((similarity == best[a]) & (similarity == best[b]))
    # By a hash and not by name: among n equal pairs of pairs, names in order would let one merge at a time.
    lot = _scramble(a[tied].astype(np.uint64) * np.uint64(n) + b[tied].astype(np.uint64))
    first = np.full(n, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(first, a[tied], lot)
    np.minimum.at(first, b[tied], lot)
    return tied[(lot == first[a[tied]]) & (lot == first[b[tied]])]


def _join(
    a: np.ndarray, b: np.ndarray, similarity: np.ndarray, merged: np.ndarray, sizes: np.ndarray, max_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs between renamed clusters: both sides' least similarity, where all their pairs are known."""
    fits = (a != b) & (sizes[a] + sizes[b] <= max_size)
    a, b, similarity = np.minimum(a, b)[fits], np.maximum(a, b)[fits], similarity[fits]
    touched = merged[a] | merged[b]
    code = a[touched] * len(merged) + b[touched]
    order = np.argsort(code, kind="stable")
    code = code[order]
    start = np.flatnonzero(np.diff(code, prepend=-1))
    if not len(start):
        return a[~touched], b[~touched], similarity[~touched]
    least = np.minimum.reduceat(similarity[touched][order], start)
    first, second = np.divmod(code[start], len(merged))
    # Each side had two names before if it merged now: all two or four pairs must reach the threshold.
    whole = np.diff(start, append=len(code)) == (1 + merged[first]) * (1 + merged[second])
    return (
        np.concatenate([a[~touched], first[whole]]),
        np.concatenate([b[~touched], second[whole]]),
        np.concatenate([similarity[~touched], least[whole]]),
    )
