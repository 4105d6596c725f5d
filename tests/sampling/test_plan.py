import copy
import itertools
import math
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.errors import PlanError
from sage.grouping import groups as grouping
from sage.sampling.budget import Cluster, clusters, nested_plan, plan_for_budget
from sage.sampling.plan import Block, Plan, shared_steps


def nfe_by_definition(plan: Plan, guidance: bool) -> int:
    """The formula of the module's head, word for word."""
    return (2 if guidance else 1) * sum(len(plan.partition(step)) for step in range(plan.steps))


@st.composite
def plans(draw):
    count = draw(st.integers(1, 12))
    steps = draw(st.integers(1, 10))
    order = draw(st.permutations(range(count)))

    def nodes(members, start):
        if len(members) < 2 or start >= steps - 1 or draw(st.booleans()):
            return list(members)
        cut = draw(st.integers(1, len(members) - 1))
        until = draw(st.integers(start + 1, steps - 1))
        return [Block(until, (*nodes(members[:cut], until), *nodes(members[cut:], until)))]

    return Plan(steps, tuple(nodes(order, 0)))


@given(plans())
@settings(deadline=None)
def test_counts_equal_the_formula_and_partitions_refine(plan):
    for guidance in (False, True):
        assert plan.nfe(guidance) == nfe_by_definition(plan, guidance)
    before = [list(range(plan.prompts))]
    for step in range(plan.steps):
        blocks = plan.partition(step)
        assert sorted(itertools.chain(*blocks)) == list(range(plan.prompts))
        assert all(any(set(block) <= set(above) for above in before) for block in blocks)
        before = blocks
    assert all(len(block) == 1 for block in before)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=10), st.integers(1, 60), st.floats(0, 0.999))
def test_one_level_saves_beta_times_one_minus_k_over_m(sizes, steps, ratio):
    edges = np.cumsum([0, *sizes])
    groups = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
    plan = Plan.shared(groups, steps, ratio)
    beta = shared_steps(ratio, steps) / steps
    assert plan.saving == pytest.approx(beta * (1 - len(groups) / edges[-1]))
    assert beta <= ratio + 1e-9


def test_independent_is_shared_at_ratio_0():
    assert Plan.shared([[0, 2], [1]], 7, 0.0) == Plan.independent(3, 7)
    assert Plan.independent(3, 7).nfe(guidance=True) == 42


def test_share_ratio_rounds_down_but_not_below_what_was_meant():
    assert shared_steps(0.29, 100) == 29
    assert shared_steps(0.4, 8) == 3
    assert shared_steps(0.999, 2) == 1


def test_a_ratio_for_each_group():
    plan = Plan.shared([[0, 1], [2, 3]], 10, [0.2, 0.5])
    assert plan.partition(1) == [[0, 1], [2, 3]]
    assert plan.partition(2) == [[0], [1], [2, 3]]
    assert plan.partition(5) == [[0], [1], [2], [3]]


def test_repeated_images_share_with_others_but_not_with_themselves():
    plan = Plan.shared([[0, 1]], 10, 0.5).repeat(2)
    assert plan.partition(0) == [[0, 2], [1, 3]]
    assert plan.saving == Plan.shared([[0, 1]], 10, 0.5).saving


@given(plans(), st.data())
@settings(deadline=None)
def test_a_prompts_images_are_one_in_the_first_steps_and_then_share_as_their_prompts_do(plan, data):
    counts = data.draw(st.lists(st.integers(1, 3), min_size=plan.prompts, max_size=plan.prompts))
    image_steps = data.draw(st.integers(0, plan.steps - 1))
    numbers = iter(data.draw(st.permutations(range(sum(counts)))))
    images = [list(itertools.islice(numbers, count)) for count in counts]
    found = plan.for_images(images, image_steps)
    for step in range(plan.steps):
        layers = [range(3)] if step < image_steps else [[r] for r in range(3)]
        expected = [
            sorted(images[prompt][r] for prompt in part for r in layer if r < len(images[prompt]))
            for part in plan.partition(step)
            for layer in layers
        ]
        assert found.partition(step) == sorted(filter(None, expected))


@pytest.mark.parametrize("group_steps", [0, 1, 2, 4])
@pytest.mark.parametrize("image_steps", [0, 1, 2, 4])
@pytest.mark.parametrize(("size", "images"), [(1, 4), (3, 1), (3, 4)])
def test_a_tree_of_groups_prompts_and_images_costs_what_the_formula_says(group_steps, image_steps, size, images):
    steps, groups = 6, [list(range(size)), list(range(size, 2 * size))]
    plan = Plan.shared(groups, steps, group_steps / steps).repeat(images, image_steps)
    if size == 1:
        group_steps = 0
    together, apart = min(group_steps, image_steps), steps - max(group_steps, image_steps)
    by_rank, by_prompt = max(0, group_steps - image_steps), max(0, image_steps - group_steps)
    each = together + by_rank * images + by_prompt * size + apart * size * images
    assert plan.nfe(guidance=False) == 2 * each
    assert plan.nfe(guidance=True) == 4 * each


@pytest.mark.parametrize(
    ("images", "image_steps", "says"),
    [
        ([[0, 1], [2]], 6, "6 of 6 steps; give 0 for none, or at most 5"),
        ([[0, 1], [2]], -1, "share -1 of 6 steps"),
        ([[0, 1]], 1, "1 prompts' images were given for 2 prompts"),
        ([[0, 1], []], 1, "1 prompts' images were given for 2 prompts"),
        ([[0, 1], [1]], 1, "names every prompt from 0 on once"),
    ],
)
def test_images_that_make_no_plan_are_refused(images, image_steps, says):
    with pytest.raises(PlanError, match=says):
        Plan.independent(2, 6).for_images(images, image_steps)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Plan.shared([[0, 1]], 10, 1.0), r"share ratio 1.0 is outside \[0, 1\)"),
        (lambda: Plan.shared([[0, 1]], 10, -0.1), "share ratio -0.1"),
        (lambda: Plan.shared([[0, 1]], 10, math.nan), "share ratio nan"),
        (lambda: Plan.shared([[0, 1]], 10, [0.1, 0.2]), "2 share ratios were given for 1 groups"),
        (lambda: Plan.shared([[0, 1], [1]], 10, 0.5), r"names every prompt from 0 on once; this one has \[0, 1, 1\]"),
        (lambda: Plan.shared([[0, 2]], 10, 0.5), r"\[0, 2\]"),
        (lambda: Plan.shared([], 10, 0.5), "at least 1 prompt"),
        (lambda: Plan.independent(2, 0), "at least 1 step, not 0"),
        (lambda: Plan(10, (Block(12, (0, 1)),)), "starts at step 0 and branches at step 12 of 10"),
        (lambda: Plan(10, (Block(5, (0, Block(5, (1, 2)))),)), "starts at step 5 and branches at step 5"),
        (lambda: Plan(10, (Block(5, (0,)),)), "1 children"),
    ],
)
def test_an_impossible_plan_says_why(make, says):
    with pytest.raises(PlanError, match=says):
        make()


class Index(int):
    """A number that is seen when something looks for it, also by a search that C does, as `in` of a list is."""

    def __eq__(self, other):
        return int.__eq__(self, other)

    def __hash__(self):
        return int.__hash__(self)


def calls_of_planning(prompts, steps):
    """Return how many calls a plan of groups of four and its cost take."""
    groups = [[Index(i + k) for k in range(4)] for i in range(0, prompts, 4)]
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        Plan.shared(groups, steps, [i % steps / steps for i in range(len(groups))]).nfe(guidance=True)
    finally:
        sys.setprofile(None)
    return calls


def test_a_plan_costs_as_much_as_it_has_prompts_whatever_the_steps():
    small = calls_of_planning(2_000, 1000)
    assert calls_of_planning(20_000, 1000) < 11 * small
    assert calls_of_planning(2_000, 100) > 0.9 * small


def test_a_tree_shares_longer_where_prompts_are_closer():
    nested = clusters(4, [(0, 1, 0.9), (2, 3, 0.8), (4, 5, 0.5)])
    plan = nested_plan(nested, 10, lambda similarity: similarity - 0.3)
    assert plan == Plan(10, (Block(2, (Block(6, (0, 1)), Block(5, (2, 3)))),))
    # An outer cluster that shares as long as the inner one is one block with it.
    assert nested_plan(nested, 10, lambda similarity: 0.5) == Plan(10, (Block(5, (0, 1, 2, 3)),))
    assert nested_plan(nested, 10, lambda similarity: 0.0) == Plan.independent(4, 10)


def test_a_budget_is_met_at_the_highest_threshold_that_meets_it():
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(8, 16)).repeat(5, axis=0)
    tree = grouping.tree(centres + 0.3 * generator.normal(size=(40, 16)), 0.0, 40)
    nested = clusters(tree.size, tree.merges)
    for saving in (0.1, 0.4, 0.6):
        budget = plan_for_budget(nested, 50, saving)
        assert saving <= budget.plan.saving < saving + 0.03
        assert all(similarity > budget.threshold for similarity, _, _ in budget.merges)
    assert plan_for_budget(nested, 50, 0.1).threshold > plan_for_budget(nested, 50, 0.6).threshold


def test_a_budget_over_groups_prompts_and_images_spends_the_images_share_first():
    nested = clusters(6, [(0, 1, 0.9), (2, 3, 0.8), (4, 5, 0.7)])
    tree = {"images": 4, "image_steps": 2}
    # Two of ten steps of four images save 15%, so no cluster has to share.
    alone = plan_for_budget(nested, 10, 0.15, **tree)
    assert alone.plan == Plan.independent(6, 10).repeat(4, 2)
    assert alone.merges == []
    budget = plan_for_budget(nested, 10, 0.3, **tree)
    assert 0.3 <= budget.plan.saving < 0.35
    assert budget.plan.prompts == 24
    without = plan_for_budget(nested, 10, 0.3, images=4)
    assert sum(share for _, share, _ in budget.merges) < sum(share for _, share, _ in without.merges)
    assert budget.threshold > without.threshold


def test_a_budget_from_flat_groups_branches_each_by_its_tightness():
    nested = [Cluster(0.95, (0, 1, 2)), Cluster(0.75, (3, 4)), 5]
    budget = plan_for_budget(nested, 100, 0.3)
    assert budget.plan.saving >= 0.3
    assert [(similarity, prompts) for similarity, _, prompts in budget.merges] == [(0.75, 2), (0.95, 3)]
    loose, tight = (share for _, share, _ in budget.merges)
    assert loose < tight


def test_clusters_that_would_cost_quality_are_refused_and_their_members_share_tighter_or_not_at_all():
    nested = [Cluster(0.5, (Cluster(0.9, (0, 1)), 2)), Cluster(0.6, (3, 4)), 5]
    assert [similarity for similarity, _, _ in plan_for_budget(nested, 100, 0.1).merges] == [0.9]
    assert [similarity for similarity, _, _ in plan_for_budget(nested, 100, 0.3).merges] == [0.5, 0.6, 0.9]
    budget = plan_for_budget(nested, 100, 0.1, at_least=0.7)
    assert budget.threshold >= 0.7
    assert budget.plan.partition(0) == [[0, 1], [2], [3], [4], [5]]
    with pytest.raises(PlanError, match=r"similarity 0\.7 or more save at most 15\.0% .* less than the 30\.0% asked"):
        plan_for_budget(nested, 100, 0.3, at_least=0.7)


def test_a_budget_out_of_reach_says_what_is_in_reach():
    with pytest.raises(PlanError, match=r"save at most 22.5% .* less than the 40.0% asked"):
        plan_for_budget([Cluster(0.9, (0, 1)), 2, 3], 100, 0.4)


def test_trees_may_be_deeper_than_python_recurses():
    depth = sys.getrecursionlimit() + 100
    steps = 80_000  # two between one branch and the next, so that no cluster dissolves
    merges = [(0, 1, 0.9), *((k + 1, depth + k, 0.9 - 2.5e-5 * k) for k in range(1, depth))]
    nested = clusters(depth + 1, merges)
    plan = nested_plan(nested, steps, lambda similarity: similarity)
    assert plan.partition(0) == [list(range(depth + 1))] and plan.repeat(2).prompts == 2 * (depth + 1)
    assert plan.repeat(2, 1).partition(0) == [list(range(2 * depth + 2))]
    assert plan_for_budget(nested, steps, 0.3).merges[0][2] == depth + 1
    (root,), (cluster,) = plan.roots, nested
    for tree in (plan, root, cluster):
        again = pickle.loads(pickle.dumps(tree))
        assert again == tree and hash(again) == hash(tree) and repr(again) == repr(tree)
        assert copy.deepcopy(tree) == tree
    assert plan != nested_plan(nested, steps, lambda similarity: similarity - 0.01)
    # Chains of clusters that share no more than those around them dissolve.
    (block,) = nested_plan(nested, 10, lambda similarity: 0.5).roots
    assert block.until == 5 and sorted(block.children) == list(range(depth + 1))


@given(plans())
@settings(deadline=None)
def test_a_plan_is_written_as_the_code_that_makes_it(plan):
    assert eval(repr(plan), {"Plan": Plan, "Block": Block}) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


@given(plans(), st.data())
@settings(deadline=None)
def test_parts_of_a_plan_are_its_roots_with_their_own_numbers(plan, data):
    order = data.draw(st.permutations(range(len(plan.roots))))
    cut = data.draw(st.integers(0, len(order)))
    parts = [plan.part(numbers) for numbers in (order[:cut], order[cut:]) if numbers]
    assert sorted(prompt for _, prompts in parts for prompt in prompts) == list(range(plan.prompts))
    assert sum(part.nfe(guidance=False) for part, _ in parts) == plan.nfe(guidance=False)
    for step in range(plan.steps):
        back = [[prompts[p] for p in block] for part, prompts in parts for block in part.partition(step)]
        assert sorted(back) == plan.partition(step)
