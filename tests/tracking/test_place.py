"""What is recorded lies in the project's folder, whatever its name, and is found again after a move."""

import shutil
from pathlib import Path

import pytest
from tracked import client, database, register, weights  # noqa: F401

from flows.commands import doctor
from flows.tracking import place, registry
from flows.tracking.runs import stage_run

pytestmark = pytest.mark.slow

NAMES = ["plain", "two words", "a%20b", "feature%2Flogin", "what?", "#1 100%", "ünï"]


@pytest.fixture
def enter(tmp_path, database, monkeypatch):
    """Make a folder with an empty database the project, as the default settings find it."""
    monkeypatch.delenv("SAGE_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")

    def call(name: str) -> Path:
        folder = tmp_path / name
        if not folder.exists():
            folder.mkdir()
            shutil.copy(database, folder / "mlflow.db")
        monkeypatch.chdir(folder)
        return folder

    return call


def record(text: str) -> str:
    """Record a file in a run; return its id."""
    Path("file.txt").write_text(text)
    with stage_run("try", {}) as run:
        run.artifact(Path("file.txt"))
    return str(run.id)


def read(run: str) -> str:
    return Path(client().download_artifacts(run, "file.txt")).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_everything_lies_in_the_folder_whatever_its_name(enter, name):
    folder = enter(name)
    assert read(record("text")) == "text"
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlartifacts", "file.txt"}
    assert [path.name for path in folder.parent.iterdir()] == [name]
    assert [finding.remedy for finding in doctor._tracking()] == [""]


@pytest.mark.parametrize("way", ["moved", "copied"])
def test_a_project_that_was_moved_or_copied_uses_its_own_artifacts(enter, way, caplog):
    old = enter("first try")
    before = record("before")
    (shutil.move if way == "moved" else shutil.copytree)(old, old.parent / "fin%l")
    (old / "mlartifacts").mkdir(exist_ok=True, parents=True)
    was = sorted(old.rglob("*"))
    new = enter("fin%l")
    assert read(before) == "before"
    assert "has moved here from" in caplog.text
    caplog.clear()
    after = record("after")
    assert read(after) == "after" and list((new / "mlartifacts").glob(f"{after}/artifacts/file.txt"))
    assert sorted(old.rglob("*")) == was and not caplog.text


def test_a_database_elsewhere_keeps_its_artifacts(enter, monkeypatch):
    old = enter("old")
    run = record("text")
    (old.parent / "alone").mkdir()
    shutil.move(old / "mlflow.db", old.parent / "alone/mlflow.db")
    monkeypatch.setenv("SAGE_TRACKING_URI", f"sqlite:///{old.parent}/alone/mlflow.db")
    assert read(run) == "text" and not (old.parent / "alone/mlartifacts").exists()


def test_a_registered_version_moves_with_its_project(enter, weights, monkeypatch, tmp_path):
    old = enter("first")
    register(weights)
    shutil.move(old, old.parent / "final")
    enter("final")
    assert registry.fetch("models:/sage@challenger", tmp_path / "out").settings()[0]
    register(weights, alignment=0.6)
    assert not old.exists()


def test_an_address_of_a_server_is_left_alone():
    assert place.artifacts("http://127.0.0.1:5000") is None
    place.follow("postgresql://sage@store/mlflow")
