"""Groups of similar prompts: every pair in a group reaches a cosine threshold, and group sizes are capped.

Complete-linkage clustering: the two most similar clusters merge repeatedly, and the similarity of two clusters is the
lowest cosine between their members. The merges form a tree; groups are a cut of it. Rows are first sorted by their
values, so the result does not depend on the order of the prompts.

| symbol | meaning |
|---|---|
| n, d | number of prompts, width of their embeddings |
| a, b | two clusters, each named by one of its members |
| M, K | number of prompts and of groups: one level of sharing at share ratio beta saves beta (1 - K / M) |
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from sage.errors import ConfigurationError, DataError
from sage.grouping.linkage import Link, agglomerate, pack
from sage.grouping.neighbours import scramble
from sage.numbers import real, whole

Groups = list[list[int]]
_PART = 16384  # rows processed at a time


@dataclass(frozen=True)
class Tree:
    """Nested groups of `size` prompts as merges (a, b, similarity), most similar first.

    Numbering as in scipy's linkage matrix: 0 to size - 1 are the prompts, size + k is the cluster that merge k makes.
    `similarity` is the lowest cosine in that cluster. Unlike scipy's, the tree may be a forest.
    """

    size: int
    merges: list[tuple[int, int, float]]


def group(embeddings: np.ndarray, threshold: float, max_size: int, near_duplicate: float = math.inf) -> Groups:
    """Return groups of similar prompts: lists of row indices, a partition of all rows.

    embeddings      shape (n, d), rows of any nonzero length; a zero or non-finite row forms a group of its own
    threshold       lowest cosine that a pair in a group may have
    max_size        largest number of prompts in a group
    near_duplicate  pairs with this cosine or more never share a group; the default lets copies of a prompt share.
                    The pipeline uses 0.999: without branch noise, near-duplicates in one group give the same image

    Indices ascend within a group, and groups are ordered by their first index. Raises ConfigurationError if `threshold`
    is outside [-1, 1] or `max_size` below 1, DataError if `embeddings` is not a matrix.
    """
    matrix = _matrix(embeddings)
    links = _links(pack, matrix, threshold, max_size, near_duplicate)
    ends = np.array([link[:2] for link in links], np.int64).reshape(-1, 2)
    pairs = csr_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(len(matrix), len(matrix)))
    count, label = connected_components(pairs, directed=False)
    members = np.argsort(label, kind="stable")
    first = np.cumsum(np.bincount(label, minlength=count))[:-1]
    return sorted(part.tolist() for part in np.split(members, first)) if count else []


def tree(embeddings: np.ndarray, threshold: float, max_size: int, near_duplicate: float = math.inf) -> Tree:
    """Return nested groups down to a threshold; `cut` gives one level. Arguments and errors are the same as `group`'s.

    At equal threshold `cut` gives a few more groups than `group`, which also dissolves small groups into others.
    """
    matrix = _matrix(embeddings)
    links = _links(agglomerate, matrix, threshold, max_size, near_duplicate)
    # Rename clusters from one of their members to scipy's numbering.
    name = list(range(len(matrix)))
    merges = []
    for k, (a, b, similarity) in enumerate(sorted(links, key=lambda link: -link[2])):
        merges.append((min(name[a], name[b]), max(name[a], name[b]), similarity))
        name[a] = name[b] = len(matrix) + k
    return Tree(len(matrix), merges)


def cut(tree: Tree, threshold: float) -> Groups:
    """Return the groups of a tree at a threshold: all merges of at least this cosine are applied."""
    members: dict[int, list[int]] = {prompt: [prompt] for prompt in range(tree.size)}
    for k, (a, b, similarity) in enumerate(tree.merges):
        if similarity >= threshold:
            members[tree.size + k] = members.pop(a) + members.pop(b)
    return sorted(sorted(group) for group in members.values())


def usable(embeddings: np.ndarray) -> np.ndarray:
    """Return a boolean mask of shape (n,): False for rows that are zero or not finite."""
    matrix = _matrix(embeddings)
    # The largest magnitude tells both without a second matrix, as max and min pass NaN and infinity on.
    if not matrix.size:
        return np.zeros(len(matrix), bool)
    largest = np.maximum(matrix.max(axis=1), -matrix.min(axis=1))
    found: np.ndarray = np.isfinite(largest) & (largest > 0)
    return found


def worst_similarity(embeddings: np.ndarray, groups: Sequence[Sequence[int]]) -> list[float]:
    """Return for each group the cosine of its least similar pair; 1 for a group of one."""
    matrix = _matrix(embeddings)
    worst = []
    for members in groups:
        rows = _unit_rows(matrix, np.asarray(members)) if len(members) > 1 else np.ones((1, 1), np.float32)
        worst.append(min(1.0, float((rows @ rows.T).min())))
    return worst


def _matrix(embeddings: np.ndarray) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # a value too large for float32 becomes infinite: a group of its own
            matrix = np.asarray(embeddings, np.float32)
    except (ValueError, TypeError) as error:
        raise DataError(f"embeddings are not a matrix of numbers: {error}; give every prompt equal width") from error
    if matrix.ndim != 2:
        raise DataError(f"embeddings have shape {matrix.shape}; give shape (prompts, width)")
    return matrix


def _unit_rows(matrix: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return the rows at `index` scaled to length 1, computed in parts so that memory holds a single copy."""
    rows = np.empty((len(index), matrix.shape[1]), np.float32)
    for start in range(0, len(index), _PART):
        part = matrix[index[start : start + _PART]]
        # Divide by the maximum first, so that the norm of tiny and huge rows neither underflows nor overflows.
        part /= np.abs(part).max(axis=1, keepdims=True)
        rows[start : start + _PART] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def _canonical(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the usable rows' indices in an order given by values alone, and the position of each first copy in it.

    Copies of a row are adjacent. The order decides between equally good merges. Distinct rows are sorted by their
    projection on a fixed direction, because rounding errors, which differ between machines, rarely change that order.
    """
    index = np.flatnonzero(usable(matrix))
    # A 64-bit hash of each row: sums of its bits times odd constants, modulo 2^64.
    factors = scramble(np.arange(matrix.shape[1], dtype=np.uint64)) | np.uint64(1)
    keys = np.empty(len(index), np.uint64)
    for start in range(0, len(index), _PART):
        bits = (matrix[index[start : start + _PART]] + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
        keys[start : start + _PART] = bits.astype(np.uint64) @ factors
    order = np.argsort(scramble(keys), kind="stable")
    index, keys = index[order], keys[order]
    new = np.ones(len(index), bool)
    alike = np.flatnonzero(keys[1:] == keys[:-1])
    new[alike + 1] = (matrix[index[alike + 1]] != matrix[index[alike]]).any(axis=1)
    first = np.flatnonzero(new)
    direction = factors.astype(np.float64) / 2**63 - 1
    places = np.empty(len(first))
    for start in range(0, len(first), _PART):
        places[start : start + _PART] = _unit_rows(matrix, index[first[start : start + _PART]]) @ direction
    ranks = np.empty(len(first), np.int64)
    ranks[np.argsort(places, kind="stable")] = np.arange(len(first))
    ranks = ranks[np.cumsum(new) - 1]
    order = np.argsort(ranks, kind="stable")
    return index[order], np.flatnonzero(np.diff(ranks[order], prepend=-1))


def _links(
    find: Callable[[np.ndarray, np.ndarray, float, float, int], list[Link]],
    matrix: np.ndarray,
    threshold: float,
    max_size: int,
    near_duplicate: float,
) -> list[Link]:
    """Return the links of all rows of a matrix: `find` (pack or agglomerate) links distinct rows; copies are added."""
    threshold, max_size = real("threshold", threshold), whole("max_size", max_size)
    near_duplicate = real("near_duplicate", near_duplicate)
    if not -1 <= threshold <= 1:
        raise ConfigurationError(f"threshold is {threshold}; give a cosine in [-1, 1]")
    if max_size < 1:
        raise ConfigurationError(f"max_size is {max_size}; give at least 1")
    index, first = _canonical(matrix)
    copies = np.diff(first, append=len(index))
    links: list[Link] = []
    if near_duplicate > 1:  # copies may share a group: they fill groups of their own, and the remainder joins others
        for row in np.flatnonzero(copies > 1):
            for begin in range(0, copies[row], max_size):
                head = first[row] + begin
                links += [(head, head + k, 1.0) for k in range(1, min(max_size, copies[row] - begin))]
        left = copies % max_size
        layers = [(np.flatnonzero(left), copies - left, 1)]
    else:  # copies may not share a group: link all first copies, then all second copies, and so on
        left = np.ones_like(copies)
        counts = [0, *np.unique(copies)]
        # Layers with the same distinct rows have the same links, so they are computed once and repeated.
        layers = [
            (np.flatnonzero(copies > done), np.full_like(copies, done), count - done)
            for done, count in itertools.pairwise(counts)
        ]
    for distinct, offset, repeats in layers:
        if len(distinct) < 2 or max_size < 2:
            continue
        place = (first + offset)[distinct]
        found = find(_unit_rows(matrix, index[place]), left[distinct], threshold, near_duplicate, max_size)
        for a, b, similarity in found:
            links += [(place[a] + repeat, place[b] + repeat, similarity) for repeat in range(repeats)]
    return [(int(index[a]), int(index[b]), similarity) for a, b, similarity in links]
