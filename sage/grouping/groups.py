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

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from sage.errors import ConfigurationError, DataError
from sage.grouping.linkage import Link, agglomerate, pack, scramble

Groups = list[list[int]]
_PART = 16384


@dataclass(frozen=True)
class Tree:
    """Nested groups of `size` prompts as merges (a, b, similarity), most similar first.

    As in scipy's linkage, 0 to size - 1 are the prompts and size + k is what merge k made; `similarity` is the cosine
    of the least similar pair inside it. Unlike there, it may be a forest:
    prompts that nothing joins stay apart.
    """

    size: int
    merges: list[tuple[int, int, float]]


def group(embeddings: np.ndarray, threshold: float, max_size: int, near_duplicate: float = math.inf) -> Groups:
    """Return groups of rows, a partition: every pair has at least this cosine, no group more than `max_size` rows.

    `embeddings` has shape (n, d), of any length but zero; a row that is zero or not finite is alone. Members ascend,
    groups are ordered by their first member. No pair of a group reaches `near_duplicate`: prompts so alike would give
    the same image twice, so copies of a prompt go to different groups, each of which has its own seed.

    Raises ConfigurationError for a threshold outside [-1, 1] or a cap below 1, DataError for what is no matrix.
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
    """Return nested groups down to a threshold, each level of which `cut` gives; arguments and errors are `group`'s.

    A level has a few more groups than `group` finds at its height, for that may take groups apart.
    """
    matrix = _matrix(embeddings)
    links = _links(agglomerate, matrix, threshold, max_size, near_duplicate)
    # Name the clusters as scipy does: a merge's number instead of a member.
    name = list(range(len(matrix)))
    merges = []
    for k, (a, b, similarity) in enumerate(sorted(links, key=lambda link: -link[2])):
        merges.append((min(name[a], name[b]), max(name[a], name[b]), similarity))
        name[a] = name[b] = len(matrix) + k
    return Tree(len(matrix), merges)


def cut(tree: Tree, threshold: float) -> Groups:
    """Return the groups of a tree at a height: what merged at this cosine or above."""
    members: dict[int, list[int]] = {prompt: [prompt] for prompt in range(tree.size)}
    for k, (a, b, similarity) in enumerate(tree.merges):
        if similarity >= threshold:
            members[tree.size + k] = members.pop(a) + members.pop(b)
    return sorted(sorted(group) for group in members.values())


def usable(embeddings: np.ndarray) -> np.ndarray:
    """Return which rows have a direction, shape (n,): all but those that are zero or not finite."""
    matrix = _matrix(embeddings)
    # A row's largest magnitude says both, and needs no second matrix: NaN and infinity survive max and min.
    if not matrix.size:
        return np.zeros(len(matrix), bool)
    largest = np.maximum(matrix.max(axis=1), -matrix.min(axis=1))
    found: np.ndarray = np.isfinite(largest) & (largest > 0)
    return found


def worst_similarity(embeddings: np.ndarray, groups: Sequence[Sequence[int]]) -> list[float]:
    """Return for each group the cosine of its least similar pair; 1 for a single."""
    matrix = _matrix(embeddings)
    worst = []
    for members in groups:
        rows = _unit_rows(matrix, np.asarray(members)) if len(members) > 1 else np.ones((1, 1), np.float32)
        worst.append(min(1.0, float((rows @ rows.T).min())))
    return worst


def _matrix(embeddings: np.ndarray) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # too large for a float32 becomes infinite, and that prompt is alone
            matrix = np.asarray(embeddings, np.float32)
    except (ValueError, TypeError) as error:
        raise DataError(f"embeddings are no matrix of numbers: {error}. Give every prompt the same width.") from error
    if matrix.ndim != 2:
        raise DataError(f"embeddings have shape {matrix.shape}, but (prompts, width) is expected")
    return matrix


def _unit_rows(matrix: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return the rows at `index`, each of length 1; a part at a time, so that memory holds them once."""
    rows = np.empty((len(index), matrix.shape[1]), np.float32)
    for start in range(0, len(index), _PART):
        part = matrix[index[start : start + _PART]]
        # Scaled twice, so that neither tiny nor huge rows lose their direction.
        part /= np.abs(part).max(axis=1, keepdims=True)
        rows[start : start + _PART] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def _canonical(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the usable rows in an order that depends on their values alone, and where in it each value begins.

    Different rows are ordered by their projection on one fixed direction, which noise in their last bits does not turn
    round: what is equally good is decided by this order, and should be decided alike on every machine.
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
    """Return what `find` links among the different rows of a matrix, and the links of their copies."""
    if not -1 <= threshold <= 1:
        raise ConfigurationError(f"threshold is {threshold}, but a cosine lies in [-1, 1]")
    if max_size < 1:
        raise ConfigurationError(f"max_size is {max_size}, but a group has at least 1 member")
    index, first = _canonical(matrix)
    copies = np.diff(first, append=len(index))
    links: list[Link] = []
    if near_duplicate > 1:  # copies of a row fill groups of their own; what is left of them joins others
        for row in np.flatnonzero(copies > 1):
            for begin in range(0, copies[row], max_size):
                head = first[row] + begin
                links += [(head, head + k, 1.0) for k in range(1, min(max_size, copies[row] - begin))]
        left = copies % max_size
        layers = [(np.flatnonzero(left), copies - left, 1)]
    else:  # all first copies among each other, all second ones, ...: those of the same rows group alike
        left = np.ones_like(copies)
        counts = [0, *np.unique(copies)]
        layers = [
            (np.flatnonzero(copies > done), np.full_like(copies, done), count - done)
            for done, count in itertools.pairwise(counts)
        ]
    for some, begin, repeats in layers:
        if len(some) < 2 or max_size < 2:
            continue
        place = (first + begin)[some]
        for a, b, similarity in find(_unit_rows(matrix, index[place]), left[some], threshold, near_duplicate, max_size):
            links += [(place[a] + repeat, place[b] + repeat, similarity) for repeat in range(repeats)]
    return [(int(index[a]), int(index[b]), similarity) for a, b, similarity in links]
