"""Random numbers as a function of a key, so that a resumed run draws the same numbers as an uninterrupted one."""

import hashlib

import torch
from torch import Tensor

from sage.numbers import whole


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a hash of the key, such as (seed, step)."""
    # Hashed, because torch's CPU generator reads only the low 32 bits of a seed: `seed << 32` would change nothing.
    plain = tuple(part if isinstance(part, str) else whole("a key of random numbers", part) for part in key)
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(plain).encode()).digest()[:4]))


def stratified_uniform(n: int, random: torch.Generator) -> Tensor:
    """Return n stratified uniform samples in [0, 1) as float64, shape (n,): one in each [k/n, (k+1)/n), shuffled.

    An average over them is an unbiased estimate, as with independent samples, and has a lower variance.
    """
    # In single precision 63 plus a number just below 1 rounds to 64; the sample would be 1 and its timestep T.
    return (torch.randperm(n, generator=random) + torch.rand(n, generator=random, dtype=torch.float64)) / n
