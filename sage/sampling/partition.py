"""Which prompts of one call may share: the groups that are given, or groups that are formed, and share keys."""

import hashlib
import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sage.errors import ConfigurationError, PlanError
from sage.sampling.plan import Block, Plan, leaves_of


def as_groups(given: Any, count: int) -> list[list[int]]:
    """Return groups of prompt numbers, from lists of them or from one label for each prompt.

    given  [[0, 2], [1]], or labels ["a", "b", "a"]: prompts of equal labels share, but -1 means, as in scikit-learn,
           that a prompt is alone; also as arrays and tensors
    count  number of prompts

    Raises PlanError if they are neither. Whether lists name every prompt once, `Plan` checks.
    """
    values: list[Any] = _plain(given)
    if values and all(isinstance(value, (int, str)) for value in values):
        return _by_label(values, count)
    for number, members in enumerate(values):
        if not isinstance(members, list) or not all(isinstance(member, int) for member in members):
            raise PlanError(
                f"groups holds {members!r} in place {number}; give lists of prompt numbers, or a label (text or "
                "integer) for each prompt"
            )
    return values


def share_keys(
    own: Sequence[Hashable] | None, negatives: Sequence[str] | None, given: Mapping[str, Any], count: int
) -> list[Hashable]:
    """Return the share key of each prompt: the caller's own key, and all else by which the prompts of a call differ.

    own        the caller's key for each prompt, or None
    negatives  negative prompt of each prompt, or None
    given      embeddings or texts by name, one row for each prompt; those of negative prompts count
    count      number of prompts

    Raises ConfigurationError if the number of the caller's keys is another.
    """
    own = [None] * count if own is None else _one_each(own, count)
    columns: list[Sequence[Hashable]] = [own, [None] * count if negatives is None else negatives]
    columns += [
        [row if isinstance(row, str) else _digest(row) for row in rows]
        for name, rows in given.items()
        if name.startswith("negative")
    ]
    return list(zip(*columns, strict=True))


def check_keys(plan: Plan, own: Sequence[Hashable]) -> None:
    """Raise PlanError if prompts share steps whose keys differ; `own` holds one key for each prompt of the plan."""
    own = _one_each(own, plan.prompts)
    for root in plan.roots:
        members = sorted(leaves_of(root.children)) if isinstance(root, Block) else []
        for a, b in itertools.pairwise(members):
            if own[a] != own[b]:
                raise PlanError(
                    f"prompts {a} and {b} share steps, but their share keys are {own[a]!r} and {own[b]!r}; "
                    "put them into different groups"
                )


def equal(values: Sequence[Hashable]) -> list[list[int]]:
    """Return the places of equal values, in the order in which they first appear."""
    places: dict[Hashable, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value, []).append(place)
    return list(places.values())


def _by_label(labels: Sequence[int | str], count: int) -> list[list[int]]:
    if len(labels) != count:
        raise PlanError(f"{len(labels)} labels were given for {count} prompts; give one for each")
    groups: dict[Hashable, list[int]] = {}
    for number, label in enumerate(labels):
        groups.setdefault(("alone", number) if label == -1 else label, []).append(number)
    return list(groups.values())


def _plain(value: Any) -> Any:
    """Return arrays, tensors and other collections as lists, and their numbers as Python's, at any depth."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return value
    return [_plain(part) for part in value]


def _one_each(keys: Sequence[Hashable], count: int) -> list[Hashable]:
    if len(keys) != count:
        raise ConfigurationError(f"{len(keys)} share keys were given for {count} prompts; give one for each")
    return list(keys)


def _digest(row: Tensor) -> str:
    return hashlib.sha256(row.detach().float().cpu().numpy().tobytes()).hexdigest()
