"""What sharing costs: the figure itself on pictures whose damage is known, and its file."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sage.errors import ConfigurationError, DataError
from sage.evaluation.bootstrap import LEAST_GROUPS
from sage.evaluation.damage import by_similarity, distances
from sage.grouping.cost import FILE, Damage, Point, kept_at, kept_form, read_damage
from sage.grouping.policy import Policy


def images(n=400, seeds=2, width=64, seed=0, centre=None):
    """Features of pictures of n prompts: a middle for each prompt, and another draw around it for each seed."""
    random = np.random.default_rng(seed)
    centre = np.random.default_rng(99).normal(size=(n, 1, width)) if centre is None else centre
    return centre + random.normal(size=(n, seeds, width)), centre


def damage_of(shared, independent):
    above, below = distances(shared, independent)
    return above.sum() / below.sum() - 1


def test_other_draws_of_the_same_prompts_are_no_damage_and_moved_ones_are():
    independent, centre = images()
    again, _ = images(seed=1, centre=centre)
    moved, _ = images(seed=1, centre=centre + 2 / np.sqrt(64))
    assert damage_of(independent, independent) == 0
    assert damage_of(again, independent) == pytest.approx(0, abs=0.01)
    # A distance of 2 beside one of sqrt(2 * 64) between draws: sqrt(1 + 4 / 128) - 1.
    assert damage_of(moved, independent) == pytest.approx(np.sqrt(1 + 4 / 128) - 1, abs=0.01)


def test_damage_is_found_where_it_is_and_the_interval_holds_it():
    independent, centre = images(n=600)
    similarity = np.linspace(0.4, 1, 300)
    off = np.repeat(np.where(similarity < 0.7, 3.0, 0.0), 2)[:, None, None] / np.sqrt(64)
    shared, _ = images(n=600, seed=1, centre=centre + off)
    above, below = (side.reshape(300, 2).sum(1) for side in distances(shared, independent))
    order = np.random.default_rng(0).permutation(300)
    points = by_similarity(similarity[order], above[order], below[order], np.full(300, 2), parts=4)
    assert [point.groups for point in points] == [75] * 4 and sum(point.prompts for point in points) == 600
    expected = np.sqrt(1 + 9 / 128) - 1
    for point, true in zip(points, (expected, expected, 0, 0), strict=True):
        assert point.low < point.damage < point.high
        assert point.low - 0.005 < true < point.high + 0.005
    measured = Damage(0.4, 6, points)
    assert points[1].similarity < measured.threshold(0.025) < points[2].similarity
    assert measured.threshold(0.2) == pytest.approx(points[0].similarity)
    with pytest.raises(ConfigurationError, match="least measured"):
        measured.threshold(-0.5)


def test_parts_of_too_few_groups_are_refused():
    ones = np.ones(4 * LEAST_GROUPS - 1)
    with pytest.raises(DataError, match=f"{len(ones)} groups in 4 parts .* an interval needs at least {LEAST_GROUPS}"):
        by_similarity(ones, ones, ones, 2 * ones, parts=4)


def test_one_seed_measures_nothing():
    one, _ = images(n=3, seeds=1)
    with pytest.raises(DataError, match="at least 2"):
        distances(one, one)


def test_the_file_travels_with_the_weights_and_is_refused_beside_others(tmp_path):
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "unet" / "weights").write_bytes(b"1")
    points = [Point(0.51236, 0.2, 0.1, 0.3, 9, 20), Point(0.9, 0.05, 0.0, 0.1, 9, 20)]
    (model / FILE).write_text(json.dumps(kept_form(Damage(0.4, 6, points), model, {"steps": 10})))
    (model / "README.md").write_text("says nothing of the weights")
    found = read_damage(model, 0.4, 6)
    assert found.points == [replace(points[0], similarity=0.5124), points[1]]
    assert read_damage(model.rename(tmp_path / "elsewhere"), 0.3, 4) == found
    model = tmp_path / "elsewhere"
    for share_ratio, max_size in ((0.5, 6), (0.4, 7)):
        with pytest.raises(ConfigurationError, match="was measured at share ratio"):
            read_damage(model, share_ratio, max_size)
    (model / "unet" / "weights").write_bytes(b"2")
    with pytest.raises(ConfigurationError, match="other weights"):
        read_damage(model, 0.4, 6)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"share_ratio": 0.4}', '{"share_ratio": 1, "max_size": 6, "points": [{}]}']
)
def test_a_damaged_measurement_is_named(content, tmp_path):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ConfigurationError, match=r"damage\.json is damaged.*Run `sage calibrate`"):
        read_damage(tmp_path, 0.4, 6)


@pytest.mark.parametrize("name", ["my.model.safetensors", f"hub/owner/name-3.5@{'a' * 40}"])
def test_the_damage_of_a_file_or_pin_lies_beside_it(name, tmp_path):
    model = tmp_path / name
    model.parent.mkdir(parents=True, exist_ok=True)
    model.write_bytes(b"1")
    damage = Damage(0.4, 6, [Point(0.5, 0.2, 0.1, 0.3, 9, 20), Point(0.9, 0.05, 0.0, 0.1, 9, 20)])
    policy = Policy(6, 0.999, max_damage=0.3)
    with pytest.raises(ConfigurationError, match=r"damage.json does not exist, so the damage of sharing is unknown"):
        policy.choose_threshold(np.zeros((0, 0)), 0.4, model)
    path = kept_at(model)
    path.write_text(json.dumps(kept_form(damage, model, {})))
    assert path == tmp_path / f"{name}.damage.json"
    assert policy.choose_threshold(np.zeros((0, 0)), 0.4, model) == 0.5
    model.write_bytes(b"2")
    with pytest.raises(ConfigurationError, match="other weights"):
        read_damage(model, 0.4, 6)
    model.unlink()
    with pytest.raises(ConfigurationError, match="is no folder, file or pin here"):
        policy.choose_threshold(np.zeros((0, 0)), 0.4, model)
