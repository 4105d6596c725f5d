"""Aspect-ratio buckets: the sizes that there are, and the one that a picture goes to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.data.buckets import bucket_sizes, cut_off, named, nearest_bucket

sides = st.integers(8, 8000)


def test_the_sizes_at_1024_are_those_that_sdxl_was_trained_on() -> None:
    found = bucket_sizes(1024, 64, 2.0)
    assert found == sorted(
        [
            *[(1024, 1024), (960, 1088), (1088, 960), (896, 1152), (1152, 896)],
            *[(832, 1216), (1216, 832), (768, 1344), (1344, 768)],
        ]
    )


@given(st.integers(1, 12), st.sampled_from([8, 16, 64]), st.floats(1, 8))
def test_every_size_has_its_step_its_area_and_its_shape_and_lies_both_ways(
    times: int, step: int, max_aspect: float
) -> None:
    side = times * step
    found = bucket_sizes(side, step, max_aspect)
    assert (side, side) in found
    assert len(found) == len(set(found))
    for height, width in found:
        assert height % step == width % step == 0
        assert (width, height) in found
        assert max(height, width) <= max_aspect * min(height, width)
        # The largest of its width: one step more is above the area.
        assert height * width <= side * side < (max(height, width) + step) * min(height, width)


@given(sides, sides)
def test_no_bucket_cuts_off_less_than_the_nearest(height: int, width: int) -> None:
    found = bucket_sizes(512, 64, 2.0)
    best = nearest_bucket(found, (height, width))
    assert cut_off((height, width), best) <= min(cut_off((height, width), one) for one in found) + 1e-9


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((480, 640), (448, 576)), ((640, 480), (576, 448)), ((9, 9), (512, 512)), ((100, 700), (384, 640))],
)
def test_a_picture_goes_where_its_shape_is_nearest(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert nearest_bucket(bucket_sizes(512, 64, 2.0), size) == bucket


def test_what_cropping_leaves_out_is_a_fraction_of_the_picture() -> None:
    assert cut_off((480, 640), (64, 64)) == pytest.approx(0.25)
    assert cut_off((640, 480), (64, 64)) == pytest.approx(0.25)
    assert cut_off((300, 400), (3, 4)) == 0
    assert named((480, 640)) == "640x480"
