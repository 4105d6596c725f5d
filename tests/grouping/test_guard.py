"""The guard: what it tells apart, what it lets share, and how often it errs on pairs with a human's verdict."""

import csv
import itertools
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.errors import ConfigurationError
from sage.grouping.guard import KINDS, differences, guard

with Path(__file__).with_name("guard_pairs.tsv").open(encoding="utf-8", newline="") as file:
    PAIRS = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
# Measured: 11 of 66 missed and 1 of 52 split among the pairs the lists were written for, 6 of 22 and 0 of 20 among
# pairs written afterwards. It knows nothing of other languages, names in lower case, and words outside its lists.
BOUNDS = {"tuned": (0.17, 0.02), "held out": (0.28, 0.0)}


def told(pair):
    return bool(differences(pair["first"], pair["second"]))


@pytest.mark.parametrize("name", BOUNDS)
def test_both_errors_are_within_their_bounds(name):
    apart = [pair for pair in PAIRS if pair["set"] == name and pair["share"] == "no"]
    together = [pair for pair in PAIRS if pair["set"] == name and pair["share"] == "yes"]
    assert len(apart) + len(together) == sum(pair["set"] == name for pair in PAIRS) >= 40
    missed, split = [pair for pair in apart if not told(pair)], [pair for pair in together if told(pair)]
    assert len(missed) / len(apart) <= BOUNDS[name][0], missed
    assert len(split) / len(together) <= BOUNDS[name][1], split


def test_every_kind_is_found_where_it_is_meant():
    for kind in KINDS:
        pairs = [pair for pair in PAIRS if pair["share"] == "no" and pair["about"] == kind]
        found = [pair for pair in pairs if kind in differences(pair["first"], pair["second"])]
        assert len(found) > len(pairs) / 2, kind


@given(text=st.text(max_size=40), other=st.text(max_size=40))
def test_differences_are_mutual_and_no_text_differs_from_itself(text, other):
    assert differences(text, text) == set()
    assert differences(text, other) == differences(other, text)


@pytest.mark.parametrize(
    "piece", ["<lora:", "a:1", "1", "(", "a:", "1 ", "f/", "<lora:a", "and ", "two by ", ", ", "v 1"]
)
def test_a_long_prompt_is_read_in_little_time(piece):
    start = time.process_time()
    for text in (piece * (20_000 // len(piece)), piece + piece[-1] * 20_000):
        differences(text, text + "x")
    assert time.process_time() - start < 2


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigurationError, match="no kind 'colours'; the kinds are negation"):
        guard(["a"], [[0]], ["colours"])


@pytest.mark.parametrize(
    "first, second, kinds",
    [
        ("a red cube on a blue ball", "a blue cube on a red ball", {"order"}),
        ("a dog chases a cat", "a cat chases a dog", {"order"}),
        ("two dogs", "three dogs", {"number"}),
        ("2 dogs", "two dogs", set()),
        ("a street with no cars", "a street with cars", {"negation"}),
        ("a red car", "a green car", {"colour"}),
        ("a portrait of Anna", "a portrait of Maria", {"name"}),
        ("a dog in the park", "a dog at the park", set()),
        ("", "", set()),
        ("\u72d7", "\u732b", set()),
    ],
)
def test_the_second_view_tells_what_an_encoder_confuses(first, second, kinds):
    assert differences(first, second) == differences(second, first) == kinds


@settings(deadline=None, max_examples=100)
@given(
    prompts=st.lists(
        st.text(max_size=20) | st.sampled_from(["two dogs", "three dogs", "2 dogs", "no dogs"]), max_size=12
    )
)
def test_the_guard_keeps_a_partition_and_leaves_no_such_pair(prompts):
    groups = guard(prompts, [list(range(len(prompts)))])
    assert sorted(itertools.chain(*groups)) == list(range(len(prompts)))
    for members in groups:
        assert all(not differences(prompts[a], prompts[b]) for a, b in itertools.combinations(members, 2))


def test_the_guard_looks_only_at_the_kinds_asked_for():
    prompts = ["two red dogs", "two green dogs", "three red dogs"]
    assert guard(prompts, [[0, 1, 2]], ["number"]) == [[0, 1], [2]]
    assert guard(prompts, [[0, 1, 2]], KINDS) == [[0], [1], [2]]
