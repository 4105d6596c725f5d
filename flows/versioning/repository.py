"""The project as a DVC and git repository: its graph, what must run, its revision. The only file that runs dvc."""

import codecs
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from flows import leash
from flows.versioning import locks
from flows.versioning.locks import BusyError
from sage.errors import ConfigurationError, SageError

State = Literal["executed", "restored", "up to date"]
Write = Callable[[str], None]

# The line that `dvc repro` prints for each stage.
_LINE = re.compile(r"(?:Running stage|Stage) '(?P<stage>[^']+)'(?P<what>:| didn't change| is cached)")
_STATES: dict[str, State] = {":": "executed", " didn't change": "up to date", " is cached": "restored"}
_FAILED = re.compile(r"failed to reproduce '([^']+)'.*?(?:exited with (-?\d+))?$")
FINAL = (2, 4)  # exit codes after which a retry is useless: a person must fix something, or training diverged
_BUSY = re.compile(r"is busy, it is being blocked by|Unable to acquire lock")
_LONGEST_LINE = 4096


class StageError(SageError):
    """A stage failed; `transient` if it died without an error message of its own, so that a retry may help."""

    def __init__(self, message: str, transient: bool) -> None:
        """`message` says which stage and why."""
        super().__init__(message)
        self.transient = transient


@dataclass(frozen=True)
class Outcome:
    """The outcome of a stage and its duration in seconds."""

    state: State
    seconds: float


def revision() -> str:
    """Return the commit of the work tree with "-dirty" if tracked files differ; "none" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "none"


def stages(graph: Path = Path("dvc.yaml")) -> list[str]:
    """Return the names of the graph's stages in an order in which they can run; ties keep the order of the file.

    Raises ConfigurationError if there is no graph here.
    """
    if not graph.exists():
        raise ConfigurationError(f"{graph} does not exist. Run from the project's top folder.")
    found: dict[str, dict[str, Any]] = yaml.safe_load(graph.read_text(encoding="utf-8"))["stages"]
    makes = {name: paths(stage, "outs") + paths(stage, "metrics") for name, stage in found.items()}
    order: TopologicalSorter[str] = TopologicalSorter()
    for name, stage in found.items():
        needs = paths(stage, "deps")
        before = [
            maker
            for maker, outs in makes.items()
            if any(need.is_relative_to(out) or out.is_relative_to(need) for need in needs for out in outs)
        ]
        order.add(name, *before)
    return list(order.static_order())


def paths(stage: Mapping[str, Any], key: str) -> list[PurePosixPath]:
    """Return the paths under a key of a stage; each is a string, or a mapping from the path to its options."""
    entries = stage.get(key, [])
    return [PurePosixPath(entry if isinstance(entry, str) else next(iter(entry))) for entry in entries]


def reproduce(
    write: Write,
    stage: str | None = None,
    *,
    alone: bool = False,
    environment: Mapping[str, str] | None = None,
    folder: Path = Path(),
) -> dict[str, Outcome]:
    """Bring stages up to date with `dvc repro`; return the outcome of each stage.

    `write` receives what DVC and the stages print, as it comes; `environment` is added to theirs. Raises BusyError
    where another process has the lock, StageError if a stage fails. Whatever ends this call, or kills its process,
    ends the stages.
    """
    target = [] if stage is None else ["--single-item", stage] if alone else [stage]
    output = Output(write)
    code = _run(["repro", *target], environment or {}, output, folder)
    if code and any(map(_BUSY.search, output.lines)):
        raise BusyError("DVC is at work in this folder already. Wait for it and try again.")
    if code:
        raise StageError(output.failure(code), output.transient())
    return output.outcomes()


def dvc(*arguments: str, folder: Path = Path()) -> str:
    """Run a DVC command in a folder and return its output; raise SageError with DVC's message if it fails."""
    output = Output(lambda text: None)
    code = _run(list(arguments), {}, output, folder)
    if code and any(map(_BUSY.search, output.lines)):
        raise BusyError("DVC is at work in this folder already. Wait for it and try again.")
    if code:
        raise SageError(f"dvc {' '.join(arguments)} failed: " + "\n".join(output.lines).removeprefix("ERROR: "))
    return "\n".join(output.lines)


def objects(*remote: str) -> Any:
    """Return the output of `flows.versioning.objects` for the cache and, if given, a remote ("": the default one).

    Raises SageError if that cannot be read.
    """
    command = [sys.executable, "-m", "flows.versioning.objects", *remote]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode:
        place = "cache and remote" if remote else "the cache"
        raise SageError(f"DVC cannot read {place}: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    return json.loads(done.stdout)


def stale() -> list[str]:
    """Return the stages that are not up to date; raise SageError if DVC cannot say."""
    locks.mend()
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode:
        raise SageError(done.stderr.strip().removeprefix("ERROR: "))
    return [name for name in stages() if name in json.loads(done.stdout)]


class Output:
    """Reader of `dvc repro` output: passes it on as it comes and finds the state of each stage."""

    def __init__(self, write: Write) -> None:
        """`write` receives every piece of text."""
        self._write = write
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._seen: dict[str, tuple[State, float]] = {}
        self._line = ""
        self.lines: deque[str] = deque(maxlen=200)  # the last ones, for the reason of a failure

    def feed(self, piece: bytes) -> None:
        """Add the next bytes of output."""
        text = self._decode(piece)
        self._write(text)
        *whole, rest = (self._line + text).split("\n")
        self._line = rest[-_LONGEST_LINE:]  # a progress bar redraws one line for hours, so its length must be bounded
        for line in whole:
            self.lines.append(line)
            if match := _LINE.search(line):
                # A stage lasts from its line to the line of the next stage.
                self._seen[match["stage"]] = _STATES[match["what"]], time.monotonic()

    def failure(self, code: int) -> str:
        """Return a message that names the stage that failed and the reason, if the output contains them."""
        # The stage prints "error:" with the reason, then DVC prints "ERROR:" with the name of the stage.
        said = [line for line in self.lines if line.lower().startswith("error: ")] or [
            f"error: dvc ended with code {code}"
        ]
        named = re.search(r"failed to reproduce '([^']+)'", said[-1])
        what = f"stage {named[1]} failed" if named else "the graph could not be run"
        return f"{what}: {said[0][len('error: ') :]}\nFix the cause and run again; finished stages are not repeated."

    def transient(self) -> bool:
        """Return whether the failed stage was killed or crashed, instead of reporting an error."""
        ended = [match[2] for match in map(_FAILED.search, self.lines) if match and match[2]]
        return bool(ended) and int(ended[-1]) not in FINAL

    def outcomes(self) -> dict[str, Outcome]:
        """Return the outcome of each stage so far."""
        starts = [start for _, start in self._seen.values()]
        ends = [*starts[1:], time.monotonic()]
        return {
            name: Outcome(state, end - start)
            for (name, (state, start)), end in zip(self._seen.items(), ends, strict=True)
        }


def _run(arguments: list[str], environment: Mapping[str, str], output: Output, folder: Path) -> int:
    """Run a dvc command; return its exit code."""
    locks.mend(folder)
    command = [sys.executable, "-m", "dvc", *arguments]
    return leash.run(command, output.feed, environment=_environment() | dict(environment), folder=folder)


def _environment() -> dict[str, str]:
    """Return an environment in which `python` is this interpreter, and stages draw progress bars on a terminal."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment["DVC_NO_ANALYTICS"] = "true"
    if sys.stderr.isatty():
        # Stages write to a pipe, which rich would not recognise as a terminal.
        environment["TTY_COMPATIBLE"] = "1"
        environment["COLUMNS"] = str(os.get_terminal_size(sys.stderr.fileno()).columns)
    return environment
