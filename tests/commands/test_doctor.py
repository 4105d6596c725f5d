"""What `sage doctor` advises is right: it harms nothing and names what is there."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
from encoders import random_encoder
from safetensors.numpy import save_file

from flows.commands import doctor
from flows.versioning import repository
from sage.errors import SageError
from sage.grouping.distilled import write_distilled

BASE = Path("models/base")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A repository with a committed base model."""
    monkeypatch.chdir(tmp_path)
    weights(0)
    git("init", "-q")
    git("add", "--all")
    git("-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "start")


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True)


def weights(value: float) -> Path:
    (BASE / "unet").mkdir(parents=True, exist_ok=True)
    save_file({"a": np.full(64, value, np.float32)}, BASE / "unet/model.safetensors")
    return BASE / "unet/model.safetensors"


def test_committed_weights_and_own_ones_in_their_place_are_fit():
    assert doctor._own_weights(BASE) == doctor.Finding("weights models/base: 0.0 MB, as in git")
    weights(1)
    assert doctor._own_weights(BASE) == doctor.Finding("weights models/base: 0.0 MB, your own, not the committed ones")


def test_damaged_weights_are_named():
    path = weights(1)
    path.write_bytes(path.read_bytes()[:-8])
    found = doctor._own_weights(BASE)
    assert found.what == f"weights models/base: damaged, {path}" and f"git restore {path}" in found.remedy


def test_weights_with_another_hash_than_their_config_are_damaged():
    path = weights(1)
    for content, word in ((path.read_bytes(), "your own"), (b"other", "damaged")):
        path.with_name("config.json").write_text(json.dumps({"sha256": hashlib.sha256(content).hexdigest()}))
        assert word in doctor._own_weights(BASE).what


def test_pickled_weights_are_not_called_missing():
    weights(1).rename(BASE / "unet/model.bin")
    assert "as safetensors" in doctor._own_weights(BASE).remedy


def test_missing_weights_come_from_git_only_if_they_are_there():
    shutil.rmtree("models")
    from_git = "git restore models/base, or train them: sage pretrain --help; or set base in params.yaml"
    assert doctor._own_weights(BASE).remedy.startswith(from_git)
    assert doctor._own_weights(Path("models/attributes")).remedy == "train them: sage pretrain --help"


def test_a_large_own_model_in_the_place_of_the_shipped_one_is_not_left_to_git(monkeypatch):
    monkeypatch.setattr(doctor, "_GIT_MB", 0.0001)
    assert not doctor._own_weights(BASE).remedy
    weights(1)
    (BASE / "vae").mkdir()
    save_file({"a": np.zeros(64, np.float32)}, BASE / "vae/model.safetensors")
    found = doctor._own_weights(BASE)
    assert "`dvc exp save` and `git add` would store 0 MB in git" in found.what
    assert found.remedy.startswith("move the model out of the project") and "git restore" not in found.remedy
    Path(".gitignore").write_text("/models/own\n")
    shutil.copytree(BASE, "models/own")
    assert doctor._own_weights(Path("models/own")).remedy == ""


def test_photographs_that_git_would_store_are_said_with_what_dvc_does_instead(monkeypatch):
    monkeypatch.setattr(doctor, "_GIT_MB", 0.0001)
    photos = Path("data/raw/photos")
    photos.mkdir(parents=True)
    (photos / "a.jpg").write_bytes(bytes(1_000_000))
    (found,) = doctor._data()
    assert found.what == "data/raw: 1.0 MB, of which `dvc exp save` and `git add` would store 1 MB in git"
    assert found.remedy.endswith("dvc add data/raw/photos")
    Path("data/raw/.gitignore").write_text("/photos\n")  # as `dvc add` writes it
    assert list(doctor._data()) == [doctor.Finding("data/raw: 1.0 MB")]


def test_images_that_are_asked_for_and_not_there_are_said(tmp_path):
    """A clone has what git has: the folder's README and what DVC keeps of the images."""
    raw = Path("data/raw")
    raw.mkdir(parents=True)
    for name in ("README.md", "photos.dvc", ".gitignore"):
        (raw / name).write_text("x")
    assert list(doctor._data()) == [doctor.Finding("data/raw: 0.0 MB")]
    small.set_params(tmp_path, prepare__source="folder", evaluate__alignment="clip", evaluate__references=None)
    (found,) = doctor._data()
    assert found.what.startswith("data/raw has no images") and "sage pull" in found.remedy
    (raw / "a.png").write_bytes(b"x")
    assert list(doctor._data()) == [doctor.Finding("data/raw: 0.0 MB")]


def test_the_base_of_the_parameters_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGED", [])
    shutil.copy(Path(__file__).parents[2] / "params.yaml", "params.yaml")
    assert next(doctor._weights()).what == "weights models/base: 0.0 MB, as in git"
    for base, what, remedy in (
        (str(weights(0)), "weights models/base/unet/model.safetensors: 0.0 MB, as in git", ""),
        (str(tmp_path / "nowhere"), "nowhere: missing", "set base in params.yaml to a model that is there"),
        (f"hub/some/model@{'a' * 40}", "aaa: missing", f"sage base some/model@{'a' * 40}"),
        ("hub/some/model@v1", "base: params.yaml has 1 problem", "correct params.yaml"),
    ):
        small.set_params(tmp_path, base=base)
        found = next(doctor._weights())
        assert what in found.what and remedy in found.remedy and bool(found.remedy) == bool(remedy)


def test_the_distilled_encoder_that_groups_need_is_checked():
    missing = doctor._distilled(BASE)
    assert "there is no models/base.distilled.safetensors" in missing.what
    assert missing.remedy == "sage distil --model models/base"
    encoder = replace(random_encoder(("DDIMScheduler", 999.0, 1.0)), measured={"variance_explained": 0.829})
    write_distilled(BASE, encoder, {})
    said = "group.by: distilled, by an encoder that explains 82.9% of first predictions"
    assert doctor._distilled(BASE) == doctor.Finding(said)
    weights(1)
    assert "other weights" in doctor._distilled(BASE).what and doctor._distilled(BASE).remedy


def test_without_git_or_a_commit(monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert [found.what for found in doctor._repository()] == ["git: no repository here"]
    git("init", "-q")
    assert [found.what for found in doctor._repository()] == ["git: no commit yet"]
    monkeypatch.setenv("PATH", "")
    assert [found.what for found in doctor._repository()] == ["git: missing"]
    weights(0)
    assert doctor._own_weights(BASE) == doctor.Finding("weights models/base: 0.0 MB, not in git")


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("'./dvc.lock' validation failed.\n\nrequired key not provided", "git restore dvc.lock; without the file"),
        ("'./dvc.yaml' is invalid.\n\nDid not find", "correct dvc.yaml, or git restore dvc.yaml"),
        ("you are not inside of a DVC repository", "`dvc init`"),
        ("dvc.yaml does not exist.", "run in the project's top folder"),
    ],
)
def test_what_dvc_says_gets_the_remedy_of_its_cause(monkeypatch, message, remedy):
    def stale():
        raise SageError(message)

    monkeypatch.setattr(repository, "stale", stale)
    (found,) = doctor._dvc()
    assert remedy in found.remedy and "\n" not in found.what


@pytest.mark.slow
def test_an_empty_lock_is_said_so():
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(root / name, ".")
    Path("dvc.lock").touch()
    (found,) = doctor._dvc()
    assert "dvc.lock" in found.what and "git restore dvc.lock" in found.remedy
