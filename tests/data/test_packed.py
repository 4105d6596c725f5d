"""Parquet and webdataset tar files as sources: below a folder and at an address, whole and damaged."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from image_files import encoded
from PIL import Image

from sage.data import packed
from sage.data.accounting import ACCOUNTING
from sage.data.dataset import SPLITS, read_split
from sage.data.imagefolder import read_address, read_folder
from sage.data.preparation import prepare
from sage.data.rows import Rejected, Row
from sage.errors import DataError

SETTINGS: dict[str, Any] = {"size": 16, "resize": "pad", "validation": 0.1, "test": 0.2, "seed": 0}


def png(seed: int) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)), "PNG")


def write_table(path: Path, numbers: range, struct: bool = True, rows_of_group: int = 3) -> None:
    images = [{"bytes": png(k), "path": None} if struct else png(k) for k in numbers]
    texts = [[f"caption {k}", f"other {k}"] for k in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"image": images, "caption": texts, "extra": list(numbers)})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_of_group)


def write_tar(path: Path, members: dict[str, bytes], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **more) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def samples(numbers: range) -> dict[str, bytes]:
    found = {}
    for k in numbers:
        found[f"{k:03}.png"] = png(k)
        found[f"{k:03}.json"] = json.dumps({"caption": f"caption {k}", "other_texts": [f"other {k}"]}).encode()
    return found


def read(rows: list[Row]) -> list[tuple[object, bytes]]:
    return [(row.text, row.read(10**9)) for row in rows]


@pytest.mark.parametrize("struct", [True, False])
def test_a_table_with_images_is_read_a_row_group_at_a_time(tmp_path: Path, struct: bool) -> None:
    write_table(tmp_path / "raw/a.parquet", range(8), struct)
    rows = read_folder(tmp_path / "raw")
    assert read(rows) == [(f"caption {k}", png(k)) for k in range(8)]
    assert [row.other_texts for row in rows] == [(f"other {k}",) for k in range(8)]
    assert [row.file for row in rows] == [f"a.parquet:{k}" for k in range(8)]
    assert packed._column.cache_info().currsize == 1


def test_a_tar_file_is_read_as_webdataset_groups_it(tmp_path: Path) -> None:
    members = samples(range(3)) | {
        "sub/x.y.png": b"",
        "b.txt": b"one\ntwo\n",
        "b.cls": b"3",
        "b.seg.png": b"",
        "b.jpg": png(9),
    }
    write_tar(tmp_path / "raw/a.tar", members)
    rows = read_folder(tmp_path / "raw")
    assert read(rows[:3]) == [(f"caption {k}", png(k)) for k in range(3)]
    # `x.y.png` and `b.seg.png` are no images of their own: the suffix begins at the first dot, as in webdataset.
    assert (rows[3].text, rows[3].other_texts, rows[3].read(10**9)) == ("one", ("two",), png(9))
    assert len(rows) == 4 and rows[0].file == "a.tar:000.png"


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_an_address_gives_the_same_rows_as_a_folder(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    write_table(tmp_path / "raw/train-00000-of-00001.parquet", range(12))
    write_tar(tmp_path / "raw/validation-0.tar", samples(range(12, 14)))
    write_tar(tmp_path / "raw/test/0.tar", samples(range(14, 17)))
    memory.put(str(tmp_path / "raw"), "/bucket", recursive=True)
    local = read_folder(tmp_path / "raw")
    for address in ("memory://bucket", "memory://bucket/**"):
        remote = read_address(address)
        assert [(row.id, row.split, row.text, row.file) for row in remote] == [
            (row.id, row.split, row.text, row.file) for row in local
        ]
        assert read(remote) == read(local)
    found = prepare(remote, tmp_path / "out", **SETTINGS)
    assert found["splits"] == {"train": 12, "validation": 2, "test": 3}
    (alone,) = {row.file.partition(":")[0] for row in read_address("memory://bucket/test/0.tar")}
    assert alone == "0.tar"


def test_a_prepared_folder_is_a_source_with_its_split(tmp_path: Path) -> None:
    write_table(tmp_path / "raw/a.parquet", range(20))
    prepare(read_folder(tmp_path / "raw"), tmp_path / "out", **SETTINGS)
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    prepare(read_folder(tmp_path / "again"), tmp_path / "again-out", **SETTINGS)
    for split in SPLITS:
        both = [read_split(tmp_path / name, split) for name in ("out", "again-out")]
        first, second = ([(one.texts, one.image.read()) for one in found] for found in both)
        assert first == second and first


def test_a_row_that_cannot_be_used_has_its_reason_and_spoils_no_other(tmp_path: Path) -> None:
    images = [{"bytes": png(0)}, {"bytes": None}, {"bytes": b"no image"}, {"bytes": png(1)}]
    table = pyarrow.table({"image": images, "text": ["a", "b", "c", None]})
    (tmp_path / "raw").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "raw/a.parquet")
    write_table(tmp_path / "raw/good.parquet", range(10, 30))
    (tmp_path / "raw/link.parquet").symlink_to(tmp_path / "raw/a.parquet")
    prepare(read_folder(tmp_path / "raw"), tmp_path / "out", **SETTINGS)
    entries = [json.loads(line) for line in (tmp_path / "out" / ACCOUNTING).read_text().splitlines()]
    assert {entry["file"]: entry["reason"] for entry in entries if entry["status"] == "rejected"} == {
        "a.parquet:1": "missing_file",
        "a.parquet:2": "decode_error",
        "a.parquet:3": "no_caption",
        "link.parquet": "unsafe_path",
    }


def test_a_member_that_is_cut_off_is_rejected(tmp_path: Path) -> None:
    write_tar(tmp_path / "raw/a.tar", samples(range(2)))
    rows = read_folder(tmp_path / "raw")
    content = (tmp_path / "raw/a.tar").read_bytes()
    (tmp_path / "raw/a.tar").write_bytes(content[: 512 + 20])
    with pytest.raises(Rejected, match="20 of its"):
        rows[0].read(10**9)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.parquet", {"picture": [b"a"], "text": ["a"]}, "a.parquet has the columns picture, text; it needs `image`"),
        ("a.parquet", {"image": ["a.png"], "text": ["a"]}, "a.parquet has the columns image, text; it needs `image`"),
        ("a.parquet", {"image": [b"a"], "label": [1]}, "a.parquet has the columns image, label; .* and `text`"),
        ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read"),
        ("a.tar", b"no tar file", "a.tar cannot be read"),
        ("a.tar", {}, "a.tar holds no images"),
        ("a.tar.gz", b"", "a.tar.gz is compressed.*Unpack"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: Any, says: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif name == "a.tar":
        write_tar(tmp_path / name, {"a.txt": b"a caption"})
    else:
        pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / name)
    with pytest.raises(DataError, match=says):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("memory://nothing", "there is no .parquet or .tar file"),
        ("memory://nothing/a.parquet", "nothing/a.parquet"),
        ("nowhere://bucket/a.tar", "prepare.source nowhere://bucket/a.tar cannot be read: Protocol not known"),
    ],
)
def test_an_address_that_cannot_be_read_is_named(address: str, says: str) -> None:
    with pytest.raises((DataError, FileNotFoundError), match=says):
        read_address(address)
