"""Image prompts (IP-Adapter): each prompt its own, and a group their mean."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from PIL import Image
from tiny_families import generators, rows
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from sage.errors import ConfigurationError, DataError
from sage.sampling.families.table import TABLE
from sage.sampling.pipeline import SharedSamplingPipeline

# The ControlNet of FLUX of diffusers 0.42 uses a name that it deprecates.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*`FluxPosEmbed` is deprecated:FutureWarning"),
]
PROMPTS = ["red cat", "red dog"]
STEPS = 4
CALL = {"num_inference_steps": STEPS, "output_type": "latent"}
WIDTH = 16


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def adapter(network, seed: int = 0, plus: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights of an adapter as they are published, strong enough to change an image."""
    random = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    text = network.config.cross_attention_dim
    projection = {
        "proj.weight": weights(4 * text, WIDTH),
        "proj.bias": weights(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    if plus:  # of the encoder's states at each patch instead of the pooled one
        projection = {
            "proj.0.weight": weights(WIDTH, WIDTH),
            "proj.0.bias": weights(WIDTH),
            "proj.2.weight": weights(text, WIDTH),
            "proj.2.bias": weights(text),
            "proj.3.weight": torch.ones(text),
            "proj.3.bias": torch.zeros(text),
        }
    names = [name for name in network.attn_processors if not name.endswith("attn1.processor")]
    sizes = {name: network.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in names}
    found = {
        f"{1 + 2 * k}.to_{part}_ip.weight": weights(sizes[name], text) for k, name in enumerate(names) for part in "kv"
    }
    return {"image_proj": projection, "ip_adapter": found}


@pytest.fixture(params=["stable_diffusion", "stable_diffusion_xl"])
def stock(request, tmp_path):
    """A stock pipeline with an image encoder and one adapter."""
    pipe = tiny.pipeline(request.param, tmp_path)
    give_sight(pipe)
    wear(pipe, adapter(pipe.unet))
    return pipe


def give_sight(pipe) -> None:
    """Register an image encoder."""
    encoder = CLIPVisionConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(encoder).eval(),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    )


def wear(pipe, *adapters) -> None:
    pipe.unet._load_ip_adapter_weights(list(adapters))
    pipe.unet.eval()


def shared(stock, prompts, seeds, **call):
    return SharedSamplingPipeline.from_pipe(stock)(prompts, seed=seeds, **CALL | {"share_ratio": 0} | call)


def embeddings(stock, *images, guided=True) -> torch.Tensor:
    """Return rows of embeddings as the stock call takes them for several prompts: without an image, then with one."""
    each = [stock.prepare_ip_adapter_image_embeds([image], None, "cpu", 1, guided)[0] for image in images]
    return torch.cat([row[place] for place in range(2 if guided else 1) for row in (list(e.split(1)) for e in each)])


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_one_image_prompt_is_the_stock_pipelines_bit_for_bit(stock, scale):
    call = {"guidance_scale": scale, "ip_adapter_image": picture(0)}
    found = shared(stock, "red cat", [5], **call).images
    assert torch.equal(found, stock("red cat", generator=generators([5]), **CALL, **call).images)
    other = shared(stock, "red cat", [5], **call | {"ip_adapter_image": picture(1)}).images
    assert not torch.equal(found, other)


def test_several_images_of_a_prompt_and_several_adapters_are_the_stock_pipelines(stock):
    wear(stock, adapter(stock.unet), adapter(stock.unet, seed=1, plus=True))
    call = {"ip_adapter_image": [[picture(0), picture(1)], picture(2)], "guidance_scale": 3.0}
    found = shared(stock, "red cat", [5], **call).images
    assert torch.equal(found, stock("red cat", generator=generators([5]), **CALL, **call).images)


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_each_prompt_has_its_own(stock, scale):
    """The stock pipeline takes one image prompt for all; so it is run for each prompt."""
    images, call = [picture(0), picture(1)], {"guidance_scale": scale, "batch_size": 1}
    rows = embeddings(stock, *images, guided=scale > 1)
    for given in ({"ip_adapter_image": [[[image] for image in images]]}, {"ip_adapter_image_embeds": [rows]}):
        found = shared(stock, PROMPTS, [5, 6], **call, **given).images
        for number, image in enumerate(images):
            asked = {"guidance_scale": scale, "ip_adapter_image": image, "generator": generators([5 + number])}
            assert torch.equal(found[number], stock(PROMPTS[number], **CALL, **asked).images[0])


def test_embeddings_without_image_are_each_prompts_own(stock):
    rows = embeddings(stock, picture(0), picture(1))
    rows[1] += 1.0
    found = shared(stock, PROMPTS, [5, 6], batch_size=1, ip_adapter_image_embeds=[rows]).images
    expected = stock(PROMPTS[1], generator=generators([6]), ip_adapter_image_embeds=[rows[1::2]], **CALL).images[0]
    assert torch.equal(found[1], expected)


def test_one_for_all_prompts_is_the_stock_pipelines_bit_for_bit(stock):
    for given in ([picture(0)], [[picture(0), picture(1)]]):
        expected = stock(PROMPTS, generator=generators([5, 6]), ip_adapter_image=given, **CALL).images
        assert torch.equal(shared(stock, PROMPTS, [5, 6], ip_adapter_image=given).images, expected)
    rows = embeddings(stock, picture(0))
    expected = stock(PROMPTS, generator=generators([5, 6]), ip_adapter_image_embeds=[rows], **CALL).images
    assert torch.equal(shared(stock, PROMPTS, [5, 6], ip_adapter_image_embeds=[rows]).images, expected)


def test_a_group_has_the_mean_until_its_branch_and_then_each_its_own(stock):
    rows = embeddings(stock, picture(0), picture(1))
    mean = torch.stack([rows[:2].mean(0), rows[2:].mean(0)])
    seen: list[torch.Tensor] = []

    def watch(pipe, step, t, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    call = {"groups": [[0, 1]], "share_ratio": 0.5, "callback_on_step_end": watch}
    own = shared(stock, PROMPTS, [5, 6], ip_adapter_image_embeds=[rows], **call)
    shared(stock, PROMPTS, [5, 6], ip_adapter_image_embeds=[mean], **call)
    assert own.cost.network_evaluations == 2 * (2 * STEPS - 2)
    torch.testing.assert_close(seen[1], seen[STEPS + 1], rtol=1e-3, atol=1e-3)
    assert (seen[STEPS - 1] - seen[-1]).abs().max() > 1e-3


def test_equal_texts_with_other_image_prompts_are_other_prompts(stock):
    images = [[picture(0)], [picture(1)]]
    call = {"ip_adapter_image": [images], "groups": [[0, 1]], "share_ratio": 0.5}
    found = shared(stock, ["red cat"] * 2, [5, 6], **call).images
    turned = shared(stock, ["red cat"] * 2, [5, 6], **call | {"ip_adapter_image": [images[::-1]]}).images
    first = shared(stock, ["red cat"] * 2, [5, 6], **call | {"ip_adapter_image": [images[0]]}).images
    # The shared steps see both images whatever their order, and the first member then sees its own.
    assert not torch.equal(found[0], turned[0]) and not torch.equal(found[0], first[0])


def test_images_do_not_depend_on_the_batch_size(stock):
    call = {
        "ip_adapter_image": [[[picture(0)], [picture(1)], [picture(2)]]],
        "groups": [[0, 2], [1]],
        "share_ratio": 0.5,
    }
    prompts = [*PROMPTS, "tall tree"]
    one = shared(stock, prompts, [5, 6, 7], batch_size=1, **call).images
    assert (one - shared(stock, prompts, [5, 6, 7], batch_size=4, **call).images).abs().max() < 1e-4 * one.abs().max()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "no image prompt, and the network 1 image adapters"),
        ({"ip_adapter_image": [1, 2]}, "ip_adapter_image has 2 entries for 1 adapters"),
        ({"ip_adapter_image": [[[1], [2], [3]]]}, "lists of images for 3 prompts, but there are 2"),
        (
            {"ip_adapter_image": [[[picture(0)], [picture(0), picture(1)]]]},
            r"adapter 0 has prompts with \[1, 2\] images",
        ),
        ({"ip_adapter_image_embeds": [torch.zeros(3, 1, WIDTH)]}, r"\(3, 1, 16\) of an adapter; .* 2 rows for all"),
        ({"ip_adapter_image": 1, "ip_adapter_image_embeds": [1]}, "ip_adapter_image and ip_adapter_image_embeds"),
    ],
)
def test_image_prompts_that_do_not_fit_are_named(stock, call, words):
    with pytest.raises(ConfigurationError, match=words):
        shared(stock, PROMPTS, [5, 6], **call)


def test_image_prompts_that_are_not_finite_are_named(stock):
    with pytest.raises(DataError, match="ip_adapter_image_embeds holds values that are not finite"):
        shared(stock, PROMPTS, [5, 6], ip_adapter_image_embeds=[torch.full((2, 1, WIDTH), torch.nan)])


def test_a_network_without_adapters_takes_none(tmp_path):
    stock = tiny.pipeline("stable_diffusion", tmp_path)
    with pytest.raises(ConfigurationError, match="the call has ip_adapter_image, and the network 0 image adapters"):
        shared(stock, PROMPTS, [5, 6], ip_adapter_image=picture(0))


def test_families_without_image_prompts_refuse_them():
    family = tiny_families.tiny("SanaPipeline")
    pipe = SharedSamplingPipeline.from_pipe(family.pipe)
    with pytest.raises(ConfigurationError, match=r"are for Stable Diffusion 1\.x, XL, 3, FLUX\.1 and their Contr"):
        pipe(**family.embed(1), **family.call, ip_adapter_image=picture(0))


# SD 3, FLUX.1 and the ControlNets: other networks, and other forms of the embeddings.


def flux_adapter(network) -> dict[str, dict[str, torch.Tensor]]:
    text, inner = network.config.joint_attention_dim, network.inner_dim
    projection = {
        "proj.weight": torch.randn(4 * text, WIDTH),
        "proj.bias": torch.randn(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    found = {}
    for block in range(network.config.num_layers):
        for part in "kv":
            found[f"{block}.to_{part}_ip.weight"] = torch.randn(inner, text)
            found[f"{block}.to_{part}_ip.bias"] = torch.randn(inner)
    return {"image_proj": projection, "ip_adapter": found}


def adapter_3(network) -> dict[str, dict[str, torch.Tensor]]:
    sides, size = {"embed_dim": WIDTH, "hidden_dim": 24, "timestep_in_dim": 8}, network.inner_dim
    projection = IPAdapterTimeImageProjection(**sides, output_dim=size, heads=1, num_queries=4)
    found = {}
    for block in range(len(network.attn_processors)):
        processor = SD3IPAdapterJointAttnProcessor2_0(size, size, network.config.attention_head_dim, 24)
        found |= {f"{block}.{name}": 5 * weight for name, weight in processor.state_dict().items()}
    return {"image_proj": projection.state_dict(), "ip_adapter": found}


@dataclass
class Seeing:
    """A stock pipeline with an image encoder and an adapter, inputs of two prompts, and arguments of its call."""

    pipe: Any
    inputs: dict[str, Any]
    call: dict[str, Any]

    def stock(self, numbers: list[int], **more: Any) -> torch.Tensor:
        torch.manual_seed(0)  # the ControlNet of SD 3 draws from torch's own generator
        seeds = generators([5 + number for number in numbers])
        return self.pipe(**rows(self.inputs, numbers), **CALL, **self.call | more, generator=seeds)[0]

    def shared(self, **more: Any) -> Any:
        torch.manual_seed(0)
        pipe = SharedSamplingPipeline.from_pipe(self.pipe)
        return pipe(**self.inputs, **CALL | {"share_ratio": 0} | self.call | more, seed=[5, 6])


SEEING = ["stable_diffusion_3", *(name for name in TABLE if TABLE[name].images)]


@pytest.fixture(params=SEEING)
def seeing(request, tmp_path) -> Seeing:
    torch.manual_seed(3)
    if request.param in tiny.FAMILIES:
        pipe = tiny.pipeline(request.param, tmp_path)
        found = Seeing(pipe, {"prompt": PROMPTS}, {**tiny.OPTIONS[request.param], "guidance_scale": 3.0})
    else:
        family = tiny_families.tiny(request.param)
        found = Seeing(family.pipe, family.embed(2), family.call | dict([family.guidance] if family.guidance else []))
    give_sight(found.pipe)
    network = getattr(found.pipe, "unet", None) or found.pipe.transformer
    if "Flux" in request.param:
        network._load_ip_adapter_weights([flux_adapter(network)])
    elif "3" in request.param:
        network._load_ip_adapter_weights(adapter_3(network))
    else:
        network._load_ip_adapter_weights([adapter(network)])
    network.eval()
    return found


def test_an_image_prompt_is_that_of_the_stock_pipeline(seeing):
    found = seeing.shared(ip_adapter_image=picture(0)).images
    assert torch.equal(found, seeing.stock([0, 1], ip_adapter_image=picture(0)))
    assert not torch.equal(found, seeing.shared(ip_adapter_image=picture(1)).images)


def test_every_prompt_may_have_its_own_image(seeing):
    images = [picture(0), picture(1)]
    found = seeing.shared(ip_adapter_image=[[[image] for image in images]], batch_size=1).images
    if "StableDiffusion3ControlNet" in type(seeing.pipe).__name__:  # it draws for both prompts in one call
        assert torch.equal(found[0], seeing.shared(ip_adapter_image=images[0], batch_size=1).images[0])
        assert torch.equal(found[1], seeing.shared(ip_adapter_image=images[1], batch_size=1).images[1])
        return
    for number, image in enumerate(images):
        assert torch.equal(found[number], seeing.stock([number], ip_adapter_image=image)[0])


def test_a_group_sees_the_mean_of_its_images_and_then_each_its_own(seeing):
    torch.manual_seed(4)
    halves = 2 if "guidance_scale" in seeing.call else 1
    embeddings = torch.randn(2 * halves, 1, WIDTH)
    mean = torch.stack([half.mean(0) for half in embeddings.chunk(halves)])
    single = "3" in type(seeing.pipe).__name__  # one adapter at most: no list of them
    seen: list[torch.Tensor] = []

    def watch(pipe, step, t, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    call = {"groups": [[0, 1]], "share_ratio": 0.5, "callback_on_step_end": watch}
    for values in (embeddings, mean):
        out = seeing.shared(ip_adapter_image_embeds=values if single else [values], **call)
        assert out.cost.network_evaluations == halves * (2 * STEPS - 2)
    torch.testing.assert_close(seen[1], seen[STEPS + 1], rtol=1e-3, atol=1e-3)
    assert (seen[STEPS - 1] - seen[-1]).abs().max() > 1e-3


def test_an_adapter_of_stable_diffusion_3_does_without_an_image_and_takes_one_of_each_prompt(tmp_path):
    pipe = tiny.pipeline("stable_diffusion_3", tmp_path)
    give_sight(pipe)
    pipe.transformer._load_ip_adapter_weights(adapter_3(pipe.transformer))
    seeing = Seeing(pipe, {"prompt": PROMPTS}, tiny.OPTIONS["stable_diffusion_3"])
    assert torch.equal(seeing.shared().images, seeing.stock([0, 1]))
    with pytest.raises(ConfigurationError, match=r"a prompt has 2 images of one adapter, but .* takes one"):
        seeing.shared(ip_adapter_image=[[picture(0), picture(1)]])
