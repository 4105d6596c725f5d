"""Values that are not finite: they make no image, and the error says where they arose and what to do."""

import math

import numpy as np
import pytest
import tiny
import tiny_families
import torch

from sage.errors import ConfigurationError, DataError, DivergedError, SageError
from sage.sampling.pipeline import SharedSamplingPipeline

pytestmark = pytest.mark.slow

STEPS = 4
PROMPTS = ["red cat", "red dog", "blue cat", "a tall tree"]
GROUPS = [[0, 1], [2], [3]]


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pipe(family, tmp_path):
    return SharedSamplingPipeline.from_pipe(tiny.pipeline(family, tmp_path))


@pytest.fixture
def options(family):
    return tiny.OPTIONS.get(family, {}) | {"num_inference_steps": STEPS, "seed": 0, "output_type": "np"}


def collect(stream, results):
    for result in stream:
        results.append(result)


def overflow(module, rows, value=math.inf, calls=(0,)):
    """Replace a value in these rows of these calls' outputs."""
    number = iter(range(1000))

    def hook(module, args, output):
        values = output[0]
        if next(number) in calls:
            values[rows] = values[rows].index_fill(1, torch.tensor([0]), value)
        return (values,)

    return module.register_forward_hook(hook)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_network_that_overflows_makes_no_image(pipe, options, value, output_type):
    call = options | {"output_type": output_type, "groups": GROUPS, "share_ratio": 0.5, "guidance_scale": 1.0}
    good = {r.index: r.image for r in pipe.stream(PROMPTS, **call)}
    # Packs sort by branch point: the first row of the second step is the block of prompts 0 and 1.
    overflow(pipe._network, [0], value, calls=(1,))
    stream = pipe.stream(PROMPTS, **call)
    results = []
    with pytest.raises(DivergedError) as error:
        collect(stream, results)
    assert str(error.value).startswith("2 of 4 images are not finite and were left out, image 0 ('red cat'), 1 ('red d")
    assert "the latents of 2 from step 1 of 4 on" in str(error.value)
    assert type(pipe._network).__name__ in str(error.value)
    assert "float32" in str(error.value)
    assert sorted(error.value.images) == [0, 1]
    assert error.value.images[0].startswith("the latents from step 1 of 4 on; check the weights of ")
    assert sorted(result.index for result in results) == [2, 3]
    for result in results:
        assert np.array_equal(np.asarray(result.image), np.asarray(good[result.index]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no room")], ids=["interrupt", "error"])
def test_a_stream_that_failed_does_not_seem_complete(pipe, options, error):
    def fails(pipeline, step, timestep, tensors):
        raise error

    stream = pipe.stream(PROMPTS, callback_on_step_end=fails, share_ratio=0, **options)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        next(stream)
    for _ in range(2):
        with pytest.raises(SageError, match=r"has failed with (KeyboardInterrupt|OSError: no room); begin another one"):
            list(stream)


def test_a_call_with_such_an_image_raises(pipe, options):
    overflow(pipe._network, [2], calls=(0,))
    with pytest.raises(
        DivergedError, match=r"1 of 4 images .* image 2 \('blue cat'\): the latents of 1 from step 0 of 4"
    ):
        pipe(PROMPTS, **options | {"share_ratio": 0, "guidance_scale": 1.0, "output_type": "pil"})


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_an_autoencoder_that_overflows_makes_no_image(pipe, options, output_type, monkeypatch):
    call = options | {"share_ratio": 0, "output_type": output_type}
    good = pipe(PROMPTS, **call).images
    decode = pipe.vae.decode

    def overflowing(latents, return_dict, **kwargs):
        (images,) = decode(latents, return_dict=False)
        images[1, 0, 0, 0] = math.inf
        return (images,)

    monkeypatch.setattr(pipe.vae, "decode", overflowing)
    results = []
    with pytest.raises(
        DivergedError, match=r"image 1 \('red dog'\): the decoded pixels of 1; the autoenc.*float32"
    ) as error:
        collect(pipe.stream(PROMPTS, **call), results)
    assert list(error.value.images) == [1]
    assert error.value.images[1].startswith("the decoded pixels; the autoencoder")
    assert [result.index for result in results] == [0, 2, 3]
    assert all(np.array_equal(np.asarray(result.image), np.asarray(good[result.index])) for result in results)


def test_a_clip_that_overflows_is_left_out(monkeypatch):
    """A clip has several frames, which are decoded and finished one clip at a time."""
    family = tiny_families.tiny("WanPipeline")
    decode = family.pipe.vae.decode

    def overflowing(latents, return_dict):
        (clips,) = decode(latents, return_dict=False)
        clips[1, 0, 0, 0, 0] = math.nan
        return (clips,)

    monkeypatch.setattr(family.pipe.vae, "decode", overflowing)
    pipe, results = SharedSamplingPipeline.from_pipe(family.pipe), []
    call = {"share_ratio": 0, "num_inference_steps": 2, "output_type": "np", "seed": 0}
    with pytest.raises(DivergedError, match="the decoded pixels of 1") as error:
        collect(pipe.stream(**family.embed(3), **family.call, **call), results)
    assert list(error.value.images) == [1] and [result.index for result in results] == [0, 2]


def test_latents_that_cannot_be_used_are_refused(pipe, options):
    latents = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ConfigurationError, match=r"latents have shape \(4, 8, 7\) each; give \(4, 8, 8\)"):
        pipe(PROMPTS[:2], latents=latents[..., 1:], **options, share_ratio=0)
    latents[1, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match=r"latents hold values that are not finite, in rows \[1\]"):
        pipe(PROMPTS[:2], latents=latents, **options, share_ratio=0)
