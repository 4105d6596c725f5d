"""Reads a user's folder of captioned images and never opens a file outside it.

Three layouts, which may be mixed and nested: `metadata.jsonl`, `.csv` or `.parquet` beside or above the images that it
names (Hugging Face's ImageFolder), `name.png` beside `name.txt` or `name.caption`, one caption a line, and Parquet and
tar files of many images (`sage.data.packed`). Hidden files and folders are ignored. Folders `train` and `test` or
`validation` at the top, or packed files named so (`train-00000.parquet`), are the user's own split.
"""

import json
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from sage.data import metadata, packed
from sage.data.captions import clean_caption
from sage.data.images import is_image
from sage.data.rows import Rejected, Row, read_below
from sage.data.tables import split_lines
from sage.errors import DataError

_CAPTIONS = (".caption", ".txt")
# Suffixes of images that Pillow does not know. Content decides what is accepted, but a damaged image has only a suffix.
_FOREIGN = {".svg", ".heic", ".heif", ".jxl"}
_SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_OF_SPLIT = re.compile(f"({'|'.join(_SPLITS)})[-_.]")
_REPEATS = re.compile(r"([1-9]\d{0,3})_(.+)")
_MAX_METADATA = 1_000_000_000  # bytes
_MAX_CAPTION = 100_000  # bytes
_MAX_CAPTIONS = 100  # of an image
_MAX_NAME = 255  # bytes of one part of a path, as on most file systems
_MAX_PATH = 1000  # bytes
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def read_folder(root: Path) -> list[Row]:
    """Return the rows of an image folder: images listed in a metadata file, other images, captions without an image.

    Each part is in the order of the file names. A file is an image if its suffix or its first bytes are those of one,
    or if a caption lies beside it. A row that cannot be used carries its reason in `rejected`. Raises DataError if the
    folder does not exist, has no row, or is split into train and test only in part.
    """
    if not root.is_dir():
        raise DataError(
            f"{root} is no folder. Put images with captions there, or set prepare.source to figures in params.yaml."
        )
    names = sorted(_walk(root), key=str)
    many = [name for name in names if packed.is_packed(str(name))]
    names = [name for name in names if name not in set(many)]
    rows = [row for name in names if _is_metadata(name) for row in _listed(root, name)]
    listed = {row.file for row in rows}
    captions: dict[str, list[PurePosixPath]] = defaultdict(list)
    for name in filter(_is_caption, names):
        captions[_stem(str(name))].append(name)
    images = list(_images(root, names, captions.keys()))
    for name in images:
        if str(name) not in listed:
            rows.append(_beside(root, name, [file for base in _bases(name) for file in captions.get(base, [])]))
    with_image = {base for name in [*images, *map(PurePosixPath, listed)] for base in _bases(name)}
    lone = Rejected("missing_file", "a caption without an image")
    for base in sorted(captions.keys() - with_image):
        rows += [_row(root, str(name), [None], rejected=lone) for name in captions[base]]
    for name in many:
        rows += _packed(root, name)
    if not rows:
        raise DataError(
            f"{root} holds no images. Put some there, with a metadata.jsonl (file_name, text) or a .txt beside each, "
            "or set prepare.source to figures in params.yaml."
        )
    return _with_splits(root, _with_distinct_ids(_without_collisions(rows)))


def _packed(root: Path, name: PurePosixPath) -> Iterator[Row]:
    try:
        yield from packed.rows(packed.below(root, name))
    except Rejected as rejected:
        yield _row(root, str(name), [None], rejected=rejected)


def read_kohya(root: Path) -> list[Row]:
    """Return the rows of a folder whose images lie in folders named for how often they count, such as `10_a cat`.

    The name, here `a cat`, is the caption of images without one. Only the ratio of the repeats matters to training,
    which counts steps, so they are divided by what divides all of them. Raises DataError as `read_folder` does, and if
    an image lies in no such folder.
    """
    rows = read_folder(root)
    found = {
        row.id: [match for part in PurePosixPath(row.file).parts[:-1] if (match := _REPEATS.fullmatch(part))]
        for row in rows
    }
    if outside := [row.file for row in rows if not found[row.id]]:
        raise DataError(
            f"{root}: {len(outside)} images, first {outside[0]!a}, lie in no folder with repeats, such as 10_name. Put "
            "them into one, or set prepare.source to folder in params.yaml."
        )
    whole = math.gcd(*(int(matches[-1][1]) for matches in found.values()))
    return [
        replace(row, repeats=int(match[1]) // whole, text=match[2].replace("_", " ") if row.text is None else row.text)
        for row in rows
        for match in found[row.id][-1:]
    ]


def read_address(address: str) -> list[Row]:
    """Return the rows of the Parquet and tar files at an fsspec address.

    Raises DataError if a file cannot be used, or if they are split into train and test only in part.
    """
    rows = [row for file in packed.at_address(address) for row in packed.rows(file)]
    return _with_splits(address, _with_distinct_ids(rows))


def _is_metadata(name: PurePosixPath) -> bool:
    return name.name.lower() in metadata.NAMES


def _is_caption(name: PurePosixPath) -> bool:
    return name.suffix.lower() in _CAPTIONS


def _bases(image: PurePosixPath) -> tuple[str, ...]:
    """Return what an image's caption is named before its suffix: `a.jpg` is described by `a.txt` or `a.jpg.txt`."""
    return tuple(dict.fromkeys((_stem(str(image)), str(image))))


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


def _images(root: Path, names: Sequence[PurePosixPath], captions: Collection[str]) -> Iterator[PurePosixPath]:
    """Yield the files with the suffix of an image, with a caption beside them, or that begin as an image."""
    suffixes = {*Image.registered_extensions(), *_FOREIGN}
    for name in names:
        if _is_caption(name) or _is_metadata(name):
            continue
        if name.suffix.lower() in suffixes or any(base in captions for base in _bases(name)) or _begins(root, name):
            yield name


def _begins(root: Path, name: PurePosixPath) -> bool:
    """Return whether a file begins as an image; for a link True, so that its rejection is reported."""
    if (root / name).is_symlink():
        return True
    try:
        return is_image(read_below(root, name, None, 32))
    except Rejected:
        return False


def _listed(root: Path, name: PurePosixPath) -> Iterator[Row]:
    try:
        for number, record in metadata.records(name.name.lower(), read_below(root, name, _MAX_METADATA)):
            try:
                if isinstance(record, Rejected):
                    raise record
                yield _from_record(root, name.parent, record)
            except Rejected as rejected:
                yield _row(root, f"{name}:{number}", [None], rejected=rejected)
    except Rejected as rejected:
        yield _row(root, str(name), [None], rejected=rejected)


def _from_record(root: Path, folder: PurePosixPath, record: metadata.Record) -> Row:
    if not isinstance(record.get("family"), str | None):
        raise Rejected("bad_row", f"`family` is {type(record['family']).__name__}, not text")
    file: str = record["file_name"]
    texts: list[object] = [None]
    try:
        _check_name(file)
        file = str(folder / file)
        texts = metadata.captions(record)
        family = clean_caption(record["family"]) if record.get("family") else None
    except Rejected as rejected:
        return _row(root, file, texts, rejected=rejected)
    return _row(root, file, texts, family=family, sha256=record.get("sha256") or None)


def _beside(root: Path, name: PurePosixPath, captions: Sequence[PurePosixPath]) -> Row:
    """Return the row of an image whose captions are the lines of the files beside it that are not blank."""
    try:
        _check_name(str(name))
        texts = [line.strip() for file in captions for line in split_lines(_text(root, file)) if line.strip()]
        return _row(root, str(name), texts or ["" if captions else None])
    except Rejected as rejected:
        return _row(root, str(name), [None], rejected=rejected)


def _text(root: Path, caption: PurePosixPath) -> str:
    try:
        return read_below(root, caption, _MAX_CAPTION).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("bad_text", f"{caption} is not UTF-8 at byte {error.start}") from error


def _row(root: Path, file: str, texts: Sequence[object], rejected: Rejected | None = None, **more: Any) -> Row:
    if rejected is None and len(texts) > _MAX_CAPTIONS:
        rejected = Rejected("bad_row", f"{len(texts)} captions, more than {_MAX_CAPTIONS}")
    slug = re.sub("[^a-z0-9]+", "-", PurePosixPath(file).stem.lower())[:40].strip("-") or "picture"
    mark = sha256(json.dumps([file, *texts], default=str).encode()).hexdigest()[:12]
    text, *others = texts
    path, id = root / file, f"{slug}-{mark}"
    return Row(id, path, text, file=file, root=root, other_texts=tuple(others), rejected=rejected, **more)


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


def _top(row: Row) -> str:
    """Return the name that could be a split: of the folder at the top, or at the beginning of a packed file's name."""
    named = row.draw and _OF_SPLIT.match(PurePosixPath(row.path).name.lower())
    return named[1] if named else PurePosixPath(row.file).parts[0]


def _without_collisions(rows: list[Row]) -> list[Row]:
    """Reject rows whose file names differ only in case or Unicode form: on some systems they are one file."""
    alike: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.draw is None:  # a member of a packed file is no file
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


def _with_splits(source: Path | str, rows: list[Row]) -> list[Row]:
    """Return the rows with the user's own split; without a folder for held-out images, there is none.

    `train` alone, or among others, is a folder like any other.
    """
    tops = {row.id: _top(row) for row in rows if row.rejected is None}
    found = {top: _SPLITS[top.lower()] for top in sorted({*tops.values()}) if top.lower() in _SPLITS}
    if not {"validation", "test"} & {*found.values()}:
        return rows
    outside = [row.file for row in rows if row.id in tops and tops[row.id] not in found]
    if outside or "train" not in found.values():
        lies = f"{len(outside)} images lie outside of them, first {outside[0]!a}" if outside else "there is no train"
        raise DataError(
            f"{source} holds {', '.join(found)}, but {lies}. To keep your split, put every image into train, "
            "validation or test; for a split by chance, give these folders other names."
        )
    rows = [replace(row, split=found[tops[row.id]]) if row.id in tops else row for row in rows]
    # Held-out images first: of duplicates the first is kept.
    return sorted(rows, key=lambda row: ("test", "validation", "train", None).index(row.split))
