"""Files that hold many captioned images: Parquet tables, and tar files as webdataset writes them.

They lie below a folder or at an fsspec address (`s3://`, `hf://`, `https://`). An image is read when its row is: one
row group of a table or one member of a tar file at a time, so memory does not grow with the number of images.
"""

import glob
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec
import pyarrow
import pyarrow.parquet

from sage.data import metadata
from sage.data.captions import clean_caption
from sage.data.rows import MAX_BYTES, Rejected, Row, opened_below
from sage.errors import DataError

SUFFIXES = (".parquet", ".tar")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img")  # columns of a table
_MEMBERS = (*_IMAGES, "bmp", "gif", "tif", "tiff")  # suffixes in a tar file
_CAPTIONS = ("txt", "caption", "json")
_MAX_CAPTION = 1_000_000  # bytes
_WANTED = ("text", "caption", "other_texts", "family")
# The place of an image to report, how its bytes are read, and its captions and family by the keys of a metadata file.
_Record = tuple[str, Callable[[], bytes], Mapping[str, Any]]


@dataclass(frozen=True)
class Packed:
    """A file of many images.

    name  name to report, relative to the source
    open  opens it, for reading at any place
    part  returns the bytes from one place up to another
    """

    name: str
    open: Callable[[], AbstractContextManager[BinaryIO]]
    part: Callable[[int, int], bytes]


def below(root: Path, name: PurePosixPath) -> Packed:
    """Return a file below a folder, read as `opened_below` does."""

    def part(start: int, end: int) -> bytes:
        with opened_below(root, name) as file:
            file.seek(start)
            return file.read(end - start)

    return Packed(str(name), partial(opened_below, root, name), part)


def at_address(address: str) -> list[Packed]:
    """Return the Parquet and tar files at an fsspec address: a file, a pattern with `*`, or a whole folder.

    Raises DataError if there are none, or if the package for that kind of address is not installed.
    """
    try:
        system, pattern = fsspec.core.url_to_fs(address)
        if glob.has_magic(pattern):
            found, root = system.glob(pattern), re.split(r"[*?[]", pattern)[0].rpartition("/")[0]
        elif is_packed(pattern):  # not listed: a web server names files, but no folders
            found, root = [pattern], pattern.rpartition("/")[0]
        else:
            found, root = system.find(pattern), pattern
    except (ImportError, ValueError) as error:
        raise DataError(f"prepare.source {address} cannot be read: {error}") from error
    paths = sorted(path for path in found if is_packed(path))
    if not paths:
        raise DataError(
            f"prepare.source {address}: there is no .parquet or .tar file. Images in files of their own are read "
            "from a folder on this machine only (prepare.source: folder)."
        )
    return [
        Packed(path.removeprefix(root).lstrip("/"), partial(system.open, path, "rb"), partial(system.cat_file, path))
        for path in paths
    ]


def is_packed(name: str) -> bool:
    """Return whether a file of this name holds many images; raise DataError for a compressed tar file.

    A metadata.parquet lists images that lie beside it.
    """
    name = PurePosixPath(name).name.lower()
    if name.endswith(_COMPRESSED):
        raise DataError(f"{name} is compressed, so its images cannot be read one by one. Unpack it to a .tar.")
    return name.endswith(SUFFIXES) and name not in metadata.NAMES


def rows(file: Packed) -> Iterator[Row]:
    """Yield the rows of a file in its order; raise DataError, naming it, if it is damaged or holds no images."""
    kind = _table if file.name.lower().endswith(".parquet") else _tar
    try:
        for place, read, fields in kind(file):
            yield _row(file, place, read, fields)
    except (pyarrow.ArrowInvalid, tarfile.TarError) as error:
        raise DataError(f"{file.name} cannot be read: {error}") from error


def _row(file: Packed, place: str, read: Callable[[], bytes], fields: Mapping[str, Any]) -> Row:
    texts: list[object] = [None]
    family, rejected = fields.get("family") or None, None
    try:
        texts = metadata.captions(fields)
        family = clean_caption(family) if family is not None else None
    except Rejected as problem:
        rejected = problem
    # Not of the whole address, so that a copy elsewhere gives the same identifiers.
    mark = sha256(json.dumps([place, *texts], default=str).encode()).hexdigest()[:12]
    text, *others = texts
    id, other_texts = f"{_slug(place)}-{mark}", tuple(others)
    return Row(id, Path(file.name), text, family, place, rejected=rejected, other_texts=other_texts, draw=read)


def _slug(place: str) -> str:
    return re.sub("[^a-z0-9]+", "-", place.lower())[-40:].strip("-")


def _table(file: Packed) -> Iterator[_Record]:
    with file.open() as opened, pyarrow.parquet.ParquetFile(opened) as table:
        names = table.schema_arrow.names
        image = next((name for name in _IMAGES if name in names and _holds_bytes(table.schema_arrow.field(name))), None)
        if image is None or not {"text", "caption"} & {*names}:
            raise DataError(
                f"{file.name} has the columns {', '.join(names)}; it needs `image` (bytes, or a struct with `bytes`, "
                "as Hugging Face datasets writes it) and `text` or `caption`. Rename its columns, or take it away."
            )
        before = 0
        for group in range(table.num_row_groups):
            fields = table.read_row_group(group, columns=[name for name in _WANTED if name in names]).to_pylist()
            for number, row in enumerate(fields):
                yield f"{file.name}:{before + number}", _cell(file, image, group, number), row
            before += len(fields)


def _holds_bytes(field: pyarrow.Field) -> bool:
    kind = field.type
    if pyarrow.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place))
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _cell(file: Packed, column: str, group: int, row: int) -> Callable[[], bytes]:
    def read() -> bytes:
        value = _column(file, column, group)[row].as_py()
        data: bytes | None = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise Rejected("missing_file", "the row has no bytes of an image")
        return data

    return read


@lru_cache(maxsize=1)  # rows are read in order
def _column(file: Packed, column: str, group: int) -> pyarrow.ChunkedArray:
    with file.open() as opened, pyarrow.parquet.ParquetFile(opened) as table:
        return table.read_row_group(group, columns=[column]).column(column)


def _tar(file: Packed) -> Iterator[_Record]:
    """Yield the samples: members in sequence whose names are equal up to the first dot of their last part."""
    found = False
    with file.open() as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
        for key, members in _samples(tar):
            suffix = next((suffix for suffix in _MEMBERS if suffix in members), None)
            if suffix is not None:
                found = True
                yield f"{file.name}:{key}.{suffix}", _member(file, members[suffix]), _fields(tar, members)
    if not found:
        raise DataError(f"{file.name} holds no images; expected are members such as a.jpg beside a.txt or a.json.")


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    key, members = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        base, _, suffix = name.partition(".")
        if not member.isreg() or not base:
            continue
        if (own := f"{folder}/{base}".lstrip("/")) != key:
            if members:
                yield key, members
            key, members = own, {}
        members[suffix.lower()] = member
    if members:
        yield key, members


def _fields(tar: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo]) -> dict[str, Any]:
    """Return the captions of a sample: the lines of its text members, and those that its .json names."""
    texts: list[Any] = []
    fields: dict[str, Any] = {}
    for suffix in _CAPTIONS:
        if (member := members.get(suffix)) is None or member.size > _MAX_CAPTION:
            continue
        text = tar.extractfile(member).read().decode("utf-8-sig", "replace")  # type: ignore[union-attr]
        if suffix != "json":
            texts += [line.strip() for line in text.splitlines() if line.strip()]
        elif isinstance(read := _json(text), dict):
            fields = {name: read[name] for name in _WANTED if name in read}
    return fields | ({"text": [*texts, *_listed(fields.get("text"))]} if texts else {})


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None  # the sample then has no caption, and is rejected for that


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _member(file: Packed, member: tarfile.TarInfo) -> Callable[[], bytes]:
    start, size = member.offset_data, member.size

    def read() -> bytes:
        if size > MAX_BYTES:
            raise Rejected("too_large", f"it has {size} bytes, more than {MAX_BYTES}")
        data = file.part(start, start + size)
        if len(data) < size:
            raise Rejected("decode_error", f"{len(data)} of its {size} bytes are there")
        return data

    return read
