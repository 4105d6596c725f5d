"""Training the base model from scratch: first the autoencoder on images, then the U-Net on their latents."""

from collections.abc import Callable, Sequence
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from sage import diffusion
from sage.precision import autocast
from sage.randomness import generator, stratified_uniform
from sage.sampling.base import text_parts
from sage.training.latents import encode
from sage.training.loop import Losses


def batch(n: int, size: int, seed: int, step: int) -> Tensor:
    """Return the row numbers of a step's batch; each epoch is a seeded permutation without its incomplete batch."""
    size = min(size, n)
    per_epoch = n // size
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(n, generator=generator(seed, "order", epoch))
    return order[place * size : (place + 1) * size]


def to_pixels(images: Tensor) -> Tensor:
    """Return uint8 images of shape (n, height, width, 3) as floats in [-1, 1] of shape (n, 3, height, width)."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def autoencoder_loss(
    network: AutoencoderKL, images: Tensor, *, batch_size: int, kl_weight: float, seed: int
) -> Callable[[int], Losses]:
    """Return the loss of step k: reconstruction error plus weighted KL (Rombach et al., 2022, without the adversary).

    The error is the absolute plus the squared error, of pixels, and the absolute error of neighbouring differences.
    `images` are uint8 of shape (n, height, width, 3); each is mirrored with probability 1/2.
    """

    def loss(step: int) -> Losses:
        random = generator(seed, step)
        x = to_pixels(images[batch(len(images), batch_size, seed, step)])
        mirrored = torch.rand(len(x), generator=random) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        with autocast():
            posterior = network.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=random)
            decoded = network.decode(z).sample.float()
        error = (decoded - x).abs().mean() + (decoded - x).square().mean()
        # In flat images the eye sees edges above all, so the differences of neighbouring pixels count, too.
        edges = sum((decoded.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (-1, -2))
        kl = posterior.kl().float().mean()
        return {"loss": error + edges + kl_weight * kl, "error": error, "edges": edges, "kl": kl}

    return loss


@torch.no_grad()
def encode_images(
    autoencoder: Any, images: Tensor, on_batch: Callable[[int], None] = lambda n: None, batch_size: int = 64
) -> Tensor:
    """Return the unscaled latents of uint8 images as float32 of shape (n, channels, height, width).

    `on_batch(k)` is called after each batch of k images.
    """
    latents = []
    for part in torch.split(images, batch_size):
        latents.append(encode(autoencoder, to_pixels(part)))
        on_batch(len(part))
    return torch.cat(latents)


@torch.no_grad()
def normalise_latents(autoencoder: AutoencoderKL, images: Tensor) -> None:
    """Give the latents of uint8 images mean 0 and standard deviation 1 in every channel, in place.

    The shift and scale go into the 1x1 convolutions on either side of the latents, so reconstructions do not change,
    and stock pipelines need only `scaling_factor`, which becomes 1.
    """
    latents = encode_images(autoencoder, images)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    into, out = autoencoder.quant_conv, autoencoder.post_quant_conv
    # quant_conv outputs means, then log variances.
    into.weight[: len(std)] /= std[:, None, None, None]
    into.bias[: len(std)].sub_(mean).div_(std)
    into.bias[len(std) :] -= 2 * std.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]
    autoencoder.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode_texts(
    texts: Sequence[str], on_batch: Callable[[int], None] = lambda n: None, batch_size: int = 64
) -> Tensor:
    """Return the text states of prompts as in the base pipeline, float16 to save memory, of shape (n, tokens, width).

    `on_batch(k)` is called after each batch of k texts.
    """
    tokenizer, encoder = text_parts()
    states = []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(
            list(texts[start : start + batch_size]), padding="max_length", truncation=True, return_tensors="pt"
        )
        states.append(encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state.half())
        on_batch(len(tokens.input_ids))
    return torch.cat(states)


def compile_blocks(network: nn.Module) -> None:
    """Compile the residual and the transformer blocks of a network of diffusers in place; needs a C++ compiler.

    Not the whole network: torch 2.13 compiles the gradient of upsampling in bfloat16 wrongly on the CPU.
    """
    for block in network.modules():
        if isinstance(block, (ResnetBlock2D, BasicTransformerBlock)):
            block.compile()


def denoiser_loss(
    network: UNet2DConditionModel,
    scheduler: Any,
    latents: Tensor,
    states: Tensor,
    captions: Tensor,
    *,
    batch_size: int,
    drop_text: float,
    seed: int,
) -> Callable[[int], Losses]:
    """Return the loss of step k: the squared error of the target (v for the base) at uniformly drawn timesteps.

    Source: v-prediction, Salimans & Ho (2022).

    network     the U-Net
    scheduler   a diffusers scheduler, for the noise levels and the prediction type
    latents     scaled latents (n, ...)
    states      text states of all captions and, last, of the empty prompt (m + 1, tokens, width)
    captions    row numbers in `states` of each image's k captions, (n, k); each step draws one of them
    batch_size  images per step
    drop_text   fraction of the captions that the empty prompt replaces, for classifier-free guidance
    seed        seed of all draws
    """
    alphas, sigmas = diffusion.noise_levels(scheduler)
    kind = scheduler.config.prediction_type

    def loss(step: int) -> Losses:
        random = generator(seed, step)
        rows = batch(len(latents), batch_size, seed, step)
        x_0 = latents[rows]
        dropped = torch.rand(len(rows), generator=random) < drop_text
        drawn = captions[rows, torch.randint(captions.shape[1], rows.shape, generator=random)]
        condition = states[torch.where(dropped, len(states) - 1, drawn)].float()
        t = (stratified_uniform(len(rows), random) * len(alphas)).long()
        eps = torch.randn(x_0.shape, generator=random)
        x_t = diffusion.add_noise(x_0, eps, alphas[t], sigmas[t])
        with autocast():
            output = network(x_t, t, condition).sample.float()
        return {"loss": F.mse_loss(output, diffusion.target(kind, x_0, eps, alphas[t], sigmas[t]))}

    return loss


@torch.no_grad()
def restored(autoencoder: Any, images: Tensor, batch_size: int = 64) -> Tensor:
    """Return uint8 images after encoding and decoding, as floats in [-1, 1] of shape (n, 3, height, width)."""
    parts = (to_pixels(part) for part in torch.split(images, batch_size))
    return torch.cat([autoencoder.decode(encode(autoencoder, x)).sample.clamp(-1, 1) for x in parts])


def reconstruction(autoencoder: Any, images: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio (PSNR) in dB of uint8 images after encoding and decoding."""
    error = (restored(autoencoder, images) - to_pixels(images)) / 2
    return float(-10 * error.square().mean(dim=(1, 2, 3)).log10().mean())
