"""Batches on disk, a folder for each: what was accepted, who shares, and the results so far.

    batch.json     what was accepted: tenant, time, number of lines and images, seed; written once
    input.jsonl    the lines as they were sent; written once
    groups.json    the images that are drawn together, once they are known: [[line, image of the line], ...] each
    results.jsonl  a line for each finished line of the input, in the order in which they finish
    index.jsonl    for each result: line of the input, whether it succeeded, where it ends, evaluations, and these alone
    cancel         an empty file: somebody wants the batch cancelled
    ended.json     how the batch ended, and when
    lock           locked by the server that draws the batch

A folder may be on a disk that several servers share. Every one may read; the one that has the lock writes results.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sage.files import new_folder, write_text

KEPT_DAYS = 30  # ended batches are deleted afterwards
_ID = re.compile(r"batch_[0-9a-f]{32}")
_PIECE = 1 << 20  # bytes of results read at a time


@dataclass(frozen=True)
class Accepted:
    """What is known of a batch when it is accepted; `seed` is for lines without one, `tenant` of the client's token."""

    id: str
    tenant: str | None
    created_at: int
    lines: int
    images: int
    seed: int


class Entry(NamedTuple):
    """One finished line: its number in the input, whether it has an image, the byte where its result ends, its cost."""

    line: int
    succeeded: bool
    end: int
    evaluations: float
    alone: float


class Batch:
    """The folder of one batch."""

    def __init__(self, folder: Path) -> None:
        """Read what was accepted."""
        self.folder = folder
        self.accepted = Accepted(**json.loads((folder / "batch.json").read_text(encoding="utf-8")))
        self._results, self._index = folder / "results.jsonl", folder / "index.jsonl"
        self._lock: int | None = None
        self._ended: dict[str, Any] | None = None

    @property
    def ended(self) -> dict[str, Any] | None:
        """Status and time, if nothing more is drawn."""
        if self._ended is None:
            self._ended = _read(self.folder / "ended.json")
        return self._ended

    @property
    def cancelled(self) -> bool:
        """Whether somebody wants it cancelled."""
        return (self.folder / "cancel").exists()

    @property
    def groups(self) -> list[list[tuple[int, int]]] | None:
        """The images that are drawn together, by line of the input and number in the line; None: not known yet."""
        found = _read(self.folder / "groups.json")
        return found and [[(line, image) for line, image in group] for group in found]

    @property
    def input(self) -> bytes:
        """The lines as they were sent."""
        return (self.folder / "input.jsonl").read_bytes()

    def keep_groups(self, groups: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Write down which images are drawn together."""
        write_text(self.folder / "groups.json", json.dumps(groups))

    def end(self, status: str) -> None:
        """Write down that nothing more is drawn."""
        write_text(self.folder / "ended.json", json.dumps({"status": status, "at": int(time.time())}))

    def cancel(self) -> None:
        """Ask whoever draws it to stop."""
        (self.folder / "cancel").touch()

    def lock(self) -> bool:
        """Become the one that draws it, unless somebody else is; a result that was not written whole is dropped."""
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self._lock = handle
        entries = self.entries()
        for path, size in (
            (self._index, sum(len(_line(entry)) for entry in entries)),
            (self._results, entries[-1].end if entries else 0),
        ):
            path.touch(0o600)
            os.truncate(path, size)
        return True

    def unlock(self) -> None:
        """Leave it to others."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append(self, results: Sequence[tuple[Entry, bytes]]) -> None:
        """Add results to those that are there, for good: after a power failure, too."""
        end, entries = self._results.stat().st_size, []
        for entry, result in results:
            end += len(result)
            entries.append(_line(entry._replace(end=end)))
        _append(self._results, b"".join(result for _, result in results))
        _append(self._index, b"".join(entries))

    def entries(self, skip: int = 0) -> list[Entry]:
        """Return the finished lines in order of finish, from the `skip`-th on."""
        try:
            lines = self._index.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return [Entry(*json.loads(line)) for line in lines[skip:]]

    def results(self, begin: int, end: int) -> Iterator[bytes]:
        """Yield the bytes of results between two ends, in pieces."""
        with self._results.open("rb") as file:
            file.seek(begin)
            while begin < end:
                piece = file.read(min(_PIECE, end - begin))
                begin += len(piece)
                yield piece


class BatchFolder:
    """The folder of all batches."""

    def __init__(self, folder: Path) -> None:
        """Make the folder; raise OSError if it cannot be used."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # What is in a batch does not change, but whether it is there and has ended.
        self._known: dict[str, Batch] = {}

    def sweep(self) -> None:
        """Delete the batches that ended `KEPT_DAYS` ago."""
        for batch in self.all():
            ended = batch.ended
            if ended is not None and time.time() > ended["at"] + KEPT_DAYS * 86400:
                shutil.rmtree(batch.folder)

    def accept(self, body: bytes, tenant: str | None, lines: int, images: int) -> Batch:
        """Write a new batch, for good, and return it."""
        name = f"batch_{secrets.token_hex(16)}"
        facts = Accepted(name, tenant, int(time.time()), lines, images, secrets.randbits(62))
        with new_folder(self.folder / name) as temporary:
            (temporary / "batch.json").write_text(json.dumps(asdict(facts)), encoding="utf-8")
            (temporary / "input.jsonl").write_bytes(body)
        self._known[name] = Batch(self.folder / name)
        return self._known[name]

    def find(self, name: str) -> Batch | None:
        """Return the batch of an id, None if there is none."""
        if not _ID.fullmatch(name) or not (self.folder / name / "batch.json").exists():
            self._known.pop(name, None)
            return None
        if name not in self._known:
            self._known[name] = Batch(self.folder / name)
        return self._known[name]

    def all(self) -> list[Batch]:
        """Return all batches, the newest first."""
        found = [self.find(path.name) for path in self.folder.iterdir()]
        return sorted((one for one in found if one), key=lambda one: one.accepted.created_at, reverse=True)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _line(entry: Entry) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
