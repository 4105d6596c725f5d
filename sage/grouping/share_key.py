"""Share keys: prompts share only if their keys are equal, however similar their texts are.

Whatever the shared steps depend on besides the prompt belongs into the key: negative prompt, image size, guidance
scale, schedule, LoRA; and who must not see whose prompts, such as the tenant of a server.
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from sage.errors import ConfigurationError
from sage.grouping.groups import Groups, Tree

Keys = Sequence[Hashable]


def group_apart(embeddings: np.ndarray, keys: Keys | None, find: Callable[[np.ndarray], Groups]) -> Groups:
    """Return the groups that `find` forms among the embeddings of each key; None: all keys are equal."""
    if keys is None:
        return find(embeddings)
    parts = _parts(embeddings, keys)
    return sorted([part[row] for row in members] for part in parts for members in find(embeddings[part]))


def tree_apart(embeddings: np.ndarray, keys: Keys | None, find: Callable[[np.ndarray], Tree]) -> Tree:
    """Return the tree that joins the trees that `find` forms among the embeddings of each key."""
    if keys is None:
        return find(embeddings)
    names = []  # of each part: names in the whole tree of the prompts and clusters of its own
    merges = []
    for number, part in enumerate(_parts(embeddings, keys)):
        names.append(list(part))
        merges += [(number, merge) for merge in find(embeddings[part]).merges]
    merges.sort(key=lambda found: -found[1][2])  # stable: the merges of a part stay in order
    whole = []
    for k, (number, (a, b, similarity)) in enumerate(merges):
        first, second = sorted((names[number][a], names[number][b]))
        whole.append((first, second, similarity))
        names[number].append(len(embeddings) + k)
    return Tree(len(embeddings), whole)


def _parts(embeddings: np.ndarray, keys: Keys) -> list[list[int]]:
    if len(keys) != len(embeddings):
        raise ConfigurationError(f"{len(keys)} share keys were given for {len(embeddings)} prompts; give one for each")
    parts: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        try:
            parts.setdefault(key, []).append(number)
        except TypeError as error:
            raise ConfigurationError(
                f"share key {number} is {key!r}, which is not hashable; give a text, a number or a tuple of them"
            ) from error
    return list(parts.values())
