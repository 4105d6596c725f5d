"""Runs with other parameters: a DVC experiment in a temporary git work tree, so that the checkout does not change.

The work tree contains the checkout's commit, without uncommitted changes, and what `dvc add` tracks in it. It shares
the checkout's DVC cache, so stages that have run with the same parameters are restored, not repeated. At the end the
tree is removed; the experiment stays (`dvc exp show`, `dvc exp apply NAME`).
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.versioning import locks, repository
from flows.versioning.locks import BusyError
from sage.config import load_params
from sage.errors import ConfigurationError, SageError

TREES = Path("work/experiments")
_NEW = 60  # seconds in which a new tree may not be locked yet
# The part of `dvc exp run -S` that changes params.yaml. It runs in a separate process, like every use of DVC here. On
# standard output it names each override before it applies it, so that the one that fails can be told.
_SET = """
import sys
from dvc.utils.cli_parse import to_path_overrides
from dvc.utils.hydra import apply_overrides
for number, override in enumerate(sys.argv[1:]):
    print(number, flush=True)
    try:
        for path, overrides in to_path_overrides([override]).items():
            if path != "params.yaml":
                raise ValueError(f"Error: parameters are in params.yaml, not in {path}")
            apply_overrides(path, overrides)
    except Exception as error:
        sys.exit(str(error.__cause__ or error))
"""


def check_name(name: str) -> None:
    """Raise ConfigurationError if a name cannot be the name of an experiment and of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", name):
        raise ConfigurationError(f"experiment {name!r}: use letters, digits, '-' and '_', at most 80")


def set_parameters(folder: Path, overrides: Sequence[str]) -> None:
    """Change a folder's params.yaml as `dvc exp run -S` does; raise ConfigurationError if an override is invalid."""
    command = [sys.executable, "-c", _SET, *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        # DVC prints several lines: the first says what is wrong, another names the key.
        said = [line for line in done.stderr.splitlines() if line.startswith(("Could not", "Key ", "Error", "no "))]
        reason = " ".join(said or done.stderr.split())
        named = f"override {overrides[int(done.stdout.split()[-1])]!r}: " if done.stdout else ""
        raise ConfigurationError(f"{named}{reason}")
    try:
        load_params(folder / "params.yaml")
    except ConfigurationError as error:
        raise ConfigurationError(f"with {', '.join(overrides)}: {error}") from error


@contextmanager
def work_tree(name: str) -> Iterator[Path]:
    """Yield a temporary work tree of this folder's commit; first remove the trees that killed runs left.

    Raises SageError if there is no commit yet, or if a tree or an experiment of this name exists.
    """
    check_name(name)
    _sweep()
    tree = TREES / name
    if tree.exists():
        raise SageError(f"{tree} exists: experiment {name} is running. Choose another name, or wait for it.")
    _git("worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
    try:
        with locks.only_writer(tree):
            cache = repository.dvc("cache", "dir")
            (tree / ".dvc/config.local").write_text(f"[cache]\n    dir = {Path(cache).resolve()}\n", encoding="utf-8")
            _bring_data(tree)
            yield tree
    finally:
        _remove(tree)


def save(tree: Path, name: str) -> None:
    """Save the state of a work tree as a DVC experiment, which is visible in the checkout too."""
    repository.dvc("exp", "save", "--name", name, folder=tree)


def _bring_data(tree: Path) -> None:
    """Check out what `dvc add` tracks; outputs of stages are restored when they are needed."""
    if added := sorted(str(path.relative_to(tree)) for path in tree.rglob("*.dvc") if path.is_file()):
        repository.dvc("checkout", *added, folder=tree)


def _sweep() -> None:
    """Remove the trees that no process has locked."""
    for tree in TREES.iterdir() if TREES.is_dir() else ():
        if time.time() - tree.stat().st_mtime < _NEW:
            continue  # its run may not have locked it yet
        try:
            with locks.only_writer(tree):
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
