"""Everything on a simulated accelerator (`tests/simulated_device_cases.py`), in a process of its own.

torch learns of a device once in a process, before its first gradient, and then other tests would see it, too.
"""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_every_case_holds_on_the_simulated_accelerator():
    cases = TESTS / "simulated_device_cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", cases]
    found = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
