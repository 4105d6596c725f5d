"""Prepared folders, written as stage prepare writes them, for tests of what reads them."""

from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from sage.data.shards import StoredImage, write_shards

NOWHERE = StoredImage(Path("none.parquet"), 0, 0)  # for examples whose image is never read


def write_split(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one split; `image` of a row is a PIL image, by default a black one; `family` is by default one for all."""
    defaults = {"image": Image.new("RGB", (16, 16)), "family": "f"}
    write_shards(folder, [row | {"image": _png(row["image"])} for row in (defaults | dict(row) for row in rows)])


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
