"""Pairs of similar rows: all of them in a small set, the nearest of each row through a faiss index in a large one."""

import numpy as np

# Up to here every pair is looked at; beyond, only each row's nearest, so that memory grows with the rows.
ALL_PAIRS = 4096
_BLOCK = 1024


def similar_pairs(rows: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (a, b, cosine), a < b, of every pair of rows whose cosine is at least `threshold`.

    `rows` is float32 of shape (n, d), each of length 1.
    """
    found = []
    for start in range(0, len(rows), _BLOCK):
        cosine = rows[start : start + _BLOCK] @ rows[start:].T
        a, b = np.nonzero(np.triu(cosine >= threshold, 1))
        found.append((a + start, b + start, cosine[a, b]))
    a, b, cosine = (np.concatenate(column) for column in zip(*found, strict=True))
    return a, b, cosine
