"""The engine: jobs of several clients in one running batch, one event for each image."""

import time
from dataclasses import replace

import numpy as np
import pytest
import tiny
from diffusers import DDIMScheduler
from waiting import Clock

from flows.serving.engine import Engine
from flows.serving.requests import Drawn, Failed, Job
from sage.grouping.policy import Policy
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Plan

pytestmark = pytest.mark.slow

SETTINGS = {
    "steps": 4,
    "guidance_scale": 2.0,
    "share_ratio": 0.5,
    "branch_noise": 0.0,
    "negative_prompt": "",
    "height": 16,
    "width": 16,
}
POLICY = Policy(max_size=6, near_duplicate=0.999, threshold=0.5)
CATS = ["a red cat on a mat", "a red cat on a rug", "a red cat on a sofa"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", tmp_path_factory.mktemp("pipe")))


def job(name, prompts, first=0, share="none", tenant=None, seeded=True, **changes):
    seeds = [first + number for number in range(len(prompts))]
    return Job(name, tenant or name, prompts, seeds, SETTINGS | changes, share, seeded)


def run(engine, jobs, between=1):
    """Submit a job every few steps, then finish; return the last event of each image."""
    events = []
    for one in jobs:
        events += engine.submit(one)
        for _ in range(between):
            events += engine.step()
    while engine.busy or engine.wait is not None:
        events += engine.step()
    found = {}
    for event in events:
        if isinstance(event, Drawn | Failed):
            assert (event.job, event.index) not in found
            found[event.job, event.index] = event
    return found


def pixels(event):
    return np.asarray(event.png)


def alone(pipe, prompts, seeds, plan=None, **changes):
    settings = {name: value for name, value in (SETTINGS | changes).items() if name not in ("steps", "share_ratio")}
    settings["negative_prompt"] = settings["negative_prompt"] or None
    plan = plan or Plan.independent(len(prompts), 4)
    return pipe(prompts, plan=plan, num_inference_steps=4, seed=seeds, batch_size=1, **settings).images


def test_an_image_does_not_depend_on_who_is_drawn_beside_it(pipe):
    mine = job("b", ["red cat", "tall tree"], 50)
    others = [job(f"a{number}", ["red dog", "blue cat"], number) for number in range(5)]
    by_itself = run(Engine(pipe, POLICY, 4, deterministic=True), [mine])
    in_company = run(Engine(pipe, POLICY, 4, deterministic=True), [*others, mine])
    wanted = alone(pipe, ["red cat", "tall tree"], [50, 51])
    for index in range(2):
        assert np.array_equal(pixels(by_itself["b", index]), pixels(in_company["b", index]))
        assert np.array_equal(pixels(by_itself["b", index]), np.asarray(wanted[index]))
    rounded = run(Engine(pipe, POLICY, 4), [*others, mine])
    for index in range(2):
        difference = np.abs(pixels(rounded["b", index]).astype(int) - np.asarray(wanted[index]).astype(int))
        assert difference.max() <= 1


def test_similar_prompts_of_a_request_share_and_say_so(pipe):
    prompts = ["a red cat on a mat", "a red cat on a rug", "the stock market fell"]
    found = run(Engine(pipe, POLICY, 4, deterministic=True), [job("a", prompts, share="request")])
    assert [found["a", index].shared_with for index in range(3)] == [[1], [0], []]
    assert [found["a", index].evaluations for index in range(3)] == [6.0, 6.0, 8.0]
    assert {found["a", index].alone for index in range(3)} == {8}
    wanted = alone(pipe, prompts, [0, 1, 2], Plan.shared([[0, 1], [2]], 4, 0.5))
    for index in range(3):
        assert np.array_equal(pixels(found["a", index]), np.asarray(wanted[index]))


@pytest.mark.parametrize("share_ratio", [0.0, 0.5])
def test_images_of_one_prompt_share_their_first_steps_beside_what_prompts_share(pipe, share_ratio):
    prompts = [*[CATS[0]] * 2, "the stock market fell", *[CATS[1]] * 2]
    settings = {"branch_noise": 1.0, "share_ratio": share_ratio}
    found = run(
        Engine(pipe, POLICY, 4, deterministic=True), [job("a", prompts, share="request", image_steps=1, **settings)]
    )
    groups = [[0, 2], [1]] if share_ratio else [[0], [1], [2]]
    plan = Plan.shared(groups, 4, share_ratio).for_images([[0, 1], [2], [3, 4]], 1)
    wanted = alone(pipe, prompts, range(5), plan, **settings)
    for index in range(5):
        assert np.array_equal(pixels(found["a", index]), np.asarray(wanted[index]))
    assert sum(event.evaluations for event in found.values()) == pytest.approx(plan.nfe(guidance=True), abs=1e-5)
    assert found["a", 0].shared_with == ([1, 3, 4] if share_ratio else [1])
    # With `share: "none"` nobody shares.
    found = run(Engine(pipe, POLICY, 4), [job("a", prompts, image_steps=1, **settings)])
    assert {event.evaluations for event in found.values()} == {8.0}


def test_images_of_one_prompt_share_in_given_groups_and_as_the_schedule_allows(pipe, monkeypatch):
    settings = {"branch_noise": 1.0, "share_ratio": 0.5, "image_steps": None}
    prompts = [*[CATS[0]] * 2, CATS[1]]
    engine = Engine(pipe, POLICY, 4)
    assert engine.groups(prompts, SETTINGS | settings) == [[0, 2], [1]]  # this schedule does not begin with noise alone
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    monkeypatch.setattr(pipe, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config, **zero))
    assert engine.groups(prompts, SETTINGS | settings) == [[0, 1, 2]]
    given = replace(job("a", prompts, share="request", **settings), groups=[[0, 1, 2]])
    found = run(Engine(pipe, POLICY, 4), [given])
    plan = Plan.shared([[0, 1]], 4, 0.5).for_images([[0, 1], [2]], 1)
    assert sum(event.evaluations for event in found.values()) == pytest.approx(plan.nfe(guidance=True), abs=1e-5)


def test_one_bad_job_fails_alone(pipe, monkeypatch):
    encode = type(pipe)._encode

    def poisoned(self, prompts, *arguments):
        if any("poison" in prompt for prompt in prompts):
            raise ValueError("cannot be encoded")
        return encode(self, prompts, *arguments)

    monkeypatch.setattr(type(pipe), "_encode", poisoned)
    prompts = ["red cat", "red dog", "blue cat", "a poison", "tall tree", "tall trees", "dog", "cat"]
    found = run(Engine(pipe, POLICY, 4), [job("a", prompts), job("b", ["red cat"])])
    assert [index for (name, index), event in found.items() if isinstance(event, Failed)] == [3]
    assert len(found) == 9 and "cannot be encoded" in found["a", 3].message


def test_an_error_of_the_network_fails_what_runs_and_the_engine_goes_on(pipe, monkeypatch):
    engine, predict = Engine(pipe, POLICY, 2), type(pipe)._predict
    monkeypatch.setattr(type(pipe), "_predict", lambda *arguments: 1 / 0)
    found = run(engine, [job("a", ["red cat", "red dog"])])
    assert all(isinstance(event, Failed) for event in found.values()) and len(found) == 2
    monkeypatch.setattr(type(pipe), "_predict", predict)
    assert isinstance(run(engine, [job("b", ["red cat"])])["b", 0], Drawn)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_an_image_that_is_broken_or_blank_is_an_error_and_no_image(pipe, monkeypatch, value):
    decode = type(pipe.vae).decode

    def broken(self, latents, *args, **kwargs):
        images = decode(self, latents, *args, **kwargs)[0]
        images[0] = value
        return (images,)

    monkeypatch.setattr(type(pipe.vae), "decode", broken)
    found = run(Engine(pipe, POLICY, 4), [job("a", ["red cat", "tall tree"])])
    assert isinstance(found["a", 0], Failed) and "DivergedError" in found["a", 0].message
    assert isinstance(found["a", 1], Drawn)


def test_a_cancelled_job_is_drawn_no_further(pipe):
    engine = Engine(pipe, POLICY, 2)
    engine.submit(job("a", ["red cat", "red dog", "blue cat"]))
    engine.submit(job("b", ["tall tree"]))
    engine.step()
    engine.cancel("a")
    found = run(engine, [])
    assert list(found) == [("b", 0)]
    assert not engine._calls and not engine._members


def test_a_job_larger_than_the_batch_waits_for_room(pipe):
    engine = Engine(pipe, POLICY, 2)
    engine.submit(job("a", tiny.PROMPTS))
    engine.step()
    assert engine._running.tracks == 2
    assert len(run(engine, [])) == 5


def tenants(first="t", second="t", **changes):
    """Two jobs of one similar prompt each."""
    changes = {"share": "tenant", "branch_noise": 1.0, **changes}
    return job("a", CATS[:1], tenant=first, **changes), job("b", CATS[1:2], 9, tenant=second, **changes)


def test_requests_of_a_tenant_that_arrive_together_share(pipe, monkeypatch):
    monkeypatch.setattr("flows.serving.engine._HOLD", 0.5)
    engine = Engine(pipe, POLICY, 4, deterministic=True)
    engine._pace = 1.0
    found = run(engine, tenants(), between=0)
    assert [found[name, 0].others for name in "ab"] == [1, 1]
    assert [found[name, 0].evaluations for name in "ab"] == [6.0, 6.0]
    wanted = alone(pipe, CATS[:2], [0, 9], Plan.shared([[0, 1]], 4, 0.5), branch_noise=1.0)
    for name, image in zip("ab", wanted, strict=True):
        assert np.array_equal(pixels(found[name, 0]), np.asarray(image))


def test_images_of_one_prompt_share_with_the_tenants_other_requests(pipe, monkeypatch):
    monkeypatch.setattr("flows.serving.engine._HOLD", 0.5)
    engine = Engine(pipe, POLICY, 4, deterministic=True)
    engine._pace = 1.0
    settings = {"share": "tenant", "tenant": "t", "branch_noise": 1.0, "image_steps": 1}
    found = run(engine, [job("a", [CATS[0]] * 2, **settings), job("b", CATS[1:2], 9, **settings)], between=0)
    plan = Plan.shared([[0, 1]], 4, 0.5).for_images([[0, 1], [2]], 1)
    wanted = alone(pipe, [CATS[0]] * 2 + CATS[1:2], [0, 1, 9], plan, branch_noise=1.0)
    for key, image in zip([("a", 0), ("a", 1), ("b", 0)], wanted, strict=True):
        assert np.array_equal(pixels(found[key]), np.asarray(image))
    told = [(event.shared_with, event.others) for _, event in sorted(found.items())]
    assert told == [([1], 1), ([0], 1), ([], 2)]
    third = run(engine, [job("c", CATS[2:], 20, **settings)])
    assert third["c", 0].prefix == "similar"


@pytest.mark.parametrize(
    "changes", [{"second": "u"}, {"share": "request"}, {"share": "none"}, {"branch_noise": 0.0}], ids=str
)
def test_nothing_is_shared_across_tenants_or_where_nobody_asked(pipe, changes):
    jobs = tenants(**changes)
    engine = Engine(pipe, POLICY, 4, deterministic=True)
    for together in (jobs, jobs[:1], jobs[1:]):
        found = run(engine, together, between=0)
        for one in together:
            event = found[one.id, 0]
            assert (event.others, event.prefix, event.evaluations) == (0, None, 8.0)
            (image,) = alone(pipe, one.prompts, one.seeds)
            assert np.array_equal(pixels(event), np.asarray(image))


def test_a_similar_prompt_begins_where_its_neighbour_branched(pipe):
    engine = Engine(pipe, POLICY, 4, deterministic=True)
    found = {name: event for one in tenants() for name, event in run(engine, [one]).items()}
    assert (found["a", 0].prefix, found["a", 0].evaluations) == (None, 8.0)
    assert (found["b", 0].prefix, found["b", 0].evaluations, found["b", 0].alone) == ("similar", 4.0, 8)
    third = run(engine, [job("c", ["the stock market fell"], tenant="t", share="tenant", branch_noise=1.0)])
    assert third["c", 0].prefix is None


def test_the_same_prompt_again_begins_after_its_first_step_unless_it_has_a_seed(pipe, monkeypatch):
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    monkeypatch.setattr(pipe, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config, **settings))
    engine = Engine(pipe, POLICY, 4, deterministic=True)

    def ask(name, **changes):
        return run(engine, [job(name, ["red cat"], 5, **{"tenant": "t", "share": "request", **changes})])[name, 0]

    assert ask("a").prefix is None
    assert (ask("b", seeded=False).prefix, ask("c", seeded=False).evaluations) == ("exact", 6.0)
    assert ask("d").prefix is None
    assert ask("e", seeded=False, share="none").prefix is None
    assert ask("f", seeded=False, tenant="u").prefix is None
    assert ask("g", seeded=False, guidance_scale=3.0).prefix is None


def test_a_waiting_image_is_released_after_its_deadline_even_if_nothing_else_happens(pipe):
    engine = Engine(pipe, POLICY, 4)
    engine.submit(tenants()[0])
    assert not engine.busy and 0 <= engine.wait <= 0.05
    time.sleep(engine.wait + 0.01)
    engine.step()
    assert engine.busy and engine.wait is None


def test_what_waited_is_forgotten_even_if_others_always_wait(pipe, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("flows.serving.engine.time", clock)
    engine = Engine(pipe, POLICY, 4)
    for number in range(6):
        one = job(str(number), [f"{CATS[0]} {number}"], number, "tenant", "t", branch_noise=1.0)
        engine.submit(one, np.eye(8)[[number]])
        clock.now += 0.03  # an image waits for 0.05 s
        engine._release()
    (forming,) = engine._forming.values()
    assert len(forming.members) == forming.grouper.waiting == 1
    assert len(engine._queue) == 5


def test_a_cancelled_image_is_not_waited_for(pipe):
    engine = Engine(pipe, POLICY, 4)
    first, second = tenants()
    engine.submit(first)
    engine.submit(second)
    engine.cancel("a")
    found = run(engine, [])
    assert list(found) == [("b", 0)] and found["b", 0].others == 0


def test_rows_of_a_batch_wait_for_requests_but_a_request_never_waits_for_them(pipe):
    engine = Engine(pipe, POLICY, 2, deterministic=True)
    batch = replace(job("batch", ["red cat", "red dog", "tall tree", "dog"]), background=True)
    order = [event.job for event in engine.submit(batch)]
    for _ in range(3):
        order += [event.job for event in engine.step()]  # rows of the batch are running
    for one in (job("a", ["blue cat"]), job("b", ["tall trees"], guidance_scale=3.0), job("c", ["cat"])):
        engine.submit(one)
    found = {}
    while engine.busy:
        for event in engine.step():
            order.append(event.job)
            found[event.job, event.index] = event
    assert order[:3] == ["a", "b", "c"] and order[3:] == ["batch"] * 4
    # What stood still in between is the image that it would have been.
    for index, (prompt, image) in enumerate(zip(batch.prompts, alone(pipe, batch.prompts, batch.seeds), strict=True)):
        assert np.array_equal(pixels(found["batch", index]), np.asarray(image)), prompt


def test_rows_of_a_batch_fill_what_requests_leave_free(pipe):
    engine = Engine(pipe, POLICY, 4)
    engine.submit(job("a", ["blue cat"]))
    engine.submit(replace(job("batch", ["red cat", "red dog", "tall tree"]), background=True))
    steps = []
    while engine.busy:
        steps.append([event.job for event in engine.step()])
    assert len(steps) == 4 and sorted(steps[-1]) == ["a", "batch", "batch", "batch"]


def test_a_job_with_groups_is_drawn_in_these_groups(pipe):
    prompts = ["a red cat on a mat", "the stock market fell", "a red cat on a rug"]
    given = replace(job("a", prompts, share="request"), groups=[[0, 1], [2]])
    found = run(Engine(pipe, POLICY, 4, deterministic=True), [given])
    assert [found["a", index].shared_with for index in range(3)] == [[1], [0], []]
    engine = Engine(pipe, POLICY, 4)
    assert engine.groups(prompts, SETTINGS) == [[0, 2], [1]]
    assert engine.groups(prompts, SETTINGS | {"share_ratio": 0.0}) == [[0], [1], [2]]
