"""Runs a command that ends with whoever started it, however that one ends: `python leash.py COMMAND...`.

Standard input is the leash: the starter holds its other end and writes nothing, so it closes when the starter is gone,
killed or not. Then the whole process group, which must be this one's own, is asked to end, and killed after a while.
"""

import os
import signal
import subprocess
import sys
import threading
import time

_GRACE = 5.0  # seconds


def main() -> None:
    """Run the command; exit with its code."""
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
