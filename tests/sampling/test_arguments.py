"""The arguments of the call: the stock pipeline's, its own, and those that are None."""

import inspect

import numpy as np
import pytest
import tiny
import torch

from sage.errors import ConfigurationError
from sage.sampling.pipeline import SharedSamplingPipeline

pytestmark = pytest.mark.slow

CALL = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def pair(request, tmp_path_factory):
    stock = tiny.pipeline(request.param, tmp_path_factory.mktemp(request.param))
    return stock, SharedSamplingPipeline.from_pipe(stock), tiny.OPTIONS.get(request.param, {}) | CALL


def test_the_signature_is_the_stock_calls_and_more(pair):
    stock, shared, _ = pair
    found, expected = (inspect.signature(pipe.__call__).parameters for pipe in (shared, stock))
    named = [name for name, one in expected.items() if one.kind != one.VAR_KEYWORD]
    assert list(found)[: len(named)] == named
    assert {"groups", "plan", "share_ratio", "seed", "batch_size", "branch_noise"} <= set(found)
    assert all(found[name].default == expected[name].default for name in named)


def test_what_the_signature_has_as_default_can_be_given(pair):
    stock, shared, options = pair
    given = {
        name: one.default for name, one in inspect.signature(stock.__call__).parameters.items() if one.kind != 4
    } | options
    del given["prompt"]
    given["generator"] = torch.Generator().manual_seed(1)
    found = shared("red cat", **{name: value for name, value in given.items() if value is not inspect.Parameter.empty})
    expected = stock("red cat", generator=torch.Generator().manual_seed(1), **options).images
    assert np.array_equal(found.images, expected)


def test_arguments_in_place_are_the_stock_calls(pair):
    stock, shared, options = pair
    names = list(inspect.signature(stock.__call__).parameters)
    values = {"prompt": "red cat", "height": 32, "width": 24}
    count = 1 + max(names.index(name) for name in values)
    place = [values.get(name, None if name != "num_inference_steps" else 2) for name in names[:count]]
    defaults = inspect.signature(stock.__call__).parameters
    place = [defaults[name].default if value is None else value for name, value in zip(names, place, strict=False)]
    rest = {name: value for name, value in options.items() if name not in names[:count]}
    found = shared(*place, seed=[1], **rest).images
    if "num_inference_steps" in names[:count]:
        rest["num_inference_steps"] = place[names.index("num_inference_steps")]
    expected = shared(**values, seed=[1], **rest).images
    assert found.shape[1:3] == (32, 24)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("share_ratio", "share_ratio is None; leave it out"),
        ("branch_noise", "branch_noise is None; leave it out"),
        ("output_type", "output_type is None; leave it out"),
        ("num_inference_steps", "num_inference_steps is None; give a whole number"),
        ("batch_size", "batch_size is None; give a whole number"),
        ("num_images_per_prompt", "num_images_per_prompt is None; give a whole number"),
    ],
)
def test_what_cannot_be_none_is_named(pair, name, says):
    _, shared, options = pair
    with pytest.raises(ConfigurationError, match=says):
        shared("red cat", **options | {name: None})


def test_without_a_text_encoder_prompts_are_refused(pair):
    stock, shared, options = pair
    parts = {name: None for name in stock.components if name.startswith(("text_encoder", "tokenizer"))}
    bare = SharedSamplingPipeline.from_pipe(shared)
    for name in parts:
        vars(bare)[name] = None
    with pytest.raises(ConfigurationError, match="without a text encoder; give prompt_embeds, not prompts"):
        bare("red cat", **options)


def test_sdxl_without_a_first_tokenizer_and_with_negative_sizes(tmp_path):
    stock = tiny.pipeline("stable_diffusion_xl", tmp_path)
    call = CALL | {"negative_original_size": (8, 8), "negative_target_size": (64, 32)}
    call |= {"negative_crops_coords_top_left": (3, 4), "original_size": (24, 16)}
    # Alone, because the stock pipeline mixes up the two kinds of sizes in batches.
    expected = stock("red cat", generator=torch.Generator().manual_seed(1), **call).images
    shared = SharedSamplingPipeline.from_pipe(stock)
    assert np.array_equal(shared("red cat", seed=[1], **call).images, expected)
    assert not np.array_equal(shared("red cat", seed=[1], **CALL).images, expected)
    both = shared(["red cat", "red dog"], seed=[1, 2], share_ratio=0, **call).images
    np.testing.assert_allclose(both[:1], expected, rtol=0, atol=2e-3)
    with pytest.raises(ConfigurationError, match=r"original_size is \(8,\); give two numbers"):
        shared("red cat", **CALL, original_size=(8,))
    shared.tokenizer = None
    assert shared._count_truncated(["a" * 20], {}) == [20 + 2 - tiny.TOKENS]


def test_tokens_that_flux_leaves_out_are_those_beyond_both_limits(tmp_path):
    shared = SharedSamplingPipeline.from_pipe(tiny.pipeline("flux", tmp_path))
    options = {**shared._options, **tiny.OPTIONS["flux"]}
    assert shared._count_truncated(["a" * 30, "a"], options) == [30 + 1 - 20, 0]
