"""The cache of prefixes: bounded, least recently used first, similar only within bounds."""

import numpy as np
import torch

from flows.serving.prefixes import Prefixes
from sage.sampling.continuous import Prefix


def prefix(step=2):
    return Prefix(step, torch.zeros(1, 10), torch.zeros(10))  # 80 bytes


def direction(degrees):
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])


def test_the_least_recently_used_goes_first():
    cache = Prefixes(160)
    kept = {prompt: prefix(1) for prompt in "abc"}
    cache.put("k", ["a"], kept["a"])
    cache.put("k", ["b"], kept["b"])
    assert cache.first("k", "a") is kept["a"]
    cache.put("k", ["c"], kept["c"])
    assert [cache.first("k", prompt) is not None for prompt in "abc"] == [True, False, True]
    assert cache.bytes == 160


def test_bytes_are_those_of_what_is_kept():
    cache = Prefixes(1000)
    for _ in range(3):
        cache.put("k", ["a"], prefix())
    assert cache.bytes == 80
    small = Prefixes(79)
    small.put("k", ["a"], prefix())
    assert small.bytes == 0 and not small._of_kind


def test_the_most_similar_of_the_same_kind_within_the_bounds_is_found():
    cache = Prefixes(10_000)
    kept = {degrees: prefix() for degrees in (0, 30, 50)}
    for degrees, one in kept.items():
        cache.put("k", [f"a {degrees}"], one, direction(degrees))
    cache.put("other", ["b"], prefix(), direction(42))

    def similar(low, high=1.0, guard=()):
        return cache.similar("k", "a 41", direction(41), low, high, guard)

    assert similar(0.5) is kept[50]
    assert similar(0.5, high=0.985) is kept[30]
    assert similar(0.99) is None
    assert similar(0.5, guard=["number"]) is None
    assert cache.similar("none", "a", direction(0), 0.0, 1.0) is None
