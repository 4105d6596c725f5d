from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from prepared_files import write_split

from sage.data.dataset import SMALL_FAMILY, SPLITS, assign_splits, in_buckets, load_pixels, read_split
from sage.errors import DataError

# Few names and pictures, so that families share pictures and pictures repeat.
rows = st.lists(st.tuples(st.sampled_from([None, "", "a", "b", "c"]), st.integers(0, 30).map(str)), max_size=80)
shares = st.floats(0.01, 0.49)
seeds = st.integers(0, 2**31 - 1)


def split(pairs: list[tuple[str | None, str]], validation: float, test: float, seed: int) -> list[str]:
    return assign_splits([family for family, _ in pairs], [image for _, image in pairs], validation, test, seed)


@given(rows, shares, shares, seeds)
def test_every_row_has_one_split_and_a_picture_never_two(
    pairs: list[tuple[str | None, str]], validation: float, test: float, seed: int
) -> None:
    found = split(pairs, validation, test, seed)
    assert len(found) == len(pairs)
    assert set(found) <= set(SPLITS)
    of_image = defaultdict(set)
    for (_, image), place in zip(pairs, found, strict=True):
        of_image[image].add(place)
    assert all(len(places) == 1 for places in of_image.values())


@given(rows, shares, shares, seeds)
def test_no_family_is_held_out_whole(
    pairs: list[tuple[str | None, str]], validation: float, test: float, seed: int
) -> None:
    splits, images = defaultdict(set), defaultdict(set)
    for (family, image), place in zip(pairs, split(pairs, validation, test, seed), strict=True):
        splits[family or ""].add(place)
        images[family or ""].add(image)
    for family, found in splits.items():
        assert "train" in found
        assert len(images[family]) >= SMALL_FAMILY or found == {"train"}


@given(rows, shares, shares, seeds, st.randoms())
def test_the_order_of_the_rows_does_not_matter(
    pairs: list[tuple[str | None, str]], validation: float, test: float, seed: int, random
) -> None:
    expected = dict(zip(pairs, split(pairs, validation, test, seed), strict=True))
    random.shuffle(pairs)
    assert dict(zip(pairs, split(pairs, validation, test, seed), strict=True)) == expected


@given(st.integers(4, 200), shares, shares, seeds)
def test_the_shares_are_kept(n: int, validation: float, test: float, seed: int) -> None:
    found = split([("a", str(image)) for image in range(n)], validation, test, seed)
    assert abs(found.count("test") - test * n) <= 0.5
    assert -1.5 <= found.count("validation") - validation * n <= 0.5  # one less where training would have none


def test_the_seed_decides_who_is_held_out() -> None:
    pairs = [("a", str(image)) for image in range(100)]
    draws = {tuple(split(pairs, 0.1, 0.2, seed)) for seed in range(20)}
    assert len(draws) == 20


def test_without_families_rows_are_drawn_from_the_whole_set() -> None:
    found = split([(None, str(image)) for image in range(10)], 0.1, 0.2, 0)
    assert [found.count(name) for name in SPLITS] == [7, 1, 2]


def test_a_family_is_not_drawn_by_what_is_in_others() -> None:
    pairs = [("a", str(image)) for image in range(10)]
    others = [("b", str(image)) for image in range(10, 30)]
    assert split(pairs + others, 0.1, 0.2, 0)[:10] == split(pairs, 0.1, 0.2, 0)


def test_a_split_is_read_in_its_order(tmp_path: Path) -> None:
    rows = (("b", "zwei"), ("a", "one\u2028two"))
    images = (Image.new("RGB", (8, 4), (place, 1, 2)) for place in range(2))
    both = zip(rows, images, strict=True)
    write_split(tmp_path / "train", ({"id": id, "text": text, "image": image} for (id, text), image in both))
    examples = read_split(tmp_path, "train")
    assert [(example.id, example.text) for example in examples] == [("b", "zwei"), ("a", "one\u2028two")]
    pixels = load_pixels(examples)
    assert (pixels.shape, pixels.dtype) == ((2, 4, 8, 3), np.uint8)
    assert pixels[:, 0, 0].tolist() == [[0, 1, 2], [1, 1, 2]]


def test_examples_lie_in_buckets_and_pixels_of_two_sizes_are_refused(tmp_path: Path) -> None:
    sizes = [(16, 24)] * 2 + [(24, 16)]
    rows = (
        {"id": f"{n}", "text": "t", "image": Image.new("RGB", size[::-1]), "bucket": size}
        for n, size in enumerate(sizes)
    )
    write_split(tmp_path / "train", rows)
    examples = read_split(tmp_path, "train")
    assert in_buckets(examples) == [[0, 1], [2]]
    assert in_buckets(examples[::-1]) == [[1, 2], [0]]
    assert load_pixels(examples[:2]).shape == (2, 16, 24, 3)
    with pytest.raises(DataError, match=r"have 2 sizes \(24x16, 16x24\).*set prepare.buckets to null"):
        load_pixels(examples)
    write_split(tmp_path / "test", [{"id": "a", "text": "t"}, {"id": "b", "text": "u"}])
    assert in_buckets(read_split(tmp_path, "test")) == [[0, 1]]


def test_a_folder_that_is_not_prepared_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dvc repro prepare"):
        read_split(tmp_path, "train")
