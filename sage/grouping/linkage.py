"""Complete linkage with a cap on a graph of similar rows, and the pass that dissolves what it leaves small.

| symbol | meaning |
|---|---|
| a, b | rows, or clusters named by their smallest row |
| sizes | how many equal prompts a row stands for |
| link | (a, b, similarity): these belong together |
"""

import itertools

import numpy as np

from sage.grouping.neighbours import ALL_PAIRS, Pairs, cosines, similar_pairs

Link = tuple[int, int, float]


def pack(rows: np.ndarray, sizes: np.ndarray, threshold: float, near_duplicate: float, max_size: int) -> list[Link]:
    """Return links of groups: agglomerate, then dissolve groups whose every row fits into another, smallest first.

    Agglomeration alone leaves pairs and singles beside groups with room; moving those saves 1 to 5 % more of the steps
    at the same threshold (docs/grouping.md).
    """
    pairs = similar_pairs(rows, threshold, near_duplicate)
    members = {row: [row] for row in range(len(rows))}
    for a, b, _ in _merge(rows, sizes, pairs, threshold, near_duplicate, max_size):
        members[a] += members.pop(b)
    home = np.empty(len(rows), np.int64)
    for name, group in members.items():
        home[group] = name
    weight = np.bincount(home, weights=sizes, minlength=len(rows)).astype(np.int64)
    refuges = _refuges(rows, sizes, pairs, home, weight, threshold, near_duplicate, max_size)
    added: dict[int, list[int]] = {}

    def refuge(row: int, guests: dict[int, list[int]]) -> int | None:
        """Return the group with room that stays most alike with this row, given the guests that it has already."""
        found = []
        for target, least in refuges[row]:
            extra = guests.get(target, [])
            if target in members and weight[target] + sizes[extra].sum() + sizes[row] <= max_size:
                if extra := extra + added.get(target, []):
                    cosine = rows[extra] @ rows[row]
                    least = min(least, cosine.min()) if cosine.max() < near_duplicate else -np.inf
                if least >= threshold:
                    found.append((least, -target))
        return -max(found)[1] if found else None

    movable = (name for name, group in members.items() if all(row in refuges for row in group))
    for name in sorted(movable, key=lambda name: (weight[name], name)):
        guests: dict[int, list[int]] = {}
        for row in members[name] + added.get(name, []):
            target = refuge(row, guests) if row in refuges else None
            if target is None:
                break
            guests.setdefault(target, []).append(row)
        else:
            del members[name]
            for target, moved in guests.items():
                added.setdefault(target, []).extend(moved)
                weight[target] += sizes[moved].sum()
    for name, more in added.items():
        if name in members:
            members[name] += more
    return [(group[0], row, threshold) for group in members.values() for row in group[1:]]


def _refuges(
    rows: np.ndarray,
    sizes: np.ndarray,
    pairs: Pairs,
    home: np.ndarray,
    weight: np.ndarray,
    threshold: float,
    near_duplicate: float,
    max_size: int,
) -> dict[int, list[tuple[int, float]]]:
    """Return for a row the groups that could take it in, each with its least similarity; rows without any are left out.

    Groups only grow, so what is not among these can never take the row in.
    """
    row, other = (np.concatenate(side) for side in (pairs[:2], pairs[1::-1]))
    target = home[other]
    room = (home[row] != target) & (weight[target] + sizes[row] <= max_size)
    row, target = np.divmod(np.unique(row[room] * len(rows) + target[room]), len(rows))
    least = _linkage(rows, np.arange(len(rows)), home, row, target, near_duplicate)
    fits = least >= threshold
    found: dict[int, list[tuple[int, float]]] = {}
    for at, name, similarity in zip(row[fits].tolist(), target[fits].tolist(), least[fits].tolist(), strict=True):
        found.setdefault(at, []).append((name, similarity))
    return found


def agglomerate(
    rows: np.ndarray, sizes: np.ndarray, threshold: float, near_duplicate: float, max_size: int
) -> list[Link]:
    """Return the merges (a, b, similarity) of all rows."""
    return _merge(rows, sizes, similar_pairs(rows, threshold, near_duplicate), threshold, near_duplicate, max_size)


def _merge(
    rows: np.ndarray, sizes: np.ndarray, pairs: Pairs, threshold: float, near_duplicate: float, max_size: int
) -> list[Link]:
    """Return the merges (a, b, similarity) of canonical rows, where row i stands for sizes[i] equal prompts.

    All pairs of clusters that are each other's most similar merge at once, named by their smaller row. Complete linkage
    only ever lowers a similarity, so this gives the tree that merging one best pair at a time gives.
    """
    a, b, similarity = pairs
    sizes = sizes.copy()
    # The cluster of each row. In a large set a pair of clusters may lack pairs of rows: those are then looked up.
    cluster = None if len(rows) <= ALL_PAIRS else np.arange(len(rows))
    merges: list[Link] = []
    fits = sizes[a] + sizes[b] <= max_size
    a, b, similarity = a[fits], b[fits], similarity[fits]
    while len(a):
        chosen = _mutual_best(a, b, similarity, len(rows))
        kept, gone = a[chosen], b[chosen]
        merges += zip(kept.tolist(), gone.tolist(), similarity[chosen].tolist(), strict=True)
        sizes[kept] += sizes[gone]
        name = np.arange(len(rows))
        name[gone] = kept
        merged = np.zeros(len(rows), bool)
        merged[kept] = True
        a, b = name[a], name[b]
        fits = (a != b) & (sizes[a] + sizes[b] <= max_size)
        a, b, similarity, known = _join(a[fits], b[fits], similarity[fits], merged)
        if cluster is not None:
            cluster = name[cluster]
            similarity[~known] = _linkage(rows, cluster, cluster, a[~known], b[~known], near_duplicate)
            known = similarity >= threshold
        a, b, similarity = a[known], b[known], similarity[known]
    return merges


def _mutual_best(a: np.ndarray, b: np.ndarray, similarity: np.ndarray, n: int) -> np.ndarray:
    """Return the pairs, at least one, in which each is the other's most similar; ties go by a hash."""
    best = np.full(n, -np.inf, np.float32)
    np.maximum.at(best, a, similarity)
    np.maximum.at(best, b, similarity)
    tied = np.flatnonzero((similarity == best[a]) & (similarity == best[b]))
    # By a hash and not by name: among n equal pairs of pairs, names in order would let one merge at a time.
    lot = scramble(a[tied].astype(np.uint64) * np.uint64(n) + b[tied].astype(np.uint64))
    first = np.full(n, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(first, a[tied], lot)
    np.minimum.at(first, b[tied], lot)
    drawn: np.ndarray = tied[(lot == first[a[tied]]) & (lot == first[b[tied]])]
    return drawn


def _join(
    a: np.ndarray, b: np.ndarray, similarity: np.ndarray, merged: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return each pair of renamed clusters once: (a, b, least similarity, whether all pairs it joins are known)."""
    a, b = np.minimum(a, b), np.maximum(a, b)
    touched = merged[a] | merged[b]
    code = a[touched] * len(merged) + b[touched]
    order = np.argsort(code, kind="stable")
    code = code[order]
    start = np.flatnonzero(np.diff(code, prepend=-1))
    first, second = np.divmod(code[start], len(merged))
    least = np.minimum.reduceat(similarity[touched][order], start) if len(start) else similarity[:0]
    # A side that merged in this round had two names before: two or four pairs become one.
    whole = np.diff(start, append=len(code)) == (1 + merged[first]) * (1 + merged[second])
    return (
        np.concatenate([a[~touched], first]),
        np.concatenate([b[~touched], second]),
        np.concatenate([similarity[~touched], least]),
        np.concatenate([np.ones((~touched).sum(), bool), whole]),
    )


def _linkage(
    rows: np.ndarray, one: np.ndarray, another: np.ndarray, a: np.ndarray, b: np.ndarray, near_duplicate: float
) -> np.ndarray:
    """Return the least similarity of the rows that `one` files under a[i] to those that `another` files under b[i].

    -inf where one reaches `near_duplicate`.
    """
    (left_rows, left_counts, left_first), (right_rows, right_counts, right_first) = (
        _members(file) for file in (one, another)
    )
    result = np.empty(len(a), np.float32)
    pairs = left_counts[a] * right_counts[b]
    # A million pairs of rows at a time.
    part = np.cumsum(pairs) // 2**20
    for start, stop in itertools.pairwise([*np.flatnonzero(np.diff(part, prepend=-1)), len(a)]):
        n = pairs[start:stop]
        begin = np.cumsum(n) - n
        place = np.arange(n.sum()) - np.repeat(begin, n)
        left, right = np.repeat(a[start:stop], n), np.repeat(b[start:stop], n)
        across = right_counts[right]
        cosine = cosines(
            rows, left_rows[left_first[left] + place // across], right_rows[right_first[right] + place % across]
        )
        least = np.minimum.reduceat(cosine, begin)
        result[start:stop] = np.where(np.maximum.reduceat(cosine, begin) < near_duplicate, least, -np.inf)
    return result


def _members(cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows cluster by cluster, how many each has, and where it begins."""
    counts = np.bincount(cluster, minlength=len(cluster))
    return np.argsort(cluster, kind="stable"), counts, np.cumsum(counts) - counts


def scramble(x: np.ndarray) -> np.ndarray:
    """Return 64-bit numbers that look random and depend on x alone (splitmix64)."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
