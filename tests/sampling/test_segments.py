"""Every family, most of them run by the segment driver, against its stock pipeline on the same random weights."""

import ast
import inspect
import json
import textwrap

import diffusers
import numpy as np
import pytest
import tiny
import tiny_families
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from tiny_families import ALL, FAMILIES, OWN, Tiny, generators, latents, rows

from sage.errors import ConfigurationError, UnsupportedError
from sage.sampling.families.table import TABLE
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Plan

# Chroma and Stable Audio of diffusers 0.42 use names that it and torch deprecate.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
]
STEPS = 4
# Batches of another size round differently; latents are of the order of 1.
CLOSE = 3e-5
# These default to an empty negative prompt and then refuse embeddings of one.
ASKING = ("SanaPipeline", "PixArtSigmaPipeline", "PixArtAlphaPipeline")


@pytest.fixture(params=ALL)
def family(request) -> Tiny:
    return tiny_families.tiny(request.param)


def name_of(family: Tiny) -> str:
    return type(family.pipe).__name__


def placeless(family: Tiny) -> None:
    """Skip a family whose stock call draws for all prompts at once, so that an image depends on its place."""
    if name_of(family) == "StableDiffusion3ControlNetPipeline":
        pytest.skip("latents of its control images are drawn by torch's own generator, all in one draw")


def stock(family: Tiny, embeddings, seeds, guided=True, output="latent", **changes):
    call = family.call | {"num_inference_steps": STEPS, "output_type": output} | changes
    if family.guidance:
        name, scale = family.guidance
        call[name] = scale if guided else family.unguided
    if name_of(family) in ASKING and "prompt_embeds" in embeddings:
        call["negative_prompt"] = None
    torch.manual_seed(0)  # the ControlNet of SD 3 draws from torch's own generator
    return latents(family.pipe(**embeddings, **call, generator=generators(seeds)))


def shared(family: Tiny, embeddings, seeds, guided=True, output="latent", **changes):
    pipe = SharedSamplingPipeline.from_pipe(family.pipe)
    call = family.call | {"num_inference_steps": STEPS, "output_type": output, "share_ratio": 0} | changes
    if family.guidance:
        call["guidance_scale"] = family.guidance[1] if guided else family.unguided
    torch.manual_seed(0)
    return pipe(**embeddings, **call, seed=seeds)


def half(embeddings):
    def cast(values):
        if isinstance(values, list):
            return [cast(row) for row in values]
        return values.bfloat16() if values.is_floating_point() else values

    return {name: cast(values) for name, values in embeddings.items()}


def drift(a, b) -> float:
    return (a.double() - b.double()).abs().max().item()


def test_the_table_and_the_tests_know_the_same_families():
    assert TABLE.keys() == FAMILIES.keys() | OWN.keys()


@pytest.mark.parametrize("guided", [True, False])
def test_share_ratio_0_is_the_stock_pipeline_bit_for_bit(family, guided):
    embeddings = family.embed(2, guided=guided)
    found = shared(family, embeddings, [5, 6], guided)
    assert torch.equal(found.images, stock(family, embeddings, [5, 6], guided))
    assert found.cost.network_evaluations == (2 if guided and family.guidance else 1) * 2 * STEPS


def test_decoded_images_are_the_stock_pipelines_bit_for_bit(family):
    embeddings = family.embed(1)
    found = shared(family, embeddings, [5], output="np").images
    assert np.array_equal(np.asarray(found), np.asarray(stock(family, embeddings, [5], output="np")))


def test_shared_steps_are_evaluated_once_and_counted(family):
    calls = []
    for name in ("unet", "transformer", "transformer_2"):
        if network := getattr(family.pipe, name, None):
            network.register_forward_pre_hook(
                lambda module, args, kwargs: calls.append(len(args[0] if args else kwargs["hidden_states"])),
                with_kwargs=True,
            )
    found = shared(family, family.embed(3), [5, 6, 7], groups=[[0, 2], [1]], share_ratio=0.5)
    each = 2 if family.guidance else 1
    assert found.cost.network_evaluations == found.cost.formula == sum(calls) == each * (3 * STEPS - 2)
    assert found.cost.saving == pytest.approx(1 / 6)


def test_a_group_of_one_and_equal_prompts_are_the_independent_image(family):
    placeless(family)
    embeddings = family.embed(2)
    alone = shared(family, embeddings, [5, 6]).images
    twice = rows(embeddings, [0, 0, 1])
    found = shared(family, twice, [5, 5, 6], groups=[[0, 1], [2]], share_ratio=0.5).images
    assert max(drift(found[0], alone[0]), drift(found[1], alone[0]), drift(found[2], alone[1])) < scale(alone)


def scale(images) -> float:
    return CLOSE * max(1.0, images.abs().max().item())


def test_members_start_as_one_and_differ_after_their_branch(family):
    embeddings = family.embed(2)
    found = shared(family, embeddings, [5, 6], groups=[[0, 1]], share_ratio=0.5).images
    alone = shared(family, embeddings, [5, 6]).images
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], alone[0])


def test_images_do_not_depend_on_order_batch_size_or_company(family):
    placeless(family)
    embeddings, groups = family.embed(4), [[0, 1], [2, 3]]
    first = shared(family, embeddings, [1, 2, 3, 4], groups=groups, share_ratio=0.5, batch_size=2).images
    turned = rows(embeddings, [3, 2, 1, 0])
    again = shared(family, turned, [4, 3, 2, 1], groups=groups, share_ratio=0.5, batch_size=8).images.flip(0)
    alone = shared(family, rows(embeddings, [2, 3]), [3, 4], groups=[[0, 1]], share_ratio=0.5).images
    assert max(drift(first, again), drift(first[2:], alone)) < scale(first)


def test_two_streams_of_one_pipeline_do_not_meet(family):
    embeddings = family.embed(2)
    pipe = SharedSamplingPipeline.from_pipe(family.pipe)
    call = family.call | {"num_inference_steps": STEPS, "output_type": "latent", "batch_size": 1, "share_ratio": 0}
    if family.guidance:
        call["guidance_scale"] = family.guidance[1]

    def stream(seeds):
        torch.manual_seed(0)
        return pipe.stream(**embeddings, **call, seed=seeds)

    streams = [stream(seeds) for seeds in ([5, 6], [7, 8])]
    found = [result.image for pair in zip(*streams, strict=True) for result in pair]
    alone = [shared(family, embeddings, seeds, batch_size=1).images for seeds in ([5, 6], [7, 8])]
    assert all(torch.equal(one, other[k]) for k in (0, 1) for one, other in zip(found[2 * k :][:2], alone, strict=True))


def test_branch_noise_moves_members_apart(family):
    if name_of(family).startswith("PixArt"):
        family.pipe.scheduler = DPMSolverMultistepScheduler(solver_order=1)
    embeddings = family.embed(2)
    call = {"groups": [[0, 1]], "share_ratio": 0.5}
    if name_of(family) == "StableAudioPipeline":
        with pytest.raises(UnsupportedError, match=r"branch noise needs one of .*, not EDMDPMSolverMultistepScheduler"):
            shared(family, embeddings, [5, 6], **call, branch_noise=1.0)
        return
    plain = shared(family, embeddings, [5, 6], **call).images
    noisy = shared(family, embeddings, [5, 6], **call, branch_noise=1.0).images
    assert drift(noisy[0], noisy[1]) > drift(plain[0], plain[1])


# Stable Audio's prompts are encoded by its row (tests/sampling/test_proof.py).
ENCODED = [name for name in TABLE if TABLE[name].encode is None]


@pytest.mark.parametrize("name", ENCODED)
def test_a_row_of_the_table_says_what_the_stock_source_says(name):
    """The results of `encode_prompt` are assigned to variables, which have the names of the call's arguments."""
    family, cls = TABLE[name], type(tiny_families.tiny(name).pipe)
    source = ast.parse(textwrap.dedent(inspect.getsource(cls.__call__)))
    calls = [
        [ast.unparse(target) for target in node.targets[0].elts]
        for node in sorted((n for n in ast.walk(source) if isinstance(n, ast.Assign)), key=lambda node: node.lineno)
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "self.encode_prompt"
    ]
    arguments = inspect.signature(cls.__call__).parameters
    assert [tuple(name if name in arguments else None for name in names) for names in calls][: len(family.encoded)] == (
        list(family.encoded)
    )
    steps = [n for n in ast.walk(source) if isinstance(n, ast.Call) and ast.unparse(n.func) == "self.scheduler.step"]
    # PixArt-alpha writes the call twice: of a single step it takes another result.
    assert len({ast.unparse(step) for step in steps}) == 1


@pytest.mark.parametrize("name", ENCODED)
def test_prompts_are_encoded_by_the_stock_pipeline(name, monkeypatch):
    """With an encoder that gives a text always the same embeddings, prompts and those embeddings are one call."""
    family, texts = tiny_families.tiny(name), ["red cat", "blue house"]
    embeddings = family.embed(2)
    expected = shared(family, embeddings, [5, 6]).images
    original = type(family.pipe).encode_prompt
    signature = inspect.signature(original)

    def encode_prompt(self, *args, **kwargs):
        said = signature.bind(self, *args, **kwargs).arguments
        prompt = said.pop("prompt", None)
        if prompt is not None and said.get("prompt_embeds") is None:
            known = [text for text in prompt if text in texts]
            end = "_2" if said.get("text_encoder_index") == 1 else ""
            numbers = [texts.index(text) for text in known] or list(range(len(prompt)))
            for prefix in ("", "negative_"):
                source = "negative_" if prefix == "" and not known else prefix  # one call for each
                for argument in signature.parameters.keys() & {*TABLE[name].inputs.values()}:
                    if (rows_of := embeddings.get(source + argument + end)) is not None:
                        said[prefix + argument] = rows({"rows": rows_of}, numbers)["rows"]
        known_arguments = {key: value for key, value in said.items() if key in signature.parameters}
        return original(**known_arguments | {"prompt": prompt if family.lists else None})

    monkeypatch.setattr(type(family.pipe), "encode_prompt", encode_prompt)
    encoder = torch.nn.Identity()
    encoder.device, encoder.dtype = torch.device("cpu"), torch.float32
    vars(family.pipe)["text_encoder"] = encoder
    negatives = {"negative_prompt": ["ugly"] * 2} if TABLE[name].asks else {}
    assert torch.equal(shared(family, {"prompt": texts} | negatives, [5, 6]).images, expected)


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        ("FluxPipeline", {"true_cfg_scale": 4.0}, "true_cfg_scale=4.0 of FluxPipeline may depend"),
        ("Lumina2Pipeline", {"cfg_trunc_ratio": 0.5}, "cfg_trunc_ratio=0.5 of Lumina2Pipeline may depend"),
    ],
)
def test_an_option_that_counts_steps_is_refused(name, option, words):
    family = tiny_families.tiny(name)
    with pytest.raises(UnsupportedError, match=words):
        shared(family, family.embed(1), [5], **option)


def test_bad_input_is_named():
    family = tiny_families.tiny("QwenImagePipeline")
    with pytest.raises(ConfigurationError, match="takes no image"):
        shared(family, family.embed(1), [5], image=1)
    with pytest.raises(ConfigurationError, match=r"takes no image .*belongs to a single prompt"):
        shared(family, family.embed(1), [5], image=1)
    with pytest.raises(ConfigurationError, match=r"takes no ip_adapter_image \(image prompts \(IP-Adapter\) are for"):
        shared(family, family.embed(1), [5], ip_adapter_image=1)
    flux = tiny_families.tiny("FluxPipeline")
    with pytest.raises(ConfigurationError, match=r"has ip_adapter_image, and the network 0 image adapters"):
        shared(flux, flux.embed(1), [5], ip_adapter_image=1)
    with pytest.raises(ConfigurationError, match="prompt_2 is for prompts, but embeddings were given"):
        shared(flux, flux.embed(1), [5], prompt_2="a cat")
    with pytest.raises(ConfigurationError, match="needs pooled_prompt_embeds beside the other embeddings"):
        shared(flux, {"prompt_embeds": flux.embed(1)["prompt_embeds"]}, [5])


CONTROLLED = tuple(name for name in TABLE if TABLE[name].control)
# These draw latents of their control images.
DRAWN = tuple(name for name in TABLE if TABLE[name].posterior)


@pytest.mark.parametrize("name", CONTROLLED)
def test_each_prompt_has_its_control_image_and_a_group_their_mean(name):
    family, argument = tiny_families.tiny(name), TABLE[name].control
    embeddings, images = family.embed(2), tiny_families.control_images(2)
    found = shared(family, embeddings, [5, 6], **{argument: images}).images
    assert torch.equal(found, stock(family, embeddings, [5, 6], **{argument: images}))
    assert not torch.equal(found, shared(family, embeddings, [5, 6], **{argument: images.flip(0)}).images)
    if name in DRAWN:
        return  # the mean of the images has latents of its own
    # Before the branch the control image is the mean, here exactly 0, 1/2 or 1; after it each member's own.
    seen: list[torch.Tensor] = []

    def watch(pipe, step, t, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    call = {"groups": [[0, 1]], "share_ratio": 0.5, "callback_on_step_end": watch}
    for given in (images, images.mean(0, keepdim=True), images[:1], images[1:]):
        shared(family, embeddings, [5, 6], **{argument: given}, **call)
    own, mean, first, second = seen[:STEPS], seen[STEPS : 2 * STEPS], seen[2 * STEPS : -STEPS], seen[-STEPS:]
    assert torch.equal(own[1], mean[1])
    assert not torch.equal(own[1], first[1]) and not torch.equal(own[1], second[1])
    assert not torch.equal(own[-1], mean[-1])


@pytest.mark.parametrize("name", DRAWN)
def test_latents_of_control_images_are_drawn_as_in_the_stock_pipeline(name):
    """By the seeds or generators of the images, or by torch's own; in a group, the members' mean until its branch."""
    family = tiny_families.tiny(name)
    embeddings = family.embed(2)
    found = shared(family, embeddings, [5, 6]).images
    assert torch.equal(shared(family, embeddings, None, generator=generators([5, 6])).images, found)
    group = shared(family, embeddings, [5, 6], groups=[[0, 1]], share_ratio=0.5).images
    assert not torch.equal(group[0], found[0])
    with pytest.raises(UnsupportedError, match="num_images_per_prompt is 2, but each image has latents of its own"):
        shared(family, embeddings, [5, 6, 7, 8], num_images_per_prompt=2)


def test_a_controlnet_that_reads_pixels_draws_nothing():
    """FLUX's have two forms: latents of the control image, or the image itself (`input_hint_block`)."""
    family = tiny_families.tiny("FluxControlNetPipeline")
    network = family.pipe.controlnet
    hint = diffusers.models.controlnets.controlnet.ControlNetConditioningEmbedding(16, block_out_channels=(8, 8))
    network.input_hint_block = tiny_families.wakened(hint).eval()
    network.controlnet_x_embedder = torch.nn.Linear(16, network.inner_dim).eval()
    embeddings, call = family.embed(2), {"control_image": tiny_families.control_images(2)}
    found = shared(family, embeddings, [5, 6], **call).images
    assert torch.equal(found, stock(family, embeddings, [5, 6], **call))


def test_control_images_that_do_not_fit_are_named():
    family = tiny_families.tiny(CONTROLLED[0])
    with pytest.raises(ConfigurationError, match="3 of image were given for 2 prompts"):
        shared(family, family.embed(2), [5, 6], image=tiny_families.control_images(3))
    with pytest.raises(ConfigurationError, match="needs image: one for each prompt, or one for all"):
        shared(family, family.embed(2), [5, 6], image=None)
    with pytest.raises(UnsupportedError, match=r"control_guidance_end=0.5 of StableDiffusionControlNetP.* may depend"):
        shared(family, family.embed(2), [5, 6], control_guidance_end=0.5)


@pytest.mark.parametrize("name", ["StableDiffusionControlNetPipeline", "HunyuanDiTPipeline"])
def test_a_safety_checker_is_asked_as_in_the_stock_pipeline(name):
    family = tiny_families.tiny(name)
    family.pipe.register_modules(**tiny.safety_checker())
    embeddings, seeds = family.embed(5), [1, 2, 3, 4, 5]
    found = shared(family, embeddings, seeds, output="np")
    call = family.call | {"num_inference_steps": STEPS, "output_type": "np", "guidance_scale": family.guidance[1]}
    expected = family.pipe(**embeddings, **call, generator=generators(seeds))
    assert found.nsfw_content_detected == expected.nsfw_content_detected and any(found.nsfw_content_detected)
    assert np.array_equal(found.images, expected.images)


def test_a_call_that_is_interrupted_while_a_step_begins_finishes_that_step(monkeypatch):
    """By another thread, in the stock call of the second step."""
    family = tiny_families.tiny("FluxPipeline")
    embeddings, pipe, seen = family.embed(2), SharedSamplingPipeline.from_pipe(family.pipe), []
    checked = type(family.pipe).check_inputs
    family.pipe.transformer.register_forward_pre_hook(lambda *args: seen.append(1))

    def check_inputs(self, *args, **kwargs):
        if len(seen) == 1:
            pipe._interrupt = True
        checked(self, *args, **kwargs)

    def stop(pipe, step, t, tensors):
        pipe._interrupt = step == 1
        return {}

    expected = stock(family, embeddings, [5, 6], callback_on_step_end=stop)
    seen.clear()
    monkeypatch.setattr(type(family.pipe), "check_inputs", check_inputs)
    call = family.call | {"num_inference_steps": STEPS, "output_type": "latent", "share_ratio": 0}
    found = pipe(**embeddings, **call, seed=[5, 6])
    assert found.finished == [False, False] and torch.equal(found.images, expected)


def test_own_sigmas_and_solvers_with_history_are_the_stock_pipelines():
    family = tiny_families.tiny("FluxPipeline")
    embeddings, own = family.embed(1), {"sigmas": [1.0, 0.7, 0.2]}
    found = shared(family, embeddings, [5], num_inference_steps=3, **own).images
    assert torch.equal(found, stock(family, embeddings, [5], num_inference_steps=3, **own))
    wan = tiny_families.tiny("WanPipeline")
    wan.pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    assert torch.equal(shared(wan, wan.embed(1), [5]).images, stock(wan, wan.embed(1), [5]))


def test_a_plan_of_a_tree_and_a_callback_see_every_step():
    family = tiny_families.tiny("ZImagePipeline")
    seen = []

    def watch(pipe, step, t, tensors):
        seen.append((step, len(tensors["latents"])))
        return {}

    plan = Plan.shared([[0, 1, 2]], STEPS, 0.5)
    shared(family, family.embed(3), [5, 6, 7], plan=plan, callback_on_step_end=watch)
    assert seen == [(0, 1), (1, 1), (2, 3), (3, 3)]


def test_an_interrupted_call_marks_what_is_not_finished():
    family = tiny_families.tiny("FluxPipeline")

    def stop(pipe, step, t, tensors):
        pipe._interrupt = step == 1
        return {}

    out = shared(family, family.embed(2), [5, 6], callback_on_step_end=stop)
    assert out.finished == [False, False]


def test_a_saved_pipeline_is_the_stock_one(tmp_path):
    family = tiny_families.tiny("SanaPipeline")
    SharedSamplingPipeline.from_pipe(family.pipe).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "SanaPipeline"


def test_one_class_for_each_stock_class():
    one, other = (SharedSamplingPipeline.from_pipe(tiny_families.tiny("FluxPipeline").pipe) for _ in range(2))
    assert type(one) is type(other)
