"""`sage up` for real: it starts everything on loopback, proves itself, and leaves no process."""

import os
import signal
import socket
import subprocess
import sys

import operated
import psutil
import pytest
import requests
from waiting import PATIENCE, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return operated.project(tmp_path_factory.mktemp("up") / "project")


def start_up(project, *options):
    port, tracking = operated.free_port(), operated.free_port()
    command = [sys.executable, "-c", "from flows.cli import main; main()", "up"]
    environment = {name: value for name, value in os.environ.items() if name != "SAGE_TRACKING_URI"}
    process = subprocess.Popen(
        [*command, "--port", str(port), "--tracking-port", str(tracking), *options],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process, port, tracking


def status(address, host):
    return requests.get(address, headers={"Host": host}, timeout=30).status_code


def gone(processes):
    return not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_check_runs_a_deployment_on_a_worker_and_ends_with_0(project):
    process, _, _ = start_up(project, "--check")
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert "a run of sage-pipeline/data completed on a worker" in said
    assert (project / "made/prepare").exists()
    assert not (project / "made/group").exists()


def test_it_listens_on_loopback_and_ctrl_c_ends_all_that_it_started(project):
    process, port, tracking = start_up(project)
    for line in process.stdout:
        if "Ctrl-C" in line:
            break
    assert process.poll() is None
    started = psutil.Process(process.pid).children(recursive=True)
    listens = {
        (connection.laddr.ip, connection.laddr.port)
        for one in started
        for connection in one.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {("127.0.0.1", port), ("127.0.0.1", tracking)} <= listens
    assert {ip for ip, _ in listens} == {"127.0.0.1"}
    for number, path in ((port, "api/health"), (tracking, "api/2.0/mlflow/experiments/get?experiment_id=0")):
        address = f"http://127.0.0.1:{number}/{path}"
        assert [status(address, f"{host}:{number}") for host in ("127.0.0.1", "localhost")] == [200, 200]
        assert status(address, "stranger.example") in (400, 403), path
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    took = wait_for(lambda: gone(started))
    print(f"\nall ended {took:.1f} s after it")


def test_a_taken_port_is_named(project):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [
            sys.executable,
            "-c",
            "from flows.cli import main; main()",
            "up",
            "--port",
            str(taken.getsockname()[1]),
        ]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is taken; choose another with --port" in done.stderr
