"""Pairs of similar rows: all pairs in a small set, pairs of nearest neighbours in a large one.

Large sets use an inverted-file (IVF) index: faiss finds centroids (k-means), each row is stored in the list of its
nearest centroid, and is compared with the rows of the PROBES lists nearest to it. Searching list by list, for all rows
that probe it, is a matrix product, twice as fast as faiss's own IVF search; docs/grouping.md compares it with graph
indexes (HNSW).
"""

import math
from collections.abc import Iterator

import faiss
import numpy as np

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]

# Up to this many rows every pair is kept; above, only each row's NEAREST, so that memory grows linearly.
ALL_PAIRS = 4096
NEAREST = 32
# Up to this many rows nearest neighbours are exact; above, a row is compared with the rows of PROBES inverted lists.
EXACT = 16384
PROBES = 20
# Lists for n rows, in units of sqrt(n): at 4, finding the lists and searching them cost about the same.
_LISTS = 4
_BLOCK = 1024
# Searches go slightly below the threshold, because they round differently from `cosines`, which decides.
_SLACK = 1e-3


def similar_pairs(rows: np.ndarray, threshold: float, near_duplicate: float = math.inf) -> Pairs:
    """Return (a, b, cosine), a < b, of pairs of rows with threshold <= cosine < near_duplicate.

    `rows` is float32 of shape (n, d), each of length 1. Up to ALL_PAIRS rows, all such pairs; above, only pairs in
    which one row is among the NEAREST neighbours of the other, which are approximate above EXACT rows.
    """
    a, b = (_all if len(rows) <= ALL_PAIRS else _nearest)(rows, threshold)
    cosine = cosines(rows, a, b)
    kept = (cosine >= threshold) & (cosine < near_duplicate)
    return a[kept], b[kept], cosine[kept]


def cosines(rows: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair (a, b) of rows of length 1, clipped to at most 1: float32 of shape (pairs,)."""
    result = np.empty(len(a), np.float32)
    part = max(1, 2**22 // rows.shape[1])  # some tens of MB at a time
    for start in range(0, len(a), part):
        some = slice(start, start + part)
        np.einsum("nd,nd->n", rows[a[some]], rows[b[some]], out=result[some])
    return np.minimum(result, 1, out=result)


def _all(rows: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for start in range(0, len(rows), _BLOCK):
        a, b = np.nonzero(np.triu(rows[start : start + _BLOCK] @ rows[start:].T >= threshold - _SLACK, 1))
        found.append((a + start, b + start))
    a, b = (np.concatenate(side) for side in zip(*found, strict=True))
    return a, b


def _nearest(rows: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    found = _exact(rows, threshold) if len(rows) <= EXACT else ivf_pairs(rows, threshold)
    # One code for both directions of a pair.
    codes = np.unique(np.concatenate([np.minimum(a, b) * len(rows) + np.maximum(a, b) for a, b in found]))
    a, b = np.divmod(codes, len(rows))
    return a[a != b], b[a != b]


def _exact(rows: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    index = _flat(rows)
    for start in range(0, len(rows), _BLOCK * 16):
        similarity, other = index.search(rows[start : start + _BLOCK * 16], NEAREST + 1)
        row, place = np.nonzero(similarity >= threshold - _SLACK)
        yield row + start, other[row, place]


def ivf_pairs(rows: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (a, b) once: each row with its NEAREST among the rows of the PROBES inverted lists nearest to it."""
    n, d = rows.shape
    lists = min(n, round(_LISTS * math.sqrt(n)))
    centroids = faiss.Kmeans(
        d, lists, niter=2, spherical=True, max_points_per_centroid=32, min_points_per_centroid=1, seed=0
    )
    centroids.train(rows)
    probes = min(PROBES, lists)
    near = np.empty((n, probes), np.int32)
    for start in range(0, n, _BLOCK * 16):
        near[start : start + _BLOCK * 16] = centroids.index.search(rows[start : start + _BLOCK * 16], probes)[1]
    members, probing = _by_list(near[:, 0], lists), _by_list(near.ravel(), lists)
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    count = 0
    # One matrix product for all rows that probe a list is several times as fast as searching row by row.
    for rows_of_list, places in zip(members, probing, strict=True):
        queries = places // probes
        for start in range(0, len(queries), _BLOCK * 4):
            some = queries[start : start + _BLOCK * 4]
            cosine = rows[some] @ rows[rows_of_list].T
            a, b = np.nonzero(cosine >= threshold - _SLACK)
            kept.append((some[a], rows_of_list[b], cosine[a, b]))
            count += len(a)
            if count > 2 * NEAREST * n:
                kept = [_best(kept)]
                count = len(kept[0][0])
    a, b, _ = _best(kept)
    yield a, b


def _by_list(number: np.ndarray, lists: int) -> list[np.ndarray]:
    return np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number, minlength=lists))[:-1])


def _best(found: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each row's NEAREST + 1 pairs of highest cosine, which include the row itself."""
    row, other, cosine = (np.concatenate(part) for part in zip(*found, strict=True))
    count = np.bincount(row)
    if count.max(initial=0) <= NEAREST + 1:
        return row, other, cosine
    order = np.lexsort((other, -cosine, row))
    row, other, cosine = row[order], other[order], cosine[order]
    first = np.cumsum(count) - count
    kept = np.arange(len(row)) - first[row] <= NEAREST
    return row[kept], other[kept], cosine[kept]


def _flat(rows: np.ndarray) -> faiss.Index:
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return index
