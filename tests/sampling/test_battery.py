"""What holds for every family, beside the equalities of `test_segments.py`."""

import inspect

import pytest
import tiny_families
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig
from test_segments import ASKING, STEPS, drift, half, name_of, scale, shared, stock
from tiny_families import ALL, TEXTS, Tiny, generators, rows

from sage.sampling.families.table import TABLE
from sage.sampling.pipeline import SharedSamplingPipeline

# Chroma and Stable Audio of diffusers 0.42 use names that it and torch deprecate.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
]
GROUP = {"groups": [[0, 1]], "share_ratio": 0.5}


@pytest.fixture(params=ALL)
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
    if name_of(family).startswith("Flux2"):  # here latents are given before they are packed
        noise = noise.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    again = shared(family, embeddings, [5, 6], latents=noise).images
    assert torch.equal(again, stock(family, embeddings, [5, 6], latents=noise.clone()))


def takes_one_image(family) -> bool:
    return getattr(TABLE.get(name_of(family)), "posterior", None) is not None


@pytest.mark.parametrize("name", TEXTS)
def test_several_images_of_a_prompt_are_the_stock_pipelines(name):
    """Of texts of one length: some stock calls repeat embeddings in one order and their masks in another."""
    family, seeds = tiny_families.reading(name), [1, 2, 3, 4]
    parameters = inspect.signature(type(family.pipe).__call__).parameters
    several = next(name for name in parameters if name.startswith("num_") and name.endswith("_per_prompt"))
    texts = {"prompt": ["red cat", "red dog"]}
    found = shared(family, texts, seeds, num_images_per_prompt=2).images
    expected = stock(family, texts, seeds, **{several: 2})
    # Stable Audio projects each text once, and its rows are then of another batch.
    assert torch.equal(found, expected) or (name == "StableAudioPipeline" and drift(found, expected) < scale(expected))


def test_images_of_one_prompt_share_no_steps_with_each_other(family):
    if takes_one_image(family):
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


def test_an_interrupted_call_has_the_latents_that_the_stock_one_has(family):
    if not hasattr(type(family.pipe), "interrupt"):
        pytest.skip("the stock call cannot be interrupted")

    def stop(pipe, step, t, tensors):
        pipe._interrupt = step == 1
        return {}

    embeddings = family.embed(2)
    found = shared(family, embeddings, [5, 6], callback_on_step_end=stop)
    assert torch.equal(found.images, stock(family, embeddings, [5, 6], callback_on_step_end=stop))
    assert found.finished == [False, False] and found.cost.network_evaluations == found.cost.formula // 2


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


def test_negative_embeddings_that_differ_inside_a_group(family):
    """The group sees their mean, and after its branch each member its own."""
    if not family.guidance:
        pytest.skip("it has no negative prompt")
    embeddings = family.embed(2)
    negative = {name: values for name, values in embeddings.items() if name.startswith("negative_")}
    seen: list[torch.Tensor] = []

    def watch(pipe, step, t, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    for numbers in ([0, 1], [1, 0], [0, 0]):
        shared(family, embeddings | rows(negative, numbers), [5, 6], callback_on_step_end=watch, **GROUP)
    own, turned, one = seen[:STEPS], seen[STEPS : 2 * STEPS], seen[2 * STEPS :]
    rounding = drift(own[1], turned[1])
    assert rounding < scale(own[1]) and not torch.equal(own[1], one[1])
    # Some of the tiny networks hardly see their text, so this is compared with what rounding does.
    assert drift(own[-1], turned[-1]) > 10 * rounding


@pytest.mark.parametrize("name", [name for name in TEXTS if not TABLE[name].embedded])
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


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionXLControlNetPipeline"])
def test_second_prompts_are_the_stock_pipelines(name):
    """One for all, or one for each."""
    family, texts = tiny_families.reading(name), {"prompt": ["red cat", "red dog"]}
    found = shared(family, texts | {"prompt_2": ["blue sea", "tall tree"]}, [5, 6]).images
    assert torch.equal(found, stock(family, texts | {"prompt_2": ["blue sea", "tall tree"]}, [5, 6]))
    one = shared(family, texts | {"prompt_2": "blue sea"}, [5, 6]).images
    assert torch.equal(one, stock(family, texts | {"prompt_2": ["blue sea"] * 2}, [5, 6]))
    assert not torch.equal(found, one) and not torch.equal(found, shared(family, texts, [5, 6]).images)


def test_a_single_generator_draws_all_noise_at_once(family):
    if name_of(family) == "HunyuanDiTPipeline":
        pytest.skip("its scheduler draws noise in each step, here from a generator of each image")
    embeddings, one = family.embed(2), torch.Generator()
    torch.manual_seed(0)  # the ControlNet of SD 3 draws from torch's own generator
    expected = family.pipe(
        **embeddings,
        **family.call,
        **({family.guidance[0]: family.guidance[1]} if family.guidance else {}),
        **({"negative_prompt": None} if name_of(family) in ASKING else {}),
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
