"""Latents and text states in memory-mapped files: computed once, and in memory only where a batch reads them.

A folder has a file of raw numbers for each tensor and `rows.json`, which says how many rows are complete. A process
that was killed goes on there. Files are appended to and not preallocated, so that a full disk is an error of the write.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage.files import write_json

TOGETHER = 64  # rows computed before they are written; whole batches of the encoders
SAVED_EVERY = 10.0  # seconds between two notes of how many rows are complete
_ROWS = "rows.json"


def stored(
    folder: Path,
    count: int,
    compute: Callable[[int, int], Mapping[str, Tensor]],
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Tensor]:
    """Return tensors of `count` rows by name, mapped from the files of a folder, after computing the missing rows.

    folder   one for each set of tensors: whatever the numbers depend on belongs into its name
    count    number of rows, at least one
    compute  returns the rows from a start to before a stop, on the CPU
    advance  called with the number of rows that are there since its last call
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        # Of several processes one computes, and the others wait; the lock ends with its process, however that ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows, forms = _complete(folder)
        advance(rows)
        saved = time.monotonic()
        while rows < count:
            computed = compute(rows, min(rows + TOGETHER, count))
            arrays = {name: _numbers(values) for name, values in computed.items()}
            forms = forms or {name: _form(array, computed[name].dtype) for name, array in arrays.items()}
            for name, array in arrays.items():
                _append(folder / name, rows * _row_bytes(forms[name]), array.transpose(forms[name]["axes"]))
            added = len(next(iter(arrays.values())))
            rows += added
            if rows == count or time.monotonic() - saved >= SAVED_EVERY:
                _save(folder, rows, forms)
                saved = time.monotonic()
            advance(added)
    return {name: _mapped(folder / name, count, form) for name, form in forms.items()}


def _numbers(values: Tensor) -> np.ndarray:
    """Return a tensor as an array; numpy has no bfloat16, so its bits are kept as integers."""
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


def _form(array: np.ndarray, kind: torch.dtype) -> dict[str, Any]:
    """Return types and shape of an array's rows, and its axes in the order in which they lie in memory, rows first.

    The order is kept, because kernels round differently for channels that lie first or last.
    """
    axes = sorted(range(1, array.ndim), key=lambda axis: -array.strides[axis])
    return {"dtype": str(array.dtype), "shape": array.shape[1:], "axes": [0, *axes], "bfloat16": kind == torch.bfloat16}


def _complete(folder: Path) -> tuple[int, dict[str, Any]]:
    """Return the number of complete rows, and the form of each tensor."""
    if not (folder / _ROWS).is_file():
        return 0, {}
    found = json.loads((folder / _ROWS).read_text(encoding="utf-8"))
    rows, forms = found["rows"], found["tensors"]
    paths = {name: folder / name for name in forms}
    whole = all(path.is_file() and path.stat().st_size >= rows * _row_bytes(forms[n]) for n, path in paths.items())
    return (rows, forms) if whole else (0, {})


def _row_bytes(form: Mapping[str, Any]) -> int:
    return int(np.dtype(form["dtype"]).itemsize * prod(form["shape"]))


def _append(path: Path, start: int, array: np.ndarray) -> None:
    """Write an array into a file from a byte on, over what a killed process left there."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(start)
        file.seek(start)
        file.write(np.ascontiguousarray(array).data)


def _save(folder: Path, rows: int, forms: Mapping[str, Any]) -> None:
    """Write down how many rows are complete, after these are on the disk."""
    for name in forms:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    write_json(folder / _ROWS, {"rows": rows, "tensors": forms})


def _mapped(path: Path, count: int, form: Mapping[str, Any]) -> Tensor:
    # Not copy-on-write: Linux counts a private writable mapping as memory, and refuses one that is larger than that.
    shape = [(count, *form["shape"])[axis] for axis in form["axes"]]
    lying = np.memmap(path, form["dtype"], "r+", shape=tuple(shape))
    mapped = torch.from_numpy(lying.transpose(np.argsort(form["axes"])))
    return mapped.view(torch.bfloat16) if form["bfloat16"] else mapped
