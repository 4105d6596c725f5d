"""Only prompts with equal keys share, and among those nothing changes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.errors import ConfigurationError
from sage.grouping.groups import cut
from sage.grouping.groups import tree as plain_tree
from sage.grouping.online import StreamingGrouper
from sage.grouping.policy import Policy
from sage.grouping.share_key import tree_apart

POLICY = Policy(max_size=4, near_duplicate=0.999, threshold=0.5)


def rows(n, seed):
    random = np.random.default_rng(seed)
    return (random.normal(size=(3, 6))[random.integers(3, size=n)] + 0.4 * random.normal(size=(n, 6))).astype("float32")


def tree(x):
    return plain_tree(x, -1, 4, 0.999)


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 20), kinds=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_groups_are_those_of_each_key_alone(n, kinds, seed):
    x, keys = rows(n, seed), [(f"tenant {k}", None) for k in np.random.default_rng(seed).integers(kinds, size=n)]
    texts = [""] * n
    groups = POLICY.form(texts, x, 0.5, keys)
    assert sorted(itertools.chain(*groups)) == list(range(n))
    assert all(len({keys[member] for member in members}) == 1 for members in groups)
    for key in set(keys):
        own = [number for number in range(n) if keys[number] == key]
        alone = [[own[row] for row in members] for members in POLICY.form(texts[: len(own)], x[own], 0.5)]
        assert sorted(alone) == [members for members in groups if keys[members[0]] == key]
        # The tree joins the trees of the keys.
        trees = cut(tree_apart(x, keys, tree), 0.3)
        alone = [[own[row] for row in members] for members in cut(tree(x[own]), 0.3)]
        assert sorted(alone) == [members for members in trees if keys[members[0]] == key]
    assert POLICY.form(texts, x, 0.5, ["same"] * n) == POLICY.form(texts, x, 0.5)


def test_a_saving_is_reached_in_spite_of_the_keys():
    x, keys = rows(40, 0), [number % 2 for number in range(40)]
    policy = Policy(max_size=4, near_duplicate=0.999, saving=0.15)
    threshold = policy.choose_threshold(x, 0.4, keys=keys)
    assert threshold < policy.choose_threshold(x, 0.4)
    assert 0.4 * (1 - len(policy.form([""] * 40, x, threshold, keys)) / 40) >= 0.15


def test_keys_that_do_not_fit_are_refused():
    with pytest.raises(ConfigurationError, match="2 share keys were given for 3 prompts"):
        POLICY.form([""] * 3, rows(3, 0), 0.5, ["a", "b"])
    with pytest.raises(ConfigurationError, match=r"share key 1 is \['b'\], which is not hashable"):
        POLICY.form([""] * 2, rows(2, 0), 0.5, ["a", ["b"]])


def test_a_stream_keeps_keys_apart():
    stream = StreamingGrouper(-1.0, 2, wait=10, window=9)
    x = np.eye(4)
    for number, tenant in enumerate(["a", "b", "a", "b"]):
        stream.add(number, x[number], 0.0, share_key=tenant)
    assert stream.close() == [[0, 2], [1, 3]]
