"""Atomic writing of files and folders (temporary name, fsync, rename), and their SHA-256 hashes."""

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
    """Return one SHA-256 over the relative names and contents of all files below a folder, or that of a file."""
    if folder.is_file():
        return sha256(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = (f"{path.relative_to(folder).as_posix()} {sha256(path)}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it is synced and replaces `path`, on failure it is deleted.

    Raises OSError that names `path` if it cannot be written; an existing file is then unchanged.
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
    """Yield a temporary folder to fill; on success it is synced and replaces `path`, on failure it is deleted.

    Raises OSError that names `path` if it cannot be written; an existing folder is then unchanged. `path` never holds
    an incomplete folder. It takes two renames to replace a folder: a process killed between them leaves none.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        temporary = _beside(path, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            # In parallel: thousands of small files, synced one by one, take half a minute on a slow disk.
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(_sync, [*temporary.rglob("*"), temporary]))
            _replace(path, temporary)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; raise ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _replace(path: Path, new: Path) -> None:
    """Replace the folder `path` by `new`, in two renames, because a rename cannot overwrite a folder with files."""
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
            # A file `a.tmp-b` of the user has temporary names that begin as those of a file `a`.
            if left.name.removeprefix(f".{path.name}.{use}-").isdecimal():
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file, such as a full disk's."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
