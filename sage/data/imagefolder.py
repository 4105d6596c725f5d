"""Reads a user's folder of captioned images and never opens a file outside it.

Two layouts, which may be mixed and nested: `metadata.jsonl` beside or above the images that it names (Hugging Face's
ImageFolder), and `name.png` beside `name.txt`. Hidden files and folders are ignored.
"""

import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from sage.data.captions import clean_caption
from sage.data.rows import Rejected, Row, read_below
from sage.errors import DataError

METADATA = "metadata.jsonl"
_ACCEPTED = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Image formats that are rejected with a reason instead of being ignored.
_FOREIGN = (".svg", ".eps", ".psd", ".heic", ".avif", ".jp2", ".ico", ".ppm")
_MAX_METADATA = 1_000_000_000  # bytes
_MAX_CAPTION = 100_000  # bytes
_MAX_NAME = 255  # bytes of one part of a path, as on most file systems
_MAX_PATH = 1000  # bytes
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def read_folder(root: Path) -> list[Row]:
    """Return the rows of an image folder: images listed in a metadata.jsonl, other images, captions without an image.

    Each part is in the order of the file names. A row that cannot be used carries its reason in `rejected`. Raises
    DataError if the folder does not exist or has no row.
    """
    if not root.is_dir():
        raise DataError(
            f"{root} is no folder. Put images with captions there, or set prepare.source to twemoji in params.yaml."
        )
    names = sorted(_walk(root), key=str)
    rows = [row for name in names if name.name == METADATA for row in _listed(root, name)]
    listed = {row.file for row in rows}
    captions = {_stem(str(name)): name for name in names if name.suffix.lower() == ".txt"}
    images = [name for name in names if _is_image(root, name)]
    rows += [_beside(root, name, captions.get(_stem(str(name)))) for name in images if str(name) not in listed]
    with_image = {_stem(file) for file in [*map(str, images), *listed]}
    lone = Rejected("missing_file", "a caption without an image")
    rows += [_row(root, str(name), None, rejected=lone) for stem, name in captions.items() if stem not in with_image]
    if not rows:
        raise DataError(
            f"{root} holds no images. Put some there, with a {METADATA} (file_name, text) or a .txt beside each, "
            "or set prepare.source to twemoji in params.yaml."
        )
    return _with_distinct_ids(_without_collisions(rows))


def _stem(file: str) -> str:
    return file.removesuffix(PurePosixPath(file).suffix)


def _walk(root: Path) -> Iterator[PurePosixPath]:
    """Yield the relative names of all files and links below `root`; links are never followed."""
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (here / name).is_symlink()]
        for name in [*files, *links]:
            if not name.startswith("."):
                yield PurePosixPath((here / name).relative_to(root))


def _is_image(root: Path, name: PurePosixPath) -> bool:
    """Return whether a file becomes a row; links of any extension do, so that their rejection is reported."""
    if name.suffix.lower() in _ACCEPTED + _FOREIGN:
        return True
    return name.name != METADATA and name.suffix.lower() != ".txt" and (root / name).is_symlink()


def _listed(root: Path, metadata: PurePosixPath) -> Iterator[Row]:
    try:
        lines = read_below(root, metadata, _MAX_METADATA).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except Rejected as rejected:
        yield _row(root, str(metadata), None, rejected=rejected)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _from_line(root, metadata.parent, line)
            except Rejected as rejected:
                yield _row(root, f"{metadata}:{number}", None, rejected=rejected)


def _from_line(root: Path, folder: PurePosixPath, line: bytes) -> Row:
    try:
        values: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Rejected("bad_text", f"the line is not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise Rejected("bad_row", f"the line is not JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("file_name"), str) or not values["file_name"]:
        raise Rejected("bad_row", "the line is not a JSON object with a text `file_name`")
    if not isinstance(values.get("family"), str | None):
        raise Rejected("bad_row", f"`family` is {type(values['family']).__name__}, not text")
    try:
        _check_name(values["file_name"])
        family = clean_caption(values["family"]) if values.get("family") else None
    except Rejected as rejected:
        return _row(root, values["file_name"], values.get("text"), rejected=rejected)
    return _row(root, str(folder / values["file_name"]), values.get("text"), family=family, sha256=values.get("sha256"))


def _beside(root: Path, name: PurePosixPath, caption: PurePosixPath | None) -> Row:
    try:
        _check_name(str(name))
        if caption is None:
            return _row(root, str(name), None)
        return _row(root, str(name), read_below(root, caption, _MAX_CAPTION).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        rejected = Rejected("bad_text", f"{caption} is not UTF-8 at byte {error.start}")
    except Rejected as caught:
        rejected = caught
    return _row(root, str(name), None, rejected=rejected)


def _row(root: Path, file: str, text: object, **more: Any) -> Row:
    slug = re.sub("[^a-z0-9]+", "-", PurePosixPath(file).stem.lower())[:40].strip("-") or "picture"
    mark = sha256(json.dumps([file, text]).encode()).hexdigest()[:12]
    return Row(f"{slug}-{mark}", root / file, text, file=file, root=root, **more)


def _check_name(name: str) -> None:
    """Raise Rejected (`unsafe_path`) if a name leads out of the folder or is invalid on some operating system."""
    parts = name.split("/")
    if bad := re.search("[\0-\x1f\x7f\\\\\ud800-\udfff]", name):
        raise Rejected("unsafe_path", f"the name contains the forbidden character U+{ord(bad[0]):04X}")
    if name.startswith("/") or ".." in parts or re.match("[A-Za-z][A-Za-z0-9+.-]*:", name):
        raise Rejected("unsafe_path", "the name leads out of the folder")
    if len(name.encode()) > _MAX_PATH or any(len(part.encode()) > _MAX_NAME for part in parts):
        raise Rejected("unsafe_path", f"the name is longer than {_MAX_NAME} bytes per part or {_MAX_PATH} in all")
    if not PurePosixPath(name).parts:
        raise Rejected("unsafe_path", "the name is the folder itself")
    if reserved := next((part for part in parts if _RESERVED.fullmatch(part)), None):
        raise Rejected("unsafe_path", f"{reserved} names a device on Windows")


def _without_collisions(rows: list[Row]) -> list[Row]:
    """Reject rows whose file names differ only in case or Unicode form: on some systems they are one file."""
    alike: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        alike[_folded(row.file)].add(row.file)
    collision = Rejected("unsafe_path", "another file name differs only in case or Unicode form")
    return [
        replace(row, rejected=collision) if row.rejected is None and len(alike[_folded(row.file)]) > 1 else row
        for row in rows
    ]


def _folded(file: str) -> str:
    return unicodedata.normalize("NFC", file).casefold()


def _with_distinct_ids(rows: list[Row]) -> list[Row]:
    """Append a number to repeated ids; rows with the same file and caption have the same id."""
    seen: Counter[str] = Counter()
    distinct = []
    for row in rows:
        seen[row.id] += 1
        distinct.append(row if seen[row.id] == 1 else replace(row, id=f"{row.id}-{seen[row.id]}"))
    return distinct
