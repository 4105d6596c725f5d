"""Commands that end with whoever started them, however that one ends.

`run` starts this file as a process in a session of its own, and that one starts the command. Its standard input is the
leash: the caller holds the other end and writes nothing, so it closes when the caller is gone, killed or not. Then the
whole group is asked to end, and killed after a while.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

_GRACE = 10.0  # seconds between asking a group to end and killing it


def run(
    command: Sequence[str],
    feed: Callable[[bytes], None],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path = Path(),
) -> int:
    """Run a command, pass on what it prints as it comes, and return its exit code.

    Whatever ends this call ends the command with all that it started.
    """
    process = start(command, subprocess.PIPE, environment, folder)
    assert process.stdout is not None
    try:
        while piece := os.read(process.stdout.fileno(), 65536):
            feed(piece)
        return process.wait()
    finally:
        # Nothing is left to end after a normal return; after an interruption the command and its children are.
        end(process)
        process.stdout.close()


def start(
    command: Sequence[str], output: int | IO[bytes], environment: Mapping[str, str] | None = None, folder: Path = Path()
) -> "subprocess.Popen[bytes]":
    """Start a command that ends when this process does, or when `end` is called; `output` receives what it prints."""
    return subprocess.Popen(
        [sys.executable, "-S", __file__, *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ask a command and all that it started to end, kill after a while what has not, and wait for it."""
    assert process.stdin is not None
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        late = time.monotonic() + _GRACE
        while time.monotonic() < late and _alive(process):
            time.sleep(0.05)
    process.stdin.close()
    process.wait()


def _alive(process: "subprocess.Popen[bytes]") -> bool:
    """Return whether any process of the group is left; the leader is reaped, or its remains would count."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Run the command of the arguments; exit with its code."""
    # A handler, for an ignored signal would be ignored by the command too; asking the group must not end this process.
    signal.signal(signal.SIGTERM, lambda *_: None)
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    let_go = threading.Event()
    holder = threading.Thread(target=_hold, args=[let_go], daemon=True)
    holder.start()
    code = command.wait()
    if let_go.is_set():
        holder.join()  # what the command started may outlive it
    sys.exit(code if code >= 0 else 128 - code)


def _hold(let_go: threading.Event) -> None:
    while os.read(0, 1):
        pass
    let_go.set()
    os.killpg(0, signal.SIGTERM)
    time.sleep(_GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
