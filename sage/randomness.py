"""Random numbers that are functions of a key, so that a resumed run draws what the uninterrupted one did."""

import hashlib

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """Return the source of all randomness that belongs to a key, such as (seed, step); another key, another stream."""
    # Hashed, because torch's CPU generator reads only the low 32 bits of a seed: `seed << 32` would change nothing.
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4]))


def stratified_uniform(n: int, random: torch.Generator) -> Tensor:
    """Return n numbers in [0, 1), one in each n-th, in random order: the mean of independent ones, less variance."""
    # In double: 63 plus a float just below 1 is 64 in single precision, and a timestep T does not exist.
    return (torch.randperm(n, generator=random) + torch.rand(n, generator=random, dtype=torch.float64)) / n
