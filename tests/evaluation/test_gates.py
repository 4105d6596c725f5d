"""What a gate decides of an evaluation that was written and read again: whatever cannot be trusted fails."""

import json
import math

import pytest
from evaluated import SET, changed, del_, part, results

from sage.errors import MetricError
from sage.evaluation.bootstrap import LEAST_GROUPS
from sage.evaluation.gates import judge, passed
from sage.evaluation.results import JudgedSet, parse, read

EXPECTED = JudgedSet(**SET)


def gate(metric="kernel_distance", limit=0.10, relative=True, reference="independent"):
    return {"metric": metric, "reference": reference, "worse_by_at_most": limit, "relative": relative}


GATES = [gate(), gate("alignment", 0.05), gate("nfe_per_image", -0.15)]


DIFFERENCE = ("worse_by", "independent", "kernel_distance")
OURS = ("arms", "sage", "kernel_distance")


def test_good_figures_pass_every_gate():
    verdicts = decided(results(), *GATES)
    assert [verdict.passed for verdict in verdicts] == [True] * 3
    assert passed(verdicts)


def decided(found, *gates, expected=EXPECTED):
    return judge(parse(found, "it"), expected, gates)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (changed(*DIFFERENCE, "relative", "high", to=del_), "independent.kernel_distance.relative.high is missing"),
        (changed(*DIFFERENCE, "relative", "high", to=math.nan), "holds NaN"),
        (changed(*DIFFERENCE, "relative", "high", to=-math.inf), "holds -Infinity"),
        (changed(*DIFFERENCE, "relative", "low", to=math.nan), "holds NaN"),
        (
            changed(*DIFFERENCE, "relative", "high", to="0.01"),
            "relative.high: Input should be a valid number, found '0.01'",
        ),
        (
            changed(*DIFFERENCE, "relative", "high", to=False),
            "relative.high: Input should be a valid number, found False",
        ),
        (changed(*DIFFERENCE, "relative", to=0.01), "worse_by.independent.kernel_distance.relative: Input should be"),
        (changed("worse_by", to=None), "worse_by: Input should be a valid dictionary, found None"),
        (changed(*OURS, "value", to=math.nan), "holds NaN"),
        (changed(*OURS, "value", to="0.21"), "arms.sage.kernel_distance.value: Input should be a valid number"),
        (changed(*DIFFERENCE, "n", to=del_), "worse_by.independent.kernel_distance.n is missing"),
        (changed(*OURS, "n", to=8.5), "arms.sage.kernel_distance.n: Input should be a valid integer, found 8.5"),
        (changed(*OURS, "n", to=True), "arms.sage.kernel_distance.n: Input should be a valid integer, found True"),
        (changed("set", to=del_), "set is missing"),
        (changed("set", "seeds", to="01"), "set.seeds: Input should be a valid list, found '01'"),
        (changed("passed", to="yes"), "passed: Input should be a valid boolean, found 'yes'"),
        ({}, "set is missing"),
        ([], "(top): Input should be"),
        ("text", "(top): Input should be"),
    ],
)
def test_a_damaged_file_is_never_judged_and_says_what_is_wrong(tmp_path, found, words):
    path = tmp_path / "evaluate.json"
    path.write_text(json.dumps(found))
    with pytest.raises(MetricError) as refused:
        read(path)
    assert words in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (changed(*DIFFERENCE, to=del_), "worse_by.independent.kernel_distance is missing"),
        (changed(*OURS, to=del_), "arms.sage.kernel_distance is missing"),
        (changed("arms", "independent", to=del_), "arms.independent.kernel_distance is missing"),
        (changed("worse_by", to={}), "worse_by.independent.kernel_distance is missing"),
        (changed(*DIFFERENCE, "relative", "high", to=None), "the difference's high is missing"),
        (changed(*DIFFERENCE, "relative", "low", to=None), "the difference's low is missing"),
        (changed(*DIFFERENCE, "relative", "value", to=None), "the difference's value is missing"),
        (changed(*OURS, "value", to=None), "sage's figure is missing"),
        (changed(*OURS, "value", to=0.19), "the arms differ by -0.01"),
        (changed(*DIFFERENCE, "n", to=7), "n = 7 images, expected 8"),
        (changed(*OURS, "n", to=4), "n = 4 images, expected 8"),
        (changed(*DIFFERENCE, "relative", "low", to=0.095), "its interval runs from 0.095 down to 0.09"),
        (changed("set", "digest", to="e" * 64), "another set: digest is"),
        (changed("set", "generated", to="o" * 64), "another set: generated is"),
        (changed("set", "n_prompts", to=400), "another set: n_prompts is 400, expected 4"),
        (changed("set", "seeds", to=[0]), "another set: seeds is [0], expected [0, 1]"),
    ],
)
def test_a_figure_that_cannot_be_trusted_fails_with_its_reason(found, words):
    verdicts = decided(found, gate())
    assert not passed(verdicts)
    assert words in verdicts[0].reason
    assert verdicts[0].reason.startswith("The kernel distance cannot be judged: ")
    assert verdicts[0].reason.endswith(".")


def with_groups(*groups):
    """An evaluation on so many groups of one prompt, and of more, whose intervals look whole."""
    found = results() | {"by_similarity": [part("single prompts", groups[0]), part("tightest third", groups[1])]}
    for side in (*found["arms"].values(), *found["worse_by"].values()):
        side["group_diversity"] = side["alignment"]
    return found


@pytest.mark.parametrize(
    ("groups", "metric", "words"),
    [
        ((0, 1), "alignment", "only 1 group; an interval needs at least "),
        ((1, LEAST_GROUPS - 2), "kernel_distance", f"only {LEAST_GROUPS - 1} groups; an interval needs at least "),
        ((0, 0), "alignment", "only 0 groups; an interval needs at least "),
        ((50, 1), "group_diversity", "only 1 group of two or more prompts; an interval needs at least "),
        ((50, LEAST_GROUPS - 1), "group_diversity", "groups of two or more prompts; an interval needs at least "),
    ],
)
def test_too_few_groups_fail_and_say_so_even_with_an_interval_that_looks_whole(groups, metric, words):
    (verdict,) = decided(with_groups(*groups), gate(metric))
    assert not verdict.passed
    assert f"{words}{LEAST_GROUPS}." in verdict.reason


def test_enough_groups_are_judged_and_what_is_counted_needs_none():
    assert passed(decided(with_groups(1, LEAST_GROUPS - 1), gate("alignment")))
    assert passed(decided(with_groups(0, LEAST_GROUPS), gate("group_diversity")))
    assert passed(decided(with_groups(0, 1), gate("nfe_per_image", -0.15)))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("end", ["value", "low", "high"])
def test_what_is_not_finite_fails_also_when_nothing_was_read(number, end):
    found = parse(results(), "it")
    difference = found.worse_by["independent"]["kernel_distance"]
    relative = difference.relative.model_copy(update={end: number})
    found.worse_by["independent"]["kernel_distance"] = difference.model_copy(update={"relative": relative})
    assert not passed(judge(found, EXPECTED, [gate()]))


@pytest.mark.parametrize(
    ("gate", "expected", "sentence"),
    [
        (
            gate(limit=0.10),
            True,
            "Kernel distance: 5.0% worse than independent; limit 10% worse; "
            "worst case of the 95% interval: 9.0% worse. Passed.",
        ),
        (
            gate(limit=0.08),
            False,
            "Kernel distance: 5.0% worse than independent; limit 8% worse; "
            "worst case of the 95% interval: 9.0% worse. Failed.",
        ),
        (
            gate(limit=0.08996),
            False,
            "Kernel distance: 5.000% worse than independent; limit 8.996% worse; "
            "worst case of the 95% interval: 9.000% worse. Failed.",
        ),
        (
            gate(limit=0.018, relative=False),
            True,
            "Kernel distance: 0.01 worse than independent; limit 0.018 worse; "
            "worst case of the 95% interval: 0.018 worse. Passed.",
        ),
        (
            gate(limit=-0.02),
            False,
            "Kernel distance: 5.0% worse than independent; at least 2% better is required; "
            "worst case of the 95% interval: 9.0% worse. Failed.",
        ),
        (
            gate("nfe_per_image", -0.25),
            True,
            "Network evaluations per image: 25.0% fewer than independent; at least 25% fewer is required. Passed.",
        ),
        (
            gate("nfe_per_image", -0.30),
            False,
            "Network evaluations per image: 25.0% fewer than independent; at least 30% fewer is required. Failed.",
        ),
    ],
)
def test_the_worst_case_decides_and_the_reason_is_a_sentence(gate, expected, sentence):
    (verdict,) = decided(results(), gate)
    assert (verdict.passed, verdict.reason) == (expected, sentence)


def test_a_better_value_whose_worst_case_is_beyond_the_limit_fails():
    found = changed(*DIFFERENCE, "relative", to={"value": -0.05, "low": -0.30, "high": 0.20})
    assert not passed(decided(found, gate(limit=0.10)))


def test_the_confidence_is_that_of_the_results():
    found = results() | {"confidence": 0.975}
    assert "worst case of the 97.5% interval: 9.0% worse. Passed." in decided(found, gate())[0].reason


def test_one_failed_gate_fails_all_and_no_gates_pass_nothing():
    assert not passed(decided(results(), *GATES, gate(limit=0.0)))
    assert not passed(decided(results()))


def test_an_unknown_reference_or_metric_fails():
    assert not passed(decided(results(), gate(reference="shared")))
    assert not passed(decided(results(), gate("group_diversity")))


@pytest.mark.parametrize("arm", ["sage", "independent"])
def test_no_gate_passes_on_an_arm_with_blank_images(arm):
    verdicts = decided(results() | {"blank": {arm: 1}}, *GATES)
    assert not any(verdict.passed for verdict in verdicts)
    assert all(f"1 of 8 images of arm {arm} are of a single colour." in verdict.reason for verdict in verdicts)
    assert passed(decided(results() | {"blank": {"shared": 1}}, *GATES)), "no gate compares this arm"
