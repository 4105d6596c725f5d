import sage.torchvision_ops  # noqa: F401

import cleanfid.fid
import numpy as np
import pytest

from sage.evaluation import bootstrap, figures
from sage.evaluation.bootstrap import LEAST_GROUPS
from sage.evaluation.distances import frechet_distance, frechet_statistic, kernel, kernel_statistic
from sage.evaluation.diversity import group_diversity, seed_diversity

GROUPS = [[0, 3, 5], [1, 2], [4], [6, 7], [8], [9, 10, 11]]
# Five such sets: enough groups for an interval.
MANY = [[12 * k + place for place in group] for k in range(5) for group in GROUPS]


@pytest.fixture
def random():
    return np.random.default_rng(0)


def features(random, n, seeds=2, width=6, shift=0.0):
    return random.normal(shift, 1, (n, seeds, width)).astype(np.float32)


def cleanfid_frechet(x, y):
    means = x.mean(0), y.mean(0)
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return cleanfid.fid.frechet_distance(means[0], covariances[0], means[1], covariances[1])


# clean-fid 0.1.35 passes scipy an argument that 1.18 removes; pyproject.toml keeps scipy below.
@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")
@pytest.mark.parametrize("n", [300, 20])
def test_frechet_distance_is_clean_fids_with_more_and_fewer_pictures_than_features(random, n):
    x, y = random.normal(0, 1, (n, 32)), random.normal(0.3, 1.4, (n + 7, 32))
    assert frechet_distance(x, y) == pytest.approx(cleanfid_frechet(x, y), rel=1e-3 if n < 32 else 1e-9)


def test_frechet_distance_of_a_set_to_itself_is_0_and_of_shifted_gaussians_the_squared_shift(random):
    x = random.normal(size=(200, 8))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(4 * 8)


def test_frechet_distance_with_repeats_is_that_of_repeated_rows(random):
    x, y = random.normal(size=(9, 4)), random.normal(size=(9, 4))
    repeats = np.array([2, 1, 3, 1, 1, 2, 1, 1, 1])
    repeated = frechet_distance(np.repeat(x, repeats, 0), np.repeat(y, repeats, 0))
    assert frechet_distance(x, y, repeats, repeats) == pytest.approx(repeated)


def test_kernel_distance_is_clean_fids_without_the_pairs_of_one_prompt(random):
    n = 12
    x, y = random.normal(size=(n, 6)), random.normal(0.5, 1, (n, 6))
    k = kernel(x, y)
    cross = k.sum() * 2 / n**2 - (k.sum() - np.trace(k)) * 2 / (n * (n - 1))
    # The subset is the whole set, so clean-fid's draws change only the order.
    theirs = cleanfid.fid.kernel_distance(x, y, num_subsets=1, max_subset_size=n) + cross
    assert bootstrap.value(kernel_statistic(x[:, None], y[:, None], GROUPS), len(GROUPS)) == pytest.approx(theirs)


@pytest.mark.parametrize("references", [1, 3])
def test_kernel_distance_has_no_bias_at_small_n_and_sees_a_shift(references):
    def mean(shift):
        draws = [np.random.default_rng(seed) for seed in range(300)]
        sets = [(features(d, 12, references), features(d, 12, 2, shift=shift)) for d in draws]
        return np.array([bootstrap.value(kernel_statistic(x, y, GROUPS), 6) for x, y in sets])

    equal, shifted = mean(0.0), mean(0.5)
    assert abs(equal.mean()) < 3 * equal.std() / np.sqrt(300)
    assert shifted.mean() > 10 * shifted.std() / np.sqrt(300)


def test_kernel_distance_of_an_exact_copy_is_0(random):
    x = random.normal(size=(12, 6))
    assert bootstrap.value(kernel_statistic(x[:, None], x[:, None], GROUPS), 6) == pytest.approx(0, abs=1e-12)


def test_kernel_distance_in_blocks_of_rows_is_the_same(random, monkeypatch):
    x, y = features(random, 12, 1), features(random, 12, shift=0.3)
    counts = bootstrap.resamples(6, 20, 0)
    whole = kernel_statistic(x, y, GROUPS)(counts)
    monkeypatch.setattr("sage.evaluation.distances._ROWS", 5)
    assert kernel_statistic(x, y, GROUPS)(counts) == pytest.approx(whole)


@pytest.mark.parametrize("references", [1, 3])
def test_a_resampled_kernel_distance_is_the_plain_one_of_the_drawn_groups_but_for_pairs_of_a_groups_copies(
    random, references
):
    x, y = features(random, 12, references).astype(float), features(random, 12, shift=0.3).astype(float)
    count = np.array([2, 0, 1, 1, 0, 2])
    drawn = [(k, copy) for k in range(6) for copy in range(count[k])]
    total = number = 0.0
    for k, i_copy in drawn:
        for m, j_copy in drawn:
            for i in GROUPS[k]:
                for j in GROUPS[m]:
                    if i == j or (k == m and i_copy != j_copy):
                        continue
                    h = kernel(x[i], x[j]).mean() + kernel(y[i], y[j]).mean()
                    total += h - kernel(x[i], y[j]).mean() - kernel(x[j], y[i]).mean()
                    number += 1
    assert kernel_statistic(x, y, GROUPS)(count[None].astype(float))[0] == pytest.approx(total / number)


def test_bootstrap_draws_do_not_lie_to_one_side_of_the_value_though_a_groups_pictures_are_alike(random):
    groups = [[2 * k, 2 * k + 1] for k in range(60)]
    x, y = (np.repeat(features(random, 60, 1), 2, axis=0) + 0.1 * features(random, 120, 1) for _ in range(2))
    statistic = kernel_statistic(x, y, groups)
    draws = statistic(bootstrap.resamples(60, 1000, 0))
    assert abs(draws.mean() - bootstrap.value(statistic, 60)) < 0.3 * draws.std()


def test_an_interval_over_groups_is_wider_than_over_prompts_when_a_groups_prompts_go_together(random):
    by_group = random.normal(size=50)
    values = np.repeat(by_group, 4)
    grouped = bootstrap.ratio(by_group * 4, np.full(50, 4.0))(bootstrap.resamples(50, 2000, 0))
    single = bootstrap.ratio(values, np.ones(200))(bootstrap.resamples(200, 2000, 0))
    assert grouped.std() == pytest.approx(2 * single.std(), rel=0.15)


def test_resamples_are_seeded_and_take_as_many_groups_as_there_are():
    counts = bootstrap.resamples(7, 50, 3)
    assert (counts.sum(1) == 7).all()
    assert (counts == bootstrap.resamples(7, 50, 3)).all()
    assert (counts != bootstrap.resamples(7, 50, 4)).any()


def test_more_references_of_each_prompt_narrow_the_distances():
    def spread(statistic, references):
        draws = [np.random.default_rng(seed) for seed in range(40)]
        sets = [(features(d, 12, references), features(d, 12, 2, shift=0.5)) for d in draws]
        return np.std([bootstrap.value(statistic(x, y, GROUPS), 6) for x, y in sets])

    for statistic in (kernel_statistic, frechet_statistic):
        assert spread(statistic, 8) < 0.9 * spread(statistic, 1)


def test_a_draw_that_leaves_nothing_to_measure_makes_the_interval_nan():
    statistic = bootstrap.ratio(np.array([0.0, 5.0]), np.array([0.0, 1.0]))
    draws = statistic(np.array([[2.0, 0.0], [1.0, 1.0]]))
    assert np.isnan(draws[0]) and draws[1] == 5
    assert np.isnan(bootstrap.percentiles(draws, 0.95, 40)).all()


def test_jackknife_of_a_mean_is_its_standard_error(random):
    values = random.normal(size=400)
    low, high = bootstrap.jackknife(bootstrap.ratio(values, np.ones(400)), 400, 0.95, 0, blocks=400)
    error = values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), rel=1e-3)


def test_jackknife_holds_the_frechet_distance_that_the_bootstrap_would_miss(random):
    x, y = features(random, 40, 1, 64), features(random, 40, 1, 64)
    groups = [[k] for k in range(40)]
    statistic = frechet_statistic(x, y, groups)
    value = bootstrap.value(statistic, 40)
    assert bootstrap.percentiles(statistic(bootstrap.resamples(40, 100, 0)), 0.95, 40)[0] > value
    low, high = bootstrap.jackknife(statistic, 40, 0.95, 0)
    assert low < value < high


def test_group_diversity_is_the_mean_distance_within_groups_and_seeds():
    points = np.zeros((5, 2, 2), np.float32)
    points[:, :, 0] = np.array([0, 3, 10, 10, 99])[:, None]
    points[:, 1, 1] = 1000  # another seed is never compared
    sums, numbers = group_diversity(points, [[0, 1], [2, 3], [4]])
    assert sums.tolist() == [3 * 2 * 2, 0, 0]
    assert numbers.tolist() == [4, 4, 0]


def test_group_diversity_falls_to_0_when_a_group_collapses(random):
    x = features(random, 4)
    x[1:] = x[0]
    assert group_diversity(x, [[0, 1, 2, 3]])[0].tolist() == [0]
    assert seed_diversity(x, [[0, 1, 2, 3]])[0][0] > 0


def test_seed_diversity_is_the_distance_between_seeds_of_a_prompt_and_nothing_with_one_seed():
    points = np.zeros((2, 2, 1), np.float32)
    points[0, 1], points[1, 1] = 4, 2
    sums, numbers = seed_diversity(points, [[0], [1]])
    assert (sums / numbers).tolist() == [4, 2]
    assert seed_diversity(points[:, :1], [[0], [1]])[1].tolist() == [0, 0]


@pytest.fixture
def arms(random):
    real = figures.ImageFeatures(features(random, 60, 1), random.uniform(0.7, 0.9, (60, 1)))
    good = figures.ImageFeatures(features(random, 60, shift=0.2), random.uniform(0.5, 0.7, (60, 2)))
    bad = figures.ImageFeatures(features(random, 60, shift=1.0), good.alignment - 0.1)
    return real, good, bad


def test_worse_by_is_paired_signed_and_agrees_with_the_arms(arms):
    real, good, bad = arms
    draws = figures.Bootstrap.over(MANY, 200, 0.9, 0)
    ours, theirs = (figures.statistics(real, arm, MANY) for arm in (bad, good))
    worse = figures.worse_by(ours, theirs, draws, 120, 0.0)
    # The same loss everywhere: a paired difference has no width, the arms' own intervals have.
    assert [worse["alignment"].value, worse["alignment"].low, worse["alignment"].high] == pytest.approx([0.1] * 3)
    found = figures.arm_figures(ours, bad, draws)
    assert found["alignment"].high - found["alignment"].low > 0.01
    assert worse["kernel_distance"].value > 0
    better = figures.worse_by(theirs, ours, draws, 120, 0.0)
    assert better["kernel_distance"].value == -worse["kernel_distance"].value
    assert found["frechet_distance"].n == 60 and found["kernel_distance"].n == 120


def test_a_kernel_distance_near_0_is_compared_with_the_floor(arms):
    real, good, bad = arms
    draws = figures.Bootstrap.over(MANY, 200, 0.9, 0)
    ours, theirs = (figures.statistics(real, arm, MANY) for arm in (bad, good))
    worse = figures.worse_by(ours, theirs, draws, 120, 1e6)["kernel_distance"]
    assert worse.relative.value == pytest.approx(worse.value / 1e6)


def test_parts_by_similarity_cover_all_groups_and_their_savings_make_the_whole(arms):
    real, good, _ = arms
    draws = figures.Bootstrap.over(MANY, 200, 0.9, 0)
    measured = {"sage": figures.statistics(real, good, MANY)}
    parts = figures.by_similarity(measured, MANY, 5 * [0.7, 0.9, 1.0, 0.8, 1.0, 0.75], draws, 2, 0.2)
    assert [part.part for part in parts] == ["single prompts", "loosest third", "middle third", "tightest third"]
    assert sum(part.groups for part in parts) == 30
    assert sum(part.prompts for part in parts) == 60
    assert sum(part.saving * part.prompts for part in parts) / 60 == pytest.approx(0.2)
    assert parts[0].saving == 0 and parts[0].arms["sage"]["group_diversity"].value is None


def test_the_floor_says_how_many_pictures_it_had(arms, random):
    real = arms[0].features
    draws = figures.Bootstrap.over(MANY, 200, 0.9, 0)
    assert figures.floor(real, features(random, 60, 1)[:, 0], MANY, draws)["kernel_distance"].n == 60
    assert figures.floor(real, features(random, 45, 1)[:, 0], MANY, draws)["frechet_distance"].n == 45


def without_interval(figure):
    return figure.value is not None and (figure.low, figure.high) == (None, None)


@pytest.mark.parametrize("groups", [1, LEAST_GROUPS - 1, LEAST_GROUPS])
def test_too_few_groups_have_a_value_and_no_interval(random, groups):
    partition = [[2 * k, 2 * k + 1] for k in range(groups)]
    n, enough = 2 * groups, groups >= LEAST_GROUPS
    real = figures.ImageFeatures(features(random, n, 1), random.uniform(0.7, 0.9, (n, 1)))
    arms = [figures.ImageFeatures(features(random, n), random.uniform(0.5, 0.7, (n, 2))) for _ in range(2)]
    draws = figures.Bootstrap.over(partition, 100, 0.9, 0)
    ours, theirs = (figures.statistics(real, arm, partition) for arm in arms)
    found = [
        *figures.arm_figures(ours, arms[0], draws).values(),
        *figures.real_figures(real, partition, draws).values(),
        *figures.floor(real.features, features(random, n, 1)[:, 0], partition, draws).values(),
    ]
    for difference in figures.worse_by(ours, theirs, draws, 2 * n, 0.0).values():
        found += [difference, difference.relative]
    assert [without_interval(figure) for figure in found] == [not enough] * len(found)


def test_a_part_of_too_few_groups_and_groups_with_nothing_to_measure_have_no_interval(arms):
    real, good, _ = arms
    draws = figures.Bootstrap.over(MANY, 200, 0.9, 0)
    measured = {"sage": figures.statistics(real, good, MANY)}
    parts = figures.by_similarity(measured, MANY, 5 * [0.7, 0.9, 1.0, 0.8, 1.0, 0.75], draws, 2, 0.2)
    assert all(part.groups < LEAST_GROUPS and without_interval(part.arms["sage"]["alignment"]) for part in parts)
    # Of thirty groups one has two prompts: only in that one can images of a group differ.
    partition = [[0, 1], *[[k] for k in range(2, 31)]]
    one = figures.ImageFeatures(good.features[:31], good.alignment[:31])
    statistics = figures.statistics(figures.ImageFeatures(real.features[:31], real.alignment[:31]), one, partition)
    found = figures.arm_figures(statistics, one, figures.Bootstrap.over(partition, 200, 0.9, 0))
    assert without_interval(found["group_diversity"]) and not without_interval(found["alignment"])
