"""Complete linkage with a size cap on the graph of similar rows, and a pass that dissolves small groups into others.

| symbol | meaning |
|---|---|
| a, b | rows, or clusters, each named by its smallest row |
| sizes | shape (n,): the number of equal prompts that each row stands for |
| link | (a, b, similarity): a and b belong to one group |
"""

import itertools

import numpy as np

from sage.grouping.neighbours import ALL_PAIRS, Pairs, cosines, scramble, similar_pairs

Link = tuple[int, int, float]


def pack(rows: np.ndarray, sizes: np.ndarray, threshold: float, near_duplicate: float, max_size: int) -> list[Link]:
    """Return the links of all groups: agglomerate, then dissolve groups whose rows all fit into others, smallest first.

    Agglomeration alone leaves singles and pairs that other groups could take in; moving them saves 1 to 5 % more of the
    steps at the same threshold (docs/grouping.md). Each link has `threshold` as its similarity.
    """
    pairs = similar_pairs(rows, threshold, near_duplicate)
    members = {row: [row] for row in range(len(rows))}
    for a, b, _ in _merge(rows, sizes, pairs, threshold, near_duplicate, max_size):
        members[a] += members.pop(b)
    group_of = np.empty(len(rows), np.int64)
    for name, group in members.items():
        group_of[group] = name
    prompts_in = np.bincount(group_of, weights=sizes, minlength=len(rows)).astype(np.int64)
    targets = _targets(rows, sizes, pairs, group_of, prompts_in, threshold, near_duplicate, max_size)
    added: dict[int, list[int]] = {}

    def best_target(row: int, moves: dict[int, list[int]]) -> int | None:
        """Return the group with room whose least similar member is most similar to this row, or None.

        `moves` holds the rows that would join each group before this one.
        """
        found = []
        for target, least in targets[row]:
            extra = moves.get(target, [])
            if target in members and prompts_in[target] + sizes[extra].sum() + sizes[row] <= max_size:
                if extra := extra + added.get(target, []):
                    cosine = rows[extra] @ rows[row]
                    least = min(least, cosine.min()) if cosine.max() < near_duplicate else -np.inf
                if least >= threshold:
                    found.append((least, -target))
        return -max(found)[1] if found else None

    movable = (name for name, group in members.items() if all(row in targets for row in group))
    for name in sorted(movable, key=lambda name: (prompts_in[name], name)):
        moves: dict[int, list[int]] = {}
        for row in members[name] + added.get(name, []):
            target = best_target(row, moves) if row in targets else None
            if target is None:
                break
            moves.setdefault(target, []).append(row)
        else:
            del members[name]
            for target, moved in moves.items():
                added.setdefault(target, []).extend(moved)
                prompts_in[target] += sizes[moved].sum()
    for name, more in added.items():
        if name in members:
            members[name] += more
    return [(group[0], row, threshold) for group in members.values() for row in group[1:]]


def _targets(
    rows: np.ndarray,
    sizes: np.ndarray,
    pairs: Pairs,
    group_of: np.ndarray,
    prompts_in: np.ndarray,
    threshold: float,
    near_duplicate: float,
    max_size: int,
) -> dict[int, list[tuple[int, float]]]:
    """Return {row: [(group, least similarity), ...]}: the other groups that could take each row in; no empty lists.

    rows, sizes     shapes (n, d) and (n,)
    pairs           similar rows, from `similar_pairs`
    group_of        shape (n,): the name of each row's group
    prompts_in      shape (n,): the number of prompts in the group of that name
    threshold, near_duplicate, max_size    as for `sage.grouping.groups.group`

    Groups only grow, so a group that is not listed for a row can never take it in later.
    """
    row, other = (np.concatenate(side) for side in (pairs[:2], pairs[1::-1]))
    target = group_of[other]
    room = (group_of[row] != target) & (prompts_in[target] + sizes[row] <= max_size)
    row, target = np.divmod(np.unique(row[room] * len(rows) + target[room]), len(rows))
    least = _linkage(rows, np.arange(len(rows)), group_of, row, target, near_duplicate)
    fits = least >= threshold
    found: dict[int, list[tuple[int, float]]] = {}
    for at, name, similarity in zip(row[fits].tolist(), target[fits].tolist(), least[fits].tolist(), strict=True):
        found.setdefault(at, []).append((name, similarity))
    return found


def agglomerate(
    rows: np.ndarray, sizes: np.ndarray, threshold: float, near_duplicate: float, max_size: int
) -> list[Link]:
    """Return the merges (a, b, similarity) of complete linkage with a size cap, in no order of similarity."""
    return _merge(rows, sizes, similar_pairs(rows, threshold, near_duplicate), threshold, near_duplicate, max_size)


def _merge(
    rows: np.ndarray, sizes: np.ndarray, pairs: Pairs, threshold: float, near_duplicate: float, max_size: int
) -> list[Link]:
    """Return the merges (a, b, similarity) of complete linkage with a size cap.

    rows, sizes     unit rows of shape (n, d), and the number of equal prompts that each stands for, shape (n,)
    pairs           similar rows, from `similar_pairs`
    threshold, near_duplicate, max_size    as for `sage.grouping.groups.group`

    In each round all pairs of clusters that are each other's most similar merge, and keep the smaller name. As complete
    linkage only ever lowers a similarity, this gives the same tree as merging the single best pair at a time.
    """
    a, b, similarity = pairs
    sizes = sizes.copy()
    # In a large set `pairs` may lack pairs of rows between two clusters; computing them needs the cluster of each row.
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
    """Return indices of the pairs, at least one, that are each other's most similar; a hash breaks ties."""
    best = np.full(n, -np.inf, np.float32)
    np.maximum.at(best, a, similarity)
    np.maximum.at(best, b, similarity)
    tied = np.flatnonzero((similarity == best[a]) & (similarity == best[b]))
    # Not by name: in a chain of equally similar pairs, names in order would let only one pair merge per round.
    key = scramble(a[tied].astype(np.uint64) * np.uint64(n) + b[tied].astype(np.uint64))
    lowest = np.full(n, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, a[tied], key)
    np.minimum.at(lowest, b[tied], key)
    chosen: np.ndarray = tied[(key == lowest[a[tied]]) & (key == lowest[b[tied]])]
    return chosen


def _join(
    a: np.ndarray, b: np.ndarray, similarity: np.ndarray, merged: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return each pair of renamed clusters once: (a, b, least similarity, complete).

    `complete` is False if the similarity of some pair of the clusters that merged is not among the given ones; `merged`
    marks the clusters that merged in this round.
    """
    a, b = np.minimum(a, b), np.maximum(a, b)
    touched = merged[a] | merged[b]
    code = a[touched] * len(merged) + b[touched]
    order = np.argsort(code, kind="stable")
    code = code[order]
    start = np.flatnonzero(np.diff(code, prepend=-1))
    first, second = np.divmod(code[start], len(merged))
    least = np.minimum.reduceat(similarity[touched][order], start) if len(start) else similarity[:0]
    # A cluster that merged in this round was two before, so a complete pair joins two or four former pairs.
    complete = np.diff(start, append=len(code)) == (1 + merged[first]) * (1 + merged[second])
    return (
        np.concatenate([a[~touched], first]),
        np.concatenate([b[~touched], second]),
        np.concatenate([similarity[~touched], least]),
        np.concatenate([np.ones((~touched).sum(), bool), complete]),
    )


def _linkage(
    rows: np.ndarray, left: np.ndarray, right: np.ndarray, a: np.ndarray, b: np.ndarray, near_duplicate: float
) -> np.ndarray:
    """Return the lowest cosine between cluster a[i] of one clustering and cluster b[i] of another, for each i.

    rows            unit rows, shape (n, d)
    left, right     the two clusterings: the cluster of each row, shape (n,)
    a, b            clusters of `left` and of `right` to compare, shape (pairs,)
    near_duplicate  the result is -inf if any cosine reaches it
    """
    (left_rows, left_counts, left_first), (right_rows, right_counts, right_first) = _members(left), _members(right)
    result = np.empty(len(a), np.float32)
    pairs = left_counts[a] * right_counts[b]
    # In parts of about a million pairs of rows, to bound memory.
    part = np.cumsum(pairs) // 2**20
    for start, stop in itertools.pairwise([*np.flatnonzero(np.diff(part, prepend=-1)), len(a)]):
        n = pairs[start:stop]
        begin = np.cumsum(n) - n
        place = np.arange(n.sum()) - np.repeat(begin, n)
        one, other = np.repeat(a[start:stop], n), np.repeat(b[start:stop], n)
        across = right_counts[other]
        cosine = cosines(
            rows, left_rows[left_first[one] + place // across], right_rows[right_first[other] + place % across]
        )
        least = np.minimum.reduceat(cosine, begin)
        result[start:stop] = np.where(np.maximum.reduceat(cosine, begin) < near_duplicate, least, -np.inf)
    return result


def _members(cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows sorted by cluster, and the size and first position of each cluster in that order."""
    counts = np.bincount(cluster, minlength=len(cluster))
    return np.argsort(cluster, kind="stable"), counts, np.cumsum(counts) - counts
