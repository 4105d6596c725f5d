"""Plans: which prompts share which sampler steps, and how many network evaluations that takes.

A plan is a forest whose leaves are the prompts. A `Block` shares steps, from the branch point of its parent (step 0 for
a root) until step `until`, and then splits into its children. So at each step every prompt is in exactly one part, a
block or the prompt alone, and later parts refine earlier ones. The cost is known before sampling:

    NFE = g * sum_k |parts at step k|        g = 2 under classifier-free guidance, else 1
    M prompts in K groups that share the fraction beta of the steps:    saving = beta * (1 - K / M)

A plan's steps are the scheduler's timesteps, one network evaluation each: at 30 inference steps
`len(scheduler.timesteps)` is 30 for most schedulers, 59 for Heun and 31 for PNDM.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Union

from sage.errors import PlanError
from sage.numbers import real, single, whole

Node = Union["Block", int]


class Nested:
    """Base of trees that may be thousands deep: comparison, hash, repr and pickle without recursion.

    A subclass is a dataclass with two fields, a number and `children`: a tuple of its own kind and of prompts.
    """

    children: tuple[Any, ...]

    def flat(self) -> tuple[Any, ...]:
        """Return the tree in postfix order: prompts as they are, a node as (number, how many children)."""
        found: list[Any] = []
        waiting: list[Any] = [self]
        while waiting:
            node = waiting.pop()
            if isinstance(node, Nested):
                found.append((getattr(node, fields(node)[0].name), len(node.children)))  # type: ignore[arg-type]
                waiting.extend(node.children)
            else:
                found.append(node)
        return tuple(reversed(found))

    def __eq__(self, other: object) -> bool:
        """Compare type, numbers and prompts."""
        return self.flat() == other.flat() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        """Hash as equal trees do."""
        return hash(self.flat())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy as a flat list."""
        return rebuilt, (type(self), self.flat())

    def __repr__(self) -> str:
        """Write the code that makes the tree."""
        number, children = (field.name for field in fields(self))  # type: ignore[arg-type]

        def written(value: float, inside: tuple[str, ...]) -> str:
            listed = ", ".join(inside) + "," * (len(inside) == 1)
            return f"{type(self).__name__}({number}={value!r}, {children}=({listed}))"

        return str(rebuilt(written, [item if isinstance(item, tuple) else repr(item) for item in self.flat()]))


def rebuilt(make: Callable[[Any, tuple[Any, ...]], Any], flat: Iterable[Any]) -> Any:
    """Return the tree that `Nested.flat` wrote, each node of it made by `make(number, children)`."""
    done: list[Any] = []
    for item in flat:
        if isinstance(item, tuple):
            number, count = item
            first = len(done) - count
            done[first:] = [make(number, tuple(done[first:]))]
        else:
            done.append(item)
    (tree,) = done
    return tree


@dataclass(frozen=True, eq=False, repr=False)
class Block(Nested):
    """Prompts and smaller blocks that are sampled as one until step `until`."""

    until: int
    children: tuple[Node, ...]


@dataclass(frozen=True)
class Plan:
    """A plan for prompts 0 to M - 1 over `steps` steps.

    Raises PlanError unless there is a step and a prompt, every prompt from 0 on appears once, and every block has at
    least two children and start < until < steps.
    """

    steps: int
    roots: tuple[Node, ...]

    def __post_init__(self) -> None:
        """Check that the blocks nest and that every prompt appears once."""
        object.__setattr__(self, "steps", whole("steps", self.steps))
        if self.steps < 1:
            raise PlanError(f"a plan needs at least 1 step, not {self.steps}")
        for node, start in self._walk():
            if isinstance(node, Block) and not start < node.until < self.steps:
                raise PlanError(
                    f"a block starts at step {start} and branches at step {node.until} of {self.steps}; "
                    "it must branch after it starts and before the last step"
                )
            if isinstance(node, Block) and len(node.children) < 2:
                raise PlanError(
                    f"a block has {len(node.children)} children and needs at least 2; put a single prompt in no block"
                )
        leaves = sorted(leaves_of(self.roots))
        if leaves != list(range(len(leaves))):
            raise PlanError(f"a plan names every prompt from 0 on once; this one has {_excerpt(leaves)}")
        if not leaves:
            raise PlanError("a plan needs at least 1 prompt")

    @classmethod
    def independent(cls, prompts: int, steps: int) -> "Plan":
        """Return the plan in which no steps are shared."""
        return cls(steps, tuple(range(prompts)))

    @classmethod
    def shared(cls, groups: Sequence[Sequence[int]], steps: int, share_ratio: float | Sequence[float]) -> "Plan":
        """Return the plan in which each group shares its first `shared_steps(share_ratio, steps)` steps (SAGE).

        `groups` partition the prompts 0 to M - 1; `share_ratio` in [0, 1) is one number or one for each group.
        Raises PlanError otherwise.
        """
        steps = whole("steps", steps)
        given: Any = share_ratio
        ratios = [given] * len(groups) if single(given) else list(given)
        if len(ratios) != len(groups):
            raise PlanError(f"{len(ratios)} share ratios were given for {len(groups)} groups; give one for each")
        roots: list[Node] = []
        for group, ratio in zip(groups, ratios, strict=True):
            until = shared_steps(ratio, steps)
            members = tuple(whole("the number of a prompt", member) for member in group)
            if until and len(members) > 1:
                roots.append(Block(until, members))
            else:
                roots.extend(members)
        return cls(steps, tuple(sorted(roots, key=lambda node: min(leaves_of((node,))))))

    @property
    def prompts(self) -> int:
        """The number of prompts, M."""
        return sum(1 for _ in leaves_of(self.roots))

    @property
    def saving(self) -> float:
        """The fraction of the network evaluations of independent sampling that this plan saves."""
        return 1 - self.nfe(guidance=False) / (self.prompts * self.steps)

    def nfe(self, guidance: bool) -> int:
        """Return the number of network evaluations (NFE); guidance evaluates every block twice."""
        ends = (((node.until if isinstance(node, Block) else self.steps), start) for node, start in self._walk())
        return (2 if guidance else 1) * sum(end - start for end, start in ends)

    def partition(self, step: int) -> list[list[int]]:
        """Return the parts at a step as sorted lists of prompts, ordered by their first prompt."""
        alive = []
        for node, start in self._walk():
            end = node.until if isinstance(node, Block) else self.steps
            if start <= step < end:
                alive.append(sorted(leaves_of((node,))))
        return sorted(alive)

    def repeat(self, times: int, image_steps: int = 0) -> "Plan":
        """Return the plan for `times` images of each prompt: image r of prompt i has number i * times + r.

        `image_steps` is as in `for_images`.
        """
        times = whole("times", times)
        rows = [range(prompt * times, (prompt + 1) * times) for prompt in range(self.prompts)]
        return self if times == 1 else self.for_images(rows, image_steps)

    def for_images(self, images: Sequence[Sequence[int]], image_steps: int) -> "Plan":
        """Return the plan for several images of each prompt: a tree of groups, prompts and images.

        images       the numbers of each prompt's images; together they are 0 to N - 1
        image_steps  number of first steps in which the images of a prompt are one, in [0, steps)

        Prompts share as in this plan. In the first `image_steps` steps they share with all of their images, afterwards
        the r-th image of a prompt shares with the r-th images of the others. Raises PlanError for other arguments.
        """
        image_steps = whole("image_steps", image_steps)
        if not 0 <= image_steps < self.steps:
            raise PlanError(
                f"the images of a prompt cannot share {image_steps} of {self.steps} steps; give 0 for none, or at most "
                f"{self.steps - 1}, as they would else be one image"
            )
        if len(images) != self.prompts or not all(images):
            raise PlanError(
                f"the numbers of {sum(map(bool, images))} prompts' images were given for {self.prompts} prompts; "
                "give each prompt one image or more"
            )

        def leaf(prompt: int) -> _Copies:
            numbers: dict[int, Node] = dict(enumerate(images[prompt]))
            return _Copies(_block(image_steps, numbers.values()), numbers)

        def made(until: int, children: tuple[_Copies, ...]) -> _Copies:
            apart: dict[int, Node] = {}
            for r in sorted({r for child in children for r in child.apart}):
                apart[r] = _block(until, [child.apart[r] for child in children if r in child.apart])
            if until < image_steps:
                return _Copies(Block(until, tuple(child.together for child in children)), apart)
            after = until > image_steps
            below = apart.values() if after else [copy for child in children for copy in child.apart.values()]
            return _Copies(_block(image_steps, below), apart)

        copies = []
        for root in self.roots:
            flat = root.flat() if isinstance(root, Block) else (root,)
            copies.append(rebuilt(made, [item if isinstance(item, tuple) else leaf(item) for item in flat]))
        if image_steps:
            return Plan(self.steps, tuple(found.together for found in copies))
        return Plan(self.steps, tuple(copy for found in copies for copy in found.apart.values()))

    def part(self, roots: Sequence[int]) -> tuple["Plan", list[int]]:
        """Return the plan of some of the roots alone, by number, and the prompts of this plan that it is for.

        Prompt number i of the part is the i-th of these prompts, which ascend; the roots keep their order.
        """
        chosen = [self.roots[number] for number in roots]
        prompts = sorted(leaves_of(chosen))
        place = {prompt: number for number, prompt in enumerate(prompts)}

        def renumbered(root: Node) -> Node:
            flat = root.flat() if isinstance(root, Block) else (root,)
            made: Node = rebuilt(Block, [item if isinstance(item, tuple) else place[item] for item in flat])
            return made

        return Plan(self.steps, tuple(map(renumbered, chosen))), prompts

    def _walk(self) -> Iterator[tuple[Node, int]]:
        """Yield every node with its first step."""
        open_nodes: list[tuple[Node, int]] = [(node, 0) for node in reversed(self.roots)]
        while open_nodes:
            node, start = open_nodes.pop()
            yield node, start
            if isinstance(node, Block):
                open_nodes.extend((child, node.until) for child in reversed(node.children))


@dataclass(frozen=True)
class _Copies:
    """A node for several images of each prompt: `together` while these are one, `apart` the node of each r-th image."""

    together: Node
    apart: dict[int, Node]


def _block(until: int, children: Iterable[Node]) -> Node:
    """Return a block of these children, or the only child itself."""
    nodes = tuple(children)
    return Block(until, nodes) if len(nodes) > 1 else nodes[0]


def leaves_of(nodes: Sequence[Node]) -> Iterator[int]:
    """Yield the prompts below these nodes, in order."""
    open_nodes = list(reversed(nodes))
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, Block):
            open_nodes.extend(reversed(node.children))
        else:
            yield whole("the number of a prompt", node)


def shared_steps(share_ratio: float, steps: int) -> int:
    """Return the number of shared steps: share_ratio * steps, rounded down.

    Raises PlanError for a share ratio outside [0, 1).
    """
    share_ratio = real("share_ratio", share_ratio)
    if not 0 <= share_ratio < 1:
        raise PlanError(
            f"share ratio {share_ratio} is outside [0, 1); 0 shares nothing, 0.4 the first 40% of the steps"
        )
    # 1e-9 makes up for rounding: 0.29 * 100 is 28.999999999999996 but means 29.
    return min(math.floor(share_ratio * steps + 1e-9), steps - 1)


def fewer_steps(most: int, evaluations: Callable[[int], int], images: int, nfe: int) -> int:
    """Return the fewest steps, up to `most`, in which independent sampling takes at least `nfe` evaluations.

    evaluations  how often the sampler evaluates the network for an image in a number of steps
    images       images that are sampled, without guidance
    """
    steps = most
    while steps > 1 and evaluations(steps - 1) * images >= nfe:
        steps -= 1
    return steps


def _excerpt(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 20 else f"{list(values[:20])} and {len(values) - 20} more"
