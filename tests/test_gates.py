import copy
import math

import pytest

from sage.evaluation.gates import judge, passed

SET = {"digest": "d" * 64, "generated": "m" * 64, "n_real": 4, "n_prompts": 4, "seeds": [0, 1]}
N = 8


def figure(value, low, high, n=N, **more):
    return {"value": value, "low": low, "high": high, "n": n} | more


def results():
    """An evaluation that passes every gate of GATES."""

    def share(value, low, high):
        return {"relative": {"value": value, "low": low, "high": high}}

    return {
        "set": copy.deepcopy(SET),
        "arms": {
            "independent": {
                "kernel_distance": figure(0.20, 0.19, 0.21),
                "alignment": figure(0.50, 0.49, 0.51),
                "nfe_per_image": figure(16.0, 16.0, 16.0),
            },
            "sage": {
                "kernel_distance": figure(0.21, 0.20, 0.22),
                "alignment": figure(0.49, 0.48, 0.50),
                "nfe_per_image": figure(12.0, 12.0, 12.0),
            },
        },
        "worse_by": {
            "independent": {
                "kernel_distance": figure(0.01, 0.002, 0.018, **share(0.05, 0.01, 0.09)),
                "alignment": figure(0.01, 0.0, 0.02, **share(0.02, 0.0, 0.04)),
                "nfe_per_image": figure(-4.0, -4.0, -4.0, **share(-0.25, -0.25, -0.25)),
            }
        },
    }


def gate(metric="kernel_distance", limit=0.10, relative=True, reference="independent"):
    return {"metric": metric, "reference": reference, "worse_by_at_most": limit, "relative": relative}


GATES = [gate(), gate("alignment", 0.05), gate("nfe_per_image", -0.15)]


def changed(*path, to):
    """Return the passing results with one thing changed; without `to`'s value where it is `del`."""
    found = results()
    place = found
    for key in path[:-1]:
        place = place[key]
    if to is del_:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return found


del_ = object()
DIFFERENCE = ("worse_by", "independent", "kernel_distance")
OURS = ("arms", "sage", "kernel_distance")


def test_good_figures_pass_every_gate():
    verdicts = judge(results(), SET, GATES)
    assert [verdict.passed for verdict in verdicts] == [True] * 3
    assert passed(verdicts)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (changed(*DIFFERENCE, to=del_), "worse_by.independent.kernel_distance is missing"),
        (changed(*OURS, to=del_), "arms.sage.kernel_distance is missing"),
        (changed("arms", "independent", to=del_), "arms.independent is missing"),
        (changed("worse_by", to=None), "worse_by is missing"),
        (changed(*DIFFERENCE, "relative", "high", to=del_), "the difference's high is None, which is no number"),
        (changed(*DIFFERENCE, "relative", "high", to=None), "the difference's high is None, which is no number"),
        (changed(*DIFFERENCE, "relative", "high", to=math.nan), "nan, which is not finite"),
        (changed(*DIFFERENCE, "relative", "high", to=-math.inf), "-inf, which is not finite"),
        (changed(*DIFFERENCE, "relative", "low", to=math.nan), "nan, which is not finite"),
        (changed(*DIFFERENCE, "relative", "high", to="0.01"), "'0.01', which is no number"),
        (changed(*DIFFERENCE, "relative", "high", to=False), "False, which is no number"),
        (changed(*DIFFERENCE, "relative", to=0.01), "relative is missing"),
        (changed(*OURS, "value", to=math.nan), "sage's figure is nan"),
        (changed(*OURS, "value", to="0.21"), "sage's figure is '0.21'"),
        (changed(*OURS, "value", to=0.19), "the arms differ by -0.01"),
        (changed(*DIFFERENCE, "n", to=7), "n = 7 pictures, expected 8"),
        (changed(*DIFFERENCE, "n", to=del_), "n = None pictures, expected 8"),
        (changed(*OURS, "n", to=4), "n = 4 pictures, expected 8"),
        (changed(*DIFFERENCE, "relative", "low", to=0.095), "its interval runs from 0.095 down to 0.09"),
        (changed("set", "digest", to="e" * 64), "another set: digest is"),
        (changed("set", "generated", to="o" * 64), "another set: generated is"),
        (changed("set", "n_prompts", to=400), "another set: n_prompts is 400, expected 4"),
        (changed("set", "seeds", to=[0]), "another set: seeds is [0], expected [0, 1]"),
        (changed("set", to=del_), "do not say which set"),
        ({}, "do not say which set"),
    ],
)
def test_a_figure_that_cannot_be_trusted_fails_with_its_reason(found, words):
    verdicts = judge(found, SET, [gate()])
    assert not passed(verdicts)
    assert words in verdicts[0].reason
    assert verdicts[0].reason.startswith("The kernel distance cannot be judged: ")
    assert verdicts[0].reason.endswith(".")


@pytest.mark.parametrize(
    ("gate", "expected", "sentence"),
    [
        (
            gate(limit=0.10),
            True,
            "Kernel distance: 5.0% worse (1.0% worse to 9.0% worse) than independent; "
            "at most 10.0% worse is allowed, and the bad end keeps to it.",
        ),
        (
            gate(limit=0.08),
            False,
            "Kernel distance: 5.0% worse (1.0% worse to 9.0% worse) than independent; "
            "at most 8.0% worse is allowed, and the bad end does not.",
        ),
        (
            gate(limit=0.08996),
            False,
            "Kernel distance: 5.000% worse (1.000% worse to 9.000% worse) than independent; "
            "at most 8.996% worse is allowed, and the bad end does not.",
        ),
        (
            gate(limit=0.018, relative=False),
            True,
            "Kernel distance: 0.01 worse (0.002 worse to 0.018 worse) than independent; "
            "at most 0.018 worse is allowed, and the bad end keeps to it.",
        ),
        (
            gate("nfe_per_image", -0.25),
            True,
            "Network evaluations per image: 25.0% fewer than independent; "
            "at least 25.0% fewer is required, and the bad end keeps to it.",
        ),
        (
            gate("nfe_per_image", -0.30),
            False,
            "Network evaluations per image: 25.0% fewer than independent; "
            "at least 30.0% fewer is required, and the bad end does not.",
        ),
    ],
)
def test_the_bad_end_decides_and_the_reason_is_a_sentence(gate, expected, sentence):
    (verdict,) = judge(results(), SET, [gate])
    assert (verdict.passed, verdict.reason) == (expected, sentence)


def test_a_better_value_whose_bad_end_is_beyond_the_limit_fails():
    found = changed(*DIFFERENCE, "relative", to={"value": -0.05, "low": -0.30, "high": 0.20})
    assert not passed(judge(found, SET, [gate(limit=0.10)]))


def test_one_failed_gate_fails_all_and_no_gates_pass_nothing():
    assert not passed(judge(results(), SET, [*GATES, gate(limit=0.0)]))
    assert not passed(judge(results(), SET, []))


def test_an_unknown_reference_or_metric_fails():
    assert not passed(judge(results(), SET, [gate(reference="shared")]))
    assert not passed(judge(results(), SET, [gate("group_diversity")]))
