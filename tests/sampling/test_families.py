"""What must hold for every model family, against the stock pipeline on the same random weights."""

import inspect

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from sage.errors import ConfigurationError
from sage.sampling.pipeline import TEXTS, SharedSamplingPipeline
from sage.sampling.plan import Block, Plan

pytestmark = pytest.mark.slow

STEPS = 6
# A batch of another size rounds differently; pictures are in [0, 1].
TOLERANCE = {"rtol": 0, "atol": 2e-3}


@pytest.fixture(scope="module", params=list(tiny.FAMILIES))
def pair(request, tmp_path_factory):
    """A stock pipeline, the shared one on its parts, and the family's options."""
    stock = tiny.pipeline(request.param, tmp_path_factory.mktemp(request.param))
    options = tiny.OPTIONS.get(request.param, {}) | {
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "np",
    }
    return stock, SharedSamplingPipeline.from_pipe(stock), options


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


SEEDS = [11, 12, 13, 14, 15]


def steps(pipe):
    return pipe.evaluations(STEPS)


def test_share_ratio_0_is_the_stock_pipeline_bit_for_bit(pair):
    stock, shared, options = pair
    for scale in (4.0, 1.0):
        call = {**options, "guidance_scale": scale}
        expected = stock(tiny.PROMPTS, generator=generators(SEEDS), **call).images
        found = shared(tiny.PROMPTS, generator=generators(SEEDS), share_ratio=0, **call)
        assert np.array_equal(found.images, expected)
        assert expected.std() > 0.02
        assert found.cost.network_evaluations == (2 if scale > 1 else 1) * STEPS * 5


def test_negative_prompts_and_several_images_are_the_stock_pipelines(pair):
    stock, shared, options = pair
    call = {**options, "num_images_per_prompt": 2}
    shares = {"share_ratio": 0, "batch_size": 16}
    negatives = ["dog", "tree", "", "cat", "red"]
    seeds = range(10)
    expected = stock(tiny.PROMPTS, negative_prompt=negatives, generator=generators(seeds), **call).images
    found = shared(tiny.PROMPTS, negative_prompt=negatives, generator=generators(seeds), **shares, **call)
    assert np.array_equal(found.images, expected)


def test_further_prompts_are_the_stock_pipelines(pair):
    """One for all, or one for each; a group in which they differ does not draw what one in which they agree does."""
    stock, shared, options = pair
    takes = [name for name in TEXTS if name in inspect.signature(type(stock).__call__).parameters]
    if not takes:
        with pytest.raises(ConfigurationError, match="takes no prompt_2"):
            shared(tiny.PROMPTS, share_ratio=0, prompt_2="cat", **options)
        return
    further = {name: list(reversed(tiny.PROMPTS)) for name in takes} | {"negative_prompt_2": "dog"}
    call = {"negative_prompt": "tree", **options}
    each = {name: [texts] * 5 if isinstance(texts, str) else texts for name, texts in further.items()}
    given = {"generator": generators(SEEDS), **call, "negative_prompt": ["tree"] * 5}
    expected = stock(tiny.PROMPTS, **given, **each).images
    found = shared(tiny.PROMPTS, seed=SEEDS, share_ratio=0, **call, **further).images
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, shared(tiny.PROMPTS, seed=SEEDS, share_ratio=0, **call).images)
    grouped = {"groups": tiny.GROUPS, "share_ratio": 0.5, "seed": SEEDS}
    one = shared(tiny.PROMPTS, **grouped, **call, **further).images
    turned = {"groups": [[4, 3], [2, 0, 1]], "share_ratio": 0.5, "seed": SEEDS}
    np.testing.assert_allclose(shared(tiny.PROMPTS, **turned, **call, **further).images, one, **TOLERANCE)
    with pytest.raises(ConfigurationError, match="prompt_2 has 2 entries for 5 prompts"):
        shared(tiny.PROMPTS, prompt_2=["cat", "dog"], **call)


def test_latents_in_and_out_are_the_stock_pipelines(pair):
    stock, shared, options = pair
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    call = {**options, "output_type": "latent", "latents": latents}
    expected = stock(tiny.PROMPTS, generator=generators(SEEDS), **call).images
    found = shared(tiny.PROMPTS, generator=generators(SEEDS), share_ratio=0, **call).images
    assert torch.equal(found, expected)


def named(*names):
    return lambda values: dict(zip(names, values, strict=True))


WITH_POOLED = named("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
WITH_MASK = named("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
EMBEDDINGS = {
    "StableDiffusionPipeline": lambda pipe: named("prompt_embeds", "negative_prompt_embeds")(
        pipe.encode_prompt(tiny.PROMPTS, "cpu", 1, True)
    ),
    "StableDiffusionXLPipeline": lambda pipe: WITH_POOLED(pipe.encode_prompt(tiny.PROMPTS)),
    "StableDiffusion3Pipeline": lambda pipe: WITH_POOLED(
        pipe.encode_prompt(tiny.PROMPTS, None, None, max_sequence_length=20)
    ),
    "PixArtAlphaPipeline": lambda pipe: WITH_MASK(pipe.encode_prompt(tiny.PROMPTS, max_sequence_length=20)),
}


def test_embeddings_in_place_of_prompts(pair):
    stock, shared, options = pair
    expected = shared(tiny.PROMPTS, seed=SEEDS, groups=tiny.GROUPS, share_ratio=0.5, **options).images
    given = EMBEDDINGS[type(stock).__name__](stock)
    # Who leads a group is decided by the seeds, which differ.
    found = shared(**given, seed=SEEDS, groups=tiny.GROUPS, share_ratio=0.5, **options).images
    np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_sharing_changes_grouped_images_and_no_others(pair):
    _, shared, options = pair
    alone = shared(tiny.PROMPTS, seed=SEEDS, share_ratio=0, **options)
    plan = Plan(steps(shared), (Block(3, (0, 1, 2)), 3, 4))
    found = shared(tiny.PROMPTS, seed=SEEDS, plan=plan, **options)
    np.testing.assert_allclose(found.images[3:], alone.images[3:], **TOLERANCE)
    assert all(np.abs(found.images[i] - alone.images[i]).max() > 0.01 for i in (0, 1, 2))
    assert found.cost.network_evaluations == plan.nfe(guidance=True) == 2 * (3 * 3 + 3 * 5)
    assert found.cost.saving == pytest.approx(1 - 48 / 60)


def test_network_calls_equal_the_formula_and_their_limit(pair):
    _, shared, options = pair
    rows = []
    handle = shared._network.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    plan = Plan(steps(shared), (Block(2, (0, Block(4, (1, 2)))), Block(3, (3, 4))))
    for scale, batch_size in ((4.0, 2), (1.0, 8)):
        rows.clear()
        call = {**options, "guidance_scale": scale, "batch_size": batch_size}
        found = shared(tiny.PROMPTS, seed=0, plan=plan, **call)
        factor = 2 if scale > 1 else 1
        assert sum(rows) == plan.nfe(scale > 1) == found.cost.formula
        assert max(rows) <= factor * batch_size
        # Guidance is part of the same call.
        assert all(count % factor == 0 for count in rows)
    handle.remove()


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULERS = {
    "its own": None,
    "ddim": lambda: DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
    "dpm": lambda: DPMSolverMultistepScheduler(**BETAS),
    "unipc": lambda: UniPCMultistepScheduler(**BETAS),
    "pndm": lambda: PNDMScheduler(**BETAS, skip_prk_steps=True),
    "heun": lambda: HeunDiscreteScheduler(**BETAS),
    "euler ancestral": lambda: EulerAncestralDiscreteScheduler(**BETAS),
}


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_identical_prompts_in_a_group_and_a_group_of_one_are_the_stock_image(pair, scheduler):
    stock, shared, options = pair
    if SCHEDULERS[scheduler] is not None:
        if type(stock).__name__ == "StableDiffusion3Pipeline":
            pytest.skip("flow matching has its own scheduler")
        stock = type(stock).from_pipe(stock, scheduler=SCHEDULERS[scheduler]())
        stock.set_progress_bar_config(disable=True)
        shared = SharedSamplingPipeline.from_pipe(stock)
    expected = stock(["red cat", "tall tree"], generator=generators([7, 8]), **options).images
    plan = Plan(steps(shared), (Block(steps(shared) // 2, (0, 1, 2)), 3))
    found = shared(["red cat"] * 3 + ["tall tree"], seed=[7, 7, 7, 8], plan=plan, batch_size=2, **options).images
    np.testing.assert_allclose(found, expected[[0, 0, 0, 1]], **TOLERANCE)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


# A scheduler that takes own timesteps or sigmas, and these.
OWN = {
    "StableDiffusionPipeline": (lambda: EulerDiscreteScheduler(**BETAS), {"timesteps": [900, 700, 400, 50]}),
    "StableDiffusionXLPipeline": (lambda: EulerDiscreteScheduler(**BETAS), {"sigmas": [10.0, 3.0, 1.0, 0.3, 0.0]}),
    "StableDiffusion3Pipeline": (FlowMatchEulerDiscreteScheduler, {"sigmas": [1.0, 0.8, 0.4, 0.1]}),
    "PixArtAlphaPipeline": (DPMSolverMultistepScheduler, {"timesteps": [900, 700, 400, 50]}),
}


def test_own_timesteps_and_sigmas_are_the_stock_pipelines(pair):
    stock, _, options = pair
    scheduler, own = OWN[type(stock).__name__]
    stock = type(stock).from_pipe(stock, scheduler=scheduler())
    stock.set_progress_bar_config(disable=True)
    shared = SharedSamplingPipeline.from_pipe(stock)
    expected = stock(tiny.PROMPTS, generator=generators(SEEDS), **options, **own).images
    found = shared(tiny.PROMPTS, seed=SEEDS, share_ratio=0, **options, **own)
    assert np.array_equal(found.images, expected)
    assert found.plan.steps == 4 and found.cost.network_evaluations == 2 * 4 * 5
    grouped = shared(tiny.PROMPTS, seed=SEEDS, groups=tiny.GROUPS, share_ratio=0.5, **options, **own)
    assert grouped.cost.network_evaluations == 2 * (2 * 2 + 2 * 5)


def test_timesteps_that_a_scheduler_does_not_take_are_named(pair):
    stock, _, options = pair
    name, own = ("sigmas", [1.0]) if type(stock).__name__ == "StableDiffusion3Pipeline" else ("timesteps", [900, 1])
    scheduler = FlowMatchHeunDiscreteScheduler() if name == "sigmas" else SCHEDULERS["ddim"]()
    shared = SharedSamplingPipeline.from_pipe(type(stock).from_pipe(stock, scheduler=scheduler))
    with pytest.raises(ConfigurationError, match=f"{type(scheduler).__name__} does not take {name}: The current sched"):
        shared("red cat", share_ratio=0, **options, **{name: own})


def test_permuting_prompts_permutes_images_and_company_changes_nothing(pair):
    _, shared, options = pair
    call = {**options, "share_ratio": 0.5, "seed": 4}
    found = shared(tiny.PROMPTS, groups=tiny.GROUPS, **call).images
    order = [3, 0, 4, 2, 1]
    groups = [[order.index(member) for member in group] for group in reversed(tiny.GROUPS)]
    moved = shared([tiny.PROMPTS[i] for i in order], groups=groups, **call).images
    np.testing.assert_allclose(moved, found[order], **TOLERANCE)
    fewer = shared(tiny.PROMPTS[3:], groups=[[0, 1]], batch_size=1, **call).images
    np.testing.assert_allclose(fewer, found[3:], **TOLERANCE)


def test_truncated_tokens_are_those_that_no_text_encoder_reads(pair):
    _, shared, options = pair
    call = {**options, "share_ratio": 0, "seed": 4, "num_inference_steps": 1}
    # A token for each letter, and one or two marks.
    longest = max(limit for _, limit in shared._tokenizers(shared._options | options))
    marks = len(shared._tokenizers(shared._options | options)[-1][0]("").input_ids)
    texts = ["a", "a" * (longest - marks), "a" * (longest - marks + 3)]
    assert shared(texts, **call).truncated_tokens == [0, 0, 3]
    if type(shared).__name__ == "SharedPixArtAlphaPipeline":
        # Its text is stripped first.
        assert shared([f"  {texts[1]}   "], **call).truncated_tokens == [0]


def test_what_is_saved_is_a_stock_folder_that_gives_the_same(pair, tmp_path):
    stock, shared, options = pair
    shared.save_pretrained(tmp_path)
    again = SharedSamplingPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    call = {**options, "share_ratio": 0.5, "seed": 4, "groups": tiny.GROUPS}
    assert np.array_equal(again(tiny.PROMPTS, **call).images, shared(tiny.PROMPTS, **call).images)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is type(stock)
    assert type(again) is type(shared)
    assert isinstance(again, type(stock))


def test_images_are_those_of_the_same_run_in_half_precision(pair):
    """bfloat16 runs, and stays near single precision."""
    _, shared, options = pair
    call = {**options, "share_ratio": 0.5, "seed": 4, "groups": tiny.GROUPS, "output_type": "latent"}
    whole = shared(tiny.PROMPTS, **call).images
    shared.to(torch.bfloat16)
    half = shared(tiny.PROMPTS, **call).images
    shared.to(torch.float32)
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
    assert (half.float() - whole).abs().mean() < 0.5 * whole.std()
