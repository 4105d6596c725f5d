"""Near-duplicates: images that look alike by a perceptual hash (dHash: which pixels are darker than the next one)."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image

BITS = 64
_SIDE = 8


def perceptual_hash(image: Image.Image) -> int:
    """Return 64 bits: for 8x8 places, whether the grey of the shrunken image rises to the right."""
    grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)).astype(int)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def first_alike(hashes: Sequence[int], distance: int) -> list[int]:
    """Return for each hash the number of the first one of its cluster.

    Hashes that differ in at most `distance` bits are in one cluster, and so are all that are linked by such pairs.
    """
    values, places = np.unique(np.array(hashes, np.uint64), return_inverse=True)
    parent = list(range(len(values)))

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = one = parent[parent[one]]
        return one

    # Of distance + 1 bands, two hashes that differ in `distance` bits have one in common.
    edges = np.linspace(0, BITS, distance + 2).astype(int).tolist()
    for low, high in pairwise(edges):
        for members in _buckets((values >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)):
            for place, one in enumerate(members[:-1]):
                others = members[place + 1 :]
                near = np.bitwise_count(values[one] ^ values[others]) <= distance
                for other in others[near].tolist():
                    parent[root(other)] = root(int(one))
    first: dict[int, int] = {}
    roots = [root(place) for place in places.tolist()]
    return [first.setdefault(own, number) for number, own in enumerate(roots)]


def _buckets(keys: np.ndarray) -> list[np.ndarray]:
    """Return the places of equal keys, for each key that occurs more than once."""
    found: dict[int, list[int]] = defaultdict(list)
    for place, key in enumerate(keys.tolist()):
        found[key].append(place)
    return [np.array(places) for places in found.values() if len(places) > 1]
