"""`sage serve models:/sage@champion`: a registered version, and the next one when the alias moves."""

from concurrent.futures import ThreadPoolExecutor

import sage.torchvision_ops  # noqa: F401

import pytest
import tiny
import torch
from served import sage as serve
from tracked import register
from waiting import wait_for

from flows.tracking import promotion, registry, runs
from sage.sampling import base

pytestmark = pytest.mark.slow


def weights(folder, seed):
    torch.manual_seed(seed)
    base.save(base.assemble(tiny.autoencoder(), tiny.unet(cross_attention_dim=384)), folder)
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder whose registry has one champion."""
    monkeypatch.chdir(tmp_path)
    for name in ("SAGE_TRACKING_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs.client(runs.address()).search_experiments()
    register(weights(tmp_path / "first", 0))
    promotion.promote()
    return tmp_path


def test_the_champion_is_served_with_its_settings_and_so_is_the_next_one(project):
    with serve("models:/sage@champion", project) as server:
        server.wait(120)

        def listed():
            return server.client.get("/v1/models").json()["data"][0]

        assert listed()["version"] == registry.current("models:/sage@champion") == "1"
        assert listed()["settings"]["steps"] == 2
        first = server.ask("red cat", seed=1).json()
        assert first["usage"]["evaluations_alone"] == 4  # two steps under guidance, as the version says
        going, statuses = [True], []

        def load():
            while going:
                statuses.append(server.ask(["red cat", "tall tree"]).status_code)

        with ThreadPoolExecutor(3) as pool:
            loads = [pool.submit(load) for _ in range(3)]
            register(weights(project / "second", 1), alignment=0.6)
            promotion.promote()
            wait_for(lambda: listed()["version"] == "2", 120, server.process, server.log)
            before = len(statuses)
            wait_for(lambda: len(statuses) > before + 3, 60, server.process, server.log)
            going.clear()
            [one.result() for one in loads]
        assert set(statuses) == {200}  # no request failed while the model was swapped
        second = server.ask("red cat", seed=1).json()
        assert second["data"][0]["b64_json"] != first["data"][0]["b64_json"]


def test_a_damaged_champion_is_not_served(project):
    (damaged,) = (path for path in project.rglob("*.safetensors") if "artifacts/model/unet" in path.as_posix())
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.chmod(0o644)
    damaged.write_bytes(content)
    with serve("models:/sage@champion", project) as server:
        assert server.process.wait(120) == 1
        assert "damaged" in server.log.read_text()
