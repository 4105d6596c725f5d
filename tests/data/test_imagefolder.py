"""A user's folder on disk: which rows it has, and that nothing outside it is ever opened."""

import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from sage.data import metadata
from sage.data.imagefolder import read_folder
from sage.data.images import decode
from sage.data.rows import Rejected, Row
from sage.errors import DataError


def put_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16)).save(path, "PNG")


def put_metadata(folder: Path, *lines: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def reason(row: Row) -> str | None:
    """Return why a row is refused, before its picture is decoded."""
    if row.rejected is not None:
        return row.rejected.reason
    try:
        row.read(1000)
    except Rejected as rejected:
        return rejected.reason
    return None


def test_both_forms_mixed_and_nested(tmp_path: Path) -> None:
    for name in ("a.png", "deep/er/b.png", "deep/c.JPG", "lonely.png", "deep/.hidden.png", ".cache/d.png"):
        put_image(tmp_path / name)
    put_metadata(
        tmp_path,
        {"file_name": "./a.png", "text": "A", "family": "letters", "sha256": "0" * 64},
        {"file_name": "deep/er/b.png", "text": "B"},
    )
    put_metadata(tmp_path / "deep", {"file_name": "er/b.png", "text": "another B", "family": None})
    (tmp_path / "deep" / "c.txt").write_bytes(b"\xef\xbb\xbfC\r\n")
    (tmp_path / "README.md").write_text("nothing to do with it")
    found = [(row.file, row.text, row.family, row.sha256) for row in read_folder(tmp_path)]
    assert found == [
        ("deep/er/b.png", "another B", None, None),
        ("a.png", "A", "letters", "0" * 64),
        ("deep/er/b.png", "B", None, None),
        ("deep/c.JPG", "C", None, None),
        ("lonely.png", None, None, None),
    ]


def test_ids_are_plain_distinct_and_the_same_again(tmp_path: Path) -> None:
    names = ["Ein schönes Bild!.png", "犬.png", "x" * 80 + ".png", "a.png", "a.jpg"]
    for name in names:
        put_image(tmp_path / name)
    put_metadata(tmp_path, *({"file_name": name, "text": "t"} for name in [*names, "a.png"]))
    ids = [row.id for row in read_folder(tmp_path)]
    assert ids == [row.id for row in read_folder(tmp_path)]
    assert len(set(ids)) == 6
    assert all(len(name) <= 60 and name.isascii() and name.replace("-", "").isalnum() for name in ids)
    assert ids[0].startswith("ein-sch-nes-bild-")
    assert ids[5] == f"{ids[3]}-2"


BAD_NAMES = [
    "../secret.png", "deep/../../secret.png", "/etc/passwd", "file:///etc/passwd", "http://example.org/a.png",
    "C:\\a.png", "C:a.png", "..\\secret.png", "nul\0.png", "bell\a.png", "half\ud83d.png", "x" * 300 + ".png",
    "/".join(["long"] * 300), "CON", "con.png", "deep/LPT1.txt.png", ".", "link.png", "linked/secret.png", "pipe.png",
    "socket", "deep",
]  # fmt: skip


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder with ways out of it: links to a secret beside it, and a pipe that would never end."""
    put_image(tmp_path / "outside" / "secret.png")
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    root = tmp_path / "root"
    put_image(root / "good.png")
    (root / "deep").mkdir()
    (root / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (root / "linked").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "socket")
    return root


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_bad_name_is_unsafe(trap: Path, name: str) -> None:
    put_metadata(trap, {"file_name": name, "text": "a secret"})
    assert reason(read_folder(trap)[0]) == "unsafe_path"


def test_links_and_pipes_are_rows_and_never_read(trap: Path) -> None:
    (trap / "good.txt").symlink_to(trap.parent / "outside" / "secret.txt")
    (trap / "deep" / "metadata.jsonl").symlink_to(trap.parent / "outside" / "secret.txt")
    for name in ("link.txt", "pipe.txt"):
        (trap / name).write_text("a caption")
    found = {row.file: reason(row) for row in read_folder(trap)}
    assert found == dict.fromkeys(["deep/metadata.jsonl", "good.png", "link.png", "linked", "pipe.png"], "unsafe_path")


def test_a_name_that_a_system_cannot_have_is_unsafe_on_disk_too(tmp_path: Path) -> None:
    for name in (b"con.png", b"new\nline.png", b"latin-\xe9.png"):
        put_image(tmp_path / os.fsdecode(name))
    assert {reason(row) for row in read_folder(tmp_path)} == {"unsafe_path"}


def test_names_that_differ_in_case_or_form_only_are_unsafe(tmp_path: Path) -> None:
    for name in ("A.png", "a.png", "caf\u00e9.png", "cafe\u0301.png", "b.png"):
        put_image(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    found = {row.file: reason(row) for row in read_folder(tmp_path)}
    assert [name for name, why in found.items() if why is None] == ["b.png"]
    assert set(found.values()) == {"unsafe_path", None}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{", "bad_row"),
        (b"[]", "bad_row"),
        (b"null", "bad_row"),
        (b"[" * 100_000, "bad_row"),
        (b'{"text": "no name"}', "bad_row"),
        (b'{"file_name": "", "text": "t"}', "bad_row"),
        (b'{"file_name": 3, "text": "t"}', "bad_row"),
        (b'{"file_name": NaN, "text": "t"}', "bad_row"),
        (b'{"file_name": "good.png", "text": "t", "family": ["f"]}', "bad_row"),
        (b'{"file_name": "good.png", "text": "caf\xe9"}', "bad_text"),
        (b'{"file_name": "good.png", "text": "t", "family": "a\\u0000"}', "bad_text"),
        (b'{"file_name": "gone.png", "text": "t"}', "missing_file"),
        (b'{"file_name": "good.png/inside.png", "text": "t"}', "missing_file"),
        (b'{"file_name": "metadata.jsonl", "text": "t"}', None),  # a file like others: decoding refuses it
        (b'{"file_name": "good.png", "text": "t"}\r', None),
        (b'{"file_name": "good.png", "caption": "t"}', None),
        (b'{"file_name": "good.png", "notes": "t"}', "no_caption"),
        (b'{"file_name": "good.png", "text": []}', "no_caption"),
        (b'{"image_file_name": "good.png", "text": "t"}', "bad_row"),
        (b'\xef\xbb\xbf{"file_name": "good.png", "text": "t"}', None),
    ],
)
def test_a_line_of_metadata(tmp_path: Path, line: bytes, expected: str | None) -> None:
    put_image(tmp_path / "good.png")
    (tmp_path / "metadata.jsonl").write_bytes(line + b"\n\n  \n")
    assert reason(read_folder(tmp_path)[0]) == expected


def parquet(text: bytes) -> bytes:
    file = BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"file_name": ["a.png"] * 3, "text": ["a cat"] * 3}), file, compression="none"
    )
    return file.getvalue().replace(b"a cat", text)


PARQUET = parquet(b"a cat")
TEXTS = [("a.png", "A, with a comma"), ("deep/b.png", "B\u2028"), ("gone.png", "C")]


def put_table(folder: Path, kind: str, texts: str) -> None:
    """Write TEXTS as metadata of a kind, with the captions under the name `texts`."""
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        put_metadata(folder, *({"file_name": name, texts: text} for name, text in TEXTS))
    elif kind == "parquet":
        columns = {"file_name": [name for name, _ in TEXTS], texts: [text for _, text in TEXTS]}
        pyarrow.parquet.write_table(pyarrow.table(columns | {"image": [b"bytes"] * 3}), path)
    else:
        lines = [f'{name},"{text}"\n' for name, text in TEXTS]
        path.write_text("".join([f"File_Name,{texts.title()}\n", *lines]), encoding="utf-8-sig")


@pytest.mark.parametrize("texts", ["text", "caption"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_kind_of_metadata_gives_the_same_rows(tmp_path: Path, kind: str, texts: str) -> None:
    for name in ("a.png", "deep/b.png"):
        put_image(tmp_path / name)
    put_table(tmp_path, kind, texts)
    rows = read_folder(tmp_path)
    assert [(row.file, row.text) for row in rows] == TEXTS
    assert [reason(row) for row in rows] == [None, None, "missing_file"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metadata.csv", b"file_name,text\na.png,a,b\na.png,fine\n", ["bad_row", None]),
        ("metadata.csv", b'file_name,text\na.png,"a\na.png,fine\n', ["bad_row", None]),
        ("metadata.csv", b"file_name,text\na.png," + b"x" * 200_000 + b"\na.png,fine\n", ["bad_row", None]),
        ("metadata.csv", b"file_name;text;family;sha256\na.png;fine;;\n", [None]),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", ["bad_text"]),
        ("metadata.csv", b"file_name,text,text\na.png,a,b\n", ["bad_row"]),
        ("metadata.csv", b"name,text\na.png,a\n", ["bad_row"]),
        ("metadata.parquet", b"PAR1 damaged PAR1", ["bad_row"]),
        ("metadata.parquet", parquet(b"a \xe9at"), ["bad_row"]),
    ],
)
def test_a_bad_table_of_metadata_is_a_row_with_its_reason(
    tmp_path: Path, name: str, content: bytes, expected: list[str | None]
) -> None:
    put_image(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    assert [reason(row) for row in read_folder(tmp_path) if row.text is not None or row.rejected] == expected


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4), st.integers(0, 10_000))
@example([], 10_000)
def test_a_damaged_parquet_file_is_rejected_or_read_but_never_an_error(
    flips: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(PARQUET)
    for place, value in flips:
        data[place % len(data)] = value
    try:
        found = list(metadata.records("metadata.parquet", bytes(data[:length])))
    except Rejected as rejected:
        assert rejected.reason in {"bad_row", "bad_text"}
    else:
        assert flips or len(found) == 3


def test_a_line_without_a_caption_names_its_keys(tmp_path: Path) -> None:
    put_image(tmp_path / "a.png")
    put_metadata(tmp_path, {"file_name": "a.png", "notes": "t"}, {"image": "a.png"})
    found = [row.rejected.detail for row in read_folder(tmp_path) if row.rejected is not None]
    assert found == [
        "`text` and `caption` are missing or empty; the keys are ['file_name', 'notes']",
        "it has no text `file_name`; the keys are ['image']",
    ]


def test_an_image_has_as_many_captions_as_are_given(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.jpg", "d.png"):
        put_image(tmp_path / name)
    put_metadata(tmp_path, {"file_name": "a.png", "text": ["1", "2"], "caption": "3", "other_texts": ["4"]})
    (tmp_path / "b.caption").write_text("1\n\n 2\r\n")
    (tmp_path / "b.txt").write_text("3\r4")
    (tmp_path / "c.jpg.txt").write_text("1\u20282")
    (tmp_path / "d.CAPTION").write_text("\n")
    found = {row.file: [row.text, *row.other_texts] for row in read_folder(tmp_path)}
    assert found == {"a.png": [*"1234"], "b.png": [*"1234"], "c.jpg": ["1\u20282"], "d.png": [""]}


OTHER_NAMES = [
    "a.jpg", "b.jfif", "c.jpe", "d.JPEG", "e.dib", "f.apng", "g.heif", "h.jxl", "i.tga", "j.pgm", "k.avif", "l",
    "m.old",
]  # fmt: skip
KINDS = {"dib": "BMP", "apng": "PNG", "tga": "TGA", "pgm": "PPM", "avif": "AVIF"}


@pytest.mark.parametrize("captioned", [True, False])
def test_an_image_is_a_row_by_its_content_or_by_its_caption_whatever_its_name(tmp_path: Path, captioned: bool) -> None:
    for name in OTHER_NAMES:
        suffix = name.rpartition(".")[2].lower()
        Image.new("RGB", (16, 16)).save(tmp_path / name, KINDS.get(suffix, "JPEG"))
        if captioned:
            (tmp_path / name).with_suffix(".txt").write_text("a caption")
    (tmp_path / "jpeg-xl.img").write_bytes(b"\0\0\0\x0cJXL " + bytes(30))
    (tmp_path / "notes.md").write_text("not an image, and no caption is beside it")
    rows = read_folder(tmp_path)
    assert [row.file for row in rows] == sorted([*OTHER_NAMES, "jpeg-xl.img"])
    texts = {(row.text, *row.other_texts) for row in rows if row.file in OTHER_NAMES}
    assert texts == {("a caption" if captioned else None,)}
    refused = {row.file for row in rows if not readable(row)}
    assert refused == {"i.tga", "j.pgm", "k.avif", "jpeg-xl.img"}


def readable(row: Row) -> bool:
    """Return whether an image is accepted; if it is not, the reason must be its format."""
    try:
        decode(row.read(10**6))
    except Rejected as rejected:
        assert rejected.reason == "format_not_allowed", rejected.detail
        return False
    return True


def test_anything_beside_a_caption_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"latents")
    (tmp_path / "a.txt").write_text("a caption")
    assert [(row.file, row.text) for row in read_folder(tmp_path)] == [("a.npz", "a caption")]


def test_captions_in_files(tmp_path: Path) -> None:
    for name in ("utf16", "latin", "huge", "both", "many"):
        put_image(tmp_path / f"{name}.png")
    (tmp_path / "many.txt").write_text("one more\n" * 101)
    put_image(tmp_path / "both.jpg")
    (tmp_path / "utf16.txt").write_text("a caption", encoding="utf-16")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "huge.txt").write_bytes(b"x" * 200_000)
    (tmp_path / "both.txt").write_text("one caption for two pictures")
    (tmp_path / "orphan.txt").write_text("no picture")
    found = {row.file: reason(row) for row in read_folder(tmp_path)}
    assert found == {
        "both.jpg": None,
        "both.png": None,
        "huge.png": "too_large",
        "latin.png": "bad_text",
        "many.png": "bad_row",
        "utf16.png": "bad_text",
        "orphan.txt": "missing_file",
    }


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(10**12)
    (row,) = read_folder(tmp_path)
    with pytest.raises(Rejected) as rejected:
        row.read(1000)
    assert rejected.value.reason == "too_large"


def test_a_missing_or_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing is no folder.*prepare\.source"):
        read_folder(tmp_path / "missing")
    (tmp_path / "README.md").write_text("nothing yet")
    with pytest.raises(DataError, match=r"holds no images.*metadata\.jsonl.*prepare\.source"):
        read_folder(tmp_path)
