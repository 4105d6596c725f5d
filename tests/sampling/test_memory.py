"""What saves memory in diffusers keeps working, and changes no image: offloading, casting, slicing, freed encoders."""

import gc
import weakref

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from tiny_families import generators, latents
from torch.ao.quantization import quantize_dynamic

from sage.errors import ConfigurationError
from sage.sampling.pipeline import SharedSamplingPipeline

pytestmark = pytest.mark.slow
PROMPTS = ["red cat", "blue dog", "a tall tree"]
DRIVEN = ("FluxPipeline", "QwenImagePipeline", "WanPipeline")
CPU = torch.device("cpu")


@pytest.fixture(params=[*tiny.FAMILIES, *DRIVEN])
def stock(request, tmp_path):
    """A stock pipeline, and the arguments of its call; those of the segment driver have no text encoder."""
    if request.param in tiny.FAMILIES:
        return tiny.pipeline(request.param, tmp_path), {"prompt": PROMPTS, **tiny.OPTIONS.get(request.param, {})}
    family = tiny_families.tiny(request.param)
    return family.pipe, family.embed(3) | family.call | dict([family.guidance] if family.guidance else [])


def shared(pipe, call, output="latent", **changes):
    settings = {"num_inference_steps": 3, "share_ratio": 0.4, "groups": [[0, 2], [1]], "seed": [5, 6, 7]} | changes
    call = {{"true_cfg_scale": "guidance_scale"}.get(name, name): value for name, value in call.items()}
    return pipe(**call, **settings, output_type=output, batch_size=2).images


def groups_on_the_cpu(pipe):
    for network in pipe._networks:
        network.enable_group_offload(CPU, offload_type="leaf_level")


@pytest.mark.parametrize(
    "offload",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        groups_on_the_cpu,
    ],
    ids=["model", "group"],
)
def test_offloading_changes_no_image(stock, offload):
    """The CPU stands for the accelerator: the hooks are those that would move weights to it.

    Not sequential offloading, for which it cannot stand: accelerate then fails in the stock pipeline, too.
    """
    pipe = SharedSamplingPipeline.from_pipe(stock[0])
    expected = shared(pipe, stock[1])
    offload(pipe)
    assert torch.equal(shared(pipe, stock[1]), expected)
    assert torch.equal(shared(pipe, stock[1]), expected)


def test_layerwise_cast_weights_are_the_stock_pipelines(stock):
    pipe = SharedSamplingPipeline.from_pipe(stock[0])
    alone = {"share_ratio": 0, "groups": None, "seed": [5, 6, 7]}
    plain = shared(pipe, stock[1], **alone)
    for network in pipe._networks:
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    found = pipe(**_own(stock[1]), num_inference_steps=3, share_ratio=0, seed=[5, 6, 7], output_type="latent").images
    expected = stock[0](**stock[1], num_inference_steps=3, generator=generators([5, 6, 7]), output_type="latent")
    assert torch.equal(found, latents(expected)) and not torch.equal(found, plain)
    assert {weight.dtype for weight in pipe._network.parameters()} >= {torch.float8_e4m3fn}


@pytest.mark.filterwarnings("ignore:.*quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_weights_of_8_bits_are_the_stock_pipelines(stock):
    """Linear layers of whole numbers, scaled for each call, as torch has them on a CPU."""
    if type(stock[0]).__name__ == "WanPipeline":
        pytest.skip("Wan's transformer asks a layer for its weights, which are none of a quantised layer's parameters")
    pipe = SharedSamplingPipeline.from_pipe(stock[0])
    call = {"num_inference_steps": 3, "output_type": "latent"}
    plain = pipe(**_own(stock[1]), **call, share_ratio=0, seed=[5, 6, 7]).images
    for network in pipe._networks:
        quantize_dynamic(network, {torch.nn.Linear}, inplace=True)
    found = pipe(**_own(stock[1]), **call, share_ratio=0, seed=[5, 6, 7]).images
    assert torch.equal(found, latents(stock[0](**stock[1], **call, generator=generators([5, 6, 7]))))
    assert not torch.equal(found, plain)
    shared = pipe(**_own(stock[1]), **call, share_ratio=0.4, groups=[[0, 2], [1]], seed=[5, 6, 7])
    assert shared.cost.saving > 0 and shared.images.isfinite().all()


def _own(call):
    return {{"true_cfg_scale": "guidance_scale"}.get(name, name): value for name, value in call.items()}


def test_slices_and_tiles_of_the_autoencoder_are_the_stock_pipelines(stock):
    pipe, call = SharedSamplingPipeline.from_pipe(stock[0]), stock[1]
    calls = []
    for switch in ("enable_slicing", "enable_tiling"):
        getattr(pipe.vae, switch)()
    for name in ("_decode", "tiled_decode"):
        _note(pipe.vae, name, calls)
    found = pipe(**_own(call), num_inference_steps=2, share_ratio=0, seed=[5, 6, 7], output_type="np").images
    ours, calls[:] = list(calls), []
    expected = stock[0](**call, num_inference_steps=2, generator=generators([5, 6, 7]), output_type="np")
    assert np.array_equal(np.asarray(found), np.asarray(latents(expected)))
    assert ours == calls and ours.count("_decode") == 3


def _note(vae, name, calls):
    original = getattr(vae, name)

    def noted(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    setattr(vae, name, noted)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_text_encoders_can_be_freed_before_the_loop(family, tmp_path):
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline(family, tmp_path))
    options = tiny.OPTIONS.get(family, {})
    call = {"num_inference_steps": 3, "groups": [[0, 2], [1]], "seed": [5, 6, 7], "output_type": "latent", **options}
    expected = pipe(PROMPTS, **call).images
    with torch.no_grad():
        asked = {name: value for name, value in options.items() if name == "max_sequence_length"}
        found = pipe.encode_prompt(PROMPTS, **_encoding(family), **asked)
    names = {
        "stable_diffusion": ("prompt_embeds", "negative_prompt_embeds"),
        "stable_diffusion_xl": (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        ),
        "pixart_alpha": (
            "prompt_embeds",
            "prompt_attention_mask",
            "negative_prompt_embeds",
            "negative_prompt_attention_mask",
        ),
    }
    embeddings = dict(zip(names.get(family, names["stable_diffusion_xl"]), found, strict=True))
    encoders = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if hasattr(pipe, name)]
    alive = [weakref.ref(getattr(pipe, name)) for name in encoders]
    for name in encoders:
        setattr(pipe, name, None)
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(encoders)
    torch.testing.assert_close(pipe(**embeddings, **call).images, expected, rtol=0, atol=3e-5)
    with pytest.raises(ConfigurationError, match="without a text encoder"):
        pipe(PROMPTS, **call)


def _encoding(family):
    if family == "stable_diffusion":
        return {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    if family == "stable_diffusion_3":
        return {"prompt_2": None, "prompt_3": None}
    return {}
