"""The whole job in small, on a real Prefect server with a real database: flow, command and `dvc repro` agree."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import small

from flows.tracking import runs
from sage.files import sha256, sha256_tree

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of the interface of a Prefect server of our own, on loopback with a fresh database."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"PREFECT_HOME": str(home)}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}/api"
        end = time.monotonic() + 180
        while not answers(address):
            assert process.poll() is None and time.monotonic() < end, (home / "log").read_text()
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def answers(address: str) -> bool:
    try:
        return ask(address, "health") is True
    except urllib.error.URLError:
        return False


def ask(address: str, path: str, body: object = None) -> Any:
    """Return what the server's interface answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return small.project(tmp_path_factory.mktemp("flow") / "project")


@pytest.fixture(scope="module")
def flow_run(server, project):
    """The answer of the flow's first run; its stages execute."""
    return run_flow(server, project)


def run_flow(server: str, project: Path) -> dict[str, Any]:
    """Run the flow as a worker does: in a process of its own, in the project's folder, against the running server."""
    code = "import json; from flows.pipeline import sage_pipeline; print('ANSWER', json.dumps(sage_pipeline()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env=small.environment(project) | {"PREFECT_API_URL": server},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("ANSWER"))[len("ANSWER ") :])


def fingerprint(project: Path) -> dict[str, str]:
    """Return a hash for everything that the job leaves."""
    folders = ["data/prepared", "data/groups", "models/sage", "data/generated", "report"]
    files = ["dvc.lock", *(f"metrics/{stage}.json" for stage in small.STAGES)]
    return {name: sha256_tree(project / name) for name in folders} | {name: sha256(project / name) for name in files}


def artifact(server: str, key: str) -> Any:
    """Return the content of the only artifact under a key."""
    (found,) = ask(server, "artifacts/filter", {"artifacts": {"key": {"any_": [key]}}})
    return json.loads(found["data"]) if found["type"] == "table" else found["data"]


def test_the_flow_does_the_whole_job(flow_run, project):
    assert [stage["stage"] for stage in flow_run["stages"]] == small.STAGES
    assert {stage["state"] for stage in flow_run["stages"]} == {"executed"}
    assert flow_run["registration"] == {"version": "1", "new": True, "reasons": []}
    page = (project / "report/index.html").read_text()
    assert "kernel" in page.lower()


def test_prefect_shows_the_tables(flow_run, server):
    assert [row["stage"] for row in artifact(server, "stages")] == small.STAGES
    assert {"independent", "independent_same_nfe", "shared", "sage"} <= set(artifact(server, "arms")[0])
    assert artifact(server, "gates")[0]["verdict"] == "passed"
    assert "report/index.html" in artifact(server, "report")
    runs_of_tasks = ask(server, "task_runs/filter", {})
    assert {run["name"] for run in runs_of_tasks} > set(small.STAGES)
    assert {run["state_type"] for run in runs_of_tasks} == {"COMPLETED"}


def test_mlflow_holds_one_parent_with_a_run_for_each_stage(flow_run, project):
    uri = f"sqlite:///{project / 'mlflow.db'}"
    client = runs.client(uri)
    found = client.search_runs([client.get_experiment_by_name("sage").experiment_id])
    parent = next(run for run in found if "sage.pipeline" in run.data.tags)
    children = {run.data.tags["sage.stage"]: run for run in found if "mlflow.parentRunId" in run.data.tags}
    assert set(children) == set(small.STAGES)
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert {run.info.status for run in found} == {"FINISHED"}
    evaluate = json.loads((project / "metrics/evaluate.json").read_text())
    assert parent.data.metrics["sage/nfe_per_image"] == evaluate["arms"]["sage"]["nfe_per_image"]["value"]
    for stage, run in children.items():
        assert json.loads((project / f"metrics/{stage}.json").read_text())["run_id"] == run.info.run_id
    assert client.list_artifacts(children["evaluate"].info.run_id, "images")


def test_a_second_run_of_any_kind_executes_nothing_and_changes_nothing(flow_run, server, project):
    before = fingerprint(project)
    command = small.sage(project, "run")
    assert command.returncode == 0, command.stderr
    assert "executed=0 cached=5" in command.stdout
    assert "registered as version 1 before" in command.stdout
    assert fingerprint(project) == before

    again = run_flow(server, project)
    assert again["executed"] == 0
    assert again["registration"]["new"] is False
    assert fingerprint(project) == before

    environment = small.environment(project) | {"SAGE_TRACKING_URI": "off"}
    dvc = [sys.executable, "-m", "dvc", "repro"]
    done = subprocess.run(dvc, cwd=project, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("didn't change, skipping") == 5
    assert fingerprint(project) == before


def test_a_stricter_gate_repeats_the_verdict_only_and_registers_nothing(flow_run, project):
    gate = {"metric": "nfe_per_image", "reference": "independent", "worse_by_at_most": -0.99, "relative": True}
    small.set_params(project, evaluate__gates=[gate])
    done = small.sage(project, "run")
    assert done.returncode == 0, done.stderr
    assert "executed=1 cached=4" in done.stdout
    assert "not registered, because a gate failed" in done.stdout
    assert "FAILED" in done.stdout


def test_a_broken_picture_of_a_user_costs_its_row_and_no_more(flow_run, project):
    (project / "data/raw/red-circle.png").write_bytes(b"no picture")
    done = small.sage(project, "run", "prepare")
    assert done.returncode == 0, done.stderr
    found = json.loads((project / "metrics/prepare.json").read_text())
    assert found["rows"] == found["kept"] + found["rejected"] + found["duplicates"] == 48
    assert found["reasons"] == {"decode_error": 1}


@pytest.mark.parametrize("left", [[], ["metadata.jsonl"]], ids=["empty folder", "no pictures"])
def test_no_usable_data_is_one_message_and_leaves_nothing(project, left):
    raw = project / "data/raw"
    for path in list(raw.iterdir()):
        if path.name not in left:
            path.unlink()
    done = small.sage(project, "run", "prepare")
    assert done.returncode == 2
    assert "error: stage prepare failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "data/prepared").exists()
