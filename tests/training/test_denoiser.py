import copy

import sage.torchvision_ops  # noqa: F401

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from diffusers import AutoencoderTiny
from peft import LoraConfig

from sage import diffusion
from sage.diffusion import NoiseSchedule
from sage.errors import ConfigurationError, UnsupportedError
from sage.sampling import adapters
from sage.sampling.conditions import merge, select
from sage.sampling.weights import store
from sage.training import lora, loss
from sage.training.batches import Batches
from sage.training.denoiser import Denoiser
from sage.training.finetuning import TrainingSet, finetuning_loss
from sage.training.loop import Schedule, fit

SIZE = (16, 16)
GROUPS = ((0, 1, 2), (3, 4))
WEIGHTS = {"diffusion": 1.0, "shared": 1.0, "branch": 1.0, "consistency": 0.1}
SETTINGS = {"share_ratios": (0.2, 0.6), "soft_target": "mean", "branch_start": "mixture", "sampler_steps": 8}
SETTINGS |= {"drop_text": 0.1, "seed": 0}


def images(n):
    return torch.randint(0, 256, (n, *SIZE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def data_of(denoiser):
    texts = [*tiny.PROMPTS, ""]
    latents = denoiser.encode_images(images(len(tiny.PROMPTS)))
    return TrainingSet(latents, denoiser.encode_texts(texts, SIZE), torch.arange(len(latents))[:, None], GROUPS)


def loss_of(denoiser, data, scheduler, batch_size=12, **changes):
    batches = Batches(GROUPS, WEIGHTS | changes.pop("weights", {}), batch_size, 0)
    return finetuning_loss(denoiser, scheduler, data, batches, **SETTINGS | changes)


def draw(pipe, family, **options):
    return pipe(
        tiny.PROMPTS[0],
        num_inference_steps=3,
        height=SIZE[0],
        width=SIZE[1],
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **tiny.OPTIONS.get(family, {}) | options,
    ).images


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pipe(family, tmp_path, monkeypatch):
    if family in tiny.OPTIONS:  # and FLUX, by `indirect`
        # What the tiny transformers have room for.
        from sage.sampling import families  # noqa: F401
        from sage.sampling.pipeline import SharedSamplingPipeline

        stock = tiny.pipeline(family, tmp_path)
        shared = type(SharedSamplingPipeline.from_pipe(stock))
        monkeypatch.setattr(shared, "_options", {**shared._options, **tiny.OPTIONS[family]})
        return stock
    return tiny.pipeline(family, tmp_path)


def test_a_denoiser_asks_as_the_stock_pipeline_does(pipe, family):
    seen = []

    def keep(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        seen.append((x, t, output[0]))

    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = network.register_forward_hook(keep, with_kwargs=True)
    draw(pipe, family, guidance_scale=1.0)
    handle.remove()
    denoiser = Denoiser(pipe)
    condition = denoiser.encode_texts(tiny.PROMPTS[:1], SIZE)
    assert len(seen) == 3
    for x, t, output in seen:
        with torch.no_grad():
            answer = denoiser(x, t.expand(1), condition)
        torch.testing.assert_close(answer, output[:, : x.shape[1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", tiny.TRAINED, indirect=True)
def test_latents_are_what_the_pipeline_decodes(pipe):
    denoiser = Denoiser(pipe)
    latents = denoiser.encode_images(images(3), batch_size=2)
    x = images(3).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
        call = denoiser._call(1, SIZE, denoiser.encode_texts(tiny.PROMPTS[:3], SIZE))
        found, _ = call._finish(call.packed(latents), "pt", denoiser._options((8, 8)))
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_a_tiny_autoencoder_gives_its_latents(tmp_path):
    """AutoencoderTiny (TAESD) has no distribution; what it encodes is decoded again by the pipeline."""
    torch.manual_seed(0)
    tiny_one = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=0.5,
    )
    pipe = tiny.stable_diffusion(tmp_path)
    pipe.register_modules(vae=tiny_one)
    latents = Denoiser(pipe).encode_images(images(2))
    x = images(2).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(latents, tiny_one.encode(x).latents * 0.5)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_flux_is_asked_as_the_stock_pipeline_asks_it(pipe, family):
    """Packed latents, their positions, the time and the guidance scale are equal, and so is the prediction."""
    seen, options = [], tiny.OPTIONS[family] | {"height": 16, "width": 12}

    def keep(module, args, kwargs, output):
        seen.append((kwargs, output[0]))

    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    pipe(tiny.PROMPTS[0], num_inference_steps=3, guidance_scale=2.5, output_type="latent", **options)
    stock, [*seen] = seen, []
    denoiser = Denoiser(pipe, guidance_scale=2.5)
    condition = denoiser.encode_texts(tiny.PROMPTS[:1], (16, 12))
    for asked, output in stock:
        x = denoiser._pipe.unpacked(asked["hidden_states"], 8, 6)
        assert torch.equal(denoiser._pipe.packed(x), asked["hidden_states"]) and x.shape == (1, 4, 8, 6)
        with torch.no_grad():
            answer = denoiser(x, 1000 * asked["timestep"], condition)
        torch.testing.assert_close(denoiser._pipe.packed(answer), output, rtol=1e-4, atol=1e-5)
        found, _ = seen.pop()
        tensors = {name for name, value in asked.items() if torch.is_tensor(value)}
        assert tensors >= {"hidden_states", "timestep", "guidance", "img_ids", "txt_ids", "pooled_projections"}
        for name in tensors:
            torch.testing.assert_close(found[name], asked[name], rtol=1e-5, atol=1e-6, msg=name)
    handle.remove()


def test_each_row_has_a_time_of_its_own(tmp_path, monkeypatch):
    """A batch of FLUX's latents at several times is predicted as each alone."""
    denoiser = Denoiser(tiny.pipeline("flux", tmp_path))
    denoiser._pipe._options = {**denoiser._pipe._options, **tiny.OPTIONS["flux"]}
    condition = denoiser.encode_texts(tiny.PROMPTS[:3], SIZE)
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([20.0, 500.0, 990.0])
    with torch.no_grad():
        together = denoiser(x, t, condition)
        for row in range(3):
            alone = denoiser(x[row : row + 1], t[row : row + 1], select(condition, slice(row, row + 1)))
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [True, False])
def test_the_guidance_scale_is_an_input_of_flux_dev_alone(guidance, tmp_path):
    pipe, answers = tiny.flux(tmp_path, guidance), []
    for scale in (1.0, 4.0):
        denoiser = Denoiser(pipe, guidance_scale=scale)
        denoiser._pipe._options = {**denoiser._pipe._options, **tiny.OPTIONS["flux"]}
        condition = denoiser.encode_texts(tiny.PROMPTS[:1], SIZE)
        with torch.no_grad():
            answers.append(denoiser(torch.ones(1, 4, 8, 8), torch.tensor([500.0]), condition))
    assert denoiser.embeds_guidance and torch.equal(*answers) is not guidance


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.TRAINED, indirect=True)
def test_every_family_can_be_tuned(pipe, family, tmp_path):
    denoiser = Denoiser(pipe, "bf16")
    data = data_of(denoiser)
    step_loss = loss_of(denoiser, data, pipe.scheduler)
    values = step_loss(0)
    assert values.keys() == {"loss", *WEIGHTS} and all(value.isfinite() for value in values.values())
    # The base agrees with itself, but for the difference of c_bar from c_n.
    assert values["consistency"] < 0.05 * values["diffusion"]
    before = sum(float(step_loss(step)["loss"].detach()) for step in range(4))
    fit(denoiser, step_loss, Schedule(12, 3e-3, warmup=0, ema=0.0), work=tmp_path / "work", identity={})
    assert sum(float(step_loss(step)["loss"].detach()) for step in range(4)) < before
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    assert network is denoiser.network  # so the pipeline has learned


def test_a_quantised_network_is_refused_by_name(tmp_path):
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    pipe.unet.is_quantized = True  # as the quantisers of diffusers mark a network
    with pytest.raises(UnsupportedError, match="UNet2DConditionModel is quantised"):
        Denoiser(pipe)


def test_a_family_that_is_not_trained_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"WanPipeline can be sampled, but not fine-tuned.*FluxPipeline"):
        Denoiser(tiny_families.tiny("WanPipeline").pipe)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_what_guidance_takes(pipe, family, zeros):
    if family == "stable_diffusion_xl":
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    denoiser = Denoiser(pipe)
    found = denoiser.encode_texts(["red cat", ""], SIZE)
    call, options = denoiser._pipe._begin_call(), denoiser._options((8, 8))
    call._begin_segments(1, 4.0, options)
    guidance = call._encode(["red cat"], None, True, {}, options)
    for name, values in found.items():
        both = torch.cat([guidance[name][:, 0], guidance["negative_" + name][:, 0]])
        torch.testing.assert_close(values, both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.TRAINED, indirect=True)
def test_a_pipeline_in_half_precision_is_trained_and_draws_in_single(pipe, family, half):
    denoiser = Denoiser(pipe.to(half))
    loss_of(denoiser, data_of(denoiser), pipe.scheduler)(0)["loss"].backward()
    trained = [p for p in denoiser.parameters() if p.grad is not None]
    assert trained and all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
    assert np.isfinite(draw(pipe, family)).all()


def test_flow_matching_is_trained_on_the_formula(tmp_path):
    """The plain term of SD 3 is the mean of |f - (eps - x_0)|^2 at x_t = (1 - s) x_0 + s eps, told 1000 s."""
    pipe = tiny.pipeline("stable_diffusion_3", tmp_path)
    denoiser = Denoiser(pipe)
    denoiser._pipe._options = {**denoiser._pipe._options, "max_sequence_length": 20}
    data, asked = data_of(denoiser), []
    denoiser.register_forward_hook(lambda module, args, output: asked.append((*args, output)))
    weights = {"shared": 0.0, "branch": 0.0, "consistency": 0.0}
    value = loss_of(denoiser, data, pipe.scheduler, weights=weights, drop_text=0.0)(0)["loss"]
    [(x_t, told, condition, output)] = asked
    s = (told / 1000).reshape(-1, 1, 1, 1)
    assert (
        told.max() > 950 and told.dtype == torch.float32 and set(condition) == {"prompt_embeds", "pooled_prompt_embeds"}
    )
    rows = Batches(GROUPS, WEIGHTS | weights, 12, 0).rows(0)["diffusion"]
    x_0 = data.latents[rows]
    eps = (x_t - (1 - s) * x_0) / s
    assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1
    torch.testing.assert_close(value, (output - (eps - x_0)).square().mean())


def test_group_conditions_are_those_of_the_sampler(tmp_path):
    """Also where tokens are masked: PixArt."""

    pipe = tiny.pipeline("pixart_alpha", tmp_path)
    denoiser = Denoiser(pipe)
    denoiser._pipe._options = {**denoiser._pipe._options, **tiny.OPTIONS["pixart_alpha"]}
    data, asked = data_of(denoiser), []
    denoiser.register_forward_hook(lambda module, args, output: asked.append(args))
    weights = {"diffusion": 0.0, "branch": 0.0, "consistency": 0.0}
    loss_of(denoiser, data, pipe.scheduler, weights=weights)(0)
    [(_, _, condition)] = asked
    rows = Batches(GROUPS, WEIGHTS | weights, 12, 0).rows(0)["shared"]
    for place, row in enumerate(rows.tolist()):
        group = next(list(group) for group in GROUPS if row in group)
        merged = merge({name: values[group][:, None] for name, values in data.conditions.items()})
        for name, values in merged.items():
            assert torch.equal(condition[name][place], values[0, 0])


def test_without_consistency_there_is_no_frozen_base(tmp_path, monkeypatch):
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    denoiser = Denoiser(pipe)
    data = data_of(denoiser)
    calls = []
    denoiser.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    monkeypatch.setattr(copy, "deepcopy", lambda value: pytest.fail("a copy was made"))
    loss_of(denoiser, data, pipe.scheduler, weights={"consistency": 0.0})(0)
    assert calls == [12]


@pytest.mark.parametrize(
    ("parts", "changes"),
    [(2, {}), (3, {"min_snr": 5.0}), (5, {"soft_target": "posterior"}), (7, {"branch_start": "sampled"})],
)
def test_parts_add_up_to_the_step(parts, changes, tmp_path):
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    denoiser = Denoiser(pipe)
    step_loss = loss_of(denoiser, data_of(denoiser), pipe.scheduler, batch_size=7, **changes)

    def gradient(values):
        denoiser.zero_grad()
        sum(value["loss"] for value in values).backward()
        return torch.cat([p.grad.flatten() for p in denoiser.parameters()])

    whole, pieces = step_loss(3), [step_loss(3, part, parts) for part in range(parts)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(piece[name] for piece in pieces), value, rtol=1e-4, atol=1e-7)
    expected = gradient([whole])
    torch.testing.assert_close(gradient(pieces), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_more_parts_than_items_are_refused(tmp_path):
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    denoiser = Denoiser(pipe)
    with pytest.raises(ConfigurationError, match="7 items of a step cannot be split into 8 parts"):
        loss_of(denoiser, data_of(denoiser), pipe.scheduler, batch_size=7)(0, 0, 8)


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_3", "flux"], indirect=True)
def test_gradient_checkpointing_changes_no_gradient(pipe):
    denoiser = Denoiser(pipe)
    step_loss = loss_of(denoiser, data_of(denoiser), pipe.scheduler)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            denoiser.network.enable_gradient_checkpointing()
        denoiser.train()
        denoiser.zero_grad()
        step_loss(0)["loss"].backward()
        gradients.append([p.grad.clone() for p in denoiser.parameters()])
    for before, after in zip(*gradients, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-8)


def test_min_snr_is_the_weight_of_the_stock_trainer(tmp_path):
    from diffusers import DDIMScheduler
    from diffusers.training_utils import compute_snr

    t = torch.tensor([0, 10, 200, 500, 990])
    for kind, divisor in (("epsilon", 0), ("v_prediction", 1)):
        scheduler = DDIMScheduler(prediction_type=kind)
        schedule = NoiseSchedule(kind, *diffusion.noise_levels(scheduler))
        snr = compute_snr(scheduler, t)
        expected = snr.clamp(max=5) / (snr + divisor)
        torch.testing.assert_close(loss.min_snr(schedule, t, 5.0), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_min_snr_weighs_the_same_error_of_the_sample_alike(kind):
    """Whatever the network predicts: weight times squared error of the answer is min(SNR, gamma) times that of x_0."""
    sigmas = torch.linspace(0.02, 0.98, 9)
    alphas = 1 - sigmas if kind == "flow_prediction" else (1 - sigmas.square()).sqrt()
    schedule, t = NoiseSchedule(kind, alphas, sigmas), torch.arange(9)
    random = torch.Generator().manual_seed(0)
    x_t, answer, wrong = (torch.randn(9, 3, generator=random) for _ in range(3))
    clean = [diffusion.predicted_sample(kind, output, x_t, alphas, sigmas) for output in (answer, wrong)]
    expected = (alphas / sigmas).square().clamp(max=5) * (clean[0] - clean[1]).square().mean(1)
    found = loss.min_snr(schedule, t, 5.0) * (answer - wrong).square().mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_min_snr_is_finite_at_the_ends():
    levels = torch.tensor([1.0, 0.0]), torch.tensor([1e-3, 1.0])
    for kind in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        weights = loss.min_snr(NoiseSchedule(kind, *levels), torch.tensor([0, 1]), 5.0)
        assert weights.isfinite().all() and (weights >= 0).all()


def test_min_snr_is_used(tmp_path):
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    denoiser = Denoiser(pipe)
    data = data_of(denoiser)
    plain, weighed, vast = (
        loss_of(denoiser, data, pipe.scheduler, min_snr=gamma)(0)["loss"] for gamma in (None, 5.0, 1e9)
    )
    assert weighed < plain
    torch.testing.assert_close(vast, plain)  # eps: no weight below gamma


# LoRA


def tuned(pipe, tmp_path, rank=2):
    denoiser = Denoiser(pipe)
    data = data_of(denoiser)
    lora.add(denoiser.network, rank, seed=0)
    step_loss = loss_of(denoiser, data, pipe.scheduler)
    fit(denoiser, step_loss, Schedule(6, 0.05, warmup=0, ema=0.0), work=tmp_path / "work", identity={})
    return denoiser, data


ADAPTED = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"]


@pytest.mark.parametrize("family", ADAPTED, indirect=True)
def test_stock_diffusers_draws_the_same_with_the_adapter(pipe, family, tmp_path):
    before = draw(pipe, family)
    denoiser, _ = tuned(pipe, tmp_path)
    ours = draw(pipe, family)
    lora.save(denoiser._pipe, lora.trained(denoiser._pipe), tmp_path)
    assert np.abs(ours - before).max() > 1e-2
    stock = tiny.pipeline(family, tmp_path)
    assert np.array_equal(draw(stock, family), before)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    np.testing.assert_allclose(draw(stock, family), ours, atol=1e-4)
    lora.fuse(denoiser._pipe, trained=True)
    assert not lora.present(denoiser.network)
    assert not any("lora" in name for name, _ in denoiser.network.named_parameters())
    np.testing.assert_allclose(draw(pipe, family), ours, atol=1e-4)


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_3", "flux"], indirect=True)
def test_with_an_adapter_the_base_is_the_same_network_with_it_off(pipe, tmp_path, monkeypatch):
    original = Denoiser(pipe).frozen()
    monkeypatch.setattr(copy, "deepcopy", lambda value, memo=None: pytest.fail("a copy was made"))
    denoiser = Denoiser(pipe)
    data = data_of(denoiser)
    monkeypatch.undo()
    lora.add(denoiser.network, 2, seed=0)
    trainable = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    monkeypatch.setattr(copy, "deepcopy", lambda value, memo=None: pytest.fail("a copy was made"))
    step_loss = loss_of(denoiser, data, pipe.scheduler)
    fit(denoiser, step_loss, Schedule(4, 0.05, warmup=0, ema=0.0), work=tmp_path / "work", identity={})
    rows = slice(0, 3)
    asked = data.latents[rows], torch.tensor([900, 500, 20]), select(data.conditions, rows)
    with torch.no_grad():
        torch.testing.assert_close(denoiser.frozen()(*asked), original(*asked))
        assert (denoiser(*asked) - original(*asked)).abs().max() > 1e-3
    assert trainable and all("lora_" in name for name in trainable)
    assert trainable == {name for name, p in denoiser.named_parameters() if p.requires_grad}


def test_an_adapter_begins_as_nothing_and_is_a_function_of_its_seed(tmp_path):
    def drawn(seed):
        network = tiny.unet()
        torch.manual_seed(7)
        lora.add(network, 2, seed)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
        return lora.layers(network)

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(not layer.any() for name, layer in first.items() if "lora_B" in name or "lora.up" in name)


def test_a_network_that_stock_diffusers_loads_no_adapter_into_is_refused(tmp_path):
    pipe = tiny.pipeline("pixart_alpha", tmp_path)
    with pytest.raises(UnsupportedError, match=r"PixArtTransformer2DModel takes no adapter.*adapter: null"):
        lora.add(pipe.transformer, 4, seed=0)


WORN = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3"]


def wear(pipe, text=False):
    """Give a pipeline LoRAs that change its images, as `load_lora_weights` does: of its network, of a text encoder."""
    torch.manual_seed(5)
    worn = [pipe.unet if hasattr(pipe, "unet") else pipe.transformer, *([pipe.text_encoder] if text else [])]
    targets = ["to_q", "to_v"], ["q_proj", "v_proj"]
    for module, names in zip(worn, targets, strict=False):
        module.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=names), adapter_name="style")
        for name, weight in module.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0, 0.5)
    return pipe


@pytest.mark.parametrize("family", WORN, indirect=True)
def test_training_starts_from_what_a_pipeline_with_a_lora_draws(pipe, family, tmp_path):
    plain = draw(pipe, family)
    before = draw(wear(pipe, text=True), family)
    denoiser = Denoiser(pipe)
    assert np.abs(before - plain).max() > 1e-2
    np.testing.assert_allclose(draw(pipe, family), before, atol=1e-4)
    assert all(p.requires_grad for p in denoiser.parameters())
    data = data_of(denoiser)
    asked = data.latents[:2], torch.tensor([900, 20]), select(data.conditions, slice(0, 2))
    with torch.no_grad():
        start = denoiser(*asked)
        torch.testing.assert_close(denoiser.frozen()(*asked), start)
        lora.add(denoiser.network, 2, seed=0)
        torch.testing.assert_close(denoiser(*asked), start)
        torch.testing.assert_close(denoiser.frozen()(*asked), start)
    lora.fuse(denoiser._pipe, trained=True)
    denoiser._pipe.save_pretrained(tmp_path / "saved")
    loaded = type(pipe).from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(loaded, family), before, atol=1e-4)


@pytest.mark.parametrize("state", ["half", "off", "fused", "fused, then off"])
def test_a_lora_is_fused_as_it_is_set(state, tmp_path):
    pipe = wear(tiny.pipeline("stable_diffusion", tmp_path))
    if state == "half":
        pipe.set_adapters(["style"], [0.5])
    if "fused" in state:
        pipe.fuse_lora(components=["unet"])
    if "off" in state:
        pipe.disable_lora()
    before = draw(pipe, "stable_diffusion")
    Denoiser(pipe)
    np.testing.assert_allclose(draw(pipe, "stable_diffusion"), before, atol=1e-4)
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())


def test_an_adapter_to_train_is_not_fused(tmp_path):
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    lora.add(pipe.unet, 2, seed=0)
    assert all("lora_" in name for name, p in Denoiser(pipe).named_parameters() if p.requires_grad)
    assert lora.present(pipe.unet)


def test_a_second_adapter_is_refused(tmp_path):
    denoiser = Denoiser(tiny.pipeline("stable_diffusion", tmp_path))
    wear(denoiser._pipe)
    with pytest.raises(ConfigurationError, match="UNet2DConditionModel has the adapter style already"):
        lora.add(denoiser.network, 2, seed=0)


# A base frozen in less than float32


@pytest.mark.parametrize("family", ADAPTED, indirect=True)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_an_adapter_learns_in_a_base_of_less_precision(pipe, precision, tmp_path):
    pipe.to(torch.bfloat16)
    if precision == "fp8":
        store(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
    before = {name: values.clone() for name, values in Denoiser(pipe, frozen=True).network.named_parameters()}
    denoiser = Denoiser(pipe, precision, frozen=True)
    data = data_of(denoiser)
    lora.add(denoiser.network, 2, seed=0)
    step_loss = loss_of(denoiser, data, pipe.scheduler, branch_start="sampled")
    assert step_loss(0)["consistency"] < 0.05 * step_loss(0)["diffusion"]
    fit(denoiser, step_loss, Schedule(3, 0.05, warmup=0, ema=0.0), work=tmp_path / "work", identity={})
    for name, values in denoiser.network.named_parameters():
        if "lora_" in name:
            assert values.dtype == torch.float32 and values.isfinite().all()
        else:  # the frozen weights are what they were
            was = before[name.replace(".base_layer", "")]
            assert values.dtype == was.dtype and torch.equal(values.float(), was.float())
    assert any(values.any() for name, values in denoiser.network.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("family", ["stable_diffusion"], indirect=True)
def test_an_earlier_adapter_goes_on_in_8_bits(pipe, tmp_path):
    lora.add(pipe.unet, 2, seed=0)
    parts = lora.trained(pipe)
    lora.save(pipe, parts, tmp_path / "saved")
    other = tiny.pipeline("stable_diffusion", tmp_path).to(torch.bfloat16)
    lora.resume(other, tmp_path / "saved" / adapters.FILE, 2)
    store(other.unet)
    # diffusers loads it in the precision of the network.
    torch.testing.assert_close(lora.trained(other), parts, rtol=2**-8, atol=0)
    assert {values.dtype for name, values in other.unet.named_parameters() if "lora_" in name} == {torch.float32}


def test_a_frozen_base_rests_where_it_was_loaded(tmp_path):
    """Images are encoded in float32 all the same, and what was moved or cast is put back."""
    pipe = tiny.pipeline("stable_diffusion", tmp_path).to(torch.bfloat16)
    denoiser = Denoiser(pipe, "bf16", frozen=True)
    exact = copy.deepcopy(pipe.vae).float()
    found = denoiser.encode_images(images(2))
    x = images(2).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = exact.encode(x).latent_dist.mode() * exact.config.scaling_factor
    torch.testing.assert_close(found, expected)
    assert pipe.vae.dtype == pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16
