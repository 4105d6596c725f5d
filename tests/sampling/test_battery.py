"""What holds for every family that the segment driver runs, beside the equalities of `test_segments.py`."""

import inspect

import pytest
import tiny_families
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig
from test_segments import STEPS, drift, name_of, scale, shared, stock
from tiny_families import FAMILIES, TEXTS, Tiny, generators, rows

from sage.sampling.families.table import TABLE
from sage.sampling.pipeline import SharedSamplingPipeline

# Chroma and Stable Audio of diffusers 0.42 use names that it and torch deprecate.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
]
GROUP = {"groups": [[0, 1]], "share_ratio": 0.5}


@pytest.fixture(params=FAMILIES)
def family(request) -> Tiny:
    return tiny_families.tiny(request.param)


def streamed(pipe, family: Tiny, embeddings, **changes):
    call = family.call | {"num_inference_steps": STEPS, "output_type": "latent", "share_ratio": 0} | changes
    if family.guidance:
        call["guidance_scale"] = family.guidance[1]
    return pipe.stream(**embeddings, **call)


def test_noise_is_that_of_seeds_generators_or_given_latents(family):
    if name_of(family) == "HunyuanDiTPipeline":  # its own scheduler draws more noise from the generator
        family.pipe.scheduler = DDIMScheduler()
    embeddings = family.embed(2)
    expected = shared(family, embeddings, [5, 6]).images
    given = shared(family, embeddings, None, generator=generators([5, 6])).images
    assert torch.equal(given, expected)
    stream = streamed(SharedSamplingPipeline.from_pipe(family.pipe), family, embeddings, seed=[5, 6])
    noise = stream._noise([0, 1], generators([5, 6])) / getattr(stream._pipe.scheduler, "init_noise_sigma", 1.0)
    assert drift(shared(family, embeddings, [5, 6], latents=noise).images, expected) < scale(expected)


def test_images_of_one_prompt_share_no_steps_with_each_other(family):
    if TABLE[name_of(family)].posterior:
        pytest.skip("it takes one image of each prompt (test_segments.py)")
    embeddings = family.embed(2)
    both = shared(family, embeddings, [1, 2, 3, 4], num_images_per_prompt=2, **GROUP)
    assert both.cost.network_evaluations == (2 if family.guidance else 1) * (4 * STEPS - 2 * 2)
    for image in (0, 1):
        alone = shared(family, embeddings, [1 + image, 3 + image], **GROUP).images
        assert drift(both.images[image::2], alone) < scale(alone)


def test_a_callback_changes_latents_as_in_the_stock_pipeline(family):
    if "callback_on_step_end" not in inspect.signature(type(family.pipe).__call__).parameters:
        pytest.skip("the stock call has no such callback")
    embeddings, seen = family.embed(2), []

    def halve(pipe, step, t, tensors):
        # CogView 4 gives its callback the noise level instead of the timestep.
        seen.append((step, float(t) if name_of(family) != "CogView4Pipeline" else None))
        return {"latents": tensors["latents"] / 2} if step == 1 else {}

    found = shared(family, embeddings, [5, 6], callback_on_step_end=halve).images
    expected = stock(family, embeddings, [5, 6], callback_on_step_end=halve)
    assert torch.equal(found, expected) and seen[:STEPS] == seen[STEPS:]
    assert not torch.equal(found, shared(family, embeddings, [5, 6]).images)


def test_a_call_that_ended_early_leaves_nothing_behind(family):
    """Interrupted by a callback, by a signal, or abandoned: the next call of the same pipeline is right."""
    embeddings, pipe = family.embed(2), SharedSamplingPipeline.from_pipe(family.pipe)

    def images(**changes):
        torch.manual_seed(0)
        return [result.image for result in streamed(pipe, family, embeddings, seed=[5, 6], batch_size=1, **changes)]

    def stop(call, step, t, tensors):
        call._interrupt = step == 1
        return {}

    def kill(call, step, t, tensors):
        raise KeyboardInterrupt

    expected = images()
    assert len(images(callback_on_step_end=stop)) == 1  # unfinished, and the second was not begun
    with pytest.raises(KeyboardInterrupt):
        images(callback_on_step_end=kill)
    abandoned = streamed(pipe, family, embeddings, seed=[5, 6], batch_size=1)
    next(abandoned)
    assert all(torch.equal(one, other) for one, other in zip(images(), expected, strict=True))
    assert not pipe._network._forward_pre_hooks


def half(embeddings):
    def cast(values):
        if isinstance(values, list):
            return [cast(row) for row in values]
        return values.bfloat16() if values.is_floating_point() else values

    return {name: cast(values) for name, values in embeddings.items()}


def test_half_precision_is_the_stock_pipeline_bit_for_bit(family):
    family.pipe.to(torch.bfloat16)
    embeddings = half(family.embed(2))
    found = shared(family, embeddings, [5, 6]).images
    assert torch.equal(found, stock(family, embeddings, [5, 6]))
    assert shared(family, embeddings, [5, 6], **GROUP).cost.saving == 0.25


def test_a_saved_pipeline_loads_and_draws_the_same(family, tmp_path):
    embeddings = family.embed(1)
    expected = shared(family, embeddings, [5]).images
    SharedSamplingPipeline.from_pipe(family.pipe).save_pretrained(tmp_path)
    family.pipe = SharedSamplingPipeline.from_pretrained(tmp_path)
    family.pipe.set_progress_bar_config(disable=True)
    # Loaded weights lie elsewhere in memory, and matrix products may round differently there.
    assert drift(shared(family, embeddings, [5]).images, expected) < scale(expected)


def test_an_adapter_is_worn_as_in_the_stock_pipeline(family):
    network = getattr(family.pipe, "unet", None) or family.pipe.transformer
    if not hasattr(network, "add_adapter"):
        pytest.skip("the network takes no adapters")
    embeddings = family.embed(2)
    plain = shared(family, embeddings, [5, 6]).images
    network.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v"], init_lora_weights=False))
    found = shared(family, embeddings, [5, 6]).images
    assert torch.equal(found, stock(family, embeddings, [5, 6])) and not torch.equal(found, plain)


@pytest.mark.parametrize("name", TEXTS)
def test_negative_prompts_that_differ_inside_a_group(name):
    family, texts = tiny_families.reading(name), {"prompt": ["red cat", "red dog"]}
    differ = {"negative_prompt": ["blurry", "dark"]}
    grouped = shared(family, texts | differ, [5, 6], **GROUP)
    one = shared(family, texts | {"negative_prompt": "blurry"}, [5, 6], **GROUP)
    assert grouped.cost.network_evaluations == one.cost.network_evaluations == 2 * (2 * STEPS - 2)
    assert not torch.equal(grouped.images, one.images)
    # After its branch each member has its own: the same group, in which both are given the other's.
    turned = shared(family, texts | {"negative_prompt": ["dark", "blurry"]}, [5, 6], **GROUP)
    assert not torch.equal(grouped.images, turned.images)


def test_a_single_generator_draws_all_noise_at_once(family):
    if name_of(family) == "HunyuanDiTPipeline":
        pytest.skip("its scheduler draws noise in each step, here from a generator of each image")
    embeddings, one = family.embed(2), torch.Generator()
    torch.manual_seed(0)  # the ControlNet of SD 3 draws from torch's own generator
    expected = family.pipe(
        **embeddings,
        **family.call,
        **({family.guidance[0]: family.guidance[1]} if family.guidance else {}),
        **({"negative_prompt": None} if name_of(family) in ("SanaPipeline", "PixArtSigmaPipeline") else {}),
        num_inference_steps=STEPS,
        output_type="latent",
        generator=one.manual_seed(7),
    )
    assert torch.equal(shared(family, embeddings, None, generator=one.manual_seed(7)).images, expected[0])


@pytest.mark.parametrize("name", ["FluxPipeline", "ZImagePipeline"])
def test_rows_of_lists_and_of_tensors_are_the_prompts_own(name):
    family = tiny_families.tiny(name)
    embeddings = family.embed(3)
    found = shared(family, embeddings, [1, 2, 3]).images
    again = shared(family, rows(embeddings, [2]), [3]).images
    assert drift(found[2:], again) < scale(found)
