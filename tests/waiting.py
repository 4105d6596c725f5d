"""Waiting for an event, bounded, instead of sleeping; and a clock that a test moves by hand."""

import time
from collections.abc import Callable
from subprocess import Popen
from types import SimpleNamespace
from typing import Any

_EVERY = 0.02  # seconds between looks


def wait_for(
    condition: Callable[[], object], seconds: float, process: "Popen[Any] | None" = None, what: str = ""
) -> float:
    """Wait until a condition holds and return how many seconds that took; fail if it takes longer.

    With a process, fail as soon as it has ended without the condition.
    """
    start = time.monotonic()
    while not condition():
        # Looked at once more: it may have come true just before the process ended.
        assert process is None or process.poll() is None or condition(), f"the process ended first: {what}"
        assert time.monotonic() - start < seconds, f"not within {seconds} s: {what}"
        time.sleep(_EVERY)
    return time.monotonic() - start


class Clock(SimpleNamespace):
    """Stands in for the module `time` where a test patches it: `monotonic` says `now`, which only the test moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now
