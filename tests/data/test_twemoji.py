import hashlib
import json
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from sage.config import load_params
from sage.data.captions import clean_caption
from sage.data.dataset import SPLITS, assign_splits
from sage.data.images import compose, pixel_hash
from sage.data.rows import Row
from sage.data.twemoji import CAPTIONS, captions, family, rows


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return rows()


def test_every_named_picture_is_a_row(found: list[Row]) -> None:
    assert len(found) == 3953
    assert len({row.id for row in found}) == len({row.text for row in found}) == 3953
    assert [row.id for row in found] == [row.path.stem for row in found]
    assert all(clean_caption(row.text) == row.text for row in found)


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("woman pilot: dark skin tone", "pilot: "),
        ("man pilot", "pilot"),
        ("woman: curly hair", ":"),
        ("Mrs. Claus: light skin tone", "claus:"),
        ("person walking facing right", "walking"),
        ("man", "person"),
        ("woman", "person"),
        ("mermaid", "mermaid"),  # not a variant of "mer"
    ],
)
def test_a_family_is_what_variants_share(caption: str, kept: str) -> None:
    assert family(caption) == kept.strip()


def test_captions_keep_some_words_in_order_and_one_at_least() -> None:
    name = "man mechanic medium-dark skin tone"
    parts = ["man", "mechanic", "medium-dark skin tone"]
    drawn = {caption for number in range(50) for caption in captions(name, str(number), 0.5)}
    assert drawn == {" ".join(parts[i] for i in range(3) if kept >> i & 1) for kept in range(1, 8)}
    assert captions(name, "0", 0.5) == captions(name, "0", 0.5) != captions(name, "1", 0.5)
    assert captions(name, "0", 1.0) == (name,)
    assert captions("Vietnam", "0", 0.01) == ("Vietnam",)
    own = captions(name, "0", 0.5)
    assert len(set(own)) == len(own) <= CAPTIONS


def test_a_family_is_of_the_whole_name_whatever_the_caption_keeps(found: list[Row]) -> None:
    shortened = rows(0.5)
    assert [row.family for row in shortened] == [row.family for row in found]
    kept = np.mean([len(short.text) / len(row.text) for short, row in zip(shortened, found, strict=True)])
    assert 0.5 < kept < 0.7
    assert all(clean_caption(text) == text for row in shortened for text in (row.text, *row.other_texts))


@pytest.mark.slow
def test_the_shipped_models_held_out_pictures_stay_held_out(found: list[Row]) -> None:
    """`models/base` was trained on this very train split: another one would judge it on what it has seen."""
    params = load_params().prepare
    assert (params.image_size, params.validation, params.test, params.seed) == (64, 0.1, 0.2, 0)
    hashes = []
    for row in found:
        with Image.open(row.path) as image:
            hashes.append(pixel_hash(compose(image, (params.image_size,) * 2, params.resize)))
    splits = assign_splits([row.family for row in found], hashes, params.validation, params.test, params.seed)
    ids = defaultdict(list)
    for row, split in zip(found, splits, strict=True):
        ids[split].append(row.id)
    assert [len(ids[split]) for split in SPLITS] == [3192, 279, 482]
    digest = hashlib.sha256(json.dumps([ids[split] for split in SPLITS]).encode()).hexdigest()
    assert digest == "3611974e241069669ad0eadf94160e1bb768512b4f917d59a7a9da80a268e639"
