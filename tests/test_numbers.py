"""Numbers of numpy and torch mean what the same numbers of Python mean; truth values and texts are refused."""

from fractions import Fraction

import numpy as np
import pytest
import torch

import sage
from sage.errors import ConfigurationError
from sage.numbers import real, single, whole
from sage.randomness import generator
from sage.sampling.plan import Block, Plan

WHOLE = [3, np.int64(3), np.uint8(3), np.array(3), next(iter(np.arange(3, 4))), torch.tensor(3)]
REAL = [0.29, np.float64(0.29), np.float32(0.29), np.array(0.29, np.float32), torch.tensor(0.29), Fraction(29, 100)]
NO_NUMBERS = [True, np.True_, np.array(True), torch.tensor(True), "3", None, [3], np.array([3]), 3j]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_a_whole_number(value):
    assert whole("n", value) == 3 and type(whole("n", value)) is int and single(value)
    assert real("n", value) == 3.0


@pytest.mark.parametrize("value", REAL, ids=repr)
def test_a_number(value):
    assert real("n", value) == 0.29 and type(real("n", value)) is float and single(value)
    with pytest.raises(ConfigurationError, match=r"n is .*; give a whole number"):
        whole("n", value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused_by_the_name_of_its_argument(value):
    for read in (whole, real):
        with pytest.raises(ConfigurationError, match=r"^n is .*; give a"):
            read("n", value)


def test_random_numbers_depend_on_the_value_of_a_key_not_on_its_type():
    assert generator(np.int64(3), "order").initial_seed() == generator(3, "order").initial_seed()


def test_a_plan_of_arrays_is_the_plan_of_lists():
    plan = Plan.shared([[0, 2], [1, 3]], 100, 0.29)
    labels = np.array([0, 1, 0, 1])
    for found in (
        Plan.shared([np.flatnonzero(labels == k) for k in range(2)], np.int64(100), np.float32(0.29)),
        Plan.shared([torch.nonzero(torch.tensor(labels) == k).flatten() for k in range(2)], 100, torch.tensor(0.29)),
        Plan.shared(np.array([[0, 2], [1, 3]]), 100, np.array([0.29, 0.29], np.float32)),
        Plan(np.int64(100), (Block(np.int64(29), (np.int64(0), np.int64(2))), Block(29, tuple(np.array([1, 3]))))),
    ):
        assert found == plan and found.nfe(True) == plan.nfe(True)
    assert plan.repeat(np.int64(2)) == plan.repeat(2)
    with pytest.raises(ConfigurationError, match="share_ratio is True"):
        Plan.shared([[0, 1]], 6, True)
    with pytest.raises(ConfigurationError, match=r"the number of a prompt is 0.5"):
        Plan.shared([[0, 0.5]], 6, 0.5)


def test_groups_do_not_depend_on_the_type_of_the_settings():
    embeddings = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    embeddings[:, 0] += 2
    wanted = sage.group(embeddings, 0.7, 4)
    assert len(wanted) < 40 and sage.group(embeddings, np.float32(0.7), np.int64(4), torch.tensor(2.0)) == wanted
    for change in ({"threshold": "0.7"}, {"max_size": 4.0}, {"max_size": True}, {"near_duplicate": None}):
        with pytest.raises(ConfigurationError, match=f"^{next(iter(change))} is "):
            sage.group(embeddings, **{"threshold": 0.7, "max_size": 4} | change)
    grouper = {"threshold": np.float32(0.7), "max_size": np.int64(4), "wait": np.float32(1), "window": np.int64(9)}
    assert sage.StreamingGrouper(**grouper).threshold == 0.7
    with pytest.raises(ConfigurationError, match=r"^window is True"):
        sage.StreamingGrouper(**grouper | {"window": True})


def test_a_budget_does_not_depend_on_the_type_of_its_numbers():
    from sage.sampling.budget import Cluster

    plain = sage.plan_for_budget([Cluster(0.9, (0, 1)), 2], 10, 0.3)
    found = sage.plan_for_budget([Cluster(np.float32(0.9), (np.int64(0), np.int64(1))), np.int64(2)], np.int64(10), 0.3)
    assert found.plan == plain.plan
    with pytest.raises(ConfigurationError, match=r"^saving is "):
        sage.plan_for_budget([Cluster(0.9, (0, 1)), 2], 10, "0.3")
