"""Child processes that end when their caller ends, even if the caller is killed.

`start` runs this file as a process in a new session, and this process runs the command. Its standard input is the
leash: a pipe whose other end the caller holds and never writes to, so it closes when the caller ends for any reason.
The whole process group then gets SIGTERM, and SIGKILL ten seconds later.
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

_GRACE = 10.0  # seconds between SIGTERM and SIGKILL


def run(
    command: Sequence[str],
    feed: Callable[[bytes], None],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path = Path(),
) -> int:
    """Run a command, pass its output to `feed` as it comes, and return its exit code.

    If this call is interrupted or its process is killed, the command and all its child processes end too.
    """
    process = start(command, subprocess.PIPE, environment, folder)
    assert process.stdout is not None
    try:
        while piece := os.read(process.stdout.fileno(), 65536):
            feed(piece)
        return process.wait()
    finally:
        # After an interruption the command and its children are still running; after a normal return nothing is.
        end(process)
        process.stdout.close()


def start(
    command: Sequence[str], output: int | IO[bytes], environment: Mapping[str, str] | None = None, folder: Path = Path()
) -> "subprocess.Popen[bytes]":
    """Start a command that ends when this process ends or `end` is called; its stdout and stderr go to `output`."""
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
    """Send SIGTERM to a command and its children, SIGKILL after the grace period, and wait for the end."""
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
    """Return whether any process of the group is left."""
    process.poll()  # reap the leader: as a zombie it would count
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Run the command given as arguments; exit with its code."""
    # SIGTERM to the group must not end this process. SIG_IGN would be inherited by the command, a handler is not.
    signal.signal(signal.SIGTERM, lambda *_: None)
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    let_go = threading.Event()
    holder = threading.Thread(target=_hold, args=[let_go], daemon=True)
    holder.start()
    code = command.wait()
    if let_go.is_set():
        holder.join()  # children of the command may still be running
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
