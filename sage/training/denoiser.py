"""The network of any supported pipeline as a trainable function of x_t, time and condition.

Network calls, text encoding and latent scaling come from `sage.sampling.families`, so training matches sampling.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, cast

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn

from sage.errors import UnsupportedError
from sage.precision import autocast
from sage.sampling.conditions import Condition
from sage.sampling.pipeline import FAMILIES, SharedSamplingPipeline
from sage.sampling.segments import SegmentedPipeline
from sage.training import lora
from sage.training.latents import encode
from sage.training.loss import Network

Precision = Literal["bf16", "fp32"]
# Configuration keys for the width of the text states that the network reads. cross_attention_dim comes last: in
# transformers with one of the other keys it is the network's own width.
_WIDTHS = ("joint_attention_dim", "caption_channels", "cross_attention_dim")


class Denoiser(nn.Module):
    """A pipeline's U-Net or transformer as a module to train.

    `network` is the pipeline's own module, so the pipeline samples with the trained weights. With `precision` "bf16"
    the forward pass runs under autocast where the device has bfloat16 arithmetic (`sage.precision`); the pipeline
    becomes float32 either way. Autocast is set here, not by accelerate, so that it also applies to the frozen base.
    LoRAs that the pipeline came with are fused into its weights (`lora.fuse`). Raises UnsupportedError for an
    unsupported pipeline class and for a quantised network.
    """

    def __init__(self, pipeline: Any, precision: Precision = "fp32") -> None:
        """Take a stock or a shared-sampling pipeline."""
        super().__init__()
        self._pipe: Any = SharedSamplingPipeline.from_pipe(pipeline)
        if isinstance(self._pipe, SegmentedPipeline):
            raise UnsupportedError(
                f"{self._pipe.family.stock} can be sampled, but not fine-tuned; fine-tune one of {', '.join(FAMILIES)}"
            )
        if getattr(self._pipe._network, "is_quantized", False):
            raise UnsupportedError(
                f"{type(self._pipe._network).__name__} is quantised, and training needs float weights; load it without "
                "quantization_config"
            )
        self._precision = precision
        lora.fuse(self._pipe)
        # All parts, because a pipeline with a float32 network cannot sample with the text states of a half encoder.
        cast(Any, self._pipe).to(dtype=torch.float32)
        self.network: Any = self._pipe._network
        cast_training_params(self.network)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the network's output as float32 on the network's device; inputs may be on the CPU."""
        device = next(self.network.parameters()).device
        x_t = x_t.to(device)
        condition = {name: values.to(device) for name, values in condition.items()}
        with autocast(device, self._precision == "bf16"):
            output = self._pipe._predict(x_t, t.to(device), condition, 1.0, self._options(x_t.shape[-2:]))
        return output.float()  # type: ignore[no-any-return]

    def frozen(self) -> Network:
        """Return the frozen base: a copy of the network as it is now, or with an adapter, the network without it."""
        if lora.present(self.network):

            def base(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
                with lora.off(self.network):
                    return self(x_t, t, condition)  # type: ignore[no-any-return]

            return base
        twin = Denoiser(self._pipe, self._precision)
        twin.network = copy.deepcopy(self.network).requires_grad_(False).eval()
        setattr(twin._pipe, "unet" if hasattr(twin._pipe, "unet") else "transformer", twin.network)
        return twin

    def check_width(self, condition: Condition) -> None:
        """Raise UnsupportedError for text states of another width than the network reads."""
        config, found = self._pipe._network.config, condition["states"].shape[-1]
        expected = next((config[name] for name in _WIDTHS if config.get(name) is not None), found)
        if expected != found:
            raise UnsupportedError(
                f"the base reads text states {expected} wide, but its text encoder gives {found}; use matching parts."
            )

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], size: Sequence[int], batch_size: int = 64) -> dict[str, Tensor]:
        """Return the conditions of prompts, (n, ...) on the CPU, for images of this size (height, width) in pixels.

        The empty prompt has the condition that guidance takes without a negative prompt, which for SDXL may be zeros.
        """
        parts = []
        for start in range(0, len(texts), batch_size):
            some = list(texts[start : start + batch_size])
            rows = self._pipe._encode(some, None, False, {}, self._pipe._options | {"size": tuple(size)})
            parts.append({name: values[:, 0].cpu() for name, values in rows.items()})
        conditions = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self._pipe.config.get("force_zeros_for_empty_prompt"):
            empty = torch.tensor([not text for text in texts])
            for name in ("states", "pooled"):
                conditions[name][empty] = 0
        return conditions

    @torch.no_grad()
    def encode_images(self, images: Tensor, batch_size: int = 16) -> Tensor:
        """Return the scaled latents of uint8 images (n, height, width, 3): float32, on the CPU."""
        vae = self._pipe.vae
        parts = []
        for part in torch.split(images, batch_size):
            x = part.to(vae.device).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1
            parts.append(encode(vae, x).float().cpu())
        return _scaled(torch.cat(parts), vae.config)

    def _options(self, latent_size: Sequence[int]) -> dict[str, Any]:
        size = tuple(side * self._pipe.vae_scale_factor for side in latent_size)
        return {**self._pipe._options, "size": size}


def _scaled(latents: Tensor, config: Any) -> Tensor:
    """Return autoencoder latents shifted and scaled for the network, the inverse of the families' `_decode`."""
    if (mean := config.get("latents_mean")) is not None and (deviation := config.get("latents_std")) is not None:
        mean, deviation = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, deviation))
        return (latents - mean) / deviation * config.scaling_factor  # type: ignore[no-any-return]
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor  # type: ignore[no-any-return]
