import base64
import io
import itertools
import json
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import operated
import psutil
import pytest
import tiny
import torch
from faults import in_child, kill
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image
from tracked import (  # noqa: F401
    aliases,
    client,
    database,
    enter,
    figure,
    params,
    project,
    register,
    small_model,
    weights,
    write_results,
)
from waiting import wait_for

from flows import leash
from flows.tracking import content, promotion, registry, runs
from sage.errors import RegistryError, SageError
from sage.files import sha256, sha256_tree
from sage.sampling import base
from sage.training import lora

# What a version must carry the moment that anybody can see it.
pytestmark = pytest.mark.slow

COMPLETE = {
    "sage.model_sha256",
    "sage.metrics_sha256",
    "sage.files_sha256",
    "sage.heldout_set",
    "sage.gates",
    "sage.data_digest",
    "sage.revision",
    "sage.params",
    "sage.metric.alignment",
    "sage.metric.kernel_distance",
}


# Runs


def test_a_run_holds_what_the_stage_says(project):
    with runs.stage_run("group", {"threshold": 0.8, "weights": {"branch": 1}, "seeds": [0, 1]}) as run:
        run.metrics({"loss": 3.0}, step=1)
        run.metrics({"loss": 2.0}, step=2)
        run.image(Image.new("RGB", (8, 8), "red"), "samples", step=2)
        run.dataset("prepared", "e" * 64, "training")
        run.tags({"verdict": "passed"})
        Path("note.txt").write_text("note")
        run.artifact(Path("note.txt"), "notes")
    found = client().get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"threshold": "0.8", "weights.branch": "1", "seeds": "[0, 1]"}
    assert [(point.step, point.value) for point in client().get_metric_history(run.id, "loss")] == [(1, 3.0), (2, 2.0)]
    assert found.data.tags["verdict"] == "passed"
    assert found.inputs.dataset_inputs[0].dataset.digest == "e" * 36
    files = {file.path for file in client().list_artifacts(run.id, "notes")}
    assert files == {"notes/note.txt"}
    images = [file.path for file in client().list_artifacts(run.id, "images")]
    assert any("samples" in path and "2" in path for path in images)


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_ends_as_its_stage_does(project, error, status):
    with pytest.raises(error), runs.stage_run("group", {}) as run:
        raise error
    assert client().get_run(run.id).info.status == status


def test_stages_of_a_pipeline_are_children_of_one_run(project, monkeypatch):
    with runs.pipeline_run() as pipeline:
        for name, value in pipeline.environment.items():
            monkeypatch.setenv(name, value)
        for stage in ("prepare", "group"):
            with runs.stage_run(stage, {}):
                pass
        pipeline.finish("FINISHED", write_results(small_model(project / "m")))
    found = client().search_runs([client().get_experiment_by_name("sage").experiment_id])
    parents = [run for run in found if "sage.pipeline" in run.data.tags]
    children = {run.data.tags["sage.stage"]: run.data.tags["mlflow.parentRunId"] for run in found if run not in parents}
    assert len(parents) == 1
    assert set(children) == {"prepare", "group"}
    assert set(children.values()) == {parents[0].info.run_id}
    assert parents[0].info.status == "FINISHED"
    assert parents[0].data.metrics["sage/nfe_per_image"] == 12.0


def test_a_pipelines_run_says_of_what_it_is_and_the_machine_is_watched(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    Path("dvc.lock").write_text("schema: '2.0'")
    with runs.pipeline_run({"prefect.flow_run": "brave-fox"}) as pipeline:
        for name, value in pipeline.environment.items():
            monkeypatch.setenv(name, value)
        with runs.stage_run("prepare", {}) as stage:
            wait_for(lambda: "system/cpu_utilization_percentage" in client().get_run(stage.id).data.metrics)
        pipeline.finish("FINISHED", write_results(small_model(project / "m")))
    (parent,) = client().search_runs(
        [client().get_experiment_by_name("sage").experiment_id], "tags.`prefect.flow_run` = 'brave-fox'"
    )
    tags = parent.data.tags
    assert tags["sage.dvc_lock"] == sha256(Path("dvc.lock"))
    assert tags["sage.data_digest"] == "d" * 64
    assert tags["sage.gates"] == "passed"
    assert tags["mlflow.source.git.commit"] == "none"
    assert "cores" in tags["sage.profile"]


@pytest.mark.slow
def test_the_next_run_ends_those_whose_process_was_killed(project):
    def work() -> None:
        with runs.pipeline_run() as pipeline:
            os.environ.update(pipeline.environment)
            with runs.stage_run("prepare", {}):
                kill()

    def running() -> list[str]:
        found = client().search_runs([client().get_experiment_by_name("sage").experiment_id])
        return sorted(run.info.status for run in found)

    assert in_child(work) == -9
    assert running() == ["RUNNING", "RUNNING"]
    with runs.stage_run("group", {}):
        # This one lives, and so does another of its kind that begins now.
        with runs.stage_run("finetune", {}):
            pass
        assert running() == ["FINISHED", "KILLED", "KILLED", "RUNNING"]
    assert in_child(work) == -9
    # Also where nothing is left to execute.
    with runs.pipeline_run() as pipeline:
        pipeline.finish("FINISHED")
    assert running() == ["FINISHED", "FINISHED", "KILLED", "KILLED", "KILLED", "KILLED"]


def test_a_pipeline_with_nothing_to_do_leaves_no_run(project):
    with runs.pipeline_run():
        pass
    with pytest.raises(ValueError, match="early"), runs.pipeline_run():
        raise ValueError("early")
    assert not client().search_runs([client().get_experiment_by_name("sage").experiment_id])


def test_off_records_nothing_and_loads_nothing(tmp_path):
    code = """
import sys
from pathlib import Path
from flows.tracking.runs import stage_run

with stage_run("group", {"a": 1}) as run:
    run.metrics({"loss": 1.0})
    run.tags({"a": 1})
    run.artifact(Path("none"))
    run.image(None, "key")
    run.dataset("a", "b", "c")
assert run.id is None
assert "mlflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_dead_address_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The product's own number of tries, not that of the tests, and without the waits between them.
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    tries = []
    with socket.create_server(("127.0.0.1", 0)) as dead:
        port = dead.getsockname()[1]

        def hang_up() -> None:
            with suppress(OSError):  # closed at the end
                while True:
                    tries.append(dead.accept()[0].close())

        threading.Thread(target=hang_up, daemon=True).start()
        monkeypatch.setenv("SAGE_TRACKING_URI", f"http://127.0.0.1:{port}")
        said = rf"tracking at http://127\.0\.0\.1:{port} does not answer(.|\n)*SAGE_TRACKING_URI=off"
        with pytest.raises(SageError, match=said), runs.stage_run("group", {}):
            pass
        dead.shutdown(socket.SHUT_RDWR)
    # MLflow itself would try eight times, for minutes.
    assert 1 <= len(tries) <= 3


# Registry


def test_a_model_that_passes_becomes_challenger_once(project, weights):
    first = register(weights)
    assert (first.version, first.new) == ("1", True)
    again = register(weights)
    assert (again.version, again.new) == ("1", False)
    assert aliases() == {"challenger": "1"}
    found = client().get_model_version("sage", "1")
    assert found.tags.keys() >= COMPLETE
    assert json.loads(found.tags["sage.params"])["generate"]["steps"] == 2
    fetched = registry.fetch("models:/sage@challenger", project / "out")
    assert sha256_tree(fetched.weights) == sha256_tree(weights)
    model, sampling, group = fetched.settings()
    assert model == sha256_tree(weights)
    shipped = {"branch_noise": 1.0, "batch_size": 128, "image_steps": 0}
    assert sampling == {"steps": 2, "guidance_scale": 3.0, "share_ratio": 0.5} | shipped
    assert (group.threshold, group.max_size, group.near_duplicate) == (0.72, 6, 0.999)


def test_a_version_holds_no_pickle_and_draws(project, weights):
    import mlflow.pyfunc

    register(weights)
    files = registry.fetch("challenger", project / "out").folder
    assert not [path for path in files.rglob("*") if path.suffix in {".pkl", ".pickle", ".pt", ".bin"}]
    answer = mlflow.pyfunc.load_model(str(files)).predict(["red heart", "blue heart"])
    assert [item["prompt"] for item in answer] == ["red heart", "blue heart"]
    assert all(item["png"].startswith("iVBOR") for item in answer)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"failed": "alignment"}, "alignment against independent: alignment!"),
        ({"gates": []}, "alignment against independent: not judged"),
        ({"passed": False}, "the evaluation as a whole did not pass"),
    ],
)
def test_a_model_that_fails_is_recorded_with_its_reasons_and_not_registered(project, changes, reason):
    model = small_model(project / "m")
    done = register(model, **changes)
    assert done.version is None
    assert reason in done.reasons
    register(model, **changes)
    assert not client().search_model_versions("name = 'sage'")
    found = client().search_runs(
        [client().get_experiment_by_name("sage").experiment_id], "tags.`sage.verdict` = 'failed'"
    )
    assert len(found) == 1
    assert reason in found[0].data.tags.values()


def test_results_of_another_model_register_nothing(project):
    model = small_model(project / "m")
    metrics = write_results(model)
    small_model(model, "other weights")
    with pytest.raises(RegistryError, match=r"but the results are of .*`sage verify --repair`, then `sage run`"):
        registry.register(model, metrics, Path("groups"), params())


def test_missing_or_infinite_results_register_nothing(project):
    model = small_model(project / "m")
    metrics = write_results(model)
    (metrics / "evaluate.json").write_text('{"passed": true, "gates": [], "arms": {"sage": {"alignment": NaN}}}')
    with pytest.raises(RegistryError, match="NaN"):
        registry.register(model, metrics, Path("groups"), params())
    (metrics / "evaluate.json").unlink()
    with pytest.raises(RegistryError, match="no results of evaluate"):
        registry.register(model, metrics, Path("groups"), params())


def without(values: dict[str, Any], *path: str) -> dict[str, Any]:
    """Return results without one thing."""
    place = values
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return values


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda values: values | {"passed": "yes"}, "passed: Input should be a valid boolean, found 'yes'"),
        (lambda values: without(values, "gates"), "gates is missing"),
        (lambda values: without(values, "set", "digest"), "set.digest is missing"),
        (lambda values: values | {"arms": {"sage": {"alignment": figure(0.5) | {"high": "1"}}}}, "alignment.high: "),
        (lambda values: values | {"gates": [{"passed": True}]}, "gates.0.metric is missing"),
        (lambda values: [values], "(top): "),
        (lambda values: "text", "(top): "),
    ],
)
def test_a_damaged_evaluation_registers_nothing_and_says_what_is_wrong(project, damage, words):
    metrics = write_results(small_model(project / "m"))
    path = metrics / "evaluate.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(RegistryError) as refused:
        registry.register(project / "m", metrics, Path("groups"), params())
    assert words in str(refused.value)
    assert str(refused.value).startswith("nothing is registered: metrics/evaluate.json is damaged")
    path.write_text("{")
    with pytest.raises(RegistryError, match=r"evaluate.json is not JSON"):
        registry.register(project / "m", metrics, Path("groups"), params())
    assert not client().search_model_versions("name = 'sage'")


def test_promotion_moves_the_champion_and_rollback_moves_it_back(project, weights):
    register(weights)
    assert promotion.promote() == "1"
    assert aliases() == {"champion": "1"}
    register(weights, alignment=0.52)
    assert aliases() == {"champion": "1", "challenger": "2"}
    assert promotion.promote() == "2"
    assert aliases() == {"champion": "2"}
    assert promotion.rollback() == "1"
    assert aliases() == {"champion": "1"}
    with pytest.raises(RegistryError, match="replaced no champion"):
        promotion.rollback()
    rows = registry.versions()
    assert [(row["version"], row["alias"]) for row in rows] == [("2", ""), ("1", "champion")]
    assert rows[0]["alignment"] == "0.52"


@pytest.mark.slow
def test_nothing_that_is_worse_foreign_or_unknown_is_promoted(project, weights):
    with pytest.raises(RegistryError, match="there is no challenger"):
        promotion.promote()
    register(weights)
    promotion.promote()
    register(weights, alignment=0.3)
    with pytest.raises(RegistryError, match=r"worse than champion 1:\n  alignment 0.3 \[0.25, 0.35\], champion 0.5"):
        promotion.promote()
    register(weights, held_out="b" * 64)
    with pytest.raises(RegistryError, match="cannot be compared"):
        promotion.promote("3")
    with pytest.raises(RegistryError, match="there is no version 9 of sage"):
        promotion.promote("9")
    client().set_model_version_tag("sage", "3", "sage.gates", json.dumps([{"metric": "alignment", "passed": False}]))
    with pytest.raises(RegistryError, match="has not passed its gates"):
        promotion.promote("3")
    assert aliases()["champion"] == "1"


def test_a_version_that_was_altered_is_refused_before_it_is_loaded(project, weights):
    register(weights)
    source = Path(client().get_model_version("sage", "1").source.removeprefix("file://"))
    code = next(source.glob("*.py"))
    code.write_text(f"open({str(project / 'executed')!r}, 'w')\n" + code.read_text())
    for attempt in (promotion.promote, lambda: registry.fetch("challenger", project / "out")):
        with pytest.raises(RegistryError, match="version 1 of sage is damaged"):
            attempt()
    assert not (project / "executed").exists()
    assert "champion" not in aliases()


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "adapter.PT"])
def test_a_version_with_a_pickle_is_neither_registered_nor_loaded(project, weights, tmp_path, name):
    pickled = tmp_path / "pickled"
    shutil.copytree(weights, pickled)
    (pickled / name).write_bytes(b"pickle")
    with pytest.raises(RegistryError, match=f"holds pickles.*{name}"):
        register(pickled)
    register(weights)
    # By somebody who can write the registry, too.
    source = Path(client().get_model_version("sage", "1").source.removeprefix("file://"))
    shutil.copy(pickled / name, source / "artifacts/model" / name)
    client().set_model_version_tag("sage", "1", content.FILES_HASH, content.files_hash(source))
    with pytest.raises(RegistryError, match=f"version 1 of sage holds pickles.*{name}"):
        registry.fetch("challenger", project / "out")


@pytest.mark.slow
def test_a_version_that_draws_one_colour_serves_errors_and_is_not_promoted(project, weights, monkeypatch):
    pipe = base.load(weights)
    torch.nn.init.zeros_(pipe.vae.decoder.conv_out.weight)
    base.save(pipe, project / "flat")
    register(project / "flat")
    version = content.download(client(), client().get_model_version("sage", "1"), project / "files")
    answers = content.pyfunc().load_model(str(version.folder)).predict(["red heart", ""])
    assert answers[0] == {"error": "blank: the model gave an image of a single colour"}
    with pytest.raises(RegistryError, match="version 1 could not draw"):
        promotion.promote()
    # The code of an older version gives the image.
    monkeypatch.setattr("flows.tracking.content.pyfunc", lambda: FlatModel())
    assert not content.draws(version)


class FlatModel:
    """Stands for MLflow and a version whose code does not look at its images."""

    def load_model(self, folder: str) -> "FlatModel":
        return self

    def predict(self, prompts: list[str]) -> list[dict[str, str]]:
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG")
        return [{"png": base64.b64encode(file.getvalue()).decode()}]


@pytest.mark.slow
def test_promotion_to_another_registry_copies_once_and_verifies_the_copy(project, weights):
    with pytest.raises(RegistryError, match="there is no champion of sage"):
        promotion.promote(to="production")
    register(weights)
    promotion.promote()
    assert promotion.promote(to="production") == "1"
    assert promotion.promote(to="production") == "1"
    here, there = (client().get_model_version(name, "1") for name in ("sage", "production"))
    assert there.tags == here.tags
    assert registry.fetch("models:/production@champion", project / "out").settings()[0] == sha256_tree(weights)
    # A better one is copied and takes the place; the copy remembers the champion there, not the one here.
    register(weights, alignment=0.52)
    promotion.promote()
    assert promotion.promote(to="production") == "2"
    assert promotion.rollback(of="production") == "1"
    assert aliases() == {"champion": "2"}
    register(weights, alignment=0.3)
    with pytest.raises(RegistryError, match="worse than champion 1"):
        promotion.promote("3", to="production")
    code = next(Path(here.source.removeprefix("file://")).glob("*.py"))
    code.write_text("raise SystemExit\n")
    with pytest.raises(RegistryError, match="version 1 of production is damaged"):
        registry.fetch("models:/production@champion", project / "again")


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # MLflow's loader calls it so
def test_an_adapter_is_also_there_in_mlflows_own_form(project, weights, tmp_path, monkeypatch):
    """Logged by its own flavor, it makes of the base what the merged weights are."""
    import mlflow.diffusers

    (tmp_path / "parts").mkdir()
    stock = tiny.pipeline("stable_diffusion", tmp_path / "parts")
    stock.save_pretrained(tmp_path / "base")
    lora.add(stock.unet, 2, 0)
    with torch.no_grad():
        for name, value in stock.unet.named_parameters():
            if "lora_B" in name:
                value += 0.5
    model = tmp_path / "model"
    shutil.copytree(weights, model)
    lora.save(stock, lora.trained(stock), model)
    register(model)
    run = client().get_model_version("sage", "1").run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", runs.address())
    loaded = mlflow.diffusers.load_model(f"runs:/{run}/lora")
    assert loaded.base_model == "./models/base"
    pipe = loaded.load_pipeline(base_model=str(tmp_path / "base"), device="cpu")
    stock.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)

    def draw(pipeline):
        return (
            pipeline("red cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].tobytes()
        )

    assert draw(pipe) == draw(stock)
    stock.unload_lora_weights()
    assert draw(pipe) != draw(stock)


def test_a_figure_that_could_not_be_measured_is_listed_as_missing(project, weights):
    sage = {"kernel_distance": figure(0.1), "seed_diversity": {"value": None, "low": None, "high": None, "n": 96}}
    sage |= {"alignment": figure(0.5), "group_diversity": figure(0.4), "nfe_per_image": figure(12.0)}
    register(weights, arms={"sage": sage})
    (row,) = registry.versions()
    assert (row["seed_diversity"], row["kernel_distance"]) == ("-", "0.1")


@pytest.mark.slow
def test_a_version_without_an_interval_is_neither_promoted_nor_compared_with(project, weights):
    register(weights)
    promotion.promote()
    kept = {"kernel_distance": figure(0.1), "group_diversity": figure(0.4), "nfe_per_image": figure(12.0)}
    alone = kept | {"alignment": figure(0.5) | {"low": None, "high": None}}
    register(weights, arms={"sage": alone})
    with pytest.raises(RegistryError, match="version 2 has no interval of alignment"):
        promotion.promote()
    assert aliases()["champion"] == "1"


def before_call(number: int) -> None:
    """Kill this process before the given call of MLflow's client, counted from 1."""
    count = itertools.count(1)

    def watched(method):
        def call(*arguments, **options):
            if next(count) == number:
                kill()
            return method(*arguments, **options)

        return call

    for name, method in list(vars(MlflowClient).items()):
        if callable(method) and not name.startswith("_"):
            setattr(MlflowClient, name, watched(method))


@pytest.mark.slow
def test_a_kill_at_any_point_leaves_a_version_invisible_or_complete(tmp_path, database, monkeypatch):
    for number in itertools.count(random.choice((1, 2)), 2):  # every second call, so all of them in a few runs
        enter(tmp_path / str(number), database, monkeypatch)
        model = small_model(Path("models/sage"))

        def work(number=number, model=model):
            before_call(number)
            register(model)

        ended = in_child(work)
        for version in client().search_model_versions("name = 'sage'"):
            assert version.tags.keys() >= COMPLETE
            registry.fetch(str(version.version), Path("check"))
        with sqlite3.connect("mlflow.db") as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert register(model).version == "1"
        assert len(client().search_model_versions("name = 'sage'")) == 1
        assert aliases() == {"challenger": "1"}
        if ended == 0:
            break
        assert ended == -9
    assert number > 8


@pytest.mark.slow
def test_a_kill_at_any_point_of_a_promotion_leaves_a_champion(project, weights):
    register(weights)
    promotion.promote()
    for number in itertools.count(random.choice((1, 2)), 2):
        version = register(weights, alignment=0.5 + number / 10_000).version

        def work(number=number):
            before_call(number)
            promotion.promote()

        ended = in_child(work)
        assert aliases()["champion"] in {version, str(int(version) - 1)}
        assert promotion.promote(version) == version
        assert aliases() == {"champion": version}
        if ended == 0:
            break
        assert ended == -9
    assert number > 5


def test_an_alias_that_another_process_gives_at_the_same_moment_is_given_again(project, weights, monkeypatch):
    version, real = register(weights).version, MlflowClient.set_registered_model_alias
    said = ["(sqlite3.IntegrityError) UNIQUE constraint failed: registered_model_aliases.name", "no such column"]

    def collides(self, *given):
        if said:
            raise MlflowException(said.pop(0))
        real(self, *given)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", collides)
    with pytest.raises(MlflowException, match="no such column"):
        promotion.promote(version)
    said[:] = ["UNIQUE constraint failed: registered_model_aliases.name"]
    assert promotion.promote(version) == version
    assert aliases() == {"champion": version}


@pytest.mark.slow
def test_processes_that_register_and_promote_at_once_make_one_version_each(project, weights):
    processes, each = 8, 5
    ready = [register(weights, alignment=alignment).version for alignment in (0.5, 0.51)]

    def work(process: int) -> None:
        for number in range(each):
            folder = project / f"{process}-{number}"
            folder.mkdir()
            os.chdir(folder)
            assert register(small_model(Path("m"), folder.name)).new
        if process < 2:
            assert promotion.promote(ready[process]) in ready

    with ThreadPoolExecutor(processes) as pool:
        ended = list(pool.map(lambda process: in_child(lambda: work(process)), range(processes)))
    assert ended == [0] * processes
    versions = client().search_model_versions("name = 'sage'")
    assert sorted(int(version.version) for version in versions) == list(range(1, processes * each + 3))
    assert len({version.tags["sage.model_sha256"] for version in versions}) == processes * each + 1
    assert aliases()["champion"] in ready
    assert set(aliases()) == {"challenger", "champion"}


@pytest.mark.slow
def test_no_acknowledged_version_is_lost_when_writers_are_killed(project):
    acknowledged = project / "acknowledged"

    def work() -> None:
        for number in itertools.count():
            done = register(small_model(Path("m"), f"{os.getpid()}-{number}"))
            with acknowledged.open("a") as file:
                file.write(f"{done.version}\n")
            if number == 0:  # written, however soon the kill comes
                threading.Timer(random.uniform(0.0, 1.0), kill).start()

    assert [in_child(work) for _ in range(5)] == [-9] * 5
    with sqlite3.connect("mlflow.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    known = {str(version.version) for version in client().search_model_versions("name = 'sage'")}
    wanted = acknowledged.read_text().split()
    assert len(wanted) >= 5
    assert set(wanted) <= known


@pytest.mark.slow
@pytest.mark.stack
def test_no_acknowledged_version_is_lost_when_the_server_is_killed(project, monkeypatch):
    port = operated.free_port()
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", runs.address(), "--artifacts-destination", str(project / "store")]
    command = [sys.executable, "-m", "mlflow", "server", *where, *stores]
    monkeypatch.setenv("SAGE_TRACKING_URI", f"http://127.0.0.1:{port}")
    acknowledged: list[str] = []

    @contextmanager
    def server():
        with (project / "log").open("ab") as log:
            process = leash.start(command, log, os.environ)
        wait_for(lambda: operated.listens(port))
        try:
            yield process
        finally:
            leash.end(process)

    def register_until_it_fails(name: str, kill: threading.Timer) -> None:
        for number in itertools.count():
            acknowledged.append(register(small_model(Path("m"), f"{name}-{number}")).version)
            if number == 0:
                kill.start()

    for number in range(10):
        with server() as process:
            tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            kill_all = threading.Timer(random.uniform(0.0, 2.0), lambda tree=tree: [one.kill() for one in tree])
            with pytest.raises((SageError, MlflowException)):
                register_until_it_fails(str(number), kill_all)
        with sqlite3.connect("mlflow.db") as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with server():
        known = {str(version.version) for version in client().search_model_versions("name = 'sage'")}
        assert len(acknowledged) >= 10 and set(acknowledged) <= known
        for version in known:
            registry.fetch(version, project / "check" / version)
