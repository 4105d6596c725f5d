"""Plans: which prompts share which sampler steps, and what that costs before anything is generated.

A plan is a forest. Its leaves are the prompts; a `Block` is sampled once for all prompts below it, from where its
parent ends (step 0 for a root) until step `until`, where it branches into its children. So the blocks alive at step k
partition the prompts, and later partitions refine earlier ones:

    NFE = g * sum_k |blocks at step k|       g = 2 under classifier-free guidance, else 1
    one level, K groups of M prompts, share ratio beta:    saving = beta * (1 - K / M)

A step is one evaluation of the network as the scheduler counts them, `len(scheduler.timesteps)`: 30 for most
schedulers at 30 inference steps, 59 for Heun's, 31 for PNDM's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Union

from sage.errors import PlanError

Node = Union["Block", int]


@dataclass(frozen=True)
class Block:
    """Prompts and blocks that are sampled as one until a step."""

    until: int
    children: tuple[Node, ...]


@dataclass(frozen=True)
class Plan:
    """A checked sharing plan for prompts 0 to M - 1 over `steps` evaluations; raises PlanError when impossible."""

    steps: int
    roots: tuple[Node, ...]

    def __post_init__(self) -> None:
        """Check that the blocks nest and that every prompt is there once."""
        if self.steps < 1:
            raise PlanError(f"a plan needs at least 1 step, not {self.steps}")
        for node, start in self._walk():
            if isinstance(node, Block) and not start < node.until < self.steps:
                raise PlanError(
                    f"a block starts at step {start} and branches at step {node.until} of {self.steps}; "
                    "it must branch after it starts and before the last step"
                )
            if isinstance(node, Block) and len(node.children) < 2:
                raise PlanError(f"a block has {len(node.children)} children; put a single prompt in no block")
        leaves = sorted(leaves_of(self.roots))
        if leaves != list(range(len(leaves))):
            raise PlanError(f"a plan names every prompt from 0 on once; this one has {_excerpt(leaves)}")
        if not leaves:
            raise PlanError("a plan needs at least 1 prompt")

    @classmethod
    def independent(cls, prompts: int, steps: int) -> "Plan":
        """Return the plan in which nobody shares anything."""
        return cls(steps, tuple(range(prompts)))

    @classmethod
    def shared(cls, groups: Sequence[Sequence[int]], steps: int, share_ratio: float | Sequence[float]) -> "Plan":
        """Return the plan in which each group shares its first `shared_steps(share_ratio, steps)` steps (SAGE).

        `groups` partition the prompts 0 to M - 1; `share_ratio` in [0, 1) is one number or one for each group.
        """
        ratios = [share_ratio] * len(groups) if isinstance(share_ratio, (int, float)) else list(share_ratio)
        if len(ratios) != len(groups):
            raise PlanError(f"{len(ratios)} share ratios were given for {len(groups)} groups; give one for each")
        roots: list[Node] = []
        for members, ratio in zip(groups, ratios, strict=True):
            until = shared_steps(ratio, steps)
            if until and len(members) > 1:
                roots.append(Block(until, tuple(members)))
            else:
                roots.extend(members)
        return cls(steps, tuple(sorted(roots, key=lambda node: min(leaves_of((node,))))))

    @classmethod
    def nested(cls, clusters: Sequence["Cluster | int"], steps: int, share: Callable[[float], float]) -> "Plan":
        """Return the plan in which every cluster shares `share(similarity)` of the steps, clusters in clusters.

        A cluster that would not share longer than the one around it dissolves into it.
        """

        def nodes(inside: "Sequence[Cluster | int]", start: int) -> list[Node]:
            found: list[Node] = []
            for cluster in inside:
                if isinstance(cluster, int):
                    found.append(cluster)
                    continue
                until = shared_steps(share(cluster.similarity), steps)
                if until > start:
                    found.append(Block(until, tuple(nodes(cluster.children, until))))
                else:
                    found.extend(nodes(cluster.children, start))
            return found

        return cls(steps, tuple(nodes(clusters, 0)))

    @property
    def prompts(self) -> int:
        """The number of prompts, M."""
        return sum(1 for _ in leaves_of(self.roots))

    @property
    def saving(self) -> float:
        """The share of network evaluations that sampling each prompt by itself would cost more."""
        return 1 - self.nfe(guidance=False) / (self.prompts * self.steps)

    def nfe(self, guidance: bool) -> int:
        """Return the number of network evaluations; guidance evaluates every block twice."""
        ends = (((node.until if isinstance(node, Block) else self.steps), start) for node, start in self._walk())
        return (2 if guidance else 1) * sum(end - start for end, start in ends)

    def partition(self, step: int) -> list[list[int]]:
        """Return the blocks alive at a step as lists of prompts, by their first prompt."""
        alive = []
        for node, start in self._walk():
            end = node.until if isinstance(node, Block) else self.steps
            if start <= step < end:
                alive.append(sorted(leaves_of((node,))))
        return sorted(alive)

    def repeat(self, times: int) -> "Plan":
        """Return the plan for `times` images of each prompt: image r of prompt i is i * times + r.

        Images of one prompt never share: whoever asks for several wants different ones.
        """

        def moved(node: Node, r: int) -> Node:
            if isinstance(node, int):
                return node * times + r
            return Block(node.until, tuple(moved(child, r) for child in node.children))

        return self if times == 1 else Plan(self.steps, tuple(moved(n, r) for n in self.roots for r in range(times)))

    def _walk(self) -> Iterator[tuple[Node, int]]:
        """Yield every node with the step at which it starts."""
        open_nodes: list[tuple[Node, int]] = [(node, 0) for node in reversed(self.roots)]
        while open_nodes:
            node, start = open_nodes.pop()
            yield node, start
            if isinstance(node, Block):
                open_nodes.extend((child, node.until) for child in reversed(node.children))


def leaves_of(nodes: Sequence[Node]) -> Iterator[int]:
    """Yield the prompts below some nodes, in order."""
    open_nodes = list(reversed(nodes))
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, int):
            yield node
        else:
            open_nodes.extend(reversed(node.children))


def shared_steps(share_ratio: float, steps: int) -> int:
    """Return how many steps a share ratio in [0, 1) means: rounded down, so that never more is shared than asked."""
    if not 0 <= share_ratio < 1:
        raise PlanError(
            f"share ratio {share_ratio} is outside [0, 1); 0 shares nothing, 0.4 the first 40% of the steps"
        )
    # 0.29 * 100 is 28.999999999999996 and means 29.
    return min(math.floor(share_ratio * steps + 1e-9), steps - 1)


@dataclass(frozen=True)
class Cluster:
    """Prompts and clusters, and the cosine similarity of the least similar pair among them."""

    similarity: float
    children: tuple["Cluster | int", ...]


def clusters(size: int, merges: Sequence[tuple[int, int, float]]) -> list[Cluster | int]:
    """Return merges (a, b, similarity) as clusters in clusters; `size` + k names what merge k made, as in scipy."""
    nodes: dict[int, Cluster | int] = {prompt: prompt for prompt in range(size)}
    for k, (a, b, similarity) in enumerate(merges):
        nodes[size + k] = Cluster(similarity, (nodes.pop(a), nodes.pop(b)))
    return list(nodes.values())


@dataclass(frozen=True)
class Budget:
    """A plan that saves what was asked, and what it costs in likeness.

    `threshold`: the similarity from which on prompts share; `merges`: for every block its similarity, the share of the
    steps that it takes together, and how many prompts it holds, least similar first.
    """

    plan: Plan
    threshold: float
    merges: list[tuple[float, float, int]]


def plan_for_budget(
    nested: Sequence[Cluster | int], steps: int, saving: float, most: float = 0.9, at_least: float = -1.0
) -> Budget:
    """Return the plan that saves this share of the evaluations at the highest threshold that does.

    A cluster of similarity s shares most * (1 - (1 - s) / (1 - threshold)) of the steps: `most` at similarity 1,
    nothing from the threshold down. `nested` comes from `clusters`, or holds one Cluster for each flat group. Clusters
    less similar than `at_least` are refused: their members share in tighter clusters or not at all. A bound on quality
    is such a similarity, together with the share ratio at which it was measured as `most` (sage.evaluation.damage).
    Raises PlanError when even sharing `most` everywhere saves less.
    """
    if not 0 <= saving < 1:
        raise PlanError(f"saving {saving} is outside [0, 1); 0.4 saves 40% of the network evaluations")

    def share(similarity: float, width: float) -> float:
        return most * max(0.0, 1 - (1 - similarity) / width) if similarity >= at_least else 0.0

    def plan(width: float) -> Plan:
        return Plan.nested(nested, steps, lambda s: share(s, width))

    # The saving grows with the width 1 - threshold; at 1e12 every cluster shares `most`.
    low, high = 1e-9, 1e12
    if plan(high).saving < saving:
        raise PlanError(
            f"groups of similarity {at_least:.4g} or more save at most {plan(high).saving:.1%} when each shares "
            f"{most:.0%} of {steps} steps, less than the {saving:.1%} asked; ask for less, or allow less alike groups"
        )
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if plan(middle).saving >= saving else (middle, high)
    found = plan(high)
    shares = [(s, shared_steps(share(s, high), steps) / steps, n) for s, n in _merges(nested)]
    return Budget(found, max(1 - high, at_least), sorted(row for row in shares if row[1]))


def _merges(nested: Sequence[Cluster | int]) -> Iterator[tuple[float, int]]:
    """Yield similarity and number of prompts of every cluster."""

    def prompts(node: Cluster | int) -> int:
        return 1 if isinstance(node, int) else sum(prompts(child) for child in node.children)

    for node in nested:
        if isinstance(node, Cluster):
            yield node.similarity, prompts(node)
            yield from _merges(node.children)


def _excerpt(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 20 else f"{list(values[:20])} and {len(values) - 20} more"
