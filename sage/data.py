"""Image folders with captions: read, check, split, write, iterate.

The form is Hugging Face's ImageFolder: pictures beside a `metadata.jsonl` whose lines have `file_name` and `text`.
A prepared folder holds one ImageFolder per split and `accounting.jsonl`, one line for every input row.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Row:
    """One input picture with its caption, not yet checked; rows of one family are variants of each other."""

    id: str
    path: Path
    text: str
    family: str | None = None


@dataclass(frozen=True)
class Example:
    """One prepared picture."""

    id: str
    path: Path
    text: str
    family: str


def compose(picture: Image.Image, size: int) -> Image.Image:
    """Return the picture over white as RGB, its larger side scaled to `size`, centred on a white square."""
    rgba = picture.convert("RGBA")
    rgba.thumbnail((size, size), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(rgba, ((size - rgba.width) // 2, (size - rgba.height) // 2))
    return square.convert("RGB")


def pixel_hash(picture: Image.Image) -> str:
    """Return the SHA-256 of the pixels, the same whatever file they came from."""
    return hashlib.sha256(np.asarray(picture.convert("RGB")).tobytes()).hexdigest()


def assign_splits(
    families: Sequence[str | None], pictures: Sequence[str], validation: float, test: float, seed: int
) -> list[str]:
    """Return the split of each row, holding out some members of a family and never a whole one.

    Rows with the same picture go together, so that nothing held out was seen in training. Members of a family of four
    or more are held out by a seeded hash; without families, rows are drawn from the whole set as from one family.
    `pictures` are pixel hashes; `validation` and `test` are shares of a family's pictures.
    """
    members: dict[str, set[str]] = defaultdict(set)
    family_of: dict[str, str] = {}
    for family, picture in zip(families, pictures, strict=True):
        members[family_of.setdefault(picture, family or "")].add(picture)
    split_of = {}
    for group in members.values():
        order = sorted(group, key=lambda picture: hashlib.sha256(f"{seed}:{picture}".encode()).digest())
        n_test, n_validation = (math.floor(share * len(order) + 0.5) for share in (test, validation))
        if len(order) < 4:
            n_test = n_validation = 0
        for place, picture in enumerate(order):
            held_out = "test" if place < n_test else "validation" if place < n_test + n_validation else "train"
            split_of[picture] = held_out
    return [split_of[picture] for picture in pictures]


def read_split(folder: Path, split: str) -> list[Example]:
    """Return the examples of one split of a prepared folder, in its order."""
    lines = (folder / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = (json.loads(line) for line in lines)
    return [Example(row["id"], folder / split / row["file_name"], row["text"], row["family"]) for row in rows]


def load_pixels(examples: Sequence[Example]) -> np.ndarray:
    """Return the pictures as uint8 of shape (n, height, width, 3)."""
    return np.stack([np.asarray(Image.open(example.path).convert("RGB")) for example in examples])
