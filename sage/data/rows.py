"""One input picture with its caption, the reasons to refuse it, and the only way to its bytes."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


class Rejected(Exception):
    """Why one input row cannot be used: a stable code and a sentence; it ends in the accounting, never at a user."""

    def __init__(self, reason: str, detail: str) -> None:
        """`reason`: the code; `detail`: for people, and the same whenever the input is."""
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Row:
    """One input picture with its caption, not yet checked; rows of one family are variants of each other.

    `file` is its name in the input's own words; `root` is the folder that reading may not leave (None: a trusted file);
    `sha256` is what the file's hash should be; `rejected` says why it is known already to be of no use; `other_texts`
    are further captions.
    """

    id: str
    path: Path
    text: object
    family: str | None = None
    file: str = ""
    root: Path | None = None
    sha256: object = None
    rejected: Rejected | None = None
    other_texts: tuple[str, ...] = ()

    def read(self, limit: int) -> bytes:
        """Return the bytes of the picture file, at most `limit`; raise Rejected where they are not to be had."""
        if self.root is None:
            return self.path.read_bytes()
        return read_below(self.root, PurePosixPath(self.path.relative_to(self.root)), limit)


def read_below(root: Path, name: PurePosixPath, limit: int) -> bytes:
    """Return the bytes of a regular file below `root`, at most `limit`, following no link and opening nothing else.

    Raises Rejected: `unsafe_path`, `missing_file`, `unreadable`, `too_large`. A fault of the disk stays an OSError.
    """
    path = root
    try:
        for part in name.parts:
            path = path / part
            found = path.lstat()
            if stat.S_ISLNK(found.st_mode):
                raise Rejected("unsafe_path", f"{path.relative_to(root)} is a link")
        if not stat.S_ISREG(found.st_mode):
            raise Rejected("unsafe_path", f"{name} is no regular file")
        if found.st_size > limit:
            raise Rejected("too_large", f"{name} has {found.st_size} bytes, above {limit}")
        # Should it become a link or a pipe between the look and the opening, that is neither followed nor waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            return file.read(limit)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Rejected("missing_file", f"{name} does not exist") from error
    except PermissionError as error:
        raise Rejected("unreadable", f"{name}: permission denied") from error
