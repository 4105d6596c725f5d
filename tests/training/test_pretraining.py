import sage.torchvision_ops  # noqa: F401

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from sage import diffusion
from sage.data.dataset import captions_of
from sage.precision import autocast
from sage.sampling import base
from sage.training import pretraining

OWN = torch.arange(512)[:, None]  # one caption a picture


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (6, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), latent_channels=2, layers_per_block=1, norm_num_groups=4)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=6,
        attention_head_dim=2,
    )


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order():
    epochs = [torch.cat([pretraining.batch(12, 4, 7, 3 * epoch + step) for step in range(3)]) for epoch in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(12)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_batch_larger_than_the_set_is_the_set():
    assert sorted(pretraining.batch(3, 64, 0, 5).tolist()) == [0, 1, 2]


def test_autoencoder_loss_depends_on_seed_and_step_alone(autoencoder, images):
    loss = pretraining.autoencoder_loss(autoencoder, images, batch_size=4, kl_weight=0.1, seed=3)
    first, other = loss(5)["loss"], loss(6)["loss"]
    torch.rand(10)
    assert torch.equal(loss(5)["loss"], first)
    assert not torch.equal(first, other)


def test_pixels_span_minus_one_to_one():
    ends = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 1, 1, 3)
    assert pretraining.to_pixels(ends)[:, 0, 0, 0].tolist() == [-1, 1]


def test_reconstruction_is_that_of_the_definition(autoencoder, images):
    x = pretraining.to_pixels(images)
    with torch.no_grad():
        restored = autoencoder.decode(autoencoder.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    errors = [((a - b) / 2).square().mean() for a, b in zip(restored, x, strict=True)]
    expected = sum(float(-10 * error.log10()) for error in errors) / len(errors)
    assert pretraining.reconstruction(autoencoder, images) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(pretraining.restored(autoencoder, images, batch_size=4), restored)


def test_normalised_latents_have_unit_deviation_and_the_same_reconstruction(autoencoder, images):
    def decoded_and_variance():
        posterior = autoencoder.encode(pretraining.to_pixels(images)).latent_dist
        return autoencoder.decode(posterior.mode()).sample, posterior.std

    with torch.no_grad():
        before, deviation = decoded_and_variance()
        scale = pretraining.encode_images(autoencoder, images).std(dim=(0, 2, 3))
        pretraining.normalise_latents(autoencoder, images)
        after, normalised = decoded_and_variance()
    latents = pretraining.encode_images(autoencoder, images)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(2))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(normalised * scale[:, None, None], deviation)


def test_denoiser_loss_is_the_squared_error_of_v(unet):
    """A network that answers 0 has the mean square of its target as loss, which is 1 for unit latents on average."""
    unet.conv_out.weight.data.zero_()
    unet.conv_out.bias.data.zero_()
    latents = torch.randn(512, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    states = torch.zeros(513, 3, 6)
    loss = pretraining.denoiser_loss(
        unet, base.new_scheduler(), latents, states, OWN[:512], batch_size=512, drop_text=0.1, seed=0
    )
    assert loss(0)["loss"].item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("drop_text", "same"), [(1.0, True), (0.0, False)])
def test_dropped_text_is_the_empty_prompt(unet, drop_text, same):
    torch.nn.init.normal_(unet.conv_out.weight, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    empty = torch.ones(1, 3, 6)
    settings = {"batch_size": 4, "drop_text": drop_text, "seed": 0}
    losses = [
        pretraining.denoiser_loss(unet, base.new_scheduler(), latents, torch.cat([states, empty]), OWN[:4], **settings)(
            0
        )["loss"]
        for states in (torch.zeros(4, 3, 6), torch.full((4, 3, 6), 5.0))
    ]
    assert torch.equal(*losses) == same


def test_every_caption_of_a_picture_is_drawn_and_no_other_pictures(unet, monkeypatch):
    texts, captions = captions_of([["a", "b", "c"], ["d"], ["b", "e"]])
    assert texts == ["a", "b", "c", "d", "e"]
    assert captions.tolist() == [[0, 1, 2], [3, 3, 3], [1, 4, 1]]
    states = torch.arange(6.0)[:, None, None].expand(6, 3, 6)
    latents = torch.arange(3.0)[:, None, None, None].expand(3, 2, 8, 8)
    seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    forward = unet.forward

    def watched(x_t, t, condition):
        order = pretraining.batch(3, 3, 0, step).tolist()
        for row, number in zip(order, condition[:, 0, 0].tolist(), strict=True):
            seen[row].add(int(number))
        return forward(x_t, t, condition)

    monkeypatch.setattr(unet, "forward", watched)
    loss = pretraining.denoiser_loss(
        unet, base.new_scheduler(), latents, states, torch.from_numpy(captions), batch_size=3, drop_text=0.2, seed=0
    )
    for step in range(40):
        loss(step)
    assert seen == {0: {0, 1, 2, 5}, 1: {3, 5}, 2: {1, 4, 5}}


def test_the_base_schedule_reaches_zero_signal():
    alphas, sigmas = diffusion.noise_levels(base.new_scheduler())
    assert alphas[-1] < 3e-4
    assert sigmas[-1] > 1 - 1e-6


def test_texts_get_the_states_of_the_stock_pipeline():
    pipeline = base.assemble(base.new_autoencoder(), base.new_unet())
    expected, _ = pipeline.encode_prompt(["red heart"], "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(pretraining.encode_texts(["red heart"]).float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, when it compiles
def test_compiled_blocks_have_the_gradients_of_the_plain_network():
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(16, 32),  # two sizes: between them, upsampling
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=6,
        attention_head_dim=2,
    )
    weights = torch.linspace(-1, 1, 4 * 2 * 64).view(4, 2, 8, 8)
    x, condition = torch.randn(4, 2, 8, 8), torch.randn(4, 3, 6)

    def gradients():
        network.zero_grad()
        with autocast():
            output = network(x, torch.arange(4) * 200, condition).sample.float()
        (output * weights).sum().backward()
        return {name: p.grad.clone() for name, p in network.named_parameters()}

    plain = gradients()
    pretraining.compile_blocks(network)
    size = max(float(gradient.norm()) for gradient in plain.values())
    for name, gradient in gradients().items():
        assert float((gradient - plain[name]).norm()) < 0.02 * size, name
