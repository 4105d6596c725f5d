"""Which prompts of one call may share: the groups that are given, or groups that are formed, and share keys."""

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from sage.errors import ConfigurationError, PlanError
from sage.sampling.plan import Block, Plan, leaves_of


def share_keys(
    own: Sequence[Hashable] | None, negatives: Sequence[str] | None, given: Mapping[str, Tensor], count: int
) -> list[Hashable]:
    """Return the share key of each prompt: the caller's own key, and all else by which the prompts of a call differ.

    own        the caller's key for each prompt, or None
    negatives  negative prompt of each prompt, or None
    given      embeddings by name, one row for each prompt; those of negative prompts count
    count      number of prompts

    Raises ConfigurationError if the number of the caller's keys is another.
    """
    own = [None] * count if own is None else _one_each(own, count)
    columns: list[Sequence[Hashable]] = [own, [None] * count if negatives is None else negatives]
    columns += [[_digest(row) for row in rows] for name, rows in given.items() if name.startswith("negative")]
    return list(zip(*columns, strict=True))


def check_keys(plan: Plan, own: Sequence[Hashable]) -> None:
    """Raise PlanError if prompts share steps whose keys differ; `own` holds one key for each prompt of the plan."""
    own = _one_each(own, plan.prompts)
    for root in plan.roots:
        members = sorted(leaves_of(root.children)) if isinstance(root, Block) else []
        for a, b in pairwise(members):
            if own[a] != own[b]:
                raise PlanError(
                    f"prompts {a} and {b} share steps, but their share keys are {own[a]!r} and {own[b]!r}; "
                    "put them into different groups"
                )


def _one_each(keys: Sequence[Hashable], count: int) -> list[Hashable]:
    if len(keys) != count:
        raise ConfigurationError(f"{len(keys)} share keys were given for {count} prompts; give one for each")
    return list(keys)


def _digest(row: Tensor) -> str:
    return hashlib.sha256(row.detach().float().cpu().numpy().tobytes()).hexdigest()
