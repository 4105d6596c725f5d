"""First predictions: the space that they make, groups by them, what they cost, and first steps taken from them."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

from sage.errors import ConfigurationError, UnsupportedError
from sage.grouping.auto import Grouping
from sage.grouping.groups import group
from sage.sampling.first_prediction import FirstPredictions
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Plan

PROMPTS = ["red cat", "red cats", "blue dog", "a tall tree", "tall trees", "red cat"]
CALL = {"num_inference_steps": 4, "guidance_scale": 4.0}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    stock = tiny.pipeline("stable_diffusion", tmp_path_factory.mktemp("stock"))
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, **ZERO_SNR)
    return SharedSamplingPipeline.from_pipe(stock)


def rows(x_0):
    return FirstPredictions(torch.as_tensor(x_0, dtype=torch.float32), 0, True, ("", 0.0, 1.0)).embeddings()


def test_the_cosine_is_one_minus_a_quarter_of_the_mean_squared_difference():
    draws = np.random.default_rng(0).normal(size=(20, 4, 8, 8))
    mean = 0.7 * draws / np.sqrt(np.square(draws).mean((1, 2, 3), keepdims=True))  # rows of one length
    found = rows(mean)
    differences = np.square(mean[:, None] - mean[None]).mean((2, 3, 4))
    np.testing.assert_allclose(found @ found.T, 1 - differences / 4, atol=1e-5)
    # Of different lengths the cosine is a little lower, and it does not depend on the rest of the set.
    apart = rows(np.stack([0.2 * draws[0], 0.9 * draws[0]]))
    assert 1 - 0.49 / 4 - 0.05 < apart[0] @ apart[1] <= 1 - 0.49 * np.square(draws[0]).mean() / 4 + 1e-6
    np.testing.assert_array_equal(rows(mean[:2]), found[:2])


def test_a_prediction_that_is_not_finite_makes_a_group_of_its_own():
    x_0 = np.zeros((3, 4, 2, 2))
    x_0[1, 0] = np.nan
    assert group(rows(x_0), 0.9, 6) == [[0, 2], [1]]


def test_groups_by_prediction_do_not_depend_on_order_batch_or_threads(pipe):
    wanted = pipe.first_predictions(PROMPTS, **CALL)
    assert wanted.network_evaluations == 2 * 5  # the copy of "red cat" is not predicted again
    assert torch.equal(wanted.x_0[0], wanted.x_0[5])
    assert (wanted.x_0[0] - wanted.x_0[2]).abs().max() > 0.01
    order = [4, 2, 5, 0, 3, 1]
    turned = pipe.first_predictions([PROMPTS[place] for place in order], **CALL)
    assert torch.equal(turned.x_0, wanted.x_0[order])
    cosines = wanted.embeddings() @ wanted.embeddings().T
    threshold = float(np.median(cosines[np.triu_indices(6, 1)]))
    groups = group(wanted.embeddings(), threshold, 3, 0.999999)
    assert 1 < len(groups) < 6
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        others = [pipe.first_predictions(PROMPTS, **CALL, batch_size=size) for size in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        torch.testing.assert_close(other.x_0, wanted.x_0, rtol=1e-3, atol=1e-4)
        assert group(other.embeddings(), threshold - 1e-4, 3, 0.9999) == group(
            wanted.embeddings(), threshold - 1e-4, 3, 0.9999
        )


def test_a_call_groups_by_prediction_counts_it_and_takes_its_first_step_from_it(pipe):
    rows_seen = []
    handle = pipe.unet.register_forward_hook(lambda module, args, output: rows_seen.append(len(output[0])))
    call = CALL | {"share_ratio": 0.5, "branch_noise": 1.0, "seed": 3, "output_type": "np", "image_steps": 0}
    try:
        # By prediction everything is alike at this threshold, and copies are kept apart.
        out = pipe(PROMPTS, groups=Grouping(by="prediction", threshold=-1.0, near_duplicate=1.0), **call)
    finally:
        handle.remove()
    roots = len(out.plan.roots)
    assert roots == 2
    assert out.cost.network_evaluations == out.cost.formula == 2 * (5 - roots) + out.plan.nfe(guidance=True)
    assert out.cost.network_evaluations == sum(rows_seen)
    assert out.cost.saving == pytest.approx(1 - out.cost.formula / out.cost.independent)
    # Equal to a call that gets the predictions, which then cost it nothing.
    first = pipe.first_predictions(PROMPTS, **CALL)
    again = pipe(PROMPTS, plan=out.plan, predictions=first, **call)
    np.testing.assert_allclose(again.images, out.images, atol=2e-3)
    assert again.cost.network_evaluations == out.plan.nfe(guidance=True) - 2 * roots


def test_an_image_alone_takes_its_first_step_from_its_own_prediction(pipe, monkeypatch):
    predict = type(pipe)._predict

    def blind(self, x, t, condition, scale, options):
        """At the first step an x_0 that depends on the condition alone: the ideal network."""
        return predict(self, torch.ones_like(x) if int(t) == 999 else x, t, condition, scale, options)

    monkeypatch.setattr(type(pipe), "_predict", blind)
    call = CALL | {"plan": Plan.independent(2, 4), "seed": 3, "output_type": "np", "image_steps": 0}
    wanted = pipe(PROMPTS[1:3], **call)
    found = pipe(PROMPTS[1:3], predictions=pipe.first_predictions(PROMPTS[1:3], **CALL), **call)
    np.testing.assert_allclose(found.images, wanted.images, atol=2e-3)
    assert found.cost.network_evaluations == wanted.cost.network_evaluations - 4


def test_a_first_step_that_sees_its_noise_is_evaluated_again(pipe, monkeypatch):
    config = dict(pipe.scheduler.config) | {"rescale_betas_zero_snr": False}
    monkeypatch.setattr(pipe, "scheduler", DDIMScheduler.from_config(config))
    call = CALL | {"share_ratio": 0.5, "seed": 3}
    out = pipe(PROMPTS[:3], groups=Grouping(by="prediction", threshold=-1.0, near_duplicate=1.0), **call)
    assert out.cost.network_evaluations == 2 * 3 + out.plan.nfe(guidance=True)


def test_predictions_of_another_call_are_refused(pipe):
    first = pipe.first_predictions(PROMPTS[:2], **CALL)
    plan = Plan.independent(2, 4)
    assert pipe.stream(PROMPTS[:2], plan=plan, predictions=first, **CALL)
    for wrong, prompts in (
        (dataclasses.replace(first, made_for=("DDIMScheduler", 999.0, 7.5)), PROMPTS[:2]),
        (first.of([0]), PROMPTS[:2]),
    ):
        with pytest.raises(ConfigurationError, match="make them for this call"):
            pipe.stream(prompts, plan=plan, predictions=wrong, **CALL)
    with pytest.raises(ConfigurationError, match="do not depend on seed, share_ratio"):
        pipe.first_predictions(PROMPTS, seed=3, share_ratio=0.4)
    with pytest.raises(ConfigurationError, match="by='prediction' compares no texts; leave out encoder='other'"):
        Grouping(by="prediction", encoder="other")


def test_a_scheduler_whose_prediction_cannot_be_read_is_named(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", UniPCMultistepScheduler.from_config(pipe.scheduler.config))
    with pytest.raises(UnsupportedError, match="not UniPCMultistepScheduler; group by text"):
        pipe.first_predictions(PROMPTS[:2], **CALL)


@pytest.mark.parametrize("family", ["stable_diffusion_3"])
def test_flow_models_predict_first(family, tmp_path):
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline(family, tmp_path))
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    options = tiny.OPTIONS[family]
    first = pipe.first_predictions(PROMPTS[:3], **CALL, **options)
    assert first.reusable
    assert first.network_evaluations == 6
    out = pipe(PROMPTS[:3], plan=Plan.independent(3, 4), predictions=first, seed=0, output_type="np", **CALL, **options)
    assert out.cost.network_evaluations == 2 * 3 * 3


def test_first_predictions_and_step_caches_are_not_mixed(tmp_path):
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", tmp_path))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **ZERO_SNR)
    known = pipe.first_predictions(tiny.PROMPTS, num_inference_steps=4)
    attentions = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    )
    apply_pyramid_attention_broadcast(pipe.unet, attentions)
    with pytest.raises(UnsupportedError, match="before a step cache begins"):
        pipe.first_predictions(tiny.PROMPTS, num_inference_steps=4)
    with pytest.raises(UnsupportedError, match="a step cache begins with the first step"):
        pipe(tiny.PROMPTS, num_inference_steps=4, predictions=known, share_ratio=0.0)
