"""Near-duplicates: what looks alike is in one cluster, however it was saved, and never in two splits."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded
from PIL import Image, ImageEnhance

from sage.data.accounting import ACCOUNTING
from sage.data.dataset import SPLITS, read_split
from sage.data.duplicates import first_alike, perceptual_hash
from sage.data.imagefolder import read_folder
from sage.data.preparation import prepare


def scene(seed: int) -> Image.Image:
    """Return soft random colours of 96x64 pixels, as of a photograph out of focus."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((96, 64), Image.Resampling.BICUBIC)


def changed(image: Image.Image, how: int) -> Image.Image:
    jpeg = Image.open(BytesIO(encoded(image, "JPEG", quality=30)))
    return [image, jpeg, ImageEnhance.Brightness(image).enhance(0.8), image.resize((60, 40)), image.convert("L")][how]


def test_scenes_saved_in_other_ways_are_alike_and_other_scenes_are_not() -> None:
    hashes = [perceptual_hash(changed(scene(seed), how)) for seed in range(30) for how in range(5)]
    assert first_alike(hashes, 6) == [5 * seed for seed in range(30) for _ in range(5)]


@pytest.mark.parametrize("distance", [0, 1, 5, 16])
def test_clusters_are_those_of_all_pairs(distance: int) -> None:
    random = np.random.default_rng(distance)
    base = random.integers(0, 2**63, 40, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in random.choice(64, random.integers(0, 12), replace=False)) for _ in range(200)]
    hashes = [int(base[number % 40]) ^ flip for number, flip in enumerate(flips)]
    expected = list(range(len(hashes)))
    for _ in range(len(hashes)):  # labels spread over the links until nothing changes
        before = list(expected)
        for one, own in enumerate(hashes):
            near = [other for other, value in enumerate(hashes) if (own ^ value).bit_count() <= distance]
            expected[one] = min(expected[other] for other in near)
        if expected == before:
            break
    assert first_alike(hashes, distance) == expected


@pytest.mark.parametrize("near_duplicate", [6, None])
def test_a_scene_is_in_one_split(tmp_path: Path, near_duplicate: int | None) -> None:
    for seed in range(40):
        for how in range(3):
            name = tmp_path / "raw" / f"{seed:02}-{how}.png"
            name.parent.mkdir(exist_ok=True)
            changed(scene(seed), how).save(name)
            name.with_suffix(".txt").write_text(f"scene {seed} again {how}")
    settings = {"size": 32, "resize": "pad", "validation": 0.2, "test": 0.2, "seed": 0}
    prepare(read_folder(tmp_path / "raw"), tmp_path / "out", near_duplicate=near_duplicate, **settings)
    found = {split: {one.text.split()[1] for one in read_split(tmp_path / "out", split)} for split in SPLITS}
    both = found["train"] & (found["validation"] | found["test"])
    assert bool(both) == (near_duplicate is None)
    if near_duplicate:
        assert {split: len(scenes) for split, scenes in found.items()} == {"train": 24, "validation": 8, "test": 8}


def test_a_scene_that_the_user_put_into_two_splits_stays_in_the_held_out_one(tmp_path: Path) -> None:
    for split, seeds, how in (("train", range(6), 0), ("validation", range(6, 8), 0), ("test", range(5, 7), 1)):
        for seed in seeds:
            name = tmp_path / "raw" / split / f"{seed}.png"
            name.parent.mkdir(parents=True, exist_ok=True)
            changed(scene(seed), how).save(name)
            name.with_suffix(".txt").write_text(f"scene {seed} of {split}")
    settings = {"size": 32, "resize": "pad", "validation": 0.2, "test": 0.2, "seed": 0}
    found = prepare(read_folder(tmp_path / "raw"), tmp_path / "out", near_duplicate=6, **settings)
    entries = map(json.loads, (tmp_path / "out" / ACCOUNTING).read_text().splitlines())
    rejected = {entry["file"]: entry["reason"] for entry in entries if entry["status"] == "rejected"}
    assert rejected == dict.fromkeys(["train/5.png", "validation/6.png"], "split_overlap")
    assert found["splits"] == {"train": 5, "validation": 1, "test": 2}
