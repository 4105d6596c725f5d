"""A project with an empty MLflow database, and results of stages that register a version, for tests of tracking."""

import shutil
from pathlib import Path

import sage.torchvision_ops  # noqa: F401

import evaluated
import pytest
import tiny
import torch
from mlflow import MlflowClient

from flows.tracking import registry, runs
from sage.config import Params, load_params
from sage.files import sha256_tree, write_json
from sage.sampling import base

SHIPPED = Path(__file__).parents[1] / "params.yaml"


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An empty database; MLflow takes seconds to make one."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    runs.client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small random model of the form that the registry keeps."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "sage"
    base.save(base.assemble(tiny.autoencoder(), tiny.unet(cross_attention_dim=384)), folder)
    return folder


@pytest.fixture
def project(tmp_path, database, monkeypatch):
    """An empty folder with a database of its own."""
    return enter(tmp_path, database, monkeypatch)


def enter(folder: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SAGE_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    shutil.copy(database, folder / "mlflow.db")
    return folder


def client() -> MlflowClient:
    return runs.client(runs.address())


def params() -> Params:
    """The shipped parameters, drawing in two steps under guidance."""
    values = load_params(SHIPPED).model_dump()
    values["generate"] |= {"steps": 2, "share_ratio": 0.5, "guidance_scale": 3.0}
    return Params.model_validate(values)


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 96}


def small_model(folder: Path, content: str = "weights") -> Path:
    """A folder with something to hash where nothing loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.safetensors").write_text(content)
    return folder


def write_results(
    model: Path, *, alignment: float = 0.5, held_out: str = "a" * 64, failed: str = "", **changes
) -> Path:
    """Write results of stages such that all gates pass but the one on the metric `failed`; return their folder."""
    sage = {
        "kernel_distance": 0.1,
        "alignment": alignment,
        "group_diversity": 0.4,
        "seed_diversity": 0.4,
        "nfe_per_image": 12.0,
    }
    gates = [
        evaluated.verdict(gate.metric, gate.reference, gate.metric != failed, f"{gate.metric}!")
        for gate in params().evaluate.gates
    ]
    evaluate = evaluated.results() | {
        "set": evaluated.SET | {"digest": held_out},
        "arms": {"sage": {name: figure(value) for name, value in sage.items()}},
        "gates": gates,
        "passed": not failed,
    }
    folder = Path("metrics")
    write_json(folder / "prepare.json", {"digest": "d" * 64})
    write_json(folder / "finetune.json", {"model_sha256": sha256_tree(model)})
    write_json(folder / "generate.json", {})
    write_json(folder / "evaluate.json", evaluate | changes)
    write_json(Path("groups/test.json"), {"threshold": 0.72, "groups": []})
    return folder


def register(model: Path, **changes) -> registry.Registration:
    return registry.register(model, write_results(model, **changes), Path("groups"), params())


def aliases() -> dict[str, str]:
    found = client().search_registered_models("name = 'sage'")
    return {alias: str(version) for model in found for alias, version in model.aliases.items()}
