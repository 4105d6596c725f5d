"""The latents of images, for any autoencoder of diffusers."""

from typing import Any

from torch import Tensor


def encode(autoencoder: Any, pixels: Tensor) -> Tensor:
    """Return the unscaled latents of images in [-1, 1] of shape (n, 3, height, width), without drawing at random."""
    encoded = autoencoder.encode(pixels)
    # A tiny autoencoder gives the latents themselves, the others a distribution.
    latents: Tensor = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()
    return latents
