"""Continuous batching gives the pipeline's own images, whatever runs beside them."""

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from sage.errors import ConfigurationError
from sage.sampling.branch_noise import begins_as_noise
from sage.sampling.continuous import Continuous, Start
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Block, Plan

pytestmark = pytest.mark.slow

# A batch of another size rounds differently.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
TREE = Plan(6, (Block(2, (Block(4, (0, 1)), 2)), Block(3, (3, 4))))


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request, tmp_path_factory):
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline(request.param, tmp_path_factory.mktemp(request.param)))
    pipe.set_progress_bar_config(disable=True)
    return pipe, tiny.OPTIONS.get(request.param, {})


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    found = SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", tmp_path_factory.mktemp("pipe")))
    found.set_progress_bar_config(disable=True)
    return found


def arguments(plan=TREE, first=0, **changes):
    count = plan.prompts
    return {
        "prompt": tiny.PROMPTS[:count],
        "plan": plan,
        "num_inference_steps": 6,
        "guidance_scale": 4.0,
        "seed": [first + 11 * number for number in range(count)],
        "output_type": "latent",
        **changes,
    }


def finish(running, found=()):
    found = list(found)
    while running.tracks:
        found += running.step()
    return found


def images(found, call):
    mine = sorted((one for one in found if one.call is call), key=lambda one: one.index)
    return torch.stack([one.image for one in mine])


def test_calls_that_join_in_the_middle_get_the_pipelines_images(family):
    pipe, options = family
    calls = [
        arguments(**options),
        arguments(Plan.independent(2, 6), 5, **options),
        arguments(Plan.shared([[0, 1, 2]], 6, 0.5), 7, negative_prompt="blue", **options),
    ]
    wanted = [pipe(**call).images for call in calls]
    running, found, admitted = Continuous(pipe, 4), [], []
    for call in calls:
        admitted.append(running.admit(pipe.stream(**call)))
        found += running.step() + running.step()
    found = finish(running, found)
    for call, expected in zip(admitted, wanted, strict=True):
        torch.testing.assert_close(images(found, call), expected, **TOLERANCE)
        assert call.evaluations == call.planned


def test_with_batches_of_one_the_images_are_the_pipelines_bit_for_bit(family):
    pipe, options = family
    calls = [arguments(batch_size=1, **options), arguments(Plan.independent(3, 6), 5, batch_size=1, **options)]
    wanted = [pipe(**call).images for call in calls]
    running = Continuous(pipe, 1)
    first = running.admit(pipe.stream(**calls[0]))
    found = running.step()
    second = running.admit(pipe.stream(**calls[1]))
    found = finish(running, found)
    assert torch.equal(images(found, first), wanted[0])
    assert torch.equal(images(found, second), wanted[1])


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler,
        EulerAncestralDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        HeunDiscreteScheduler,
        PNDMScheduler,
    ],
)
def test_every_schedulers_state_moves_between_batches(pipe, scheduler, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config))
    pipe.scheduler.set_timesteps(6)
    steps = len(pipe.scheduler.timesteps)
    noise = 0.7 if scheduler in (DDPMScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler) else 0.0
    plan = Plan(steps, (Block(3, (0, 1)), 2))
    calls = [arguments(plan, branch_noise=noise), arguments(plan, 5, branch_noise=noise)]
    wanted = [pipe(**call).images for call in calls]
    running = Continuous(pipe, 3)
    first = running.admit(pipe.stream(**calls[0]))
    found = running.step()
    second = running.admit(pipe.stream(**calls[1]))
    found = finish(running, found)
    torch.testing.assert_close(images(found, first), wanted[0], **TOLERANCE)
    torch.testing.assert_close(images(found, second), wanted[1], **TOLERANCE)


def test_what_differs_in_steps_size_or_guidance_runs_apart(pipe):
    calls = [
        arguments(Plan.independent(2, 6)),
        arguments(Plan.independent(2, 6), guidance_scale=1.0),
        arguments(Plan.independent(2, 4), num_inference_steps=4),
        arguments(Plan.independent(2, 6), height=24, width=16),
    ]
    wanted = [pipe(**call).images for call in calls]
    running = Continuous(pipe, 8)
    admitted = [running.admit(pipe.stream(**call)) for call in calls]
    found = finish(running)
    for call, expected in zip(admitted, wanted, strict=True):
        torch.testing.assert_close(images(found, call), expected, **TOLERANCE)


def test_a_newcomer_catches_up_and_shares_the_remaining_network_calls(pipe):
    running, calls = Continuous(pipe, 4), 0
    one = arguments(Plan.independent(1, 6))
    running.admit(pipe.stream(**one))
    running.step()
    running.admit(pipe.stream(**one))
    while running.tracks:
        running.step()
        calls += 1
    assert calls == 1 + 5  # its first step alone, then together


def test_newcomers_cannot_hold_back_the_oldest_for_ever(pipe):
    running, calls = Continuous(pipe, 8), 0
    one = arguments(Plan.independent(1, 6))
    oldest, done = running.admit(pipe.stream(**one)), False
    running.step()
    while not done:
        running.admit(pipe.stream(**one))
        done = any(finished.call is oldest for finished in running.step())
        calls += 1
    assert calls <= 5 + 3


def test_the_cost_of_a_block_is_split_among_its_members(pipe):
    running = Continuous(pipe, 8)
    call = running.admit(pipe.stream(**arguments()))
    found = finish(running)
    assert call.evaluations == TREE.nfe(guidance=True) == round(sum(one.evaluations for one in found), 9)
    costs = {one.index: one.evaluations for one in found}
    assert costs[0] == pytest.approx(2 * (2 / 3 + 2 / 2 + 2))


def test_the_others_images_do_not_change_when_one_is_cancelled(pipe):
    wanted = pipe(**arguments(batch_size=1)).images
    running = Continuous(pipe, 1)
    call = running.admit(pipe.stream(**arguments(batch_size=1)))
    running.step()
    running.cancel(call, {1, 3})
    found = finish(running)
    assert sorted(one.index for one in found) == [0, 2, 4]
    assert torch.equal(images(found, call), wanted[[0, 2, 4]])


def test_a_cancelled_call_costs_nothing_more(pipe):
    running = Continuous(pipe, 8)
    call = running.admit(pipe.stream(**arguments()))
    running.step()
    spent = call.evaluations
    running.cancel(call)
    assert running.tracks == 0 and running.step() == [] and call.evaluations == spent


def test_a_batch_needs_a_row(pipe):
    with pytest.raises(ConfigurationError, match="batch_size is 0"):
        Continuous(pipe, 0)


def zero_snr(pipe, monkeypatch):
    """Give the pipeline a schedule that begins with noise alone."""
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    monkeypatch.setattr(pipe, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config, **settings))


def prefixes(pipe, call, keep):
    running = Continuous(pipe, 4)
    admitted = running.admit(pipe.stream(**call), keep=keep)
    finish(running)
    return {(prefix.step, *members): prefix for members, prefix in admitted.kept}


def test_a_first_prediction_that_does_not_depend_on_the_noise_gives_exactly_the_image_alone(pipe, monkeypatch):
    zero_snr(pipe, monkeypatch)
    predict = type(pipe)._predict

    def blind(self, x, t, condition, scale, options):
        """At the first step, v = -x_0 for an x_0 that depends on the condition alone: the ideal network."""
        return predict(self, torch.ones_like(x) if int(t) == 999 else x, t, condition, scale, options)

    monkeypatch.setattr(type(pipe), "_predict", blind)
    one = Plan.independent(1, 6)
    kept = prefixes(pipe, arguments(one, 1), keep=[1])[1, 0]
    wanted = pipe(**arguments(one, 2)).images
    running = Continuous(pipe, 4)
    call = running.admit(pipe.stream(**arguments(one, 2)), starts={0: Start(kept, own_noise=True)})
    found = finish(running)
    torch.testing.assert_close(images(found, call), wanted, rtol=1e-3, atol=5e-3)
    assert call.evaluations == call.planned == found[0].evaluations == 10


def test_images_of_one_prompt_share_as_in_the_pipeline(pipe, monkeypatch):
    zero_snr(pipe, monkeypatch)
    settings = {"branch_noise": 1.0, "num_images_per_prompt": 3, "image_steps": 2, "seed": [5, 3, 9, 4, 8, 2]}
    call = arguments(Plan.shared([[0, 1]], 6, 0.2), **settings)
    wanted = pipe(**call | {"batch_size": 1}).images
    running = Continuous(pipe, 1)
    admitted = running.admit(pipe.stream(**call))
    assert torch.equal(images(finish(running), admitted), wanted)
    assert admitted.evaluations == 2 * (1 + 2 + 4 * 6)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_an_image_begins_from_a_prefix_as_the_child_of_its_block_would(pipe, monkeypatch, scheduler):
    monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config))
    pair = Plan(6, (Block(3, (0, 1)),))
    call = arguments(pair, branch_noise=0.8)
    wanted = pipe(**call).images[1]
    alone = arguments(Plan.independent(1, 6), branch_noise=0.8, prompt=call["prompt"][1:2], seed=call["seed"][1:2])
    kept = prefixes(pipe, call, keep=[3])[3, 0, 1]
    running = Continuous(pipe, 4)
    admitted = running.admit(pipe.stream(**alone), starts={0: Start(kept, own_noise=False)})
    found = finish(running)
    torch.testing.assert_close(images(found, admitted)[0], wanted, **TOLERANCE)
    assert admitted.evaluations == 6


def test_keeping_prefixes_changes_no_image_and_counts_their_bytes(pipe):
    call = arguments(Plan.shared([[0, 1], [2]], 6, 0.5))
    running = Continuous(pipe, 4)
    admitted = running.admit(pipe.stream(**call), keep=[1, 3])
    found = finish(running)
    torch.testing.assert_close(images(found, admitted), pipe(**call).images, **TOLERANCE)
    assert sorted((prefix.step, members) for members, prefix in admitted.kept) == [
        (1, [0, 1]),
        (1, [2]),
        (3, [0, 1]),
        (3, [2]),
    ]
    assert {prefix.bytes for _, prefix in admitted.kept} == {2 * 4 * 8 * 8 * 4}


@pytest.mark.parametrize(
    ("scheduler", "noise"),
    [
        (DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), True),
        (DDIMScheduler(), False),
        (EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), False),
        (FlowMatchEulerDiscreteScheduler(), True),
        (UniPCMultistepScheduler(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_schedules_begin_as_noise(scheduler, noise):
    scheduler.set_timesteps(6)
    assert begins_as_noise(scheduler) is noise
