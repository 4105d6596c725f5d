"""Callbacks, interruptions, and calls of one pipeline at the same time: the state of a call is its own."""

import threading

import numpy as np
import pytest
import tiny
import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)

from sage.errors import ConfigurationError, UnsupportedError
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Block, Plan

pytestmark = pytest.mark.slow

CALL = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}
TOLERANCE = {"rtol": 0, "atol": 2e-3}
CUTOFFS = {
    "stable_diffusion": SDCFGCutoffCallback,
    "stable_diffusion_xl": SDXLCFGCutoffCallback,
    "stable_diffusion_3": SD3CFGCutoffCallback,
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return tiny.pipeline("stable_diffusion", tmp_path_factory.mktemp("stock"))


@pytest.fixture
def pipe(stock):
    return SharedSamplingPipeline.from_pipe(stock)


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def stop_at(step):
    def stop(pipeline, i, timestep, tensors):
        pipeline._interrupt = i == step
        return tensors

    return stop


def test_a_callback_sees_every_step_and_can_change_latents(pipe, stock):
    seen = []

    def keep(pipeline, step, timestep, tensors):
        assert int(timestep) == int(pipeline.scheduler.timesteps[step])
        seen.append((step, tensors["latents"].shape[0]))
        return tensors

    plan = Plan(4, (Block(2, (0, 1, 2)), 3))
    pipe(tiny.PROMPTS[:4], plan=plan, seed=0, callback_on_step_end=keep, **CALL)
    assert seen == [(0, 2), (1, 2), (2, 4), (3, 4)]

    def halve(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"] / 2}

    call = CALL | {"callback_on_step_end": halve}
    expected = stock("red cat", generator=torch.Generator().manual_seed(1), **call).images
    assert np.array_equal(pipe("red cat", seed=[1], **call).images, expected)


def test_a_guidance_scale_set_by_a_callback_is_for_the_images_of_its_batch(pipe, stock):
    def rise(pipeline, step, timestep, tensors):
        pipeline._guidance_scale += 2.0
        return tensors

    call = CALL | {"callback_on_step_end": rise}
    expected = stock(tiny.PROMPTS, generator=generators(range(5)), **call).images
    out = pipe(tiny.PROMPTS, seed=range(5), share_ratio=0, batch_size=2, **call)
    np.testing.assert_allclose(out.images, expected, **TOLERANCE)
    assert pipe.guidance_scale == stock.guidance_scale == 4 + 4 * 2
    assert np.abs(expected - stock(tiny.PROMPTS, generator=generators(range(5)), **CALL).images).max() > 0.01

    scales = []

    def note(pipeline, step, timestep, tensors):
        scales.append((step, pipeline.guidance_scale))
        return rise(pipeline, step, timestep, tensors)

    pipe(tiny.PROMPTS[:4], plan=Plan(4, (Block(2, (0, 1)), Block(3, (2, 3)))), callback_on_step_end=note, **CALL)
    assert scales
    assert all(scale == 4 + 2 * step for step, scale in scales)


@pytest.mark.parametrize("family", CUTOFFS)
def test_the_cutoff_callbacks_of_diffusers_turn_guidance_off(family, tmp_path):
    stock = tiny.pipeline(family, tmp_path)
    shared = SharedSamplingPipeline.from_pipe(stock)
    cutoff = CUTOFFS[family](cutoff_step_ratio=None, cutoff_step_index=1)
    call = tiny.OPTIONS.get(family, {}) | CALL | {"callback_on_step_end": MultiPipelineCallbacks([cutoff])}
    # For several prompts, diffusers' own pipelines fail on what its callbacks return.
    expected = [stock(p, generator=generators([i]), **call).images[0] for i, p in enumerate(tiny.PROMPTS)]
    out = shared(tiny.PROMPTS, seed=range(5), share_ratio=0, batch_size=3, **call)
    np.testing.assert_allclose(out.images, expected, **TOLERANCE)
    assert out.cost.network_evaluations == 5 * (2 * 2 + 2)
    # Members go on as their block: without guidance.
    grouped = shared(tiny.PROMPTS, seed=0, groups=tiny.GROUPS, share_ratio=0.5, **call)
    assert grouped.cost.network_evaluations == 2 * 2 * 2 + 2 * 5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_callback_gets_every_tensor_that_its_family_names(family, tmp_path):
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline(family, tmp_path))
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append((set(tensors), pipeline.guidance_scale, pipeline.num_timesteps))
        return tensors

    names = pipe._callback_tensor_inputs
    call = CALL | tiny.OPTIONS.get(family, {}) | {"callback_on_step_end_tensor_inputs": names}
    pipe("red cat", seed=0, callback_on_step_end=look, **call)
    assert seen == [({*names}, 4.0, 4)] * 4
    assert (pipe.guidance_scale, pipe.num_timesteps) == (4.0, 4)


def test_the_cutoff_of_the_documentation_is_the_stock_pipelines(pipe, stock):
    def cut(pipeline, step, timestep, tensors):
        if step == int(pipeline.num_timesteps * 0.5):
            pipeline._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    inputs = ["latents", "prompt_embeds"]
    call = CALL | {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": inputs}
    expected = stock(tiny.PROMPTS, generator=generators(range(5)), **call).images
    assert np.array_equal(pipe(tiny.PROMPTS, seed=range(5), share_ratio=0, **call).images, expected)


def refuse(pipe, callback, says, error=UnsupportedError, **more):
    inputs = ["latents", "prompt_embeds"]
    with pytest.raises(error, match=says):
        pipe("red cat", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs, **CALL | more)


def test_what_a_callback_cannot_change_is_said(pipe):
    def replace(pipeline, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 2}

    def in_place(pipeline, step, timestep, tensors):
        tensors["prompt_embeds"].zero_()
        return tensors

    def guide(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 3.0
        return tensors

    for change in (replace, in_place):
        refuse(pipe, change, "the callback changed prompt_embeds; it may change latents and the guidance scale")
    says = r"set the guidance scale to 3.0, but the call began without guidance \(scale 1.0\)"
    refuse(pipe, guide, says, ConfigurationError, guidance_scale=1.0)
    adapter = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    refuse(pipe, MultiPipelineCallbacks([adapter]), "IPAdapterScaleCutoffCallback changes the networks")


def test_an_interrupted_call_has_the_latents_that_the_stock_one_has(pipe, stock):
    call = CALL | {"callback_on_step_end": stop_at(1)}
    expected = stock(tiny.PROMPTS, generator=generators(range(5)), **call).images
    out = pipe(tiny.PROMPTS, seed=range(5), share_ratio=0, **call)
    assert np.array_equal(out.images, expected)
    assert out.finished == [False] * 5
    assert out.cost.network_evaluations == 5 * 2 * 2 < out.cost.formula
    whole = pipe(tiny.PROMPTS, seed=range(5), share_ratio=0, **CALL)
    assert whole.finished == [True] * 5


def test_an_interruption_keeps_finished_images_and_makes_none_of_noise(pipe):
    encoded = []
    handle = pipe.text_encoder.register_forward_hook(lambda module, args, output: encoded.append(len(output[0])))
    seen = []

    def stop(pipeline, i, timestep, tensors):
        seen.append(i)
        pipeline._interrupt = len(seen) == 6
        return tensors

    call = {"share_ratio": 0, "batch_size": 2, "seed": 1} | CALL
    prompts = [*tiny.PROMPTS, *tiny.PROMPTS]
    out = pipe(prompts, callback_on_step_end=stop, **call)
    handle.remove()
    assert out.finished == [True] * 2 + [False] * 8
    assert [image is None for image in out.images] == [False] * 4 + [True] * 6
    assert np.array_equal(out.images[:2], pipe(prompts, **call).images[:2])
    assert encoded == [2, 2, 2]  # with text and without, then with text
    seen.clear()
    results = list(pipe.stream(prompts, callback_on_step_end=stop, **call))
    assert [(result.index, result.finished) for result in results] == [(0, True), (1, True), (2, False), (3, False)]


def test_interrupting_one_stream_leaves_the_others(pipe):
    call = {"share_ratio": 0, "batch_size": 1} | CALL
    alone = pipe(tiny.PROMPTS, seed=1, **call).images
    first = pipe.stream(tiny.PROMPTS, seed=1, **call)
    results = [next(first)]
    stopped = pipe.stream(tiny.PROMPTS, seed=2, callback_on_step_end=stop_at(1), **call)
    assert [result.finished for result in stopped] == [False]
    results += first
    assert all(np.array_equal(result.image, alone[result.index]) and result.finished for result in results)
    assert len(results) == 5


def test_an_interrupted_pipeline_stops_all_its_calls_under_way(pipe):
    call = {"share_ratio": 0, "batch_size": 1} | CALL
    streams = [pipe.stream(tiny.PROMPTS, seed=seed, **call) for seed in (1, 2)]
    for stream in streams:
        next(stream)
    pipe._interrupt = True
    later = pipe.stream(tiny.PROMPTS, seed=3, **call)
    assert [len(list(stream)) for stream in (*streams, later)] == [0, 0, 5]


def test_two_streams_at_once_do_not_disturb_each_other(pipe):
    call = {"groups": [[0, 1], [2]], "share_ratio": 0.5, "batch_size": 1, **CALL}
    streams = [pipe.stream(["red cat", "red dog", "tree"], seed=seed, **call) for seed in (1, 2)]
    mixed = [sorted(pair, key=lambda result: result.index) for pair in zip(*zip(*streams, strict=True), strict=True)]
    for seed, results in zip((1, 2), mixed, strict=True):
        alone = pipe(["red cat", "red dog", "tree"], seed=seed, **call)
        assert all(np.array_equal(result.image, alone.images[result.index]) for result in results)


def test_threads_do_not_disturb_each_other(pipe):
    """Each thread has other steps, another guidance scale and texts of other lengths."""
    settings = [
        {"prompt": [text * (1 + 9 * k) for text in tiny.PROMPTS], "num_inference_steps": 3 + k, "guidance_scale": scale}
        for k, scale in enumerate((4.0, 1.0, 7.0))
    ]
    call = {"share_ratio": 0.5, "groups": tiny.GROUPS, "seed": 1, "output_type": "np", "batch_size": 2}
    expected = [pipe(**own, **call) for own in settings]
    wrong = []

    def work(own, alone):
        for _ in range(5):
            try:
                out = pipe(**own, **call)
                if not np.array_equal(out.images, alone.images) or out.truncated_tokens != alone.truncated_tokens:
                    wrong.append("another image")
            except Exception as error:  # what a thread raises is lost otherwise
                wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(settings, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
