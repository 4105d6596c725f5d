"""Conditions: the text inputs of the network, of one prompt or merged for a block of prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Condition = Mapping[str, Tensor]
"""Tensors by name, such as text states, pooled states and mask, each of shape (rows, ...).

In the sampling loop they have one more axis, (rows, g, ...) with g = 1; those without text have names of their own.
"""


def select(condition: Condition, rows: Tensor | slice) -> Condition:
    """Return these rows of a condition."""
    return {name: values[rows] for name, values in condition.items()}


def stacked(rows: Condition) -> Condition:
    """Return conditions (n, ...) as the sampling loop has them, (n, 1, ...)."""
    return concatenated([{name: values[:, None] for name, values in rows.items()}], dim=1)


def concatenated(parts: Sequence[Condition], dim: int) -> Condition:
    """Concatenate conditions (n, g, ...) along an axis; tokens that others lack are filled with zeros."""
    return {name: _concatenated([part[name] for part in parts], dim) for name in parts[0]}


def _concatenated(parts: list[Tensor], dim: int) -> Tensor:
    if parts[0].ndim > 2:
        longest = max(part.shape[2] for part in parts)
        missing = [0, 0] * (parts[0].ndim - 3)
        parts = [torch.nn.functional.pad(part, (*missing, 0, longest - part.shape[2])) for part in parts]
    return torch.cat(parts, dim)


def joined(condition: Condition) -> Condition:
    """Flatten conditions (rows, g, ...) to (g * rows, ...) for one network call."""
    return {name: rows.transpose(0, 1).flatten(0, 1) for name, rows in condition.items()}


def padded(condition: Condition, rows: int, size: int) -> Condition:
    """Repeat the last of the `rows` of joined conditions (g * rows, ...) until they are `size`: (g * size, ...)."""
    found = {}
    for name, values in condition.items():
        parts = values.reshape(-1, rows, *values.shape[1:])
        last = parts[:, -1:].expand(-1, size - rows, *values.shape[1:])
        found[name] = torch.cat([parts, last], dim=1).flatten(0, 1)
    return found


def block_conditions(
    blocks: Sequence[Sequence[int]],
    encode: Callable[[list[int]], Condition],
    rank: Callable[[int], Any],
    batch_size: int,
    medoid: bool,
) -> Condition:
    """Return the conditions of blocks of prompts, (g * len(blocks), ...), each merged from its members' conditions.

    The condition of a single prompt stays as it is. `encode(prompts)` returns conditions (n, g, ...); it is called for
    about `batch_size` prompts at a time. `rank` orders the members, `medoid` as in `merge`.
    """
    if all(len(block) == 1 for block in blocks):
        return joined(encode([block[0] for block in blocks]))
    # In order of rank, so that not even rounding depends on the order of the prompts.
    members = [sorted(block, key=rank) for block in blocks]
    merged: list[Condition] = []
    while len(merged) < len(blocks):
        some = [members[len(merged)]]
        while len(merged) + len(some) < len(blocks) and sum(map(len, some)) < batch_size:
            some.append(members[len(merged) + len(some)])
        rows = encode([member for block in some for member in block])
        sizes = [len(block) for block in some]
        parts = {name: torch.split(values, sizes) for name, values in rows.items()}
        merged += [merge({name: parts[name][i] for name in parts}, medoid) for i in range(len(some))]
    return joined(concatenated(merged, dim=0))


def merge(members: Condition, medoid: bool = False) -> Condition:
    """Return one condition, (1, ...), for the members (n, ...): their mean, or with `medoid` the member nearest to it.

    Equal members give exactly their own condition. With an "x_mask" (for condition x), each token's state is the mean
    over the members whose mask includes the token, and the merged mask is the union; a token that no mask includes,
    which some networks read all the same, has the mean over all members.
    """
    mean = {}
    for name, rows in members.items():
        mask = members.get(f"{name}_mask")
        if name.endswith("_mask"):
            mean[name] = rows.amax(0, keepdim=True)
            continue
        # Average the differences to the first member: they are exactly 0 for equal members, so nothing is rounded.
        first = rows[:1]
        difference = rows.float() - first.float()
        if mask is None or rows.ndim == mask.ndim:
            shift = difference.mean(0, keepdim=True)
        else:
            weight = mask.to(difference).reshape(*mask.shape, *[1] * (rows.ndim - mask.ndim))
            weight = weight.where(weight.amax(0, keepdim=True) > 0, 1)
            shift = (weight * difference).sum(0, keepdim=True) / weight.sum(0, keepdim=True)
        mean[name] = (first.float() + shift).to(rows.dtype)
    if not medoid:
        return mean
    distance = sum((rows.float() - mean[name].float()).flatten(1).square().sum(1) for name, rows in members.items())
    nearest = int(torch.as_tensor(distance).argmin())
    return {name: rows[nearest : nearest + 1] for name, rows in members.items()}
