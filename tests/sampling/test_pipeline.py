"""What somebody used to diffusers expects of the pipeline, on a tiny Stable Diffusion."""

import itertools
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from sage.errors import ConfigurationError, DataError, PlanError, SageError, UnsupportedError
from sage.grouping.auto import Grouping
from sage.sampling import base
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Block, Plan
from sage.sampling.seeds import prompt_seed

TOLERANCE = {"rtol": 0, "atol": 2e-3}
CALL = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return tiny.pipeline("stable_diffusion", tmp_path_factory.mktemp("stock"))


@pytest.fixture
def pipe(stock):
    return SharedSamplingPipeline.from_pipe(stock)


def test_five_lines(pipe):
    out = pipe(tiny.PROMPTS, num_inference_steps=10, guidance_scale=7.5, share_ratio=0.4, seed=0)
    assert all(isinstance(image, Image.Image) for image in out.images)
    # MiniLM finds alike: cats and dog, the tall tree and the tall trees.
    assert out.plan.partition(3) == [[0, 1, 2], [3, 4]]
    assert out.cost.network_evaluations == out.cost.formula == 2 * (4 * 2 + 6 * 5)
    assert out.cost.independent == 100
    assert out.cost.saving == pytest.approx(0.24)
    assert 0 < out.cost.seconds < 60
    assert pipe(tiny.PROMPTS[0], seed=0, **CALL | {"output_type": "pil"}, return_dict=False)[0][0].size == (16, 16)


def test_a_seed_gives_every_image_noise_of_its_own_whatever_the_order(pipe, stock):
    prompts = ["red cat", "red cat", "blue dog"]
    out = pipe(prompts, seed=5, share_ratio=0, **CALL)
    assert out.seeds == [prompt_seed(5, "0:red cat"), prompt_seed(5, "1:red cat"), prompt_seed(5, "0:blue dog")]
    assert len(set(out.seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in out.seeds)
    moved = pipe(prompts[::-1], seed=5, share_ratio=0, **CALL)
    assert moved.seeds[0] == out.seeds[2]
    for image, prompt, seed in zip(out.images, prompts, out.seeds, strict=True):
        alone = stock(prompt, generator=torch.Generator().manual_seed(seed), **CALL).images[0]
        np.testing.assert_allclose(image, alone, **TOLERANCE)
    assert pipe(prompts, seed=6, share_ratio=0, **CALL).seeds != out.seeds
    torch.manual_seed(1)
    first = pipe(prompts, share_ratio=0, **CALL).seeds
    torch.manual_seed(1)
    assert pipe(prompts, share_ratio=0, **CALL).seeds == first != pipe(prompts, share_ratio=0, **CALL).seeds


@pytest.mark.parametrize(
    "change",
    [
        {"seed": np.int64(3)},
        {"seed": torch.tensor(3), "batch_size": np.int64(8), "num_images_per_prompt": np.int64(1)},
        {"groups": [np.flatnonzero(np.array([0, 0, 1]) == k) for k in range(2)], "guidance_scale": np.float32(4)},
        {"share_ratio": np.float32(0.5), "num_inference_steps": np.int64(4), "height": np.int64(16)},
        {"share_ratio": np.array([0.5, 0.5]), "branch_noise": np.float32(0)},
        {"seed": np.array([prompt_seed(3, f"0:{prompt}") for prompt in tiny.PROMPTS[:3]])},
    ],
    ids=lambda change: "+".join(change),
)
def test_numbers_of_numpy_and_torch_draw_what_plain_numbers_draw(pipe, change):
    plain = {"groups": [[0, 1], [2]], "share_ratio": 0.5, "seed": 3, **CALL, "output_type": "latent"}
    wanted, found = pipe(tiny.PROMPTS[:3], **plain), pipe(tiny.PROMPTS[:3], **plain | change)
    assert torch.equal(found.images, wanted.images)
    assert found.seeds == wanted.seeds and {type(seed) for seed in found.seeds} == {int}


@pytest.mark.parametrize("name", ["seed", "share_ratio", "num_inference_steps", "guidance_scale", "batch_size"])
def test_a_truth_value_is_no_number(pipe, name):
    with pytest.raises(ConfigurationError, match=f"^{name} is True"):
        pipe(tiny.PROMPTS[:3], **{"groups": [[0, 1], [2]], **CALL, name: True})


def test_one_generator_draws_all_noise_at_once_as_in_diffusers(pipe, stock):
    expected = stock(tiny.PROMPTS, generator=torch.Generator().manual_seed(2), **CALL).images
    found = pipe(tiny.PROMPTS, generator=torch.Generator().manual_seed(2), share_ratio=0, **CALL).images
    assert np.array_equal(found, expected)


def test_images_of_one_prompt_differ_and_share_with_other_prompts(pipe):
    out = pipe(["red cat", "red dog"], groups=[[0, 1]], share_ratio=0.5, num_images_per_prompt=3, seed=1, **CALL)
    assert out.images.shape == (6, 16, 16, 3)
    assert out.plan.partition(0) == [[0, 3], [1, 4], [2, 5]]
    assert all(np.abs(out.images[a] - out.images[b]).max() > 0.01 for a, b in itertools.combinations(range(3), 2))


def test_a_repeated_prompt_is_grouped_with_others_and_not_with_itself(pipe):
    out = pipe(["tall tree", "red cat", "tall trees", "tall tree"], share_ratio=0.5, seed=1, **CALL)
    assert out.plan.partition(0) in ([[0, 2], [1], [3]], [[0], [1], [2, 3]])
    sixtyfour = pipe(["red cat"] * 64, share_ratio=0.5, seed=1, **CALL | {"num_inference_steps": 2})
    assert len({image.tobytes() for image in sixtyfour.images}) == 64


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


def begin_as_noise(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config, **ZERO_SNR))


def test_images_of_one_prompt_share_the_first_step_if_it_is_noise_alone(pipe, monkeypatch):
    call = CALL | {"share_ratio": 0.5, "num_images_per_prompt": 3, "seed": 1, "groups": [[0, 1], [2]]}

    def parts(**changes):
        plan = pipe.stream(["red cat", "red dog", "tree"], **call | changes).plan
        return [plan.partition(step) for step in range(2)]

    apart = [[0, 3], [1, 4], [2, 5], [6], [7], [8]]
    assert parts(branch_noise=1.0) == [apart, apart]  # this schedule begins with some signal
    begin_as_noise(pipe, monkeypatch)
    assert parts(branch_noise=1.0) == [[[0, 1, 2, 3, 4, 5], [6, 7, 8]], apart]
    assert parts(branch_noise=1.0, image_steps=0) == parts(branch_noise=0.5) == parts() == [apart, apart]
    assert parts(branch_noise=0.5, image_steps=2)[1] == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]
    assert len(parts(branch_noise=1.0, share_ratio=0)[0]) == 9  # sharing is off altogether
    assert parts(branch_noise=1.0, share_ratio=0, image_steps=1)[0] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    out = pipe(["red cat", "red dog", "tree"], **call, branch_noise=1.0)
    assert out.cost.network_evaluations == 2 * (2 + 6 + 2 * 9)
    assert len({image.tobytes() for image in out.images}) == 9


def test_a_repeated_prompt_shares_its_first_step_with_itself(pipe, monkeypatch):
    begin_as_noise(pipe, monkeypatch)
    prompts = ["tall tree", "red cat", "tall trees", "tall tree"]
    call = CALL | {"share_ratio": 0.5, "branch_noise": 1.0}
    plan = pipe.stream(prompts, seed=1, **call).plan
    assert plan.partition(0) == [[0, 2, 3], [1]]
    assert plan.partition(1) == [[0, 2], [1], [3]]
    assert pipe.stream(prompts, seed=1, **call, num_images_per_prompt=2).plan.partition(0) == [
        [0, 1, 4, 5, 6, 7],
        [2, 3],
    ]
    # Embeddings of one's own have a row for each prompt; keys keep copies apart.
    rows = np.eye(4)[[0, 1, 0, 0]] + 0.1 * np.eye(4)[[0, 1, 3, 0]]
    assert pipe.stream(prompts, groups=Grouping(embeddings=rows), **call).plan.partition(0) == [[0, 2, 3], [1]]
    assert [0, 3] not in pipe.stream(prompts, share_key=list("abcd"), **call).plan.partition(0)
    # Given groups are taken as they are.
    given = pipe.stream(prompts, groups=[[0, 1], [2], [3]], **call).plan
    assert given.partition(0) == [[0, 1], [2], [3]]
    # Order changes nothing, and each image keeps its seed and noise.
    seeds = [11, 12, 13, 14]
    images = pipe(prompts, seed=seeds, **call).images
    turned = pipe(prompts[::-1], seed=seeds[::-1], **call).images
    np.testing.assert_allclose(turned[::-1], images, **TOLERANCE)


LABELS = {
    "lists": [[0, 2], [1], [3]],
    "sets": [{0, 2}, {1}, {3}],
    "numbers": [np.array([0, 2]), torch.tensor([1]), (np.int64(3),)],
    "texts": ["fox", "cat", "fox", "dog"],
    "integers": [7, 0, 7, 1],
    "numpy": np.array([7, 0, 7, 1]),
    "numpy texts": np.array(["fox", "cat", "fox", "dog"]),
    "torch": torch.tensor([7, 0, 7, 1]),
    "scikit-learn": np.array([4, -1, 4, -1]),
}


@pytest.mark.parametrize("groups", LABELS.values(), ids=LABELS.keys())
def test_groups_are_lists_of_prompts_or_labels(pipe, groups):
    stream = pipe.stream(["red fox", "cat", "the fox", "dog"], groups=groups, share_ratio=0.5, seed=1, **CALL)
    assert stream.plan == Plan.shared([[0, 2], [1], [3]], 4, 0.5)


def test_a_grouping_says_how_groups_are_formed(pipe, monkeypatch):
    prompts = ["two red cats", "two red cat", "three red cats", "tree"]

    def parts(**how):
        ratio = how.pop("share_ratio", 0.5)
        return pipe.stream(prompts, groups=Grouping(**how), share_ratio=ratio, seed=1, **CALL).plan.partition(0)

    assert parts() == pipe.stream(prompts, share_ratio=0.5, seed=1, **CALL).plan.partition(0) == [[0, 1, 2], [3]]
    assert parts(max_size=2) == [[0, 1], [2], [3]]
    assert parts(guard=["number"]) == [[0, 1], [2], [3]]
    assert parts(threshold=0.99) == [[0], [1], [2], [3]]
    assert parts(threshold=0.3, near_duplicate=0.5) != [[0, 1, 2], [3]]
    assert parts(saving=0.12) == [[0, 1], [2], [3]]
    monkeypatch.setattr("sage.grouping.auto.embed", lambda *arguments: pytest.fail("the encoder was used"))
    for rows in (np.eye(3)[[0, 1, 2, 0]] + 0.1, torch.eye(3, requires_grad=True)[[0, 1, 2, 0]].bfloat16() + 0.1):
        assert parts(embeddings=rows, near_duplicate=np.inf) == [[0, 3], [1], [2]]
    assert parts(share_ratio=0) == [[0], [1], [2], [3]]
    with pytest.raises(ConfigurationError, match="give one of threshold, saving and max_damage, not all"):
        Grouping(threshold=0.5, saving=0.1)


def test_another_encoder_is_used_for_grouping(pipe, monkeypatch):
    told = []
    monkeypatch.setattr("sage.grouping.auto.embed", lambda texts, encoder: told.append(encoder) or np.eye(len(texts)))
    pipe.stream(["a", "b"], groups=Grouping(encoder="mine"), share_ratio=0.5, seed=1, **CALL)
    assert told == ["mine"]


def test_embeddings_are_grouped_by_rows_that_are_given(pipe):
    with torch.no_grad():
        given = pipe.encode_prompt(["red cat", "red dog", "tree"], "cpu", 1, True)
    how = {"prompt_embeds": given[0], "negative_prompt_embeds": given[1], "share_ratio": 0.5, "seed": 1, **CALL}
    rows = np.array([[1, 0.1], [1, 0], [0, 1]])
    assert pipe.stream(groups=Grouping(embeddings=rows), **how).plan.partition(0) == [[0, 1], [2]]
    with pytest.raises(ConfigurationError, match="cannot be grouped"):
        pipe.stream(groups=Grouping(embeddings=rows, guard=["colour"]), **how)


def test_only_prompts_with_the_same_negative_and_key_share(pipe):
    prompts = ["tall tree", "tall trees", "a tall tree", "the tall tree"]

    def parts(**more):
        return pipe(prompts, share_ratio=0.5, seed=1, **more, **CALL).plan.partition(0)

    assert parts() == [[0, 1, 2, 3]] == parts(negative_prompt="dog") == parts(share_key=["a"] * 4)
    assert parts(negative_prompt=["dog", "cat", "dog", "cat"]) == [[0, 2], [1, 3]]
    assert parts(share_key=["a", "a", ("b", 1), ("b", 1)]) == [[0, 1], [2, 3]]
    assert parts(share_key=["a", "a", "b", "b"], negative_prompt=["dog", "cat", "dog", "dog"]) == [[0], [1], [2, 3]]
    # Given groups are taken as they are, unless they contradict a given key.
    assert parts(groups=[[0, 1], [2, 3]], negative_prompt=["dog", "cat", "dog", "cat"]) == [[0, 1], [2, 3]]
    with pytest.raises(PlanError, match="prompts 0 and 1 share steps, but their share keys are 'a' and 'b'"):
        parts(groups=[[0, 1], [2, 3]], share_key=["a", "b", "b", "b"])
    with pytest.raises(PlanError, match="prompts 1 and 2 share"):
        parts(plan=Plan(4, (Block(1, (0, Block(2, (1, 2)), 3)),)), share_key=[1, 1, 2, 2])
    with pytest.raises(ConfigurationError, match="3 share keys were given for 4 prompts"):
        parts(share_key=["a", "b", "c"])


def test_the_order_of_equal_seeds_is_that_of_their_prompts(pipe):
    first = pipe(["red cat", "red dog"], groups=[[0, 1]], share_ratio=0.5, seed=[1, 1], **CALL).images
    second = pipe(["red dog", "red cat"], groups=[[0, 1]], share_ratio=0.5, seed=[1, 1], **CALL).images
    np.testing.assert_allclose(first, second[::-1], **TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("pil", lambda images: isinstance(images, list) and images[0].size == (16, 16)),
        ("np", lambda images: images.shape == (5, 16, 16, 3) and 0 <= images.min() <= images.max() <= 1),
        ("pt", lambda images: images.shape == (5, 3, 16, 16)),
        ("latent", lambda images: images.shape == (5, 4, 8, 8)),
    ],
)
def test_output_types(pipe, kind, check):
    assert check(pipe(tiny.PROMPTS, groups=tiny.GROUPS, seed=0, **CALL | {"output_type": kind}).images)


def test_another_size(pipe, stock):
    call = CALL | {"height": 32, "width": 24}
    expected = stock("red cat", generator=torch.Generator().manual_seed(1), **call).images
    assert np.array_equal(pipe("red cat", seed=[1], **call).images, expected)


def test_progress_counts_what_the_network_evaluates(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe(tiny.PROMPTS, groups=tiny.GROUPS, share_ratio=0.5, seed=0, **CALL)
    assert "14/14" in capsys.readouterr().err


def test_images_stream_out_as_they_are_ready(pipe):
    whole = pipe(tiny.PROMPTS, groups=tiny.GROUPS, share_ratio=0.5, seed=0, batch_size=2, **CALL)
    stream = pipe.stream(tiny.PROMPTS, groups=tiny.GROUPS, share_ratio=0.5, seed=0, batch_size=2, **CALL)
    assert stream.cost.network_evaluations == 0
    first = next(stream)
    assert 0 < stream.cost.network_evaluations < stream.cost.formula
    results = [first, *stream]
    assert sorted(result.index for result in results) == [0, 1, 2, 3, 4]
    for result in results:
        assert np.array_equal(result.image, whole.images[result.index])
        assert result.seed == whole.seeds[result.index]
    assert stream.cost.network_evaluations == stream.cost.formula == whole.cost.formula


def test_a_text_is_encoded_once_and_what_all_avoid_with_the_first_batch(pipe):
    rows = []
    handle = pipe.text_encoder.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    call = {"groups": tiny.GROUPS, "share_ratio": 0.5, "seed": 0, "batch_size": 2, **CALL}
    whole = pipe(tiny.PROMPTS, negative_prompt="dog", **call).images
    assert rows == [2, 2, 1, 2]
    rows.clear()
    # One negative for each is encoded for each.
    same = pipe(tiny.PROMPTS, negative_prompt=["dog"] * 4 + ["dog "], **call).images
    assert sum(rows) == 10
    handle.remove()
    np.testing.assert_allclose(same, whole, **TOLERANCE)


@pytest.mark.parametrize("images", [1, 2])
def test_a_text_is_encoded_once_in_large_groups_and_trees(pipe, images):
    texts, kept = [], []

    def note(module, args, kwargs, output):
        texts.extend(map(tuple, kwargs.get("input_ids", args[0] if args else None).tolist()))

    handle = pipe.text_encoder.register_forward_hook(note, with_kwargs=True)
    prompts = [f"{'ab'[i % 2]}{'cdefgh'[i // 2]}" for i in range(12)]
    tree = Block(2, (Block(3, (6, 7)), Block(4, (8, Block(5, (9, 10, 11))))))
    stream = pipe.stream(
        prompts,
        plan=Plan(6, (Block(2, tuple(range(6))), tree)),
        num_images_per_prompt=images,
        batch_size=2,
        seed=0,
        **CALL | {"num_inference_steps": 6},
    )
    for _ in stream:
        kept.append(len(stream._encoded))
    handle.remove()
    empty = tuple(pipe.tokenizer("", padding="max_length").input_ids)
    assert sorted(Counter(row for row in texts if row != empty).values()) == [1] * 12
    # Forgotten when their images are done.
    assert kept[-1] == 0


@pytest.mark.parametrize("more", [{}, {"negative_prompt": ["dog", "cat"]}])
def test_negative_prompts_are_read_beside_given_embeddings(pipe, stock, more):
    embeddings, _ = stock.encode_prompt(tiny.PROMPTS[:2], "cpu", 1, False)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    expected = stock(prompt_embeds=embeddings, generator=generators, **more, **CALL).images
    assert np.array_equal(pipe(prompt_embeds=embeddings, seed=[1, 2], share_ratio=0, **more, **CALL).images, expected)


def test_schedulers_are_swapped_as_in_diffusers(pipe, stock):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    other = StableDiffusionPipeline(**stock.components | {"scheduler": pipe.scheduler}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    expected = other("red cat", generator=torch.Generator().manual_seed(1), **CALL).images
    assert np.array_equal(pipe("red cat", seed=[1], **CALL).images, expected)


def test_stochastic_sampling_at_ratio_0_is_the_stock_pipelines(pipe, stock):
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    other = StableDiffusionPipeline(**stock.components | {"scheduler": pipe.scheduler}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    expected = other(tiny.PROMPTS, generator=generators, **CALL).images
    assert np.array_equal(pipe(tiny.PROMPTS, seed=range(5), share_ratio=0, **CALL).images, expected)


@pytest.mark.parametrize("option", [{"guidance_rescale": 0.7}, {"eta": 0.5}])
def test_options_of_the_stock_pipeline(pipe, stock, option):
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    expected = stock(tiny.PROMPTS, generator=generators, **CALL, **option).images
    assert np.array_equal(pipe(tiny.PROMPTS, seed=range(5), share_ratio=0, **CALL, **option).images, expected)
    plain = pipe(tiny.PROMPTS, seed=range(5), share_ratio=0, **CALL).images
    assert np.abs(plain - expected).max() > 1e-4


def test_lora_loads_as_into_the_stock_pipeline(tmp_path):
    stock = tiny.pipeline("stable_diffusion", tmp_path)
    plain = SharedSamplingPipeline.from_pipe(stock)("red cat", seed=[1], **CALL).images
    torch.manual_seed(3)
    stock.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    layers = get_peft_model_state_dict(stock.unet)
    expected = stock("red cat", generator=torch.Generator().manual_seed(1), **CALL).images
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    fresh = SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", tmp_path))
    fresh.load_lora_weights(tmp_path / "lora")
    np.testing.assert_allclose(fresh("red cat", seed=[1], **CALL).images, expected, **TOLERANCE)
    scaled = fresh("red cat", seed=[1], cross_attention_kwargs={"scale": 0.0}, **CALL).images
    np.testing.assert_allclose(scaled, plain, **TOLERANCE)
    assert np.abs(expected - plain).max() > 0.01


def test_only_safetensors_are_read(tmp_path, monkeypatch):
    stock = tiny.pipeline("stable_diffusion", tmp_path)
    stock.save_pretrained(tmp_path / "safe")
    assert SharedSamplingPipeline.from_pretrained(tmp_path / "safe").unet.config.in_channels == 4
    monkeypatch.setattr(torch, "load", None)  # the reader of pickles
    for part in ("unet", "text_encoder"):
        folder = tmp_path / f"pickled {part}"
        shutil.copytree(tmp_path / "safe", folder)
        (weights,) = (folder / part).glob("*.safetensors")
        getattr(stock, part).save_pretrained(folder / part, safe_serialization=False)
        if list((folder / part).glob("*.bin")):
            weights.unlink()
        else:  # transformers no longer writes them
            weights.rename(weights.with_name("pytorch_model.bin"))
        with pytest.raises(DataError, match=r"cannot be loaded .*safetensors") as found:
            SharedSamplingPipeline.from_pretrained(folder)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("missing", ["no/such", "/no/such", "a b//c"])
def test_a_model_that_is_not_there_is_one_line(missing, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it would wait for the hub, and try again
    with pytest.raises(DataError, match=f"^{missing} cannot be loaded") as found:
        SharedSamplingPipeline.from_pretrained(missing)
    assert "\n" not in str(found.value)


def test_a_pickled_adapter_is_refused(pipe, tmp_path):
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    for arguments in ({"weight_name": "pytorch_lora_weights.bin"}, {}):
        with pytest.raises(DataError, match="safetensors"):
            pipe.load_lora_weights(tmp_path, **arguments)


def test_memory_options_change_only_the_arithmetic(tmp_path):
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", tmp_path))
    call = {"groups": tiny.GROUPS, "share_ratio": 0.5, "seed": 0, **CALL}
    plain = pipe(tiny.PROMPTS, **call).images
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    np.testing.assert_allclose(pipe(tiny.PROMPTS, **call).images, plain, **TOLERANCE)


def test_a_safety_checker_is_asked_as_in_the_stock_pipeline(tmp_path):
    stock = tiny.pipeline("stable_diffusion", tmp_path)
    parts = stock.components | tiny.safety_checker()
    checked = StableDiffusionPipeline(**parts)
    checked.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    expected = checked(tiny.PROMPTS, generator=generators, **CALL)
    found = SharedSamplingPipeline.from_pipe(checked)(tiny.PROMPTS, seed=range(5), share_ratio=0, **CALL)
    assert any(expected.nsfw_content_detected)
    assert found.nsfw_content_detected == expected.nsfw_content_detected
    as_tuple = SharedSamplingPipeline.from_pipe(checked)(
        tiny.PROMPTS, seed=range(5), share_ratio=0, return_dict=False, **CALL
    )
    assert as_tuple[1] == expected.nsfw_content_detected
    assert np.array_equal(found.images, expected.images)


def test_it_loads_as_a_custom_pipeline(stock, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    stock.save_pretrained(tmp_path / "model")
    file = tmp_path / "shared.py"
    file.write_text(
        "from diffusers import StableDiffusionPipeline\n"
        "from sage.sampling.families.table import shared_class\n"
        "Shared = shared_class(StableDiffusionPipeline)\n"
    )
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model", custom_pipeline=str(file), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    expected = SharedSamplingPipeline.from_pipe(stock)("red cat", seed=[1], **CALL).images
    assert np.array_equal(pipe("red cat", seed=[1], **CALL).images, expected)


def test_the_projects_own_base_loads_without_its_text_encoder(tmp_path):
    torch.manual_seed(0)
    made = base.assemble(base.new_autoencoder(), base.new_unet())
    base.save(made, tmp_path / "model")
    pipe = SharedSamplingPipeline.from_pretrained(tmp_path / "model")
    call = CALL | {"num_inference_steps": 2}
    expected = base.load(tmp_path / "model")("red heart", generator=torch.Generator().manual_seed(1), **call).images
    assert np.array_equal(pipe("red heart", seed=[1], **call).images, expected)
    # 24 tokens are read, the first and the last of them marks.
    out = pipe(["red heart", "heart " * 10_000], share_ratio=0, seed=0, **call)
    assert out.truncated_tokens == [0, 10_002 - 24]


def test_texts_of_every_kind_are_drawn_as_the_stock_pipeline_draws_them(pipe, stock):
    prompts = ["", "\x00\x01\x1b[31m", "猫と犬", "🐈‍⬛", "abc\u202edef", "a" * 500, " \t\n "]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    expected = stock(prompts, generator=generators, **CALL).images
    out = pipe(prompts, seed=range(len(prompts)), share_ratio=0, **CALL)
    assert np.array_equal(out.images, expected)
    assert out.truncated_tokens[5] == 502 - tiny.TOKENS
    grouped = pipe(prompts, seed=0, share_ratio=0.5, **CALL)
    assert np.isfinite(grouped.images).all()


BAD = [
    ({"prompt": []}, DataError, "there are no prompts"),
    ({"prompt": None}, ConfigurationError, "either prompts or prompt_embeds"),
    ({"prompt": ["a", 3]}, DataError, "prompt 1 is int, not text: 3"),
    ({"prompt": ["a", "b\ud800"]}, DataError, "prompt 1 is no valid Unicode at character 1"),
    ({"share_ratio": 1.0, "groups": [[0, 1]]}, PlanError, r"share ratio 1.0 is outside \[0, 1\)"),
    ({"share_ratio": -0.5, "groups": [[0, 1]]}, PlanError, "share ratio -0.5"),
    ({"share_ratio": math.nan}, PlanError, "share ratio nan"),
    ({"groups": [[0]]}, PlanError, "the plan is for 1 prompts, but 2 were given"),
    ({"groups": [[0, 5]]}, PlanError, r"names every prompt from 0 on once; this one has \[0, 5\]"),
    ({"groups": [0, 0, 1]}, PlanError, "3 labels were given for 2 prompts"),
    ({"groups": [0, [1]]}, PlanError, "groups holds 0 in place 0"),
    ({"groups": [0.0, 1.0]}, PlanError, "groups holds 0.0 in place 0"),
    ({"groups": [["a"], ["b"]]}, PlanError, r"groups holds \['a'\] in place 0"),
    ({"groups": 3}, ConfigurationError, "groups is 3; give lists of prompt numbers"),
    ({"groups": [[0], [1]], "plan": Plan.independent(2, 4)}, ConfigurationError, "either groups or a plan"),
    ({"share_ratio": [0.5]}, ConfigurationError, r"share_ratio \[0.5\] is for given groups"),
    ({"groups": Grouping(embeddings=np.eye(3))}, DataError, r"shape \(3, 3\), but there are 2 prompts"),
    ({"groups": Grouping(threshold=2.0, embeddings=np.eye(2))}, ConfigurationError, "threshold is 2.0"),
    ({"groups": Grouping(guard=["colours"], embeddings=np.eye(2))}, ConfigurationError, "no kind 'colours'"),
    ({"groups": Grouping(max_damage=0.1, embeddings=np.eye(2))}, ConfigurationError, "max_damage 0.1 needs the damage"),
    ({"plan": Plan.independent(3, 4)}, PlanError, "for 3 prompts, but 2 were given"),
    ({"plan": Plan.independent(2, 30)}, PlanError, "has 30 steps, but DDIMScheduler evaluates the network 4 times"),
    ({"seed": [1]}, ConfigurationError, "1 seeds were given for 2 images"),
    ({"seed": 1, "generator": torch.Generator()}, ConfigurationError, "either seed or generator"),
    ({"generator": [torch.Generator()] * 2}, ConfigurationError, "1 different generators were given for 2 images"),
    ({"latents": torch.zeros(1, 4, 8, 8)}, ConfigurationError, "1 latents were given for 2 images"),
    ({"negative_prompt": ["a"]}, ConfigurationError, "1 negative prompts were given for 2 prompts"),
    ({"height": 15}, ConfigurationError, "height 15 and width 16 must be multiples of 2"),
    ({"batch_size": 0}, ConfigurationError, "batch_size 0"),
    ({"num_images_per_prompt": 0}, ConfigurationError, "num_images_per_prompt 0"),
    ({"image_steps": 1}, ConfigurationError, "image_steps is 1, but branch_noise is 0"),
    ({"image_steps": 0.5}, ConfigurationError, "image_steps is 0.5"),
    ({"image_steps": 50, "branch_noise": 1.0}, PlanError, "cannot share 50 of 4 steps"),
    ({"num_inference_steps": 0}, ConfigurationError, "num_inference_steps 0 must each be at least 1"),
    ({"branch_noise": 2.0}, ConfigurationError, "branch_noise 2.0"),
    ({"guidance_scale": math.nan}, ConfigurationError, "guidance_scale is nan"),
    ({"guidance": 3.0}, ConfigurationError, "takes no guidance; further options are clip_skip"),
    (
        {"callback_on_step_end_tensor_inputs": ["latents", "image"]},
        ConfigurationError,
        "the callback can get latents, prompt_embeds, not image",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "says"), BAD)
def test_what_cannot_be_done_is_said_before_anything_is_drawn(pipe, arguments, error, says):
    with pytest.raises(error, match=says):
        pipe(**{"prompt": ["red cat", "tall tree"], **CALL, **arguments})


def test_embeddings_that_are_not_finite_or_not_grouped_are_refused(pipe):
    embeddings = torch.zeros(2, tiny.TOKENS, 16)
    with pytest.raises(ConfigurationError, match="prompt_embeds cannot be grouped; give groups"):
        pipe(prompt_embeds=embeddings, **CALL)
    embeddings[1, 0, 0] = math.nan
    with pytest.raises(DataError, match=r"prompt_embeds holds values that are not finite, in rows \[1\]"):
        pipe(prompt_embeds=embeddings, share_ratio=0, **CALL)


def test_an_unsupported_scheduler_or_pipeline_is_named(pipe, stock):
    pipe.scheduler = LCMScheduler()
    with pytest.raises(UnsupportedError, match=r"LCMScheduler cannot be shared; use one of .*DDIMScheduler"):
        pipe("red cat", **CALL)
    parts = {name: part for name, part in stock.components.items() if name != "image_encoder"}
    other = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(UnsupportedError, match=r"StableDiffusionImg2ImgPipeline cannot share .* StableDiffusionXLP"):
        SharedSamplingPipeline.from_pipe(other)


def test_errors_are_of_one_tree():
    assert all(issubclass(error, SageError) for _, error, _ in BAD)
