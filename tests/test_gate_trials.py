"""The trials that chose the least number of groups: what they take for true is true, and below it no gate passes."""

import numpy as np
import pytest

from benchmarks.gates import WIDTH, Truth, judge, kernel_distance, shift_for
from sage.evaluation.bootstrap import LEAST_GROUPS
from sage.evaluation.distances import kernel_statistic


@pytest.mark.parametrize("spread", [1.0, 0.9])
def test_the_true_kernel_distance_is_the_mean_of_measured_ones(spread):
    shift = shift_for(0.15, spread)
    assert kernel_distance(shift, spread) == pytest.approx(0.15)
    random, groups = np.random.default_rng(0), [[k] for k in range(200)]
    found = []
    for _ in range(20):
        real, drawn = random.normal(size=(200, 1, WIDTH)), random.normal(shift, spread, size=(200, 2, WIDTH))
        found.append(kernel_statistic(real, drawn, groups)(np.ones((1, 200)))[0])
    assert abs(np.mean(found) - 0.15) < 3 * np.std(found) / np.sqrt(20)


@pytest.mark.parametrize("groups", [1, LEAST_GROUPS - 1])
def test_one_group_and_one_too_few_pass_no_gate_but_what_is_counted(groups):
    for seed in range(10):
        verdicts = judge(groups, Truth(), seed)
        assert [verdict.metric for verdict in verdicts if verdict.passed] == ["nfe_per_image"]
        assert all(f"only {groups} group" in verdict.reason for verdict in verdicts if not verdict.passed)


def test_enough_groups_are_judged_by_their_intervals():
    assert all(verdict.high is not None for verdict in judge(LEAST_GROUPS, Truth(), 0))
