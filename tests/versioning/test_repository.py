import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE, wait_for

from flows.versioning import repository
from flows.versioning.locks import BusyError
from flows.versioning.repository import StageError
from sage.errors import ConfigurationError, SageError

# Two stages, written in the other order than they must run; what they do is said by the environment.
GRAPH = """
stages:
  second:
    cmd: python step.py made/first made/second
    deps: [made/first, step.py]
    outs: [made/second]
  first:
    cmd: python step.py input made/first
    deps: [input, step.py]
    outs: [made/first]
"""
STEP = """
import os, sys, time
from pathlib import Path

source, target = map(Path, sys.argv[1:])
if os.environ.get("FAIL") == target.name:
    sys.exit("error: the reason that the stage gave")
if os.environ.get("WAIT") == target.name:
    Path("pid").write_text(str(os.getpid()))
    while True:
        if "QUIET" not in os.environ:
            print("working", flush=True)
        time.sleep(0.2)
target.parent.mkdir(exist_ok=True)
target.write_text(source.read_text() + target.name)
"""
CALL = """
import sys
from flows.versioning import locks, repository
from flows.terminal import exit_on_error

def main():
    with locks.only_writer():
        repository.reproduce(sys.stdout.write)

exit_on_error(main)
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A git repository with a DVC graph of two stages."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "dvc.yaml").write_text(GRAPH)
    (folder / "step.py").write_text(STEP)
    (folder / "input").write_text("in ")
    subprocess.run(["git", "init", "-q"], check=True, cwd=folder)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True, cwd=folder)
    return folder


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    """A copy of that repository as the working folder."""
    folder = tmp_path / "project"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    return folder


def states(*arguments, alone=False, **environment):
    outcomes = repository.reproduce(lambda text: None, *arguments, alone=alone, environment=environment)
    return {name: outcome.state for name, outcome in outcomes.items()}


def test_the_shipped_graph_is_in_the_order_of_the_design():
    graph = Path(__file__).parents[2] / "dvc.yaml"
    assert repository.stages(graph) == ["prepare", "group", "finetune", "generate", "evaluate"]


def test_the_order_follows_what_stages_need_not_how_they_are_written(project):
    assert repository.stages() == ["first", "second"]


def test_no_graph_says_where_to_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="top folder"):
        repository.stages()


@pytest.mark.slow
def test_what_became_of_each_stage_is_known(project):
    assert repository.stale() == ["first", "second"]
    assert states() == {"first": "executed", "second": "executed"}
    assert (project / "made/second").read_text() == "in firstsecond"
    assert repository.stale() == []
    assert states() == {"first": "up to date", "second": "up to date"}
    assert states("first") == {"first": "up to date"}
    assert states("second") == {"first": "up to date", "second": "up to date"}
    assert states("second", alone=True) == {"second": "up to date"}
    (project / "made/second").unlink()
    assert states("second", alone=True) == {"second": "restored"}
    (project / "input").write_text("other ")
    assert states() == {"first": "executed", "second": "executed"}


def test_output_is_passed_on_as_it_comes(project):
    pieces = []
    repository.reproduce(pieces.append)
    assert "Running stage 'first':" in "".join(pieces)


@pytest.mark.slow
def test_a_failing_stage_is_named_with_its_own_reason_and_nothing_done_is_repeated(project):
    with pytest.raises(SageError, match="stage second failed: the reason that the stage gave"):
        states(FAIL="second")
    assert states() == {"first": "up to date", "second": "executed"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["interrupted", "told to end", "killed"]
)
def test_a_run_that_ends_early_leaves_no_process_and_no_lock(project, number):
    command = [sys.executable, "-c", CALL]
    waiting = os.environ | {"WAIT": "first", "QUIET": "1"}
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=waiting)
    wait_for(lambda: (project / "pid").exists() and (project / "pid").read_text(), process=run)
    stage = int((project / "pid").read_text())
    run.send_signal(number)
    run.wait(PATIENCE)
    wait_for(lambda: not Path(f"/proc/{stage}").exists())
    assert states() == {"first": "executed", "second": "executed"}


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_told_to_come_again(project):
    run = subprocess.Popen([sys.executable, "-c", CALL], stdout=subprocess.DEVNULL, env=os.environ | {"WAIT": "first"})
    try:
        wait_for(lambda: (project / "pid").exists() and (project / "pid").read_text(), process=run)
        second = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, timeout=PATIENCE)
        assert second.returncode == 75
        assert "another pipeline run works in this folder" in second.stderr
        # DVC by hand holds only its own lock.
        with pytest.raises(BusyError, match="DVC is at work"):
            states()
    finally:
        run.terminate()
        run.wait(PATIENCE)


@pytest.mark.parametrize("call", [states, repository.stale])
def test_a_list_of_used_files_that_a_kill_cut_off_is_mended(project, call):
    (project / ".dvc/tmp/rwlock").write_text("")
    call()


def test_the_revision_says_when_files_differ_from_it(project):
    assert repository.revision() == "none"
    commit = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qam", "x"]
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run(commit, check=True)
    clean = repository.revision()
    assert len(clean) == 40
    (project / "input").write_text("changed")
    assert repository.revision() == f"{clean}-dirty"


@pytest.mark.parametrize(
    ("how", "again"), [("sys.exit('error: mend it')", True), ("sys.exit(2)", False), ("os.kill(os.getpid(), 9)", True)]
)
def test_a_stage_that_died_is_told_from_one_that_says_what_to_mend(project, how, again):
    (project / "step.py").write_text(f"import os, sys; {how}")
    with pytest.raises(StageError) as caught:
        states()
    assert caught.value.transient is again
