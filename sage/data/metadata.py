"""Files that list images with captions, one image a row: metadata.jsonl, metadata.csv and metadata.parquet.

Read are `file_name`; the captions in `text`, `caption` and `other_texts`, each a text or a list of texts; `family`; and
`sha256`.
"""

import json
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

from sage.data.rows import Rejected
from sage.data.tables import read_table

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TEXTS = ("text", "caption", "other_texts")
_KEYS = ("file_name", *_TEXTS, "family", "sha256")

Record = dict[str, Any]


def records(name: str, data: bytes) -> Iterator[tuple[int, Record | Rejected]]:
    """Yield the number of each row that is not empty, and its record, or why it is none.

    A record is an object with a text `file_name`. Raises Rejected if nothing of the file can be read.
    """
    kind = name.rpartition(".")[2]
    found = {"jsonl": _lines, "csv": _table, "parquet": _parquet}[kind](data)
    return ((number, _checked(record)) for number, record in found)


def captions(record: Mapping[str, Any]) -> list[object]:
    """Return the captions of a record, at least one; raise Rejected (`no_caption`), naming the keys, if it has none."""
    texts: list[object] = []
    for key in _TEXTS:
        value = record.get(key)
        texts += value if isinstance(value, list) else [value]
    # An empty cell is no caption if another cell holds one.
    if found := [text for text in texts if text not in (None, "")]:
        return found
    raise Rejected("no_caption", f"`text` and `caption` are missing or empty; the keys are {_keys(record)}")


def _checked(record: object) -> Record | Rejected:
    if isinstance(record, Rejected):
        return record
    if not isinstance(record, dict):
        return Rejected("bad_row", f"{type(record).__name__} is no JSON object with a text `file_name`")
    if not isinstance(record.get("file_name"), str) or not record["file_name"]:
        return Rejected("bad_row", f"it has no text `file_name`; the keys are {_keys(record)}")
    return record


def _keys(record: Mapping[str, Any]) -> str:
    return ascii(list(record))[:200]


def _lines(data: bytes) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, _line(line)


def _line(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Rejected("bad_text", f"the line is not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Rejected("bad_row", f"the line is not JSON: {error}")


def _table(data: bytes) -> Iterator[tuple[int, object]]:
    try:
        table = read_table(data.decode("utf-8-sig"), {"file_name"})
    except UnicodeDecodeError as error:
        raise Rejected("bad_text", f"it is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if table.problem:
        raise Rejected("bad_row", f"the header is no row of a table: {table.problem}")
    if double := [key for key in _KEYS if table.columns.count(key) > 1]:
        raise Rejected("bad_row", f"{table.columns.count(double[0])} columns are named {double[0]}; leave one")
    found = (Rejected("bad_row", record.problem) if record.problem else record.cells for record in table.records)
    return enumerate(found, start=1)


def _parquet(data: bytes) -> Iterator[tuple[int, object]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(BytesIO(data))
        names = file.schema_arrow.names
        # Without the others: a table often holds the images, too.
        rows = [row for batch in file.iter_batches(columns=[*set(names) & set(_KEYS)]) for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Rejected("bad_row", f"it cannot be read as Parquet: {error}") from error
    if "file_name" not in names:
        raise Rejected("bad_row", f"it has no column `file_name`; the columns are {ascii(names)[:200]}")
    return enumerate(rows, start=1)
