"""Waiting for an event, bounded, instead of sleeping; and a clock that a test moves by hand."""

import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from types import SimpleNamespace
from typing import Any

PATIENCE = 900.0  # seconds that nothing takes unless it hangs, however busy the machine is


def wait_for(
    condition: Callable[[], object],
    seconds: float = PATIENCE,
    process: "Popen[Any] | None" = None,
    log: Path | None = None,
    every: float = 0.1,
) -> float:
    """Wait until a condition holds and return how many seconds that took; fail if it takes longer.

    With a process, fail as soon as it has ended without the condition. `log` is shown then; `every`: between looks.
    """
    start = time.monotonic()
    while not condition():
        # Looked at once more: it may have come true just before the process ended.
        ended = process is not None and process.poll() is not None and not condition()
        late = time.monotonic() - start >= seconds
        if ended or late:
            told = log.read_text(errors="replace")[-3000:] if log else ""
            raise AssertionError(f"{'the process ended first' if ended else f'not within {seconds} s'}\n{told}")
        time.sleep(every)
    return time.monotonic() - start


class Clock(SimpleNamespace):
    """Stands in for the module `time` where a test patches it: `monotonic` says `now`, which only the test moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now
