"""Properties of grouping on random and hostile embeddings, against definitions written out here."""

import itertools
import tracemalloc
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_info, threadpool_limits

from sage.errors import ConfigurationError, DataError
from sage.grouping import groups as grouping
from sage.grouping import linkage as sage_linkage
from sage.grouping import neighbours
from sage.grouping.embedding import embed
from sage.grouping.groups import cut, group, tree, usable, worst_similarity
from sage.grouping.thresholds import (
    damage_curve,
    share_reaching,
    threshold_for_damage,
    threshold_for_saving,
    threshold_for_share,
)

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
VALUES = st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, 1.0, np.nan, np.inf, -np.inf, 1e-40, 3e38])


@st.composite
def matrices(draw):
    shape = (draw(st.integers(0, 24)), draw(st.integers(1, 4)))
    # Few different values, so that copies, ties and opposite rows are common.
    values = draw(st.sampled_from([VALUES, st.sampled_from([-1.0, 0.0, 1.0, 2.0])]))
    return draw(arrays(np.float32, shape, elements=values))


def random_rows(n, d=8, spread=0.5, centres=None, seed=0):
    random = np.random.default_rng(seed)
    middle = random.normal(size=(centres or max(1, n // 4), d))
    rows = middle[random.integers(len(middle), size=n)] + spread * random.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def cosine_of(x, a, b):
    one, other = (x[i].astype(np.float64) / np.abs(x[i]).max() for i in (a, b))
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


@settings(deadline=None, max_examples=300)
@given(
    x=matrices(),
    threshold=st.floats(-1, 1),
    max_size=st.integers(1, 8),
    near_duplicate=st.sampled_from([0.9, 0.999, 1.0, 2.0]),
)
def test_groups_are_a_partition_within_threshold_and_cap(x, threshold, max_size, near_duplicate):
    groups = group(x, threshold, max_size, near_duplicate)
    assert sorted(itertools.chain(*groups)) == list(range(len(x)))
    assert groups == sorted(sorted(members) for members in groups)
    alone = set(np.flatnonzero(~usable(x)))
    for members in groups:
        assert len(members) <= max_size
        assert len(members) == 1 or not alone.intersection(members)
        for a, b in itertools.combinations(members, 2):
            same = np.array_equal(x[a], x[b])
            assert threshold - TOLERANCE <= cosine_of(x, a, b) < near_duplicate + TOLERANCE
            assert not (same and near_duplicate <= 1), "copies of a prompt share a group"
    assert group(x, threshold, max_size, near_duplicate) == groups


@settings(deadline=None, max_examples=200)
@given(x=matrices(), threshold=st.floats(-1, 1), max_size=st.integers(1, 8), seed=st.integers(0, 99))
def test_groups_do_not_depend_on_the_order_of_the_prompts(x, threshold, max_size, seed):
    order = np.random.default_rng(seed).permutation(len(x))

    def values(rows, groups):
        # Copies are interchangeable, so groups are compared by the values of their rows (0.0 and -0.0 are one).
        return sorted(sorted((rows[member] + np.float32(0)).tobytes() for member in members) for members in groups)

    for near_duplicate in (0.99, np.inf):
        plain, shuffled = (
            group(x, threshold, max_size, near_duplicate),
            group(x[order], threshold, max_size, near_duplicate),
        )
        assert values(x, plain) == values(x[order], shuffled)


def test_the_order_does_not_matter_in_a_large_set_either():
    x = random_rows(neighbours.EXACT + 500, spread=0.1)
    order = np.random.default_rng(0).permutation(len(x))
    plain, shuffled = group(x, 0.9, 6), group(x[order], 0.9, 6)
    assert plain == sorted(sorted(order[members].tolist()) for members in shuffled)


def test_the_last_digits_of_the_embeddings_do_not_matter():
    """Batches of other prompts, and other machines, change them."""
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 8)).astype(np.float32)
    noise = 1e-7 * random.normal(size=x.shape).astype(np.float32)
    assert group(x + noise, 0.5, 6) == group(x, 0.5, 6)


def test_a_tree_without_a_cap_is_the_complete_linkage_of_scipy():
    x = random_rows(60)
    built = tree(x, -1.0, len(x))
    reference = linkage(x.astype(np.float64), "complete", metric="cosine")
    np.testing.assert_allclose([merge[2] for merge in built.merges], 1 - reference[:, 2], atol=1e-5)
    for threshold in (0.2, 0.5, 0.8):
        labels = fcluster(reference, 1 - threshold, "distance")
        expected = sorted(np.flatnonzero(labels == label).tolist() for label in np.unique(labels))
        assert cut(built, threshold) == expected


@settings(deadline=None, max_examples=100)
@given(x=matrices(), floor=st.floats(-1, 0.5), height=st.floats(0.5, 1), max_size=st.integers(1, 8))
def test_levels_of_a_tree_are_nested_and_each_is_what_a_tree_of_its_own_gives(x, floor, height, max_size):
    built = tree(x, floor, max_size)
    similarity = [merge[2] for merge in built.merges]
    assert similarity == sorted(similarity, reverse=True)
    low, high = cut(built, floor), cut(built, height)
    assert all(any(set(fine) <= set(coarse) for coarse in low) for fine in high)
    assert high == cut(tree(x, height, max_size), height)
    assert all(worst >= height - TOLERANCE for worst in worst_similarity(x, high))


def test_group_saves_at_least_what_the_tree_saves():
    x = random_rows(400, spread=0.7)
    finer = cut(tree(x, 0.5, 6), 0.5)
    assert len(group(x, 0.5, 6)) < len(finer)


@pytest.mark.parametrize(
    "x, groups",
    [
        (np.zeros((0, 4)), []),
        (np.zeros((0, 0)), []),
        (np.ones((1, 4)), [[0]]),
        (np.ones((7, 4)), [[0, 1, 2], [3, 4, 5], [6]]),
        (np.eye(4), [[0], [1], [2], [3]]),
        (np.zeros((3, 4)), [[0], [1], [2]]),
        ([[1, 0], [np.nan, 0], [1, 0], [np.inf, 0], [0, 0], [1e300, 0]], [[0, 2], [1], [3], [4], [5]]),
        (np.array([[1e-45, 0], [1e38, 0]]), [[0, 1]]),
    ],
    ids=["none", "none of no width", "one", "identical", "different", "zero", "not finite", "tiny and huge"],
)
def test_bad_and_extreme_input(x, groups):
    assert group(x, 0.9, 3) == groups


def test_64_identical_prompts_are_one_group_or_64_pictures():
    x = np.ones((64, 8))
    assert group(x, 0.9, 64) == [list(range(64))]
    assert group(x, 0.9, 64, near_duplicate=0.999) == [[number] for number in range(64)]


def test_copies_of_prompts_group_crosswise_when_kept_apart():
    x = np.repeat(np.array([[1, 0, 0.1], [1, 0, -0.1], [0, 1, 0]]), 3, axis=0)
    assert group(x, 0.9, 6, near_duplicate=0.999) == [[0, 3], [1, 4], [2, 5], [6], [7], [8]]


@pytest.mark.parametrize(
    "error, call",
    [
        (ConfigurationError, lambda: group(np.eye(2), 1.1, 2)),
        (ConfigurationError, lambda: group(np.eye(2), float("nan"), 2)),
        (ConfigurationError, lambda: tree(np.eye(2), -1.1, 2)),
        (ConfigurationError, lambda: group(np.eye(2), 0.5, 0)),
        (DataError, lambda: group([[1.0, 2.0], [1.0]], 0.5, 2)),
        (DataError, lambda: group(np.ones(3), 0.5, 2)),
        (DataError, lambda: group([["a"]], 0.5, 2)),
    ],
)
def test_impossible_arguments_are_refused(error, call):
    with pytest.raises(error):
        call()


def test_many_equal_similarities_take_few_rounds(monkeypatch):
    rounds = []
    best = sage_linkage._mutual_best
    monkeypatch.setattr(sage_linkage, "_mutual_best", lambda *args: rounds.append(1) or best(*args))
    assert len(group(np.eye(1000), 0.0, 4)) == 250
    assert len(rounds) < 50


def test_neighbours_of_a_large_set_are_nearly_those_of_all_pairs(monkeypatch):
    x = random_rows(3000, d=16, spread=0.3)
    exact = set(zip(*(side.tolist() for side in neighbours.similar_pairs(x, 0.9)[:2]), strict=True))
    monkeypatch.setattr(neighbours, "ALL_PAIRS", 0)
    monkeypatch.setattr(neighbours, "EXACT", 0)
    a, b, cosine = neighbours.similar_pairs(x, 0.9)
    found = set(zip(a.tolist(), b.tolist(), strict=True))
    assert found <= exact and len(found) > 0.97 * len(exact)
    assert (a < b).all() and (cosine >= 0.9).all()


def test_the_number_of_threads_does_not_matter(monkeypatch):
    monkeypatch.setattr(neighbours, "ALL_PAIRS", 0)
    monkeypatch.setattr(neighbours, "EXACT", 0)
    x = random_rows(3000, d=32, spread=0.1)
    found = []
    for threads in (1, 2, 3):
        with threadpool_limits(threads):
            assert {pool["num_threads"] for pool in threadpool_info()} == {threads}
            found.append(group(x, 0.8, 6))
    assert found[0] == found[1] == found[2]


def test_a_limited_graph_costs_no_correctness_and_little_saving(monkeypatch):
    x = random_rows(2000, d=8, spread=0.4, centres=20)
    exact = group(x, 0.7, 6)
    monkeypatch.setattr(neighbours, "ALL_PAIRS", 0)
    monkeypatch.setattr(sage_linkage, "ALL_PAIRS", 0)
    limited = group(x, 0.7, 6)
    assert sorted(itertools.chain(*limited)) == list(range(2000))
    assert min(worst_similarity(x, limited)) >= 0.7 - TOLERANCE
    assert len(limited) <= 1.05 * len(exact)


@pytest.mark.parametrize("exact", [True, False])
def test_near_duplicates_do_not_crowd_out_the_neighbours_that_a_group_could_take(monkeypatch, exact):
    # 12 kinds with a common part, 60 near-duplicates of each: a group can take one of each kind.
    random = np.random.default_rng(0)
    kinds = random.normal(size=(12, 64)) + 3 * random.normal(size=64)
    x = (kinds[:, None] + 0.02 * random.normal(size=(12, 60, 64))).reshape(-1, 64).astype(np.float32)
    all_pairs = len(group(x, 0.5, 6, 0.99))
    monkeypatch.setattr(neighbours, "ALL_PAIRS", 0)
    monkeypatch.setattr(sage_linkage, "ALL_PAIRS", 0)
    if not exact:
        monkeypatch.setattr(neighbours, "EXACT", 0)
    assert all_pairs == len(x) / 6
    assert len(group(x, 0.5, 6, 0.99)) <= 1.05 * all_pairs


def test_what_many_rows_keep_grows_with_the_rows_however_dense_they_are(monkeypatch):
    x = random_rows(3000, d=16, spread=0.02, centres=1)
    compared = []
    compare = neighbours._Nearest.compare

    def counted(self, queries, members):
        compared.append(len(queries) * len(members))
        compare(self, queries, members)

    monkeypatch.setattr(neighbours._Nearest, "compare", counted)
    a, _, _ = neighbours.ivf_pairs(x, 0.5)
    assert np.bincount(a).max() <= neighbours.NEAREST + 1
    assert sum(compared) <= 0.6 * len(x) ** 2


def test_the_same_neighbours_are_nearest_whatever_the_last_bits_are(monkeypatch):
    # Every cosine is a multiple of 1/8 up to rounding, in two bases that round differently.
    random = np.random.default_rng(0)
    x = np.zeros((1500, 64), np.float32)
    for row in x:
        row[random.choice(24, 8, replace=False)] = 8**-0.5
    turned = x @ np.linalg.qr(random.normal(size=(64, 64)))[0].astype(np.float32)
    pairs = [set(zip(*(side.tolist() for side in neighbours.exact_pairs(rows, 0.5)[:2]), strict=True))
             for rows in (x, turned)]  # fmt: skip
    assert pairs[0] == pairs[1]


@pytest.mark.slow
def test_memory_grows_with_the_prompts_where_all_are_alike():
    x = random_rows(neighbours.ALL_PAIRS + 2000, d=8, spread=0.01, centres=1)
    tracemalloc.start()
    groups = group(x, 0.5, 6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(groups) < len(x) / 5
    assert peak < 100e6  # all pairs alone would be 18 million, or 350 MB


def test_a_budget_gives_the_highest_threshold_that_meets_it():
    x = random_rows(200, spread=0.6)
    built = tree(x, 0.0, 6)
    threshold = threshold_for_saving(built, 0.2, 0.4)
    assert 0.4 * (1 - len(cut(built, threshold)) / 200) >= 0.2
    assert 0.4 * (1 - len(cut(built, np.nextafter(threshold, 2))) / 200) < 0.2
    assert 0.4 * (1 - len(group(x, threshold, 6)) / 200) >= 0.2
    assert threshold_for_saving(built, 0.0, 0.4) == 1.0
    with pytest.raises(ConfigurationError, match=r"allow 0\.3"):
        threshold_for_saving(built, 0.39, 0.4)
    with pytest.raises(ConfigurationError):
        threshold_for_saving(tree(np.zeros((0, 3)), 0, 6), 0.2, 0.4)


def test_a_bound_on_damage_gives_the_lowest_threshold_that_keeps_it():
    curve = damage_curve([0.5, 0.6, 0.7, 0.8, 0.9], [0.4, 0.2, 0.3, 0.1, 0.0])
    damage = [value for _, value in curve]
    assert damage == sorted(damage, reverse=True)
    for bound in (0.05, 0.1, 0.2):
        threshold = threshold_for_damage(curve, bound)
        assert np.interp(threshold, *zip(*curve, strict=True)) == pytest.approx(bound)
    assert threshold_for_damage(curve, 1.0) == 0.5
    with pytest.raises(ConfigurationError, match="least measured"):
        threshold_for_damage(curve, -0.1)
    with pytest.raises(ConfigurationError):
        damage_curve([0.5], [0.1])


@pytest.mark.parametrize("n", [50, 3000])
def test_thresholds_translate_between_encoders(n):
    one = random_rows(n, d=16)
    # The same prompts through an encoder whose vectors all share a direction, as many encoders' do.
    other = one + np.float32(0.5)
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    share = share_reaching(one, 0.8)
    assert share_reaching(other, threshold_for_share(other, share)) == pytest.approx(share, rel=0.05)
    assert threshold_for_share(other, share) > 0.8


@pytest.mark.slow
def test_a_calibrated_threshold_is_as_strict_for_another_encoder_on_real_prompts():
    names = [unicodedata.name(chr(code)).lower() for code in range(0x1F300, 0x1F650, 2)]
    minilm = embed(names)
    # The second encoder counts words, the rarer the weightier: nearly no pair has a cosine of 0.72.
    words = TfidfVectorizer().fit_transform(names).toarray().astype(np.float32)
    words = words[usable(words)]
    wanted = share_reaching(minilm, 0.72)
    calibrated = threshold_for_share(words, wanted)
    assert calibrated < 0.6 and share_reaching(words, 0.72) < wanted / 3
    assert share_reaching(words, calibrated) == pytest.approx(wanted, rel=0.1)


def test_worst_similarity_is_the_least_cosine_of_each_group():
    x = random_rows(10)
    groups = [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9]]
    expected = [min((cosine_of(x, a, b) for a, b in itertools.combinations(g, 2)), default=1.0) for g in groups]
    np.testing.assert_allclose(worst_similarity(x, groups), expected, atol=1e-6)
    assert grouping.worst_similarity(x, [[0, 0]]) == pytest.approx([1.0])
