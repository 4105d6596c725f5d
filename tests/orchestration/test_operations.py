"""How runs are operated, on a real Prefect server with a real worker: retries, cancelling, death, experiments."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import operated
import pytest
import requests
import tiny
import tiny_judges
from operated import artifacts, ask, start, state
from served import without_model
from waiting import PATIENCE, wait_for

from flows import leash
from sage.files import sha256_tree

pytestmark = pytest.mark.slow

DIRECT = """
from flows.orchestration.graph import sage_pipeline
from flows.orchestration.forms import Range
print(sage_pipeline(Range(until="group")))
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with operated.server(tmp_path_factory.mktemp("prefect")) as found:
        yield found


@pytest.fixture(scope="module")
def environment(address, tmp_path_factory):
    return os.environ | {
        "PREFECT_API_URL": address,
        "PREFECT_HOME": str(tmp_path_factory.mktemp("client")),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "SAGE_TRACKING_URI": "off",
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return operated.project(tmp_path_factory.mktemp("operated") / "project")


@pytest.fixture(scope="module")
def killed(address, environment, tmp_path_factory):
    """A folder, the run that was killed in it, and when; first of all, for it takes long to be seen."""
    folder = operated.project(tmp_path_factory.mktemp("killed") / "project")
    subprocess.run([sys.executable, "-m", "flows.orchestration"], env=environment, cwd=folder, check=True)
    pid = folder / "work-pid"
    waiting = environment | {"WAIT": "prepare", "PID": str(pid)}
    process = subprocess.Popen([sys.executable, "-c", DIRECT], env=waiting, cwd=folder, stdout=subprocess.DEVNULL)
    wait_for(lambda: pid.exists() and pid.read_text())
    (run,) = ask(address, "flow_runs/filter", {})
    # The server must know of a sign of life, or it would not miss the next ones.
    beats = {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}}, "limit": 1}
    wait_for(lambda: ask(address, "events/filter", beats)["events"])
    process.kill()
    process.wait()
    ended = wait_for(lambda: not Path(f"/proc/{pid.read_text()}").exists())
    print(f"\na killed run's stage ended after {ended:.1f} s")
    return folder, run["id"], time.monotonic()


@pytest.fixture(scope="module")
def worker(killed, address, environment, project):
    """The project, deployed, and a worker that takes its runs."""
    for arguments in (["work-pool", "create", "--type", "process", "sage"], ["deploy", "--all"]):
        command = [operated.PREFECT, "--no-prompt", *arguments]
        done = subprocess.run(
            command, env=environment | {"PWD": str(project)}, cwd=project, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    process = subprocess.Popen(
        [operated.PREFECT, "worker", "start", "--pool", "sage"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield project
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finished(address, run):
    return state(address, run) in ("Completed", "Failed", "Cancelled", "Crashed")


def states(address, run):
    return {row["stage"]: row["state"] for row in artifacts(address, run)["stages"]}


def untouched(project):
    """Return what a run in a tree of its own must leave as it is."""
    status = subprocess.run(["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True, check=True)
    files = {path: path.read_bytes() for path in project.iterdir() if path.is_file()}
    return status.stdout, files, sha256_tree(project / "made")


def test_deployments_are_those_of_the_file(worker, address):
    found = {d["name"]: d for d in ask(address, "deployments/filter", {})}
    assert set(found) == {"all", "data", "model", "evaluate", "generate", "promote", "promote-with-approval"}
    form = found["all"]["parameter_openapi_schema"]["definitions"]["Range"]["properties"]
    assert all(field["title"] and field["description"] for field in form.values())
    assert form["until"]["enum"] == ["prepare", "group", "finetune", "generate", "evaluate"]
    place = [{"prefect.deployments.steps.set_working_directory": {"directory": str(worker)}}]
    assert all(deployment["pull_steps"] == place for deployment in found.values())


def test_a_deployment_runs_on_a_worker_and_the_second_run_is_up_to_date(worker, address):
    first = start(address, "sage-pipeline/data")
    wait_for(lambda: finished(address, first))
    assert state(address, first) == "Completed"
    assert states(address, first) == {"prepare": "executed", "group": "executed"}
    assert artifacts(address, first)["prepare-drawing"] == 50.0
    second = start(address, "sage-pipeline/data")
    wait_for(lambda: finished(address, second))
    assert states(address, second) == {"prepare": "up to date", "group": "up to date"}


def test_a_schedule_plans_runs(worker, address):
    found = ask(address, "deployments/name/sage-pipeline/all")["id"]
    # Not soon, so that the worker takes none of them.
    daily = {"interval": 86400, "anchor_date": (datetime.now(UTC) + timedelta(hours=12)).isoformat()}
    (schedule,) = ask(address, f"deployments/{found}/schedules", [{"schedule": daily, "active": True}])
    planned = {"deployments": {"id": {"any_": [found]}}, "flow_runs": {"state": {"name": {"any_": ["Scheduled"]}}}}
    wait_for(lambda: ask(address, "flow_runs/filter", planned))
    requests.delete(f"{address}/deployments/{found}/schedules/{schedule['id']}", timeout=30).raise_for_status()


def test_overrides_are_an_experiment_that_leaves_the_checkout_alone(worker, address):
    before = untouched(worker)
    run = start(address, "sage-pipeline/data", run={"until": "group", "overrides": ["group.max_size=3"]})
    wait_for(lambda: finished(address, run))
    assert state(address, run) == "Completed"
    assert states(address, run) == {"prepare": "restored", "group": "executed"}
    assert artifacts(address, run)["overrides"] == "- `group.max_size=3`"
    assert untouched(worker) == before
    name = ask(address, f"flow_runs/{run}")["name"]
    show = [sys.executable, "-m", "dvc", "exp", "list", "--name-only"]
    assert subprocess.run(show, cwd=worker, capture_output=True, text=True, check=True).stdout.split() == [name]
    subprocess.run([sys.executable, "-m", "dvc", "exp", "apply", "-q", name], cwd=worker, check=True)
    assert "max_size: 3" in (worker / "made/group").read_text()
    subprocess.run(["git", "checkout", "-q", "."], cwd=worker, check=True)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"from_stage": "group", "until": "prepare"}, "from_stage group comes after until prepare"),
        ({"until": "group", "overrides": ["group.max_sise=3"]}, "override 'group.max_sise=3'"),
        ({"until": "group", "overrides": ["group.max_size=0"]}, "group.max_size"),
        ({"until": "prepare", "overrides": ["group.max_size=3"]}, "needs all stages, but `until` is prepare"),
    ],
)
def test_a_bad_input_fails_the_run_with_its_name(worker, address, run, said):
    before = untouched(worker)
    failed = start(address, "sage-pipeline/data", run=run)
    wait_for(lambda: finished(address, failed))
    found = ask(address, f"flow_runs/{failed}")["state"]
    assert found["name"] == "Failed"
    assert said in found["message"]
    assert untouched(worker) == before


@pytest.mark.parametrize("run", [{"until": "grouping"}, {"untill": "group"}, {"overrides": ["no value"]}])
def test_what_no_form_allows_is_refused_before_there_is_a_run(worker, address, run):
    with pytest.raises(requests.HTTPError, match=r"409|422"):
        start(address, "sage-pipeline/data", run=run)


def test_a_stage_that_died_is_tried_again_and_nothing_else_is(worker, address, environment):
    (worker / "input").write_text("other ")
    command = [sys.executable, "-c", DIRECT]
    done = subprocess.run(command, env=environment | {"DIE": "group"}, cwd=worker, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {
        run["name"]: run["run_count"] for run in ask(address, "task_runs/filter", {"sort": "EXPECTED_START_TIME_ASC"})
    }
    assert (runs["prepare"], runs["group"]) == (1, 2)


def test_cancelling_ends_every_process_and_the_next_run_continues(worker, address):
    pid = worker / "work-pid"
    (worker / "input").write_text("third ")
    variables = {"env": {"WAIT": "group", "PID": str(pid)}}
    found = ask(address, "deployments/name/sage-pipeline/data")
    run = ask(address, f"deployments/{found['id']}/create_flow_run", {"job_variables": variables})["id"]
    wait_for(lambda: pid.exists() and pid.read_text())
    stage = Path(f"/proc/{pid.read_text()}")
    assert stage.exists()
    ask(address, f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    took = wait_for(lambda: not stage.exists() and state(address, run) == "Cancelled")
    print(f"\ncancelled after {took:.1f} s")
    following = start(address, "sage-pipeline/data")
    wait_for(lambda: finished(address, following))
    assert states(address, following) == {"prepare": "up to date", "group": "executed"}


def test_a_killed_run_is_crashed_and_the_next_one_continues(worker, killed, address, environment):
    folder, run, when = killed
    wait_for(lambda: state(address, run) == "Crashed")
    print(f"\ncrashed at most {time.monotonic() - when:.0f} s after the kill")
    done = subprocess.run(
        [sys.executable, "-c", DIRECT], env=environment, cwd=folder, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "made/group").exists()


def test_a_server_that_restarts_during_a_run_leaves_the_folder_to_the_next_run(environment, tmp_path):
    port = operated.free_port()
    folder, pid = operated.project(tmp_path / "project"), tmp_path / "pid"
    own = environment | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    command = [sys.executable, "-c", DIRECT]
    with operated.server(tmp_path, port):
        waiting = own | {"WAIT": "prepare", "PID": str(pid)}
        first = subprocess.Popen(command, env=waiting, cwd=folder, stdout=subprocess.DEVNULL)
        wait_for(lambda: pid.exists() and pid.read_text(), process=first)
    with operated.server(tmp_path, port):
        first.kill()
        first.wait()
        done = subprocess.run(command, env=own, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def cluster(environment, tmp_path):
    """The address of a Dask scheduler with two workers on this machine, and the workers."""
    port = operated.free_port()
    address = f"tcp://127.0.0.1:{port}"
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port)]
    work = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--host", "127.0.0.1", "--nthreads", "1"]
    with ExitStack() as stack:
        log = stack.enter_context((tmp_path / "dask.log").open("wb"))

        def begin(*command):
            process = leash.start(command, log, environment | {"SAGE_DEVICE": "cpu", "OMP_NUM_THREADS": "1"})
            stack.callback(leash.end, process)
            return process

        begin(*dask, "--no-dashboard")
        yield address, [begin(*work, "--no-nanny", "--no-dashboard") for _ in range(2)]


def test_a_lost_worker_costs_its_shard_only_and_the_bytes_are_those_of_one_machine(
    killed, environment, cluster, tmp_path
):
    scheduler, workers = cluster
    tiny.pipeline("stable_diffusion", tmp_path).save_pretrained(tmp_path / "model")
    texts = [
        f"{colour} {thing}" for thing in ("cat", "dog", "tree", "house", "car") for colour in ("red", "blue", "big")
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "params.yaml").write_text((operated.ROOT / "params.yaml").read_text())
    out, whole = tmp_path / "out", tmp_path / "whole"
    settings = {"steps": 4, "share_ratio": 0.5, "guidance_scale": 3.0, "batch_size": 1}
    batch = {"prompts": str(tmp_path / "prompts.txt"), "out": str(out), "model": str(tmp_path / "model"), "shards": 4}
    batch |= {"judge": str(tiny_judges.clip(tmp_path / "clip"))}
    code = (
        "from flows.orchestration.batch import generate_batch; from flows.orchestration.forms import Batch\n"
        f"generate_batch(Batch(**{batch | settings!r}))"
    )
    one = environment | {"SAGE_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "SAGE_CACHE": str(tmp_path / "cache")}
    flow = subprocess.Popen(
        [sys.executable, "-c", code],
        env=one | {"SAGE_DASK": scheduler},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: flow.poll() is not None or len(list(out.glob("0*.png"))) > 0)
    at = len(list(out.glob("0*.png")))
    os.killpg(workers[0].pid, signal.SIGKILL)
    said, _ = flow.communicate(timeout=PATIENCE)
    assert flow.returncode == 0, said
    assert 0 < at < len(texts)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [
        sys.executable,
        "-m",
        "flows.prompts.generate",
        batch["prompts"],
        "--out",
        str(whole),
        "--model",
        batch["model"],
    ]
    subprocess.run([*command, *options], env=one, cwd=tmp_path, check=True, capture_output=True)
    assert json.loads((out / "evaluation.json").read_text())["alignment"]["n"] == len(texts)
    for path in [out / "plan.json", out / "evaluation.json", *out.glob("judged-*")]:
        path.unlink()
    assert sha256_tree(out) == sha256_tree(whole)


def test_a_batch_may_be_drawn_by_a_server(killed, environment, tmp_path):
    (tmp_path / "prompts.txt").write_text("red {cat|dog}\ntall tree\n(a cat:1.3)\n")
    (tmp_path / "tokens").write_text("ann:canary-secret\n")
    (tmp_path / "params.yaml").write_text((operated.ROOT / "params.yaml").read_text())
    own = environment | {"SAGE_SERVER_TOKEN": "canary-secret", "SAGE_CACHE": str(tmp_path / "cache")}
    with without_model(tmp_path, "--tokens", str(tmp_path / "tokens")) as server:
        server.wait(PATIENCE)
        batch = {"prompts": "prompts.txt", "out": "out", "server": server.url, "model": "quick", "expand": "all"}
        code = (
            "from flows.orchestration.batch import generate_batch; from flows.orchestration.forms import Batch\n"
            f"generate_batch(Batch(**{batch!r}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=own, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
        )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [line.get("prompt") for line in lines] == ["red cat", "red dog", "tall tree", None]
    assert "secret" not in done.stdout + done.stderr
