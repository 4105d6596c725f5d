"""Where the time of the main job goes: python benchmarks/pipeline.py

Clones what is committed into a temporary folder, runs every stage there from nothing, registers, and repeats. Prints
seconds and peak memory, the resident sizes of all processes of the stage added up.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from flows.tracking import registry
from flows.versioning import repository
from sage.config import load_params

ROOT = Path(__file__).parents[1]


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds, and the most memory in GB that child processes had together, sampled ten times a second."""
    end, most = threading.Event(), [0]

    def watch() -> None:
        while not end.wait(0.1):
            most.append(sum(map(resident, psutil.Process().children(recursive=True))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        work()
    finally:
        end.set()
        watcher.join()
    return time.perf_counter() - start, max(most) / 1e9


def resident(process: psutil.Process) -> int:
    """Return a process's resident size in bytes, 0 when it ended meanwhile."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def show(text: str) -> None:
    """Pass on what a stage prints."""
    sys.stderr.write(text)


def main() -> None:
    """Measure and print."""
    command = [str(Path(sys.executable).parent / "sage")]
    table = Table("what", "seconds", "peak GB", title=f"the main job on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        os.chdir(folder)
        # The clone's own code, not the installed one; and a database of its own.
        os.environ |= {"PYTHONPATH": folder, "SAGE_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        jobs: dict[str, Callable[[], object]] = {
            stage: partial(repository.reproduce, show, stage, alone=True) for stage in repository.stages()
        }
        jobs |= {
            "register": lambda: registry.register(
                Path("models/sage"), Path("metrics"), Path("data/groups"), load_params()
            ),
            "dvc repro, up to date": lambda: repository.reproduce(show),
            "sage run, up to date": lambda: subprocess.run([*command, "run"], check=True),
            "sage --help": lambda: subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL),
        }
        total, most = 0.0, 0.0
        for name, job in jobs.items():
            seconds, memory = measure(job)
            table.add_row(name, f"{seconds:.1f}", f"{memory:.2f}", end_section=name in ("register",))
            if name in repository.stages() or name == "register":
                total, most = total + seconds, max(most, memory)
    table.add_row("all stages and register", f"{total:.1f}", f"{most:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
