"""Prompts are embedded beside the steps: a slow or failing encoder holds up only who needs it."""

import queue
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from flows.serving import encoder, worker
from flows.serving.encoder import Encoder
from flows.serving.engine import Engine
from flows.serving.requests import Drawn, Failed, Job
from sage.grouping.policy import Policy
from sage.sampling.pipeline import SharedSamplingPipeline

SETTINGS = {
    "steps": 4,
    "guidance_scale": 1.0,
    "share_ratio": 0.5,
    "branch_noise": 1.0,
    "negative_prompt": "",
    "height": 16,
    "width": 16,
}
PAIR = ["a red cat on a mat", "a red cat on a rug"]


def job(name, prompts, share):
    return Job(name, "t", prompts, list(range(len(prompts))), SETTINGS, share, seeded=True)


@pytest.fixture
def slow_encoder(monkeypatch):
    """An encoder that answers only when the returned event is set; "poison" fails. It notes what it was given."""
    embed, released, asked = encoder.embed, threading.Event(), []

    def wait(prompts):
        if prompts != ["red heart"]:
            asked.append(list(prompts))
            assert released.wait(60)
        if "poison" in prompts:
            raise ValueError("cannot be embedded")
        return embed(prompts)

    monkeypatch.setattr(encoder, "embed", wait)
    released.asked = asked
    return released


@pytest.fixture
def running(tmp_path):
    """The model process's loop in a thread: its inbox, and the images and errors that it sends."""
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", tmp_path))
    inbox, outbox = queue.SimpleQueue(), queue.SimpleQueue()
    engine = Engine(pipe, Policy(max_size=6, near_duplicate=0.999, threshold=0.5), 4)
    thread = threading.Thread(target=worker._serve, args=(engine, inbox, outbox))
    thread.start()

    def events(count):
        found = []
        while len(found) < count:
            event = outbox.get(timeout=60)
            found += [event] if isinstance(event, Drawn | Failed) else []
        return {(event.job, event.index): event for event in found}

    yield SimpleNamespace(put=inbox.put, events=events)
    inbox.put(None)
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.slow
def test_a_slow_encoder_holds_up_only_who_needs_it(slow_encoder, running):
    running.put(("submit", job("a", PAIR, "request")))
    running.put(("submit", job("gone", PAIR, "request")))
    running.put(("submit", job("b", ["tall tree"], "request")))
    running.put(("submit", job("c", PAIR, "none")))
    assert set(running.events(3)) == {("b", 0), ("c", 0), ("c", 1)}
    running.put(("cancel", "gone"))
    running.put(("submit", job("d", ["tall tree"], "none")))
    assert set(running.events(1)) == {("d", 0)}
    slow_encoder.set()
    found = running.events(2)
    assert [found["a", index].shared_with for index in range(2)] == [[1], [0]]


@pytest.mark.slow
def test_what_cannot_be_embedded_fails_alone(slow_encoder, running):
    slow_encoder.set()
    running.put(("submit", job("a", ["poison", "red cat"], "request")))
    running.put(("submit", job("b", PAIR, "request")))
    found = running.events(4)
    assert [isinstance(found[place], Failed) for place in [("a", 0), ("a", 1), ("b", 0), ("b", 1)]] == [1, 1, 0, 0]
    assert "cannot be embedded" in found["a", 0].message


def test_only_requests_that_share_in_a_tenant_are_embedded_together(slow_encoder):
    done = queue.SimpleQueue()
    beside = Encoder(lambda job, found: done.put((job.id, found)))
    beside.submit(job("first", ["x"], "request"))
    while not slow_encoder.asked:
        pass
    for name, prompts, share in [("a", PAIR, "tenant"), ("b", PAIR, "request"), ("c", ["poison"], "tenant")]:
        beside.submit(job(name, prompts, share))
    beside.submit(job("d", PAIR[:1], "tenant"))
    slow_encoder.set()
    found = dict(done.get(timeout=60) for _ in range(5))
    assert slow_encoder.asked[1] == [*PAIR, "poison", PAIR[0]] and PAIR in slow_encoder.asked[2:]
    assert isinstance(found["c"], ValueError)
    assert np.allclose(found["a"], found["b"], atol=1e-5) and np.allclose(found["d"][0], found["b"][0], atol=1e-5)
