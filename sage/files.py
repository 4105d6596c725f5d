"""Writing that a crash cannot halve: temporary name, fsync, rename; and the hashes to check what was written."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(folder: Path) -> str:
    """Return one SHA-256 for all files below a folder: their relative names and their contents."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = (f"{path.relative_to(folder).as_posix()} {sha256(path)}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it is synced and takes the place of `path`, on failure it goes.

    Raises OSError with the name of `path` where it cannot be written; what stood there before stands unchanged.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        temporary = _beside(path, "tmp")
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it is synced and takes the place of `path`, on failure it goes.

    Raises OSError with the name of `path` where it cannot be written; what stood there before stands unchanged. Only
    a kill between its two renames leaves no folder of this name; half a folder never.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        temporary = _beside(path, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            # Together: one after the other, thousands of small files take half a minute on a slow disk.
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(_sync, [*temporary.rglob("*"), temporary]))
            _replace(path, temporary)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; a NaN or an infinity is refused with ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _replace(path: Path, new: Path) -> None:
    """Put the folder `new` in the place of `path`; a folder cannot be renamed over one that is not empty."""
    if not path.exists():
        new.rename(path)
        return
    old = _beside(path, "old")
    try:
        path.rename(old)
        new.rename(path)
    finally:
        if not path.exists():
            old.rename(path)
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path, use: str) -> Path:
    return path.with_name(f".{path.name}.{use}-{os.getpid()}")


def _sweep(path: Path) -> None:
    """Remove what killed writers of the same path left behind."""
    for use in ("tmp", "old"):
        for left in path.parent.glob(f".{glob.escape(path.name)}.{use}-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an error without a path, as a full disk raises it, the path that was to be written."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
