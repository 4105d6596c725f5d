"""The whole job in small, on a real Prefect server with a real database: flow, command and `dvc repro` agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
from prefect.testing.utils import prefect_test_harness

from flows import tracking
from flows.tracking import runs
from sage.files import sha256, sha256_tree

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return small.project(tmp_path_factory.mktemp("flow") / "project")


@pytest.fixture(scope="module")
def flow_run(server, project):
    """The answer of the flow's first run; its stages execute."""
    return run_flow(project)


def run_flow(project: Path) -> dict:
    """Run the flow as a worker does: in a process of its own, in the project's folder, against the running server."""
    from prefect.settings import PREFECT_API_URL

    code = "import json; from flows.pipeline import sage_pipeline; print('ANSWER', json.dumps(sage_pipeline()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env=small.environment(project) | {"PREFECT_API_URL": PREFECT_API_URL.value()},
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


def read_artifacts() -> dict[str, object]:
    from prefect.artifacts import Artifact

    return {key: Artifact.get(key) for key in ("stages", "arms", "gates", "report")}


def test_the_flow_does_the_whole_job(flow_run, project):
    assert [stage["stage"] for stage in flow_run["stages"]] == small.STAGES
    assert {stage["state"] for stage in flow_run["stages"]} == {"executed"}
    assert flow_run["registration"] == {"version": "1", "new": True, "reasons": []}
    page = (project / "report/index.html").read_text()
    assert "kernel" in page.lower()


def test_prefect_shows_the_tables(flow_run):
    found = read_artifacts()
    assert all(found.values()), found
    assert [row["stage"] for row in json.loads(found["stages"].data)] == small.STAGES
    assert {"independent", "independent_same_nfe", "shared", "sage"} <= set(json.loads(found["arms"].data)[0])
    assert json.loads(found["gates"].data)[0]["verdict"] == "passed"


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


def test_a_second_run_of_any_kind_executes_nothing_and_changes_nothing(flow_run, project):
    before = fingerprint(project)
    command = small.sage(project, "run")
    assert command.returncode == 0, command.stderr
    assert "executed=0 cached=5" in command.stdout
    assert "registered as version 1 before" in command.stdout
    assert fingerprint(project) == before

    again = run_flow(project)
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


def test_the_flow_deploys_to_a_real_server(server, project):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    environment = small.environment(project) | {"PREFECT_API_URL": PREFECT_API_URL.value(), "PWD": str(project)}
    prefect = [str(Path(sys.executable).parent / "prefect"), "--no-prompt"]
    for arguments in (["work-pool", "create", "--type", "process", "sage"], ["deploy", "--all"]):
        done = subprocess.run([*prefect, *arguments], cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("sage-pipeline/local")
    assert deployment.work_pool_name == "sage"
    assert deployment.pull_steps == [{"prefect.deployments.steps.set_working_directory": {"directory": str(project)}}]


def test_tracking_here_is_off_unless_asked_for():
    assert os.environ["SAGE_TRACKING_URI"] == "off"
    assert tracking.address() is None
