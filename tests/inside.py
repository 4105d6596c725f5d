"""Commands of `sage` and `dvc`, and the stages that they start, run in the test's own process.

A process of its own for each would import torch, diffusers and DVC again, which is most of the time of such a test.
"""

import contextlib
import io
import os
import runpy
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
from dvc.cli import main as dvc
from dvc.stage import run as stage_run
from dvc.stage.exceptions import StageCmdFailedError

from flows import leash
from flows.cli import main as sage


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    code: int
    said: str


@dataclass
class Inside:
    """Runs commands; `stages` names the stages that were run, in order."""

    stages: list[str] = field(default_factory=list)

    def __call__(self, command: str) -> Done:
        """Run `sage ...` or `dvc ...` in this process, anything else in a shell."""
        program, *arguments = shlex.split(command)
        if program == "sage":
            return _ended(sage, "sage", arguments)
        if program == "dvc":
            return self.dvc(arguments)
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout + done.stderr)

    def dvc(self, arguments: Sequence[str]) -> Done:
        """Run DVC."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="dvc|pygtrie")  # DVC's own affair
            return _ended(lambda: sys.exit(dvc(list(arguments))), "dvc", arguments)

    def stage(self, module: str, arguments: Sequence[str]) -> Done:
        """Run a module with its arguments, as `python -m` does."""
        self.stages.append(module.rpartition(".")[2])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
            return _ended(lambda: runpy.run_module(module, run_name="__main__"), module, arguments)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Inside:
    """What runs commands; `dvc repro`, `sage run` and `sage judge` run their stages in this process, too."""
    here = Inside()

    def of_dvc(executable: str, command: str, **kwargs: Any) -> None:
        _, _, module, *arguments = shlex.split(command)
        done = here.stage(module, arguments)
        print(done.said, end="")
        if done.code:
            raise StageCmdFailedError(command, done.code)

    def leashed(
        command: Sequence[str],
        feed: Callable[[bytes], None],
        *,
        environment: Mapping[str, str] | None = None,
        folder: object = None,
    ) -> int:
        _, _, module, *arguments = command
        with mock.patch.dict(os.environ, environment or {}):
            done = here.dvc(arguments) if module == "dvc" else here.stage(module, arguments)
        feed(done.said.encode())
        return done.code

    monkeypatch.setattr(stage_run, "_run", of_dvc)
    monkeypatch.setattr(leash, "run", leashed)
    return here


def _ended(call: Callable[[], object], program: str, arguments: Sequence[str]) -> Done:
    """Return how a program ended that ends by SystemExit, called with these arguments."""
    code: object = 0
    with _output() as said, mock.patch.object(sys, "argv", [program, *arguments]):
        handler = signal.getsignal(signal.SIGTERM)
        try:
            call()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
    return Done(code if isinstance(code, int) else 1, said.getvalue())


@contextlib.contextmanager
def _output() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said
