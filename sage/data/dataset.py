"""Captioned pictures as the stages share them: one ImageFolder (Hugging Face's form) a split.

A prepared folder also holds `accounting.jsonl`, a line for every input row, and SHA256SUMS, for `sha256sum --check`;
sage.data.preparation writes them all.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sage.errors import DataError
from sage.files import sha256

SUMS = "SHA256SUMS"
SPLITS = ("train", "validation", "test")
SMALL_FAMILY = 4  # pictures; of a family with fewer, none is held out


@dataclass(frozen=True)
class Example:
    """One prepared picture with its caption; `other_texts` are further captions, which only training may see."""

    id: str
    path: Path
    text: str
    family: str
    other_texts: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All captions."""
        return self.text, *self.other_texts


def assign_splits(
    families: Sequence[str | None], pictures: Sequence[str], validation: float, test: float, seed: int
) -> list[str]:
    """Return the split of each row, holding out some members of a family and never a whole one.

    Rows with the same picture go together, so that nothing held out was seen in training. Members of a family of four
    or more are held out by a seeded hash; without families, rows are drawn from the whole set as from one family.
    `pictures` are pixel hashes; `validation` and `test` are shares of a family's pictures.
    """
    families_of: dict[str, set[str]] = defaultdict(set)
    for family, picture in zip(families, pictures, strict=True):
        families_of[picture].add(family or "")
    members: dict[str, list[str]] = defaultdict(list)
    for picture, names in families_of.items():
        # A picture of several families is trained on: drawn for one of them, it could be all that another has.
        if len(names) == 1:
            members[min(names)].append(picture)
    split_of = dict.fromkeys(families_of, "train")
    for group in members.values():
        if len(group) < SMALL_FAMILY:
            continue
        order = sorted(group, key=lambda picture: hashlib.sha256(f"{seed}:{picture}".encode()).digest())
        n_test, n_validation = (math.floor(share * len(order) + 0.5) for share in (test, validation))
        # Rounding up both shares must not take the last member from training.
        held_out = ["test"] * n_test + ["validation"] * n_validation
        split_of |= dict(zip(order[:-1], held_out, strict=False))
    return [split_of[picture] for picture in pictures]


def write_sums(folder: Path) -> None:
    """Write the hash of every file of a prepared folder into it."""
    lines = (f"{found}  {name}\n" for name, found in _sums(folder).items())
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Raise DataError where a prepared folder's files are not those that were written; it names the first."""
    if not (folder / SUMS).is_file():
        raise DataError(f"{folder / SUMS} does not exist. Run `dvc repro prepare`.")
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    wanted, found = {line[66:]: line[:64] for line in lines}, _sums(folder)
    if wrong := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
        raise DataError(
            f"{folder} is damaged: {len(wrong)} files are not as they were prepared, first {wrong[0]}. Run "
            "`dvc repro --force prepare`."
        )


def _sums(folder: Path) -> dict[str, str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: sha256(folder / name) for name in names if name != SUMS}


def read_split(folder: Path, split: str) -> list[Example]:
    """Return the examples of one split of a prepared folder, in its order.

    Raises DataError where the folder is not prepared.
    """
    metadata = folder / split / "metadata.jsonl"
    if not metadata.is_file():
        raise DataError(f"{metadata} does not exist. Run `dvc repro prepare`.")
    # Not splitlines: it also ends lines where Unicode does and JSON does not.
    lines = metadata.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [_example(folder / split, json.loads(line)) for line in lines]


def _example(folder: Path, row: dict[str, Any]) -> Example:
    others = tuple(row.get("other_texts", ()))
    return Example(row["id"], folder / row["file_name"], row["text"], row["family"], others)


def captions_of(texts: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """Return all different captions, and which of them are each picture's, of shape (n, k): few are repeated."""
    different = list(dict.fromkeys(text for own in texts for text in own))
    place = {text: number for number, text in enumerate(different)}
    most = max(map(len, texts), default=0)
    rows = [[place[own[k % len(own)]] for k in range(most)] for own in texts]
    return different, np.array(rows, np.int64).reshape(len(texts), most)


def load_pixels(examples: Sequence[Example]) -> np.ndarray:
    """Return the pictures as uint8 of shape (n, height, width, 3)."""
    return np.stack([np.asarray(Image.open(example.path).convert("RGB")) for example in examples])
