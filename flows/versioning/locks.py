"""The locks of a folder: our own, which one pipeline run holds, and DVC's list of who uses which file.

DVC writes its list `.dvc/tmp/rwlock` in place. A process that is killed meanwhile leaves it empty or cut off, and then
every command of DVC fails. DVC removes killed processes from its list by their number, so a number that the system has
given to another process blocks the folder. In both cases the list is deleted if no process of DVC works in the folder.
"""

import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
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
    """Delete DVC's list of used files if it is cut off or out of date; raise BusyError if DVC works in the folder."""
    users = folder / _TEMPORARY / "rwlock"
    if _valid(users):
        return
    with users.with_name("rwlock.lock").open("a") as guard:  # DVC locks this file while it writes the list
        if not _locked(guard) or _valid(users):
            return
        if at_work := _dvc_processes(folder.resolve()):
            raise BusyError(
                f"{users} is not valid, but DVC still works in this folder: {'; '.join(at_work)}. Wait, and try again."
            )
        users.unlink()


def _locked(file: IO[str]) -> bool:
    """Lock a file unless another process has locked it; return whether this process has it now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _valid(users: Path) -> bool:
    """Return whether DVC's list can be read, and no process in it is younger than it; a missing list is empty."""
    import psutil

    try:
        modes, written = json.loads(users.read_text(encoding="utf-8")), users.stat().st_mtime
        infos = [*modes.get("write", {}).values(), *chain(*modes.get("read", {}).values())]
    except FileNotFoundError:
        return True
    except (ValueError, AttributeError):
        return False
    numbers = {info["pid"] for info in infos if "pid" in info}
    return all(process.create_time() <= written for process in psutil.process_iter() if process.pid in numbers)


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
