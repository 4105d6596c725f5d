"""The tables of metrics and arms, and that every part takes names, directions and labels from them."""

import numpy as np
import pytest

from flows.report import plots
from sage.config import load_params
from sage.evaluation import arms, registry
from sage.evaluation.arms import ARMS, JUDGED, REFERENCES
from sage.evaluation.registry import BOOTSTRAPPED, BY_SIMILARITY, GATEABLE, METRICS


def test_only_what_has_an_interval_can_be_gated_and_only_draws_can_be_split():
    assert {METRICS[name].interval for name in GATEABLE} == {"bootstrap", "exact"}
    assert set(BY_SIMILARITY) <= set(BOOTSTRAPPED) <= set(GATEABLE)
    assert all(metric.higher_is_better is False for metric in METRICS.values() if metric.cost)


def test_worse_follows_the_direction_of_numbers_and_of_arrays():
    assert METRICS["alignment"].worse(0.3, 0.5) == pytest.approx(0.2)
    assert METRICS["kernel_distance"].worse(np.array([0.3]), np.array([0.5])) == pytest.approx([-0.2])


def test_the_judged_arm_is_no_reference_and_every_arm_has_colours():
    assert JUDGED not in REFERENCES and {JUDGED, *REFERENCES} == set(ARMS)
    assert plots.LIGHT.keys() == plots.DARK.keys() == ARMS.keys()


def test_a_name_that_the_tables_do_not_know_is_spelled_out():
    assert (registry.label("old_metric"), arms.label("old_arm")) == ("old metric", "Old arm")
    assert (registry.label("group_diversity"), arms.label("sage")) == ("diversity within groups", "SAGE")


def test_the_shipped_gates_rest_on_the_tables():
    for gate in load_params().evaluate.gates:
        assert gate.metric in GATEABLE and gate.reference in REFERENCES
