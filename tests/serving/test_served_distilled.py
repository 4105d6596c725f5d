"""The server groups by a distilled encoder, beside the steps, and refuses what the encoder was not made for."""

import dataclasses
import queue
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from encoders import random_encoder
from examples import ROOT
from waiting import Clock

from flows.serving import worker
from flows.serving.engine import Engine
from flows.serving.requests import Drawn, Failed, Grouping, Job
from sage.errors import ConfigurationError
from sage.grouping import embedding
from sage.grouping.distilled import read_distilled, write_distilled
from sage.grouping.groups import group
from sage.grouping.policy import Policy
from sage.sampling.pipeline import SharedSamplingPipeline

pytestmark = pytest.mark.slow

SETTINGS = {"steps": 4, "guidance_scale": 2.0, "share_ratio": 0.5, "branch_noise": 1.0, "negative_prompt": ""}
SETTINGS |= {"height": 16, "width": 16}
PROMPTS = ["a red cat", "a red cat on a mat", "stock market", "tall tree", "an old house", "old houses"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", tmp_path_factory.mktemp("pipe")))


@pytest.fixture(scope="module")
def encoder(pipe):
    return random_encoder(pipe.made_for(4, 2.0))


@pytest.fixture(scope="module")
def policy(encoder):
    """A policy whose groups are neither all alone nor all together, nor those by text."""
    rows = encoder.embed(PROMPTS)
    threshold = float(np.median((rows @ rows.T)[np.triu_indices(len(rows), 1)]))
    found = Policy(max_size=3, near_duplicate=1.0, threshold=threshold, by="distilled")
    wanted = group(rows, threshold, 3, 1.0)
    assert 1 < len(wanted) < len(PROMPTS) and wanted != group(embedding.embed(PROMPTS), threshold, 3, 1.0)
    return found


def job(name, prompts, share="request", **changes):
    return Job(name, "t", prompts, list(range(len(prompts))), SETTINGS | changes, share, seeded=True)


def run(engine, jobs):
    events = [event for one in jobs for event in engine.submit(one)]
    while engine.busy or engine.wait is not None:
        events += engine.step()
    return {(event.job, event.index): event for event in events if isinstance(event, Drawn | Failed)}


def test_a_request_is_grouped_by_it(pipe, encoder, policy):
    engine = Engine(pipe, policy, 4, distilled=encoder)
    wanted = policy.form(PROMPTS, encoder.embed(PROMPTS), policy.threshold)
    found = run(engine, [job("a", PROMPTS)])
    together = {frozenset({index, *event.shared_with}) for (_, index), event in found.items()}
    assert together == {frozenset(members) for members in wanted}
    assert engine.groups(PROMPTS, SETTINGS) == wanted


def test_a_budget_does_not_meet_between_requests_and_the_encoders_own_threshold_does(pipe, encoder, policy):
    budget = dataclasses.replace(policy, threshold=None, saving=0.1)
    assert Engine(pipe, budget, 4, distilled=encoder)._threshold(job("a", PROMPTS)) == encoder.threshold


def test_requests_of_a_tenant_share_by_it(pipe, encoder, policy, monkeypatch):
    clock = Clock()  # the second comes before the first has waited enough
    monkeypatch.setattr("flows.serving.engine.time", clock)
    engine = Engine(pipe, dataclasses.replace(policy, threshold=-1.0), 4, distilled=encoder)
    for one in (job("a", PROMPTS[:1], "tenant"), job("b", PROMPTS[2:3], "tenant")):
        engine.submit(one)
    clock.now += 1
    found = run(engine, [])
    assert [found[name, 0].others for name in "ab"] == [1, 1]


def test_a_request_with_other_settings_fails_alone(pipe, encoder, policy):
    engine = Engine(pipe, policy, 4, distilled=encoder)
    jobs = [job("a", PROMPTS[:2], guidance_scale=3.0), job("b", PROMPTS[:2]), job("c", PROMPTS[:2], "none", steps=6)]
    found = run(engine, jobs)
    assert {name for (name, _), event in found.items() if isinstance(event, Failed)} == {"a"}
    assert "guidance scale 2.0, not 3.0" in found["a", 0].message
    with pytest.raises(ConfigurationError, match="guidance scale"):
        engine.groups(PROMPTS, SETTINGS | {"guidance_scale": 3.0})


@pytest.mark.parametrize("by", ["prediction", "distilled"])
def test_an_engine_without_what_the_policy_needs_is_refused(pipe, by):
    with pytest.raises(ConfigurationError, match=rf"group\.by is {by}; set it to text, or to distilled after `sage d"):
        Engine(pipe, Policy(max_size=6, near_duplicate=0.999, threshold=0.9, by=by), 4)


def test_the_model_process_embeds_with_it_beside_the_steps(pipe, encoder, policy, monkeypatch):
    monkeypatch.setattr("flows.serving.encoder.embed", lambda prompts: ValueError("the sentence encoder was used"))
    inbox, outbox = queue.SimpleQueue(), queue.SimpleQueue()
    thread = threading.Thread(target=worker._serve, args=(Engine(pipe, policy, 4, distilled=encoder), inbox, outbox))
    thread.start()
    inbox.put(("submit", job("a", PROMPTS)))
    inbox.put(("submit", job("b", PROMPTS, guidance_scale=3.0)))
    inbox.put(("group", Grouping("c", PROMPTS, SETTINGS)))
    found, groups = {}, None
    while len(found) < 2 * len(PROMPTS) or groups is None:
        event = outbox.get(timeout=60)
        if isinstance(event, Drawn | Failed):
            found[event.job, event.index] = event
        groups = getattr(event, "groups", None) or groups
    inbox.put(None)
    thread.join(60)
    wanted = policy.form(PROMPTS, encoder.embed(PROMPTS), policy.threshold)
    assert groups == wanted
    assert {frozenset({i, *found["a", i].shared_with}) for i in range(len(PROMPTS))} == set(map(frozenset, wanted))
    assert all(isinstance(found["b", i], Failed) for i in range(len(PROMPTS)))


def test_a_model_is_served_with_its_encoder_or_refused_before_it_is_ready(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    tiny.stable_diffusion(tmp_path).save_pretrained("model")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["group"] |= {"by": "distilled", "threshold": 0.9}
    params["generate"] |= {"steps": 4, "guidance_scale": 2.0}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    source = worker.Source("model", 4)
    with pytest.raises(ConfigurationError, match="Run `sage distil --model model`"):
        worker._load(source)
    pipe = SharedSamplingPipeline.from_pretrained("model")
    write_distilled(Path("model"), random_encoder(pipe.made_for(4, 3.0)), {})
    with pytest.raises(ConfigurationError, match=r"guidance scale 3\.0, not 2\.0"):
        worker._load(source)
    write_distilled(Path("model"), random_encoder(pipe.made_for(4, 2.0)), {})
    engine, model = worker._load(source)
    assert engine.distilled.sha256 == read_distilled(Path("model")).sha256
    assert model.settings["group"]["by"] == "distilled"


def test_prefixes_on_disk_are_found_by_the_embeddings_that_they_have(pipe, encoder, tmp_path):
    source = worker.Source("model", prefix_folder=tmp_path)
    files = [worker._prefix_files(source, pipe, "hash", one) for one in (None, encoder, encoder)]
    assert files[0].identity != files[1].identity == files[2].identity
