"""Terminal output of commands: errors as one message, progress with rate and time left."""

import logging
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from sage.errors import DivergedError, SageError

# Exit codes besides 0: 2 an error that the user can fix, 4 training or all images diverged, 130 interrupted, 143
# terminated.
# flows.versioning.locks.BusyError and flows.prompts.remote.ServerError have their own: 75, try again later.
_EXIT_CODE = 2
_EXIT_DIVERGED = 4
_EXIT_INTERRUPTED = 128 + signal.SIGINT
_EXIT_TERMINATED = 128 + signal.SIGTERM

Advance = Callable[[int], None]


def run(main: Callable[..., None]) -> None:
    """Run a stage's `main` as a command: parameters become options, a SageError one message and an exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    exit_on_error(app)


def exit_on_error(app: Callable[..., Any]) -> None:
    """Call `app` with quiet logs; an error that the user can fix becomes one message on stderr, not a traceback."""
    quiet()
    # SIGTERM unwinds the stack as Ctrl-C does, so that child processes are ended and temporary files removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_EXIT_TERMINATED))
    try:
        app()
    except DivergedError as error:
        _stop(error, _EXIT_DIVERGED)
    except SageError as error:
        _stop(error, getattr(error, "exit_code", _EXIT_CODE))
    except OSError as error:
        # With a file name (full disk, no permission) the message is enough for the user; otherwise it is a bug.
        if error.filename is None:
            raise
        _stop(error, _EXIT_CODE)
    except KeyboardInterrupt:
        _stop("interrupted", _EXIT_INTERRUPTED)


def _stop(message: object, code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def finite(value: float | None) -> float | None:
    """Return the value of an option; raise typer.BadParameter for infinity and NaN, which pass typer's limits."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not finite; give a finite number")
    return value


def quiet() -> None:
    """Log warnings only, and turn off the progress bars of libraries, whether imported already or later."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("transformers", "diffusers"):
        if module := sys.modules.get(name):
            module.utils.logging.set_verbosity_error()
            module.utils.logging.disable_progress_bar()
    if module := sys.modules.get("huggingface_hub"):
        module.utils.disable_progress_bars()


@contextmanager
def progress(total: int, what: str) -> Iterator[Advance]:
    """Yield `advance(n)`: it moves a bar on a terminal, and otherwise prints a line at most every five seconds."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        with _bar(console, total, what) as advance:
            yield advance
    else:
        lines = Lines(total, what)
        yield lines.advance
        lines.finish()


@contextmanager
def _bar(console: Any, total: int, what: str) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn

    class Rate(ProgressColumn):
        def render(self, task: Task) -> str:
            return f"{_rate(task.finished_speed or task.speed)} "

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task(what, total=total)
        yield lambda n: bars.advance(bar, n)


class Lines:
    """Progress as lines of text, for output that is not a terminal."""

    def __init__(self, total: int, what: str, every: float = 5.0, window: float = 60.0) -> None:
        """`every`: minimum seconds between lines; `window`: seconds over which the rate is averaged."""
        self._total, self._what, self._every, self._window = total, what, every, window
        self._done = 0
        self._start = self._printed = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque()

    def advance(self, n: int = 1) -> None:
        """Count `n` more; print a line if the last one is `every` seconds old."""
        now = time.monotonic()
        self._done += n
        # In a resumed run the first call counts the work of an earlier process, so rates are measured from there on.
        self._seen.append((now, self._done))
        while now - self._seen[0][0] > self._window and len(self._seen) > 2:
            self._seen.popleft()
        if now - self._printed >= self._every and self._done < self._total:
            self._printed = now
            self._print(f"{self._percent()}, {_rate(self._speed())}, {self._left()} left")

    def finish(self) -> None:
        """Print the closing line."""
        self._print(f"{self._percent()}, took {_duration(time.monotonic() - self._start)}")

    def _print(self, text: str) -> None:
        print(f"{self._what}: {self._done}/{self._total} ({text})", file=sys.stderr, flush=True)

    def _percent(self) -> str:
        return f"{self._done / self._total:.0%}" if self._total else "100%"

    def _speed(self) -> float | None:
        (then, before), (now, done) = self._seen[0], self._seen[-1]
        return (done - before) / (now - then) if now > then else None

    def _left(self) -> str:
        speed = self._speed()
        return _duration((self._total - self._done) / speed) if speed else "?"


def _rate(speed: float | None) -> str:
    if not speed:
        return "?/s"
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
