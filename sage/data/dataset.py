"""The prepared dataset, which all stages read: captioned images, a folder of Parquet shards for each split.

A prepared folder also holds `accounting.jsonl`, one line per input row, and SHA256SUMS, for `sha256sum --check`.
`sage.data.preparation` writes it; `sage.data.shards` describes the shards.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sage.data.buckets import Size, named
from sage.data.shards import StoredImage, read_rows, rgb
from sage.errors import DataError
from sage.files import sha256

SUMS = "SHA256SUMS"
SPLITS = ("train", "validation", "test")
SMALL_FAMILY = 4  # images; a family with fewer is used for training only


@dataclass(frozen=True)
class Example:
    """One prepared image with its caption. Its pixels stay in the shard until `image` is read.

    `other_texts` are further captions, used in training only; `asked` are the attributes that `text` asks for, if they
    are known, with their words.
    """

    id: str
    image: StoredImage
    text: str
    family: str
    other_texts: tuple[str, ...] = ()
    asked: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def texts(self) -> tuple[str, ...]:
        """All captions of the image, `text` first."""
        return self.text, *self.other_texts


def assign_splits(
    families: Sequence[str | None], images: Sequence[str], validation: float, test: float, seed: int
) -> list[str]:
    """Return the split of each row; some images of each family are held out, never all of them.

    families    family of each row (variants of one subject), or None; rows without a family count as one family
    images    pixel hash of each row; equal hashes get the same split, so that no held-out image is trained on
    validation  fraction of each family held out for validation
    test        fraction of each family held out for test
    seed        seed of the hash that decides which images are held out

    Families of fewer than SMALL_FAMILY images, and images that belong to several families, are not held out.
    """
    families_of: dict[str, set[str]] = defaultdict(set)
    for family, image in zip(families, images, strict=True):
        families_of[image].add(family or "")
    members: dict[str, list[str]] = defaultdict(list)
    for image, names in families_of.items():
        # An image of several families stays in training: held out for one, it could be the last image of another.
        if len(names) == 1:
            members[min(names)].append(image)
    split_of = dict.fromkeys(families_of, "train")
    for group in members.values():
        if len(group) < SMALL_FAMILY:
            continue
        order = sorted(group, key=lambda image: hashlib.sha256(f"{seed}:{image}".encode()).digest())
        n_test, n_validation = (math.floor(share * len(order) + 0.5) for share in (test, validation))
        # Rounding both up must not hold out the last image of a family.
        held_out = ["test"] * n_test + ["validation"] * n_validation
        split_of |= dict(zip(order[:-1], held_out, strict=False))
    return [split_of[image] for image in images]


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS, the hashes of all files in a prepared folder, into that folder."""
    lines = (f"{found}  {name}\n" for name, found in _sums(folder).items())
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Raise DataError, naming the first file, if files of a prepared folder changed, are missing or were added."""
    if not (folder / SUMS).is_file():
        raise DataError(f"{folder / SUMS} does not exist. Run `dvc repro prepare`.")
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    wanted, found = {line[66:]: line[:64] for line in lines}, _sums(folder)
    if wrong := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
        raise DataError(
            f"{folder} is damaged: {len(wrong)} files changed, are missing or were added since it was prepared, first "
            f"{wrong[0]}. Run `dvc repro --force prepare`."
        )


def _sums(folder: Path) -> dict[str, str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: sha256(folder / name) for name in names if name != SUMS}


def read_split(folder: Path, split: str) -> list[Example]:
    """Return the examples of one split of a prepared folder, in the order of its shards; no pixels are read.

    Raises DataError if the split has no shards, or one is damaged.
    """
    return [_example(image, row) for image, row in read_rows(folder / split)]


def _example(image: StoredImage, row: dict[str, Any]) -> Example:
    asked = {one["name"]: one["words"] for one in row["attributes"] if one["asked"]}
    return Example(row["id"], image, row["text"], row["family"], tuple(row["other_texts"]), asked)


def captions_of(texts: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """Return the distinct captions, and each image's captions as indices into them, shape (n, k).

    k is the largest number of captions of an image; an image with fewer repeats its captions in turn.
    """
    different = list(dict.fromkeys(text for own in texts for text in own))
    index = {text: number for number, text in enumerate(different)}
    most = max(map(len, texts), default=0)
    rows = [[index[own[k % len(own)]] for k in range(most)] for own in texts]
    return different, np.array(rows, np.int64).reshape(len(texts), most)


def in_buckets(examples: Sequence[Example]) -> list[list[int]]:
    """Return the places of the examples of each aspect-ratio bucket, in order; without buckets all are in one."""
    places: dict[Size | None, list[int]] = {}
    for place, example in enumerate(examples):
        places.setdefault(example.image.bucket, []).append(place)
    return [places[bucket] for bucket in sorted(places, key=lambda bucket: bucket or (0, 0))]


def load_pixels(examples: Sequence[Example]) -> np.ndarray:
    """Return the images as uint8 RGB of shape (n, height, width, 3); raise DataError if they differ in size."""
    images = [np.asarray(rgb(example.image)) for example in examples]
    if len(sizes := sorted({image.shape[:2] for image in images})) > 1:
        found = ", ".join(map(named, sizes))
        raise DataError(
            f"the prepared images have {len(sizes)} sizes ({found}), and this needs one; set prepare.buckets to null"
        )
    return np.stack(images)
