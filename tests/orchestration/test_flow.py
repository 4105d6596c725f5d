"""The whole job in small, on a real Prefect server with a real database: flow, command and `dvc repro` agree."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import operated
import psutil
import pytest
import small
from operated import ask
from waiting import wait_for

from flows.tracking import runs
from sage.evaluation.arms import ARMS
from sage.files import sha256, sha256_tree

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of the interface of a Prefect server of our own, on loopback with a fresh database."""
    with operated.server(tmp_path_factory.mktemp("prefect")) as address:
        yield address


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return small.project(tmp_path_factory.mktemp("flow") / "project")


@pytest.fixture(scope="module")
def flow_run(server, project):
    """The answer of the flow's first run; its stages execute."""
    return run_flow(server, project)


def run_flow(server: str, project: Path) -> dict[str, Any]:
    """Run the flow as a worker does: in a process of its own, in the project's folder, against the running server."""
    code = (
        "import json; from flows.orchestration.graph import sage_pipeline; print('ANSWER', json.dumps(sage_pipeline()))"
    )
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
    files = ["dvc.lock", *(f"metrics/{stage}.json" for stage in [*small.STAGES, "headline"])]
    files += ["plots/losses.csv", "plots/frontier.csv"]
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
    assert {arm.label for arm in ARMS.values()} <= set(artifact(server, "arms")[0])
    assert artifact(server, "gates")[0]["verdict"] == "passed"
    assert "report/index.html" in artifact(server, "report")
    assert artifact(server, "pictures").startswith("data:image/jpeg;base64,")
    assert artifact(server, "generate-generating") == 100.0
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
        assert runs.run_of(client, parent.info.experiment_id, project / f"metrics/{stage}.json") == run.info.run_id
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


def test_a_fresh_clone_pulls_and_judges_without_training_again(flow_run, project, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(project), str(clone)], check=True)
    # What a commit of the results would carry.
    shutil.copy(project / "dvc.lock", clone)
    for folder in ("metrics", "plots"):
        shutil.copytree(project / folder, clone / folder)
    store = [sys.executable, "-m", "dvc", "remote", "add", "--local", "--default", "store", str(tmp_path / "store")]
    for folder in (project, clone):
        subprocess.run(store, cwd=folder, check=True, capture_output=True)
    for folder, *command in ((project, "push"), (clone, "pull"), (clone, "verify", "--remote")):
        done = small.sage(folder, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    small.set_params(clone, evaluate__resamples=150)
    done = small.sage(clone, "run", "evaluate")
    assert "executed=1 cached=4" in done.stdout, done.stderr


def start_flow(server: str, project: Path, code: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=project,
        env=small.environment(project) | {"PREFECT_API_URL": server},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def champion(project: Path) -> str | None:
    rows = [line.split("│") for line in small.sage(project, "compare").stdout.splitlines()]
    return next((row[1].strip() for row in rows if len(row) > 2 and "champion" in row[2]), None)


def test_a_promotion_waits_for_a_person_who_sees_figures_and_pictures(flow_run, server, project):
    code = (
        "from flows.orchestration.versions import promote_version; from flows.orchestration.forms import Promotion\n"
        "print(promote_version(Promotion(ask=True, prompts=['red circle', 'blue ring'])))"
    )
    paused = {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}}
    for answer, expected in ((False, None), (True, "1")):
        process = start_flow(server, project, code)
        wait_for(lambda: ask(server, "flow_runs/filter", paused), process=process)
        (run,) = (row["id"] for row in ask(server, "flow_runs/filter", paused))

        def form(run=run) -> str:
            rows = ask(server, f"flow_runs/{run}/input/filter", {"prefix": "paused", "limit": 10})
            return next((row["value"] for row in rows if row["key"].endswith("description")), "")

        wait_for(form, process=process)  # it comes a moment after the state
        shown = form()
        assert "Make version 1 champion?" in shown
        assert "| kernel_distance |" in shown
        assert "data:image/jpeg;base64," in shown
        assert champion(project) is None
        ask(server, f"flow_runs/{run}/resume", {"run_input": {"promote": answer, "by": "Ada", "reason": "seen"}})
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert champion(project) == expected


def test_a_registered_version_is_judged_again_to_the_same_figures_beside_the_checkout(flow_run, server, project):
    before = fingerprint(project)
    code = (
        "from flows.orchestration.versions import evaluate_version; from flows.orchestration.forms import Judged\n"
        "print(evaluate_version(Judged(version='1')))"
    )
    process = start_flow(server, project, code)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert "'passed': True" in said
    assert fingerprint(project) == before
    mine, other = (json.loads(row["data"]) for row in arms(server))
    assert mine == other


def test_versions_of_other_held_out_sets_are_judged_on_todays_and_then_promoted(flow_run, project):
    """Version 1, the champion, was judged with seed 0 and version 2 is with seed 1: these figures do not compare."""
    small.set_params(project, generate__seeds=[1])
    done = small.sage(project, "run")
    assert done.returncode == 0, done.stderr
    assert "executed=2 cached=3" in done.stdout and "registered as version 2" in done.stdout
    client = runs.client(f"sqlite:///{project / 'mlflow.db'}")
    sets = [client.get_model_version("sage", number).tags["sage.heldout_set"] for number in ("1", "2")]
    assert sets[0] != sets[1]

    before = fingerprint(project)
    judged = small.sage(project, "judge", "champion", "2")
    assert judged.returncode == 0, judged.stdout + judged.stderr
    runs_of = {number: client.get_model_version("sage", number).tags["sage.judged_in"] for number in ("1", "2")}
    assert all(f"version {number}: run {run}" in judged.stdout for number, run in runs_of.items())
    assert {client.get_run(run).data.tags["sage.heldout_set"] for run in runs_of.values()} == {sets[1]}
    gates = next(line for line in judged.stdout.splitlines() if "Gates" in line)
    assert gates.count("passed") == 2

    promoted = small.sage(project, "promote")
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr
    # What `sage judge` recorded is taken: neither version is drawn again.
    assert runs_of == {number: client.get_model_version("sage", number).tags["sage.judged_in"] for number in runs_of}
    assert champion(project) == "2" and fingerprint(project) == before


def arms(server: str) -> list[dict[str, Any]]:
    """Return the tables of the first flow and of the latest one."""
    found = ask(server, "artifacts/filter", {"artifacts": {"key": {"any_": ["arms"]}}})
    found.sort(key=lambda row: row["created"])
    return [found[0], found[-1]]


def test_a_stricter_gate_repeats_the_verdict_only_and_registers_nothing(flow_run, project):
    gate = {"metric": "nfe_per_image", "reference": "independent", "worse_by_at_most": -0.99, "relative": True}
    small.set_params(project, evaluate__gates=[gate])
    done = small.sage(project, "run")
    assert done.returncode == 0, done.stderr
    assert "executed=1 cached=4" in done.stdout
    assert "not registered, because a gate failed" in done.stdout
    assert "FAILED" in done.stdout


def test_a_training_that_is_killed_is_tried_again_and_goes_on_where_it_was(flow_run, server, project):
    small.set_params(project, finetune__steps=70)
    code = (
        "from flows.orchestration.graph import sage_pipeline; from flows.orchestration.forms import Range\n"
        "print(sage_pipeline(Range(until='finetune')))"
    )
    process = start_flow(server, project, code)
    wait_for(lambda: list(project.glob("work/finetune/*/step-*")), process=process)
    (training,) = [
        found
        for found in psutil.Process(process.pid).children(recursive=True)
        if found.cmdline()[1:3] == ["-m", "flows.stages.finetune"]
    ]
    training.kill()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    (task,) = ask(server, "task_runs/filter", {"task_runs": {"name": {"any_": ["finetune"]}}, "sort": "END_TIME_DESC"})[
        :1
    ]
    assert task["run_count"] == 2
    client = runs.client(f"sqlite:///{project / 'mlflow.db'}")
    home = client.get_experiment_by_name("sage").experiment_id
    last = client.search_runs([home], "tags.`sage.stage` = 'finetune'", order_by=["start_time DESC"])[0]
    curve = client.get_metric_history(last.info.run_id, "loss")
    assert [point.step for point in curve] == list(range(10, 71, 10))
    small.set_params(project, finetune__steps=2)


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
