"""Batches of images of several sizes: a step has one size, and every image counts alike."""

from collections import Counter

import sage.torchvision_ops  # noqa: F401

import pytest
import torch

from sage.errors import DataError
from sage.randomness import generator
from sage.training.batches import Batches, Endless, batches_of_parts, groups_of_parts

WEIGHTS = {"diffusion": 1.0, "shared": 0.0, "branch": 1.0, "consistency": 0.0}
# 60, 30, 9 and 1 images
PARTS = [list(range(60)), list(range(60, 90)), list(range(90, 99)), [99]]
GROUPS = [(start, start + 1, start + 2) for start in range(0, 99, 3)] + [(99,)]


def test_a_step_has_images_of_one_part_and_parts_have_steps_in_proportion():
    buckets = batches_of_parts(GROUPS, PARTS, WEIGHTS, 12, 0)
    steps = 5120
    turns = [buckets.turn(step)[0] for step in range(steps)]
    for number, part in enumerate(PARTS):
        # Each block of 256 steps has a share that is right to one step.
        assert abs(turns.count(number) - steps * len(part) / 100) <= steps / 256


def test_every_image_of_a_part_is_seen_before_one_is_seen_again():
    buckets = batches_of_parts([(row,) for row in range(100)], PARTS, WEIGHTS, 10, 0)
    seen = {number: [] for number in range(4)}
    for step in range(300):
        number, batches, own = buckets.turn(step)
        assert batches is buckets.parts[number]
        assert own == len(seen[number]) // 10
        seen[number] += batches.rows(own)["diffusion"].tolist()
    for number, part in enumerate(PARTS):
        times = Counter(seen[number])
        assert max(times.values()) - min(times.get(row, 0) for row in range(len(part))) <= 1


def test_a_step_does_not_depend_on_which_were_asked_for_before():
    first, second = (batches_of_parts(GROUPS, PARTS, WEIGHTS, 12, 0) for _ in range(2))
    asked = [first.turn(step)[::2] for step in range(1000)]
    assert [second.turn(step)[::2] for step in (999, 3, 700)] == [asked[999], asked[3], asked[700]]
    assert [batches_of_parts(GROUPS, PARTS, WEIGHTS, 12, 1).turn(step)[::2] for step in range(1000)] != asked


def test_one_part_is_batches_as_they_are():
    groups = tuple(map(tuple, GROUPS))
    alone, whole = Batches(groups, WEIGHTS, 12, 0), batches_of_parts(GROUPS, [list(range(100))], WEIGHTS, 12, 0)
    assert (whole.batch_size, whole.weights, whole.seed) == (12, WEIGHTS, 0)
    for step in range(20):
        number, batches, own = whole.turn(step)
        assert (number, own) == (0, step)
        assert {t: r.tolist() for t, r in batches.rows(own).items()} == {
            t: r.tolist() for t, r in alone.rows(step).items()
        }
        assert whole.cost(step) == alone.cost(step)


def test_groups_become_places_in_their_part_and_none_may_lie_in_two():
    assert groups_of_parts([(1, 3), (0,), (2,)], [[0, 2], [1, 3]]) == [((0,), (1,)), ((0, 1),)]
    with pytest.raises(DataError, match=r"a group has images of several sizes.*dvc repro group"):
        groups_of_parts([(0, 1)], [[0], [1]])


@pytest.mark.parametrize("groups", [[(0,), (1,), (2,)], [(4, 2, 0), (1,), (3, 5)], [tuple(range(50))]])
def test_an_endless_order_lists_only_what_is_asked_for(groups):
    """Against the plain way: list all epochs, and cut out a slice."""
    order = Endless(groups, 7)
    listed = []
    for epoch in range(40):
        permutation = torch.randperm(len(groups), generator=generator(7, "order", epoch)).tolist()
        listed += [row for place in permutation for row in groups[place]]
    for start in range(0, 60):
        for count in (0, 1, 2, 5, 13, 60):
            assert order.rows(start, count).tolist() == listed[start : start + count]
