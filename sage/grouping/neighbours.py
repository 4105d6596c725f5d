"""Pairs of similar rows: all pairs in a small set, pairs of nearest neighbours in a large one.

Large sets use an inverted-file (IVF) index: faiss finds centroids (k-means), each row is stored in the list of its
nearest centroid, and is compared with the rows of the PROBES lists nearest to it. Searching list by list, for all rows
that probe it, is a matrix product, twice as fast as faiss's own IVF search; docs/grouping.md compares it with graph
indexes (HNSW).
"""

import math

import faiss
import numpy as np
from threadpoolctl import threadpool_limits

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]

# Up to this many rows every pair is kept; above, only each row's NEAREST, so that memory grows linearly.
ALL_PAIRS = 4096
NEAREST = 32
# Up to this many rows nearest neighbours are exact; above, a row is compared with the rows of PROBES inverted lists.
EXACT = 16384
PROBES = 20
# Lists for n rows, in units of sqrt(n): at 4, finding the lists and searching them cost about the same.
_LISTS = 4
# A list of more than this many times the mean length is divided.
_LONGEST = 8
# Near-duplicates of a row that are searched together: of its NEAREST neighbours, no more are copies of one another.
CROWD = 6
_BLOCK = 1024
# Searches go slightly below the threshold, because they round differently from `cosines`, which decides.
_SLACK = 1e-3
_ROUNDING = 1e-5


def similar_pairs(rows: np.ndarray, threshold: float, near_duplicate: float = math.inf) -> Pairs:
    """Return (a, b, cosine), a < b, of pairs of rows with threshold <= cosine < near_duplicate.

    `rows` is float32 of shape (n, d), each of length 1. Up to ALL_PAIRS rows, all such pairs; above, only pairs in
    which one row is among the NEAREST of these neighbours of the other, which are approximate above EXACT rows. The
    result is the same for any number of threads.
    """
    a, b = _all(rows, threshold) if len(rows) <= ALL_PAIRS else _nearest(rows, threshold, near_duplicate)
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


def _nearest(rows: np.ndarray, threshold: float, near_duplicate: float) -> tuple[np.ndarray, np.ndarray]:
    # With one thread a matrix product has the same last bits on machines with any number of cores.
    with threadpool_limits(1):
        row, other, crowd = _search(rows, threshold, near_duplicate)
        # Near-duplicates of one neighbour would fill a row's list, and a group can take only one of them. So crowded
        # rows are dealt to several layers, in each of which about CROWD of a crowd remain.
        layer = scramble(np.arange(len(rows), dtype=np.uint64)) % np.maximum(-(-crowd // CROWD), 1).astype(np.uint64)
        if layer.any():
            found = []
            for members in _by_list(layer.astype(np.int64), int(layer.max()) + 1):
                a, b, _ = _search(rows[members], threshold, near_duplicate)
                found.append((members[a], members[b]))
            row, other = (np.concatenate(side) for side in zip(*found, strict=True))
    # One code for both directions of a pair.
    codes = np.unique(np.minimum(row, other) * len(rows) + np.maximum(row, other))
    a, b = np.divmod(codes, len(rows))
    return a[a != b], b[a != b]


def _search(rows: np.ndarray, threshold: float, near_duplicate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (exact_pairs if len(rows) <= EXACT else ivf_pairs)(rows, threshold, near_duplicate)


class _Nearest:
    """The NEAREST neighbours found so far of each of n rows, and its crowd: the number of near-duplicates met.

    Cosines are compared in steps of 2^-16, because their last bits differ between machines; a hash of the pair decides
    between equal ones. (The lowest index would make the same few rows everyone's neighbours.)
    """

    def __init__(self, rows: np.ndarray, threshold: float, near_duplicate: float) -> None:
        n = len(rows)
        self.rows, self.low, self.high = rows, threshold - _SLACK, near_duplicate
        # One more than NEAREST: a row may find itself.
        self.key = np.full((n, NEAREST + 1), -np.inf, np.float32)
        self.other = np.full((n, NEAREST + 1), -1, np.int32)
        self.crowd = np.full(n, -1, np.int64)  # a row finds itself, too
        self.hash = (scramble(np.arange(n, dtype=np.uint64)) >> np.uint64(32)).astype(np.float32) / np.float32(2**32)

    def compare(self, queries: np.ndarray, members: np.ndarray) -> None:
        """Look for neighbours of `queries` among `members`, both indices of different rows."""
        cosine = self.rows[queries] @ self.rows[members].T
        self.crowd[queries] += np.count_nonzero(cosine >= self.high, axis=1)
        band = (cosine >= self.low) & (cosine < self.high + _ROUNDING)
        asking = np.flatnonzero(band.any(axis=1))
        row = queries[asking]
        band = band[asking]
        # The columns that no row needs would only be sorted.
        needed = np.flatnonzero(band.any(axis=0))
        members, band = members[needed], band[:, needed]
        key = np.rint(cosine[np.ix_(asking, needed)] * np.float32(2**16))
        key += (self.hash[row][:, None] + self.hash[members]) % np.float32(1)
        key = np.concatenate([self.key[row], np.where(band, key, np.float32(-np.inf))], axis=1)
        best = np.argpartition(key, -NEAREST - 1, axis=1)[:, -NEAREST - 1 :]
        self.key[row] = np.take_along_axis(key, best, axis=1)
        ids = np.broadcast_to(members.astype(np.int32), band.shape)
        self.other[row] = np.take_along_axis(np.concatenate([self.other[row], ids], axis=1), best, axis=1)

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (row, neighbour) of all that were found, and the crowd of each row."""
        row, place = np.nonzero(self.key > -np.inf)
        return row, self.other[row, place].astype(np.int64), np.maximum(self.crowd, 0)


def exact_pairs(
    rows: np.ndarray, threshold: float, near_duplicate: float = math.inf
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (a, b, crowd): each row with its NEAREST in the band, and its number of near-duplicates."""
    found = _Nearest(rows, threshold, near_duplicate)
    everyone = np.arange(len(rows))
    for start in range(0, len(rows), _BLOCK // 4):
        found.compare(everyone[start : start + _BLOCK // 4], everyone)
    return found.pairs()


def ivf_pairs(
    rows: np.ndarray, threshold: float, near_duplicate: float = math.inf
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what `exact_pairs` does, among the rows of the PROBES inverted lists nearest to each row only.

    A list that is much longer than the mean is a dense place. It is dealt to lists of about that length, and a row that
    probes it is compared with one of them.
    """
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
    found = _Nearest(rows, threshold, near_duplicate)
    longest = _LONGEST * n // lists
    # One matrix product for all rows that probe a list is several times as fast as searching row by row.
    for members, places in zip(_by_list(near[:, 0], lists), _by_list(near.ravel(), lists), strict=True):
        queries = places // probes
        parts = max(1, len(members) // longest)
        for part in range(parts):
            some, asking = members[members % parts == part], queries[queries % parts == part]
            for start in range(0, len(asking), _BLOCK):
                found.compare(asking[start : start + _BLOCK], some)
    return found.pairs()


def _by_list(number: np.ndarray, lists: int) -> list[np.ndarray]:
    return np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number, minlength=lists))[:-1])


def scramble(x: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each element of x (splitmix64)."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
