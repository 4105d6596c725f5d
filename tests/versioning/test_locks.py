import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from flows.versioning import locks
from flows.versioning.locks import BusyError

# What a process that was killed while it wrote leaves.
CUT_OFF = ["", '{"write": {"made": {"pid": 1, "c', "null"]


@pytest.fixture
def users(tmp_path, monkeypatch):
    """DVC's list of who uses which file, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    return tmp_path / ".dvc/tmp/rwlock"


def test_a_run_that_waits_gets_the_folder_when_its_holder_is_killed(users):
    code = "from flows.versioning import locks\nwith locks.only_writer(): print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match="another pipeline run"), locks.only_writer():
            pass
        waits = []
        with locks.only_writer(on_wait=lambda: [waits.append(holder.poll()), holder.kill()]):
            assert holder.wait(30) == -signal.SIGKILL
    assert waits == [None]


@pytest.mark.parametrize("left", CUT_OFF)
def test_a_list_that_cannot_be_read_is_deleted(users, left):
    users.write_text(left)
    locks.mend()
    assert not users.exists()


def test_a_list_that_can_be_read_stays(users):
    locks.mend()
    whole = '{"read": {"made": [{"pid": 1, "cmd": "dvc repro"}]}}'
    users.write_text(whole)
    locks.mend()
    assert users.read_text() == whole


def test_a_list_that_names_a_process_younger_than_itself_is_deleted(users):
    users.write_text(json.dumps({"write": {"made": {"pid": os.getpid(), "cmd": "dvc repro"}}, "read": {}}))
    locks.mend()
    assert users.exists()
    os.utime(users, (0, 0))
    locks.mend()
    assert not users.exists()


def test_a_list_that_is_being_written_stays(users):
    users.write_text("")
    with (users.parent / "rwlock.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        locks.mend()
    assert users.exists()


def test_a_list_that_cannot_be_read_stays_while_dvc_works_in_the_folder(users, tmp_path):
    users.write_text("")
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "dvc").write_text("print(flush=True); input()")
    with subprocess.Popen(
        [sys.executable, "../dvc", "repro"], cwd=inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as work:
        work.stdout.readline()
        with pytest.raises(BusyError, match=f"process {work.pid}, .*dvc repro"):
            locks.mend()
        work.kill()
    locks.mend()
    assert not users.exists()
