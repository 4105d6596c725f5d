import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.errors import DataError
from sage.evaluation.bootstrap import LEAST_GROUPS
from sage.evaluation.diversity import group_diversity
from sage.evaluation.shards import figures, sums

GROUPS = [[0, 3], [1], [2, 4, 5], [6, 7], [8]]
DRAWS = {"draws": 50, "confidence": 0.9, "seed": 0}


def parts(numbers, features, alignment):
    """The sums of some groups, from their own pictures only, as a machine that has no others."""
    mine = [member for number in numbers for member in GROUPS[number]]
    place = {member: i for i, member in enumerate(mine)}
    local = [[place[member] for member in GROUPS[number]] for number in numbers]
    return sums(numbers, local, features[mine], alignment[mine])


@given(st.lists(st.integers(0, 2), min_size=5, max_size=5), st.integers(0, 100))
@settings(max_examples=30)
def test_figures_are_those_of_all_pictures_however_they_are_parted(machine, seed):
    random = np.random.default_rng(seed)
    features, alignment = random.normal(size=(9, 4)).astype(np.float32), random.uniform(-1, 1, 9)
    found = []
    for machines in (machine, [0] * 5):
        rows = []
        for m in (2, 1, 0):
            mine = [number for number in range(5) if machines[number] == m]
            rows += parts(mine, features, alignment)
        found.append(figures(rows, 5, **DRAWS))
    assert found[0] == found[1]
    distances, n = group_diversity(features[:, None], GROUPS)
    assert found[0]["group_diversity"].value == pytest.approx(distances.sum() / n.sum())
    assert found[0]["alignment"].value == pytest.approx(alignment.mean())
    assert (found[0]["alignment"].n, found[0]["group_diversity"].n) == (9, 7)
    assert found[0]["alignment"].low is None  # five groups are too few for an interval


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 3]])
def test_parts_that_are_not_each_group_once_are_refused(rows):
    features, alignment = np.ones((9, 4), np.float32), np.ones(9)
    with pytest.raises(DataError, match=f"figures of {len(rows)} groups, but 5"):
        figures([row for number in rows for row in parts([number], features, alignment)], 5, **DRAWS)


def test_a_figure_that_is_not_finite_is_none():
    features = np.full((9, 4), np.nan, np.float32)
    found = figures(parts(range(5), features, np.full(9, np.nan)), 5, **DRAWS)
    assert {figure.value for figure in found.values()} == {None}


@pytest.mark.parametrize(("single", "paired"), [(LEAST_GROUPS - 1, 0), (1, LEAST_GROUPS - 1), (0, LEAST_GROUPS)])
def test_an_interval_needs_enough_groups_that_have_something_to_measure(single, paired):
    random = np.random.default_rng(0)
    groups = [[k] for k in range(single)] + [[single + 2 * k, single + 2 * k + 1] for k in range(paired)]
    n = single + 2 * paired
    rows = sums(range(len(groups)), groups, random.normal(size=(n, 4)), random.uniform(size=n))
    found = figures(rows, len(groups), **DRAWS)
    assert (found["alignment"].low is not None) == (single + paired >= LEAST_GROUPS)
    assert (found["group_diversity"].low is not None) == (paired >= LEAST_GROUPS)
