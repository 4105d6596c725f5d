"""Input rows (an image file and its caption), their rejection, and safe reading of their files."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO


class Rejected(Exception):
    """An input row cannot be used; the reason is written to the accounting and the exception never leaves `prepare`."""

    def __init__(self, reason: str, detail: str) -> None:
        """`reason` is a fixed code; `detail` explains it to people, in the same words for the same input."""
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Row:
    """One input image with its caption, not yet checked.

    id           identifier, unique in the input
    path         path of the image file
    text         caption as found in the input; may be of any type
    family       name shared by the variants of one subject; None: no family
    file         file name to report to the user, relative to the input folder
    root         folder outside of which nothing may be read; None: `path` is trusted
    sha256       expected hash of the image file; None: not checked
    rejected     reason for rejection, if the row is already known to be unusable
    other_texts  further captions, as found
    split        split that the row belongs to; None: any
    draw         returns the bytes of the image file, for an image that is drawn and not read; None: `path` is read
    attributes   what is known of the image: the words of each attribute; asked: the attributes that `text` names
    repeats      how many times it counts in training
    """

    id: str
    path: Path
    text: object
    family: str | None = None
    file: str = ""
    root: Path | None = None
    sha256: object = None
    rejected: Rejected | None = None
    other_texts: tuple[object, ...] = ()
    split: str | None = None
    draw: Callable[[], bytes] | None = None
    attributes: Mapping[str, str] | None = None
    asked: tuple[str, ...] = ()
    repeats: int = 1

    def read(self, limit: int) -> bytes:
        """Return the bytes of the image file; below a `root`, raise Rejected as `read_below` does."""
        if self.draw is not None:
            return self.draw()
        if self.root is None:
            return self.path.read_bytes()
        return read_below(self.root, PurePosixPath(self.path.relative_to(self.root)), limit)


MAX_BYTES = 200_000_000  # of an image file


def read_below(root: Path, name: PurePosixPath, limit: int | None, first: int | None = None) -> bytes:
    """Return the bytes of a file below `root`, opened as `opened_below` does; `first` asks for its first bytes only."""
    with opened_below(root, name, limit) as file:
        wanted = limit if first is None else first
        return file.read(-1 if wanted is None else wanted)


@contextmanager
def opened_below(root: Path, name: PurePosixPath, limit: int | None = None) -> Iterator[BinaryIO]:
    """Open a regular file below `root` for reading; links are not followed, other kinds of file are not opened.

    Raises Rejected with `unsafe_path`, `missing_file`, `unreadable` or `too_large` (more than `limit` bytes). Disk
    errors stay OSError.
    """
    path = root
    try:
        for part in name.parts:
            path = path / part
            found = path.lstat()
            if stat.S_ISLNK(found.st_mode):
                raise Rejected("unsafe_path", f"{path.relative_to(root)} is a link")
        if not stat.S_ISREG(found.st_mode):
            raise Rejected("unsafe_path", f"{name} is not a regular file")
        if limit is not None and found.st_size > limit:
            raise Rejected("too_large", f"{name} has {found.st_size} bytes, more than {limit}")
        # If the file became a link or a pipe since lstat, O_NOFOLLOW does not follow it and O_NONBLOCK does not wait.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Rejected("missing_file", f"{name} does not exist") from error
    except PermissionError as error:
        raise Rejected("unreadable", f"{name}: permission denied") from error
    with os.fdopen(handle, "rb") as file:
        yield file
