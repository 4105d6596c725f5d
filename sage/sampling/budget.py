"""Plans that save a given fraction of the network evaluations, from nested clusters of prompts.

The more similar the prompts of a cluster, the more steps they share. The similarity threshold for sharing is solved for
the asked saving before anything is generated.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sage.errors import PlanError
from sage.numbers import real, whole
from sage.sampling.plan import Block, Nested, Node, Plan, shared_steps


@dataclass(frozen=True, eq=False, repr=False)
class Cluster(Nested):
    """A cluster of prompts and smaller clusters, with the lowest cosine similarity of any two prompts in it."""

    similarity: float
    children: tuple["Cluster | int", ...]


def clusters(size: int, merges: Sequence[tuple[int, int, float]]) -> list[Cluster | int]:
    """Return nested clusters from merges (a, b, similarity); as in scipy, node `size` + k is the result of merge k."""
    nodes: dict[int, Cluster | int] = {prompt: prompt for prompt in range(size)}
    for k, (a, b, similarity) in enumerate(merges):
        nodes[size + k] = Cluster(similarity, (nodes.pop(a), nodes.pop(b)))
    return list(nodes.values())


def nested_plan(clusters: Sequence["Cluster | int"], steps: int, share: Callable[[float], float]) -> Plan:
    """Return the plan in which every cluster shares a fraction `share(similarity)` of the steps.

    A cluster that would not share more steps than the cluster around it dissolves into that cluster.
    """
    roots: list[Node] = []
    # Without recursion, as merges may be nested thousands deep: (what is left, first step, nodes found, where to).
    waiting: list[tuple[list[Cluster | int], int, list[Node], list[Node] | None]]
    waiting = [(list(reversed(clusters)), 0, roots, None)]
    while waiting:
        left, start, found, into = waiting[-1]
        if not left:
            waiting.pop()
            if into is not None:
                into.append(Block(start, tuple(found)))
        elif isinstance(cluster := left.pop(), Cluster):
            until = shared_steps(share(cluster.similarity), steps)
            if until > start:
                waiting.append((list(reversed(cluster.children)), until, [], found))
            else:
                left.extend(reversed(cluster.children))
        else:
            found.append(cluster)
    return Plan(steps, tuple(roots))


@dataclass(frozen=True)
class Budget:
    """A plan with the asked saving, and how similar the prompts are that share in it.

    `threshold`: no cluster below this similarity shares; `merges`: (similarity, share ratio, number of prompts) of
    every cluster that shares, least similar first.
    """

    plan: Plan
    threshold: float
    merges: list[tuple[float, float, int]]


def plan_for_budget(
    nested: Sequence[Cluster | int],
    steps: int,
    saving: float,
    most: float = 0.9,
    at_least: float = -1.0,
    *,
    images: int = 1,
    image_steps: int = 0,
) -> Budget:
    """Return a Budget whose plan saves at least `saving`, with the highest similarity threshold that does.

    nested    the tree of the prompts, as made by `sage.grouping.groups.tree` and `clusters`:
              `found = tree(embed(prompts), 0.0, 6); nested = clusters(found.size, found.merges)`;
              or one Cluster for each flat group
    steps     steps of the sampler
    saving    fraction of the network evaluations to save, in [0, 1)
    most      share ratio of a cluster of similarity 1; it falls linearly to 0 at the threshold
    at_least  similarity below which a cluster never shares as a whole; tighter clusters inside it may
    images, image_steps  number of images of each prompt, and the first steps that these share (`Plan.repeat`): the plan
              is then one of images. What they save counts, and clusters share only for what is still missing

    To bound the loss of quality, give the similarity measured for that bound as `at_least` and the share ratio of the
    measurement as `most` (`sage.grouping.cost`). Raises PlanError if `saving` is outside [0, 1) or out of reach.
    """
    steps, saving = whole("steps", steps), real("saving", saving)
    most, at_least = real("most", most), real("at_least", at_least)
    if not 0 <= saving < 1:
        raise PlanError(f"saving {saving} is outside [0, 1); 0.4 saves 40% of the network evaluations")

    def share(similarity: float, width: float) -> float:
        return most * max(0.0, 1 - (1 - similarity) / width) if similarity >= at_least else 0.0

    def plan(width: float) -> Plan:
        return nested_plan(nested, steps, lambda s: share(s, width)).repeat(images, image_steps)

    # Bisect the width 1 - threshold, with which the saving grows; at 1e12 every cluster shares `most`.
    low, high = 1e-9, 1e12
    if plan(high).saving < saving:
        raise PlanError(
            f"groups of similarity {at_least:.4g} or more save at most {plan(high).saving:.1%} when each shares "
            f"{most:.0%} of {steps} steps, less than the {saving:.1%} asked; ask for less, or allow less similar groups"
        )
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if plan(middle).saving >= saving else (middle, high)
    found = plan(high)
    shares = [(s, shared_steps(share(s, high), steps) / steps, n) for s, n in _merges(nested)]
    return Budget(found, max(1 - high, at_least), sorted(row for row in shares if row[1]))


def _merges(nested: Sequence[Cluster | int]) -> Iterator[tuple[float, int]]:
    """Yield the similarity and the number of prompts of every cluster."""
    for root in nested:
        prompts: list[int] = []
        for item in root.flat() if isinstance(root, Cluster) else ():
            if isinstance(item, tuple):
                similarity, count = item
                prompts[-count:] = [sum(prompts[-count:])]
                yield similarity, prompts[-1]
            else:
                prompts.append(1)
