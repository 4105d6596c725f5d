"""LoRAs by name for each request: in one running batch, in prefixes, and over HTTP."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import tiny
from diffusers import DDIMScheduler
from lora_files import save
from PIL import Image
from served import sage

from flows.serving.engine import Engine
from flows.serving.requests import Drawn, Job
from flows.serving.worker import named
from sage.errors import ConfigurationError
from sage.grouping.policy import Policy
from sage.sampling import adapters
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Plan

pytestmark = pytest.mark.slow

SETTINGS = {"steps": 4, "guidance_scale": 2.0, "share_ratio": 0.0, "branch_noise": 0.0, "negative_prompt": ""}
WORN = [(), (("a", 1.0),), (("b", 1.0),), (("a", 0.5), ("b", 1.0))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline and two LoRAs for it, on disk."""
    found = tmp_path_factory.mktemp("model")
    stock = tiny.pipeline("stable_diffusion", tmp_path_factory.mktemp("tokens"))
    save(stock, found / "a", 1)
    save(stock, found / "b", 2, text=True)
    stock.save_pretrained(found / "model")
    return found


@pytest.fixture
def pipe(folder):
    found = SharedSamplingPipeline.from_pretrained(folder / "model")
    found.set_progress_bar_config(disable=True)
    adapters.load(found, {name: folder / name for name in "ab"})
    return found


def job(name, worn, seed=5, **changes):
    lora = tuple((one, weight, "0" * 64) for one, weight in worn)
    settings = SETTINGS | {"height": 16, "width": 16, "lora": lora}
    return replace(Job(name, name, ["red cat", "tall tree"], [seed, seed + 1], settings, "none", True), **changes)


def run(engine, jobs):
    events = []
    for one in jobs:
        events += [*engine.submit(one), *engine.step()]
    while engine.busy:
        events += engine.step()
    return {(event.job, event.index): event for event in events if isinstance(event, Drawn)}


def alone(folder, worn):
    """Draw with a pipeline that has no other LoRAs than these."""
    pipe = SharedSamplingPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    adapters.load(pipe, {name: folder / name for name, _ in worn})
    if worn:
        pipe.set_adapters([name for name, _ in worn], [weight for _, weight in worn])
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.0, "seed": [5, 6], "batch_size": 1}
    return pipe(["red cat", "tall tree"], plan=Plan.independent(2, 4), **arguments).images


@pytest.mark.parametrize("deterministic", [True, False])
def test_requests_with_different_loras_run_together_and_each_has_its_own(pipe, folder, deterministic):
    jobs = [job(str(number), worn) for number, worn in enumerate(WORN)]
    found = run(Engine(pipe, Policy(6, 0.999, 0.5), 8, deterministic), jobs)
    images = {}
    for number, worn in enumerate(WORN):
        for index, image in enumerate(alone(folder, worn)):
            mine = np.asarray(found[str(number), index].png).astype(int)
            assert np.abs(mine - np.asarray(image).astype(int)).max() <= (0 if deterministic else 1), worn
            images[number, index] = mine
    assert all(np.abs(images[0, 0] - images[number, 0]).max() > 1 for number in (1, 2, 3))


def test_a_prefix_is_for_its_loras(pipe, monkeypatch):
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    monkeypatch.setattr(pipe, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config, **settings))
    engine = Engine(pipe, Policy(6, 0.999, 0.5), 8)

    def begins(name, worn):
        asked = job(name, worn, tenant="t", share="request", seeded=False)
        return run(engine, [asked])[name, 0].prefix

    assert [begins("a", WORN[1]), begins("b", WORN[2]), begins("c", ()), begins("d", (("a", 0.5),))] == [None] * 4
    assert begins("e", WORN[1]) == begins("f", ()) == "exact"


def test_a_request_names_its_loras(folder, tmp_path):
    given = [argument for name in "ab" for argument in ("--lora", f"{name}={folder / name}")]
    with sage(folder / "model", tmp_path, "--deterministic", *given) as server:
        server.wait(180)
        assert set(server.client.get("/v1/models").json()["data"][0]["loras"]) == {"a", "b"}

        def ask(**fields):
            settings = {"seeds": [5, 6], "steps": 4, "guidance_scale": 2.0, "share": "none"}
            answer = server.ask(["red cat", "tall tree"], **settings, **fields)
            assert answer.status_code == 200, answer.text
            return [
                np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))) for item in answer.json()["data"]
            ]

        for fields, worn in [({"lora": "a"}, WORN[1]), ({}, ()), ({"lora": {"b": 1, "a": 0.5}}, WORN[3])]:
            for mine, image in zip(ask(**fields), alone(folder, worn), strict=True):
                assert np.array_equal(mine, np.asarray(image)), fields
        refused = server.ask("a", lora="c")
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "lora"
        assert "a, b" in refused.json()["error"]["message"]
        for wrong in ({"a": 99.0}, {"a": "1"}, 1, ["a"]):
            assert server.ask("a", lora=wrong).status_code == 422


@pytest.mark.parametrize("given", ["a", "a=", "=b", "a.b=c", "a b=c"])
def test_a_lora_without_a_name_or_a_path_is_refused(given):
    with pytest.raises(ConfigurationError, match="NAME=PATH"):
        named([given])
