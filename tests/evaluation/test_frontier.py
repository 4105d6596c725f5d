import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.errors import MetricError
from sage.evaluation.frontier import evaluations_for, saving

NFE = np.array([4.0, 8.0, 16.0, 32.0])
FRONTIER = np.array([[1.0, 0.5, 0.3, 0.2]])


def read(distance, frontier=FRONTIER, nfe=NFE):
    return evaluations_for(np.array([distance]), nfe, frontier)[0]


@pytest.mark.parametrize(("distance", "nfe"), list(zip(FRONTIER[0], NFE, strict=True)))
def test_a_point_of_the_frontier_costs_what_it_costs(distance, nfe):
    assert read(distance) == pytest.approx(nfe)


def test_between_points_the_cost_is_geometric():
    assert read(0.75) == pytest.approx((4 * 8) ** 0.5)


def test_a_worse_dearer_point_is_no_part_of_the_frontier():
    worse = np.array([[1.0, 0.5, 0.9, 0.2]])
    assert read(0.5, worse) == pytest.approx(8)
    assert read(0.35, worse) == pytest.approx((16 * 32) ** 0.5)  # from 0.5, the best so far, at 16


def test_outside_the_frontier_nothing_is_made_up():
    assert np.isnan(read(1.1))
    assert read(0.1) == 32  # at least


def test_each_draw_is_read_on_its_own_frontier():
    frontier = np.vstack([FRONTIER, FRONTIER + 0.1])
    assert evaluations_for(np.array([0.5, 0.6]), NFE, frontier) == pytest.approx([8, 8])


@given(
    st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    st.floats(0.01, 10),
    st.permutations(range(4)),
)
def test_a_better_quality_never_costs_less_whatever_the_order_of_the_points(distances, distance, order):
    frontier = np.array([distances])
    cost, better = read(distance, frontier), read(distance * 0.9, frontier)
    assert np.isnan(cost) or better >= cost - 1e-9
    np.testing.assert_allclose(read(distance, frontier[:, order], NFE[list(order)]), cost)


def test_the_saving_compares_equal_quality():
    assert saving(6.0, np.array([0.5]), NFE, FRONTIER) == pytest.approx([0.25])


@pytest.mark.parametrize("nfe", [[4.0], [0.0, 4.0]])
def test_a_frontier_without_two_points_is_refused(nfe):
    with pytest.raises(MetricError, match="two points"):
        evaluations_for(np.array([0.5]), np.array(nfe), np.full((1, len(nfe)), 0.5))
