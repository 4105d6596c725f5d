import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from waiting import Clock

from flows.terminal import Lines

PROGRAM = """
import signal, sys
from pathlib import Path
from flows.terminal import progress, run
from sage.errors import DataError, DivergedError

def main(end: str = "well") -> None:
    if end == "error":
        raise DataError("data/raw is empty; put pictures there")
    if end == "diverged":
        raise DivergedError("step 3: loss is nan")
    if end == "fault":
        raise ZeroDivisionError
    if end == "folder":
        Path("/proc/none/file").write_text("x")
    with progress(5, "counting") as advance:
        for _ in range(5):
            advance(1)
            if end == "wait":
                print("ready", flush=True)
                signal.pause()

run(main)
"""


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr("flows.terminal.time", found)
    return found


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("error", 2, "error: data/raw is empty; put pictures there\n"),
        ("diverged", 4, "error: step 3: loss is nan\n"),
        ("folder", 2, "error: [Errno 2] No such file or directory: '/proc/none/file'\n"),
    ],
)
def test_what_a_person_can_mend_is_one_message(end, code, message):
    done = program("--end", end)
    assert (done.returncode, done.stderr) == (code, message)


def test_a_fault_of_ours_keeps_its_traceback():
    done = program("--end", "fault")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_at_once(number, code):
    command = [sys.executable, "-c", PROGRAM, "--end", "wait"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in errors


def test_progress_in_a_log_is_a_closing_line_when_it_is_quick():
    done = program()
    assert re.fullmatch(r"counting: 5/5 \(100%, took \d+s\)\n", done.stderr)


def test_progress_on_a_terminal_is_a_bar():
    reader, writer = pty.openpty()
    with os.fdopen(writer, "wb") as terminal:
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
        subprocess.run([sys.executable, "-c", PROGRAM], stderr=terminal, check=True, env=environment)
    with os.fdopen(reader, "rb") as shown:
        text = shown.read1(65536).decode()
    assert "━" in text
    assert "5/5" in text


def test_lines_come_no_more_often_than_asked(capsys, clock):
    lines = Lines(1000, "work", every=5)
    for _ in range(500):
        clock.now += 0.125
        lines.advance(1)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 500 * 0.125 // 5
    assert all(re.fullmatch(r"work: \d+/1000 \(\d+%, [\d.]+/s, (\d+m)?\d+s left\)", line) for line in printed)


def test_the_rate_of_a_resumed_run_is_not_that_of_the_process_before(capsys, clock):
    lines = Lines(100_000, "work", every=0.0)
    lines.advance(90_000)
    for _ in range(5):
        clock.now += 0.02
        lines.advance(1)
    rate = float(re.search(r"([\d.]+)/s, ", capsys.readouterr().err.splitlines()[-1])[1])
    assert rate == pytest.approx(50)


def test_no_closing_line_claims_an_end_that_was_not(capsys):
    from flows.terminal import progress

    with pytest.raises(ValueError, match="stop"), progress(10, "work") as advance:
        advance(3)
        raise ValueError("stop")
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["quiet(); import sage.torchvision_ops, diffusers", "import sage.torchvision_ops, diffusers; quiet()"]
)
def test_bars_and_warnings_of_libraries_stay_away_whenever_they_are_imported(order):
    code = f"""
from flows.terminal import quiet
{order}
import transformers
from diffusers.utils import logging
print(list(logging.tqdm([1, 2], desc="Loading pipeline components...")), list(transformers.utils.logging.tqdm([3])))
for library in (diffusers, transformers):
    library.utils.logging.get_logger(f"{{library.__name__}}.any").warning("a warning")
"""
    clean = {name: value for name, value in os.environ.items() if "PROGRESS" not in name and "TQDM" not in name}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[1, 2] [3]\n", "")
