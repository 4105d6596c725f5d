"""The locks of a folder: our own, which one pipeline run holds, and DVC's list of who uses which file.

DVC writes its list `.dvc/tmp/rwlock` in place. A process that is killed meanwhile leaves it empty or cut off, and then
every command of DVC fails. The list means nothing if no process of DVC works in the folder, so it is deleted then.
"""

import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sage.errors import SageError

_TEMPORARY = Path(".dvc/tmp")
_POLL = 0.5  # seconds between attempts to lock a folder


class BusyError(SageError):
    """Another process is working in this folder; exit code 75 tells a caller to try again later."""

    exit_code = 75


@contextmanager
def only_writer(folder: Path = Path(), on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Lock a folder against other pipeline runs; the operating system releases the lock when this process ends.

    If another run holds it, raises BusyError; with `on_wait`, calls that once and waits for the other run instead.
    """
    lock = folder / _TEMPORARY / "sage.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        if not _locked(file):
            if on_wait is None:
                raise BusyError("another pipeline run works in this folder. Wait for it and try again.")
            on_wait()
            while not _locked(file):
                time.sleep(_POLL)
        yield


def mend(folder: Path = Path()) -> None:
    """Delete DVC's list of used files if it cannot be read; raise BusyError if DVC still works in the folder."""
    users = folder / _TEMPORARY / "rwlock"
    if _readable(users):
        return
    with users.with_name("rwlock.lock").open("a") as guard:  # DVC locks this file while it writes the list
        if not _locked(guard) or _readable(users):
            return
        if at_work := _dvc_processes(folder.resolve()):
            raise BusyError(
                f"{users} is damaged, but DVC still works in this folder: {'; '.join(at_work)}. Wait, and try again."
            )
        users.unlink()


def _locked(file: IO[str]) -> bool:
    """Lock a file unless another process has locked it; return whether this process has it now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _readable(users: Path) -> bool:
    """Return whether DVC can read its list; a missing one is empty."""
    try:
        return isinstance(json.loads(users.read_text(encoding="utf-8")), dict)
    except FileNotFoundError:
        return True
    except ValueError:
        return False


def _dvc_processes(folder: Path) -> list[str]:
    """Return the processes of DVC that work in a folder, as text."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            command, place = process.cmdline(), Path(process.cwd())
        except psutil.Error:
            continue  # it has just ended, or belongs to another user
        is_dvc = any(Path(part).name == "dvc" for part in command[:4]) and "daemon" not in command
        if is_dvc and place.is_relative_to(folder):
            found.append(f"process {process.pid}, {' '.join(command)}")
    return found
