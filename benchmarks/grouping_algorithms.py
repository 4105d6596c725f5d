"""Other ways to cover a similarity graph with cliques of a capped size, to compare `sage.grouping.groups` with.

Each takes a graph (row -> {similar row: cosine}) and a cap, and returns groups whose pairs are all in the graph.
"""

from collections.abc import Callable, Iterable

import numpy as np

Graph = list[dict[int, float]]
Groups = list[list[int]]


def graph_of(size: int, a: np.ndarray, b: np.ndarray, cosine: np.ndarray) -> Graph:
    """Return the graph of pairs as one dictionary of neighbours a row."""
    graph: Graph = [{} for _ in range(size)]
    for left, right, similarity in zip(a.tolist(), b.tolist(), cosine.tolist(), strict=True):
        graph[left][right] = graph[right][left] = similarity
    return graph


def greedy_cliques(graph: Graph, max_size: int) -> Groups:
    """Start a clique at the free row with fewest neighbours, and add whatever keeps it most alike, while one fits."""
    free = set(range(len(graph)))
    groups = []
    for row in sorted(free, key=lambda row: (len(graph[row]), row)):
        if row not in free:
            continue
        clique = [row]
        free.discard(row)
        candidates = {other: similarity for other, similarity in graph[row].items() if other in free}
        while candidates and len(clique) < max_size:
            best = max(candidates, key=lambda other: (candidates[other], -other))
            clique.append(best)
            free.discard(best)
            candidates = {
                other: min(similarity, graph[best][other])
                for other, similarity in candidates.items()
                if other != best and other in graph[best]
            }
        groups.append(clique)
    return groups


def colouring(graph: Graph, max_size: int) -> Groups:
    """Colour the graph's complement greedily, rows with fewest neighbours first: a colour is a clique."""
    colour = [-1] * len(graph)  # -1: none yet
    groups: Groups = []
    for row in sorted(range(len(graph)), key=lambda row: (len(graph[row]), row)):
        near = {colour[other] for other in graph[row]} - {-1}
        fitting = [c for c in near if len(groups[c]) < max_size and all(member in graph[row] for member in groups[c])]
        if fitting:
            colour[row] = max(fitting, key=lambda c: (len(groups[c]), -c))
            groups[colour[row]].append(row)
        else:
            colour[row] = len(groups)
            groups.append([row])
    return groups


def leiden(graph: Graph, max_size: int, repair: Callable[[Iterable[int]], Groups]) -> Groups:
    """Find communities with Leiden (modularity, weights are cosines), then repair each into cliques."""
    import igraph  # type: ignore[import-not-found]
    import leidenalg  # type: ignore[import-not-found]

    edges = [(row, other) for row, near in enumerate(graph) for other in near if row < other]
    network = igraph.Graph(len(graph), edges)
    weights = [graph[row][other] for row, other in edges]
    found = leidenalg.find_partition(network, leidenalg.ModularityVertexPartition, weights=weights, seed=0)
    return [group for community in found for group in repair(community)]


def communities(embeddings: np.ndarray, threshold: float, repair: Callable[[Iterable[int]], Groups]) -> Groups:
    """Find communities with `sentence_transformers.util.community_detection`, then repair each into cliques."""
    from sentence_transformers.util import community_detection

    found = community_detection(embeddings, threshold=threshold, min_community_size=1, show_progress_bar=False)
    return [group for community in found for group in repair(community)]


def scikit_learn(embeddings: np.ndarray, threshold: float, repair: Callable[[Iterable[int]], Groups]) -> Groups:
    """Agglomerate with scikit-learn's complete linkage, then repair what exceeds the cap."""
    from sklearn.cluster import AgglomerativeClustering

    model = AgglomerativeClustering(None, metric="cosine", linkage="complete", distance_threshold=1 - threshold)
    labels = model.fit_predict(embeddings)
    order = np.argsort(labels, kind="stable")
    found = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    return [group for members in found for group in repair(members.tolist())]


def dissolve(groups: Groups, graph: Graph, max_size: int) -> Groups:
    """Take groups apart, smallest first, where every member fits into another group: fewer groups, less alike."""
    where = {row: number for number, group in enumerate(groups) for row in group}
    live = {number: list(group) for number, group in enumerate(groups)}
    for number in sorted(live, key=lambda number: (len(live[number]), number)):
        moves: dict[int, int] = {}
        taken: dict[int, list[int]] = {}
        for row in live[number]:
            targets = {where[other] for other in graph[row] if where[other] != number}
            fitting = [
                target
                for target in targets
                if len(live[target]) + len(taken.get(target, [])) < max_size
                and all(member in graph[row] for member in live[target] + taken.get(target, []))
            ]
            if not fitting:
                break
            best = max(fitting, key=lambda target: (min(graph[row][member] for member in live[target]), -target))
            moves[row] = best
            taken.setdefault(best, []).append(row)
        else:
            for row, target in moves.items():
                live[target].append(row)
                where[row] = target
            del live[number]
    return list(live.values())
