"""Pairs of similar rows: all of them in a small set, those of each row's nearest in a large one.

The index of large sets is faiss's inverted file: rows are filed under the nearest of some centroids, and a search looks
into the files of the centroids nearest to it. Unlike a graph index (HNSW, as in usearch too) it gives the same answer
however many threads build it, and builds in less time; docs/grouping.md has the figures.
"""

import math

import faiss
import numpy as np

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]

# Up to here every pair is kept; beyond, only those of each row's nearest, so that memory grows with the rows.
ALL_PAIRS = 4096
NEAREST = 32
# Up to here the nearest are exact; beyond, a search looks into PROBES files of the index.
EXACT = 16384
PROBES = 32
_BLOCK = 1024
# Pairs are sought from a little below the threshold: a search rounds otherwise than `cosines`, which has the last word.
_SLACK = 1e-3


def similar_pairs(rows: np.ndarray, threshold: float, upper: float = math.inf) -> Pairs:
    """Return (a, b, cosine), a < b, of pairs of rows whose cosine reaches `threshold` and not `upper`.

    `rows` is float32 of shape (n, d), each of length 1. All such pairs up to ALL_PAIRS rows; above, those in which one
    is among the NEAREST of the other.
    """
    a, b = (_all if len(rows) <= ALL_PAIRS else _nearest)(rows, threshold)
    cosine = cosines(rows, a, b)
    kept = (cosine >= threshold) & (cosine < upper)
    return a[kept], b[kept], cosine[kept]


def cosines(rows: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows of length 1, at most 1: float32 of shape (pairs,)."""
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
    index = _flat(rows) if len(rows) <= EXACT else inverted_file(rows)
    codes = []
    for start in range(0, len(rows), _BLOCK * 16):
        similarity, other = index.search(rows[start : start + _BLOCK * 16], NEAREST + 1)
        row, place = np.nonzero((similarity >= threshold - _SLACK) & (other >= 0))
        row, other = row + start, other[row, place]
        # One number for both directions of a pair.
        codes.append(np.minimum(row, other) * len(rows) + np.maximum(row, other))
    a, b = np.divmod(np.unique(np.concatenate(codes)), len(rows))
    return a[a != b], b[a != b]


def _flat(rows: np.ndarray) -> faiss.Index:
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return index


def inverted_file(rows: np.ndarray) -> faiss.Index:
    """Return the index of large sets, which gives the same answers whatever the threads that build and ask it."""
    n, d = rows.shape
    centroids = faiss.IndexFlatIP(d)
    files = round(2 * math.sqrt(n))
    index = faiss.IndexIVFScalarQuantizer(
        centroids, d, files, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.cp.niter = 8
    index.cp.max_points_per_centroid = 64
    index.train(rows)
    index.add(rows)
    index.nprobe = PROBES
    return index
