"""`python -m benchmarks.data` runs to its end, every step in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.data import STEPS


@pytest.mark.slow
def test_every_step_is_measured():
    command = [sys.executable, "-m", "benchmarks.data", "70", "--size", "16"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    measured = {words[1]: float(words[3]) for words in lines if words[:1] == ["70"] and words[1] in STEPS}
    assert list(measured) == list(STEPS) and min(measured.values()) > 0
