"""What became of each input row in stage prepare: `accounting.jsonl` of a prepared folder, a JSON object a line.

A line has `id`, `file` and `status`: "kept" (with its `split` and, if images were prepared in aspect-ratio buckets, its
`bucket`: height and width), "rejected" (with `reason`, a code, and `detail`) or "duplicate" (with `of`, the id of the
row that it repeats). ASCII escapes, because a rejected caption may hold lone surrogates.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sage.errors import DataError

ACCOUNTING = "accounting.jsonl"


@dataclass
class Accounting:
    """The counts of an accounting.

    rows, kept, duplicates: numbers of rows.
    buckets: number of training images of each size, (height, width), if they were prepared in buckets.
    rejected: file and detail of each rejected row, by reason.
    """

    rows: int = 0
    kept: int = 0
    duplicates: int = 0
    buckets: Counter[tuple[int, int]] = field(default_factory=Counter)
    rejected: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


def write_accounting(folder: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write the accounting of a prepared folder."""
    lines = (f"{json.dumps(entry)}\n" for entry in entries)
    (folder / ACCOUNTING).write_text("".join(lines), encoding="ascii")


def read_accounting(folder: Path) -> Accounting:
    """Return the accounting of a prepared folder; raise DataError if it is missing or damaged."""
    path, found = folder / ACCOUNTING, Accounting()
    if not path.is_file():
        raise DataError(f"{path} does not exist. Run `dvc repro prepare`.")
    with path.open(encoding="ascii") as file:
        for number, line in enumerate(file, 1):
            try:
                _count(found, json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path}, line {number} is damaged. Run `dvc repro --force prepare`.") from error
    return found


def _count(found: Accounting, entry: dict[str, Any]) -> None:
    found.rows += 1
    status = entry["status"]
    if status == "rejected":
        found.rejected.setdefault(entry["reason"], []).append((entry["file"] or entry["id"], entry["detail"]))
    elif status == "kept":
        found.kept += 1
        if entry["split"] == "train" and "bucket" in entry:
            height, width = entry["bucket"]
            found.buckets[height, width] += 1
    elif status == "duplicate":
        found.duplicates += 1
    else:
        raise ValueError(status)
