"""Shards: what is written is read, in order, in few files and small row groups, and damage is never read."""

import tracemalloc
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from sage.data import shards
from sage.data.shards import StoredImage, read_rows, rgb, write_shards
from sage.errors import DataError
from sage.files import sha256_tree


def row(number: int, size: int = 100) -> dict[str, Any]:
    return {"id": f"id-{number}", "text": f"text {number}", "image": Random(number).randbytes(size)}


def groups(folder: Path) -> list[list[int]]:
    """Return the number of rows of each row group of each shard."""
    found = []
    for path in sorted(folder.iterdir()):
        metadata = pyarrow.parquet.read_metadata(path)
        found.append([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
    return found


def test_every_column_comes_back_in_order_over_shards_and_groups(tmp_path: Path) -> None:
    attributes = [
        {"name": "hat", "words": "a red hat", "asked": True},
        {"name": "nose", "words": "none", "asked": False},
    ]
    rows = [row(number) for number in range(2 * shards.SHARD_ROWS + 3)]
    rows[7] |= {"text": "one\u2028two", "other_texts": ["drei", ""], "family": "x", "attributes": attributes}
    write_shards(tmp_path / "train", iter(rows))
    assert groups(tmp_path / "train") == [[100] * 10, [100] * 10, [3]]
    nothing = {"other_texts": [], "family": "", "attributes": []}
    found = list(read_rows(tmp_path / "train"))
    assert [image.read() for image, _ in found] == [row["image"] for row in rows]
    assert [columns for _, columns in found] == [
        {k: v for k, v in (nothing | row).items() if k != "image"} for row in rows
    ]


def test_large_images_give_small_groups_and_small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "GROUP_BYTES", 1000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 2500)
    # One larger than a group, and one larger than a shard, are still written.
    sizes = [400, 400, 400, 400, 1200, 3000, 100, 100]
    write_shards(tmp_path / "train", (row(number, size) for number, size in enumerate(sizes)))
    assert groups(tmp_path / "train") == [[2, 2], [1], [1], [2]]
    assert [len(image.read()) for image, _ in read_rows(tmp_path / "train")] == sizes


def test_a_shard_has_images_of_one_bucket_and_names_it(tmp_path: Path) -> None:
    places = [(64, 64)] * 3 + [(48, 80)] * 150 + [(80, 48)]
    write_shards(tmp_path / "train", (row(number) | {"bucket": place} for number, place in enumerate(places)))
    assert groups(tmp_path / "train") == [[3], [100, 50], [1]]
    found = list(read_rows(tmp_path / "train"))
    assert [image.bucket for image, _ in found] == places
    assert [image.read() for image, _ in found] == [row(number)["image"] for number in range(len(places))]
    # Without buckets nothing is named.
    write_shards(tmp_path / "plain", [row(0)])
    assert [image.bucket for image, _ in read_rows(tmp_path / "plain")] == [None]
    assert b"bucket" not in pyarrow.parquet.read_schema(tmp_path / "plain/00000.parquet").metadata


@pytest.fixture
def threads() -> Iterator[int]:
    before = pyarrow.cpu_count()
    yield before
    pyarrow.set_cpu_count(before)


def test_the_same_rows_give_the_same_bytes_with_any_number_of_threads(tmp_path: Path, threads: int) -> None:
    for count in (1, 8):
        pyarrow.set_cpu_count(count)
        write_shards(tmp_path / str(count), map(row, range(350)))
    assert sha256_tree(tmp_path / "1") == sha256_tree(tmp_path / "8")


def test_captions_are_read_without_the_images_and_images_a_group_at_a_time(tmp_path: Path) -> None:
    size, count = 100_000, 200
    write_shards(tmp_path / "train", (row(number, size) for number in range(count)))

    def peak(read: Any) -> int:
        tracemalloc.start()
        before = pyarrow.total_allocated_bytes()
        largest = max(pyarrow.total_allocated_bytes() - before for _ in read())
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return largest + python

    assert peak(lambda: read_rows(tmp_path / "train")) < 1_000_000
    # Of 20 MB: two groups of 4 MB are kept, and one is being read.
    assert peak(lambda: (image.read() for image, _ in read_rows(tmp_path / "train"))) < 4 * shards.GROUP_BYTES


def test_a_shard_written_anew_is_read_anew(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / "train"
        write_shards(tmp_path / f"next-{number}", [row(number)])
        folder.mkdir(exist_ok=True)
        (tmp_path / f"next-{number}/00000.parquet").replace(folder / "00000.parquet")
        assert StoredImage(folder / "00000.parquet", 0, 0).read() == row(number)["image"]


@pytest.mark.parametrize("fault", ["caption", "pixels", "cut off", "other columns", "no shards"])
def test_what_is_damaged_is_named_and_never_read(tmp_path: Path, fault: str) -> None:
    write_shards(tmp_path / "train", map(row, range(5)))
    shard = tmp_path / "train/00000.parquet"
    content = shard.read_bytes()
    column = pyarrow.parquet.read_metadata(shard).row_group(0).column({"caption": 3}.get(fault, 0))
    match fault:
        case "caption" | "pixels":
            # In the middle of the page: random bytes are stored as they are, so that only its checksum tells.
            middle = column.data_page_offset + column.total_compressed_size // 2
            shard.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        case "cut off":
            shard.write_bytes(content[:-20])
        case "other columns":
            pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), shard)
        case "no shards":
            shard.rename(shard.with_suffix(".other"))
            shard = shard.parent
    with pytest.raises(DataError, match=rf"{shard} .*Run `dvc repro") as error:
        [image.read() for image, _ in read_rows(tmp_path / "train")]
    assert ("['text'], expected ['image'" in str(error.value)) == (fault == "other columns")


def test_an_image_of_a_shard_and_one_of_a_file_are_opened_alike(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    write_shards(tmp_path / "train", [{"id": "a", "text": "a", "image": file.getvalue()}])
    stored = next(read_rows(tmp_path / "train"))[0]
    for source in (stored, tmp_path / "a.png"):
        assert np.array_equal(np.asarray(rgb(source)), pixels)
