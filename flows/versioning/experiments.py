"""Runs with other parameters: a DVC experiment in a work tree of its own, so that the checkout stays as it is.

The tree is git's, of the checkout's commit; what is not committed is not in it. It shares the checkout's DVC cache, so
a stage that was ever run with these parameters is restored, not repeated. What is left of it is the experiment:
`dvc exp show`, `dvc exp apply NAME`.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.versioning import repository
from flows.versioning.repository import BusyError
from sage.config import load_params
from sage.errors import ConfigurationError, SageError

TREES = Path("work/experiments")
_NEW = 60  # seconds
# DVC's own reading of `-S`, the part of `dvc exp run` that changes params.yaml, in a process, as all of DVC runs here.
_SET = """
import sys
from dvc.utils.hydra import apply_overrides
try:
    apply_overrides("params.yaml", sys.argv[1:])
except Exception as error:
    sys.exit(str(error.__cause__ or error))
"""


def check_name(name: str) -> None:
    """Raise ConfigurationError for a name that is no name of an experiment and of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", name):
        raise ConfigurationError(f"experiment {name!r}: use letters, digits, '-' and '_', at most 80")


def set_parameters(folder: Path, overrides: Sequence[str]) -> None:
    """Change a folder's params.yaml as `dvc exp run -S` does; raise ConfigurationError naming what is wrong."""
    for override in overrides:
        # One at a time, so that the message can name it.
        command = [sys.executable, "-c", _SET, override]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            # Of several lines the first says what, and one names the key.
            said = [line for line in done.stderr.splitlines() if line.startswith(("Could not", "Key ", "Error", "no "))]
            reason = " ".join(said or done.stderr.split())
            raise ConfigurationError(f"override {override!r}: {reason}")
    try:
        load_params(folder / "params.yaml")
    except ConfigurationError as error:
        raise ConfigurationError(f"with {', '.join(overrides)}: {error}") from error


@contextmanager
def work_tree(name: str) -> Iterator[Path]:
    """Yield a work tree of this folder's commit, which goes in the end; those that killed runs left go first.

    Raises SageError if there is no commit yet, or if a tree or an experiment of this name exists.
    """
    check_name(name)
    _sweep()
    tree = TREES / name
    if tree.exists():
        raise SageError(f"{tree} exists: experiment {name} is running. Choose another name, or wait for it.")
    _git("worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
    try:
        with repository.only_writer(tree):
            cache = repository.dvc("cache", "dir")
            (tree / ".dvc/config.local").write_text(f"[cache]\n    dir = {Path(cache).resolve()}\n", encoding="utf-8")
            yield tree
    finally:
        _remove(tree)


def save(tree: Path, name: str) -> None:
    """Keep the state of a work tree as the DVC experiment of this name, which the checkout sees too."""
    repository.dvc("exp", "save", "--name", name, folder=tree)


def _sweep() -> None:
    """Remove the trees that nobody works in."""
    for tree in TREES.iterdir() if TREES.is_dir() else ():
        if time.time() - tree.stat().st_mtime < _NEW:
            continue  # made a moment ago by a run that does not hold it yet
        try:
            with repository.only_writer(tree):
                _remove(tree)
        except BusyError:
            continue


def _remove(tree: Path) -> None:
    shutil.rmtree(tree)
    _git("worktree", "prune")


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SageError(f"git {' '.join(arguments[:2])} failed: {done.stderr.strip()}")
