"""What a space of prompts is worth: explained variance, ranks of pairs, and m in as many groups."""

import itertools

import numpy as np
import pytest

from sage.evaluation.spaces import groups_by_count, mean_difference, rank_correlation, variance_explained
from sage.grouping.sphere import on_sphere

RANDOM = np.random.default_rng(0)
X = (np.repeat(RANDOM.normal(size=(6, 40)), 4, axis=0) + 0.3 * RANDOM.normal(size=(24, 40))) / 2


def test_the_mean_explains_nothing_and_the_truth_everything():
    assert variance_explained(X, X) == 1
    assert variance_explained(X, np.broadcast_to(X.mean(0), X.shape)) == pytest.approx(0)


def test_ranks_of_pairs_do_not_depend_on_the_scale():
    rows = on_sphere(X, 40)
    assert rank_correlation(rows, rows) == pytest.approx(1)
    assert rank_correlation(rows, on_sphere(X / 3, 40)) > 0.9
    assert abs(rank_correlation(rows, on_sphere(RANDOM.normal(size=(24, 40)), 40))) < 0.3


def test_m_is_the_mean_over_pairs_of_groups():
    pairs = [(0, 1), (0, 2), (1, 2), (4, 7)]
    wanted = np.mean([np.square(X[a] - X[b]).mean() for a, b in pairs])
    assert mean_difference(X, [[0, 1, 2], [3], [4, 7]]) == pytest.approx(wanted)
    assert mean_difference(X) == pytest.approx(mean_difference(X, [list(range(24))]))
    assert mean_difference(X, [[0], [1]]) == 0


def test_every_space_forms_as_many_groups():
    rows = on_sphere(X, 40)
    for count in (24, 17, 6):
        groups, threshold = groups_by_count(rows, count, 6)
        assert len(groups) == count and sorted(itertools.chain(*groups)) == list(range(24))
        worst = min((rows[group] @ rows[group].T).min() for group in groups)
        assert count == 24 or worst == pytest.approx(threshold, abs=1e-5)
    assert groups_by_count(rows, 6, 6)[0] == [list(range(k, k + 4)) for k in range(0, 24, 4)]
    assert len(groups_by_count(rows, 2, 6)[0]) >= 4  # the size is capped
