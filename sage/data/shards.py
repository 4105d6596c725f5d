"""Shards of a prepared split: Parquet files of images with their captions, written once and read as a stream.

A shard holds at most SHARD_ROWS images or about SHARD_BYTES, in row groups of at most GROUP_ROWS images or about
GROUP_BYTES; a row group is what is read at once. With aspect-ratio buckets a shard has images of one bucket, and its
metadata name the size. Column `image` is a struct of `bytes` and `path` and the schema names
its features, as Hugging Face datasets writes images, so that `load_dataset` opens the files.

Parquet, not tar files of webdataset: captions are read without the images, one image without those before it, pages
carry checksums, and viewers and query engines read it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet
from PIL import Image

from sage.errors import DataError

SHARD_ROWS, SHARD_BYTES = 1000, 64_000_000
GROUP_ROWS, GROUP_BYTES = 100, 4_000_000
_ATTRIBUTE = {"name": pyarrow.string(), "words": pyarrow.string(), "asked": pyarrow.bool_()}
_FIELDS = {
    "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
    "id": pyarrow.string(),
    "text": pyarrow.string(),
    "other_texts": pyarrow.list_(pyarrow.string()),
    "family": pyarrow.string(),
    "attributes": pyarrow.list_(pyarrow.struct(_ATTRIBUTE)),
}
_KINDS = {name: {"dtype": str(kind), "_type": "Value"} for name, kind in _ATTRIBUTE.items()}
_TEXT = {"dtype": "string", "_type": "Value"}
_FEATURES = {
    "image": {"_type": "Image"},
    "id": _TEXT,
    "text": _TEXT,
    "other_texts": {"feature": _TEXT, "_type": "List"},
    "family": _TEXT,
    "attributes": {"feature": _KINDS, "_type": "List"},
}
SCHEMA = pyarrow.schema(_FIELDS, metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})})


_BUCKET = b"bucket"


@dataclass(frozen=True)
class StoredImage:
    """The place of an image in a shard: file, row group, and row in the group. It is read only when asked for.

    `bucket` is its height and width, if the images were prepared in aspect-ratio buckets.
    """

    shard: Path
    group: int
    row: int
    bucket: tuple[int, int] | None = None

    def read(self) -> bytes:
        """Return the encoded image; raise DataError if the shard is missing or damaged."""
        try:
            status = self.shard.stat()
            # A shard that was written anew at the same path is another file.
            identity = status.st_ino, status.st_mtime_ns, status.st_size
            data: bytes = _images(self.shard, self.group, identity)[self.row].as_py()
            return data
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(self.shard, error) from error


class Encoded(Protocol):
    """An image that is read only when asked for."""

    def read(self) -> bytes:
        """Return the encoded image."""


ImageFile = Path | Encoded


@lru_cache(maxsize=2)  # images are mostly read in order, each row group once
def _images(shard: Path, group: int, identity: tuple[int, ...]) -> pyarrow.Array:
    with pyarrow.parquet.ParquetFile(shard, page_checksum_verification=True) as file:
        table = file.read_row_group(group, columns=["image.bytes"], use_threads=False)
    return table.column("image").combine_chunks().field("bytes")


def rgb(image: ImageFile) -> Image.Image:
    """Return the image of a file or of a shard as RGB."""
    with Image.open(image if isinstance(image, Path) else BytesIO(image.read())) as opened:
        return opened.convert("RGB")


def write_shards(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the shards of a split into a new folder, in the order of the rows.

    A row has the encoded image as `image`, `id` and `text`; `other_texts`, `family` and `attributes` if there are any;
    with buckets, the height and width of the image as `bucket`, and rows of one bucket lie side by side.
    The same rows give the same bytes, with any number of threads. Of the rows only one row group is in memory.
    """
    folder.mkdir(parents=True)
    bucket: tuple[int, int] | None = None
    writer, written, size = None, 0, 0
    for bucket_of_group, group in _groups(rows):
        bytes_of_group = sum(len(row["image"]["bytes"]) for row in group)
        full = written + len(group) > SHARD_ROWS or size + bytes_of_group > SHARD_BYTES
        if writer and (full or bucket_of_group != bucket):
            writer.close()
            writer = None
        if writer is None:
            writer, written, size, bucket = _open_shard(folder, bucket_of_group), 0, 0, bucket_of_group
        writer.write_table(pyarrow.Table.from_pylist(group, schema=SCHEMA), row_group_size=len(group))
        written, size = written + len(group), size + bytes_of_group
    if writer:
        writer.close()


def _open_shard(folder: Path, bucket: tuple[int, int] | None) -> pyarrow.parquet.ParquetWriter:
    path = folder / f"{sum(1 for _ in folder.iterdir()):05}.parquet"
    named = {} if bucket is None else {_BUCKET: json.dumps(bucket).encode()}
    # Statistics would hold whole images.
    return pyarrow.parquet.ParquetWriter(
        path,
        SCHEMA.with_metadata(SCHEMA.metadata | named),
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )


def _groups(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[tuple[int, int] | None, list[dict[str, Any]]]]:
    """Yield the row groups, each with the bucket of its rows."""
    group: list[dict[str, Any]] = []
    bucket: tuple[int, int] | None = None
    size = 0
    for row in rows:
        image = {"bytes": row["image"], "path": f"{row['id']}.png"}
        own: tuple[int, int] | None = row.get("bucket")
        full = len(group) == GROUP_ROWS or size + len(row["image"]) > GROUP_BYTES
        if group and (full or own != bucket):
            yield bucket, group
            group, size = [], 0
        bucket = own
        more = {name: row.get(name) or [] for name in ("other_texts", "attributes")}
        group.append({"id": row["id"], "text": row["text"], "family": row.get("family") or "", "image": image} | more)
        size += len(row["image"])
    if group:
        yield bucket, group


def read_rows(folder: Path) -> Iterator[tuple[StoredImage, dict[str, Any]]]:
    """Yield the place of each image of a split and its other columns, in the order written; pixels are not read.

    Raises DataError if there is no shard, or one is damaged or has other columns.
    """
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        raise DataError(f"{folder} holds no shards (*.parquet). Run `dvc repro prepare`.")
    names = [name for name in SCHEMA.names if name != "image"]
    for shard in shards:
        try:
            with pyarrow.parquet.ParquetFile(shard, page_checksum_verification=True) as file:
                if not file.schema_arrow.equals(SCHEMA):
                    raise DataError(
                        f"{shard} has the columns {file.schema_arrow.names}, expected {SCHEMA.names} of the types that "
                        "stage prepare writes. Run `dvc repro --force prepare`."
                    )
                bucket = _bucket(file.schema_arrow.metadata or {})
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=names, use_threads=False)
                    for number, row in enumerate(table.to_pylist()):
                        yield StoredImage(shard, group, number, bucket), row
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(shard, error) from error


def _bucket(metadata: Mapping[bytes, bytes]) -> tuple[int, int] | None:
    if _BUCKET not in metadata:
        return None
    height, width = json.loads(metadata[_BUCKET])
    return height, width


def _damaged(shard: Path, error: Exception) -> DataError:
    return DataError(f"{shard} is missing or damaged ({error}). Run `dvc repro --force prepare`.")
