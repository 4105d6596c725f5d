"""The network of any supported pipeline as a trainable function of x_t, time and condition.

Network calls, text encoding and latent scaling come from `sage.sampling.families`, so training matches sampling.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn

from sage import diffusion
from sage.errors import UnsupportedError
from sage.precision import autocast
from sage.sampling.conditions import Condition
from sage.sampling.pipeline import SharedSamplingPipeline, is_trainable, trainable
from sage.sampling.weights import Precision
from sage.training import lora
from sage.training.latents import encode
from sage.training.loss import Network

# Configuration keys for the width of the text states that the network reads. cross_attention_dim comes last: in
# transformers with one of the other keys it is the network's own width.
_WIDTHS = ("joint_attention_dim", "caption_channels", "cross_attention_dim")


class Denoiser(nn.Module):
    """A pipeline's U-Net or transformer as a module to train.

    `network` is the pipeline's own module, so the pipeline samples with the trained weights. LoRAs that the pipeline
    came with are fused into its weights (`lora.fuse`).

    precision       with "bf16" and "fp8" the forward pass runs under autocast, unless the device has no bfloat16
                    arithmetic and all weights are float32 (`sage.precision`). Autocast is set here, not by accelerate,
                    so that it also applies to the frozen base
    frozen          only an adapter is trained: the pipeline's weights stay in the precision that they have, and what is
                    not the network is on the device only while it is needed. Otherwise the pipeline becomes float32
    guidance_scale  for a network that takes it as an input, such as FLUX.1-dev; None: the stock call's default
    device          where to compute; None: where the network is

    Raises UnsupportedError for a pipeline class that cannot be fine-tuned and for a quantised network.
    """

    def __init__(
        self,
        pipeline: Any,
        precision: Precision = "fp32",
        *,
        frozen: bool = False,
        guidance_scale: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Take a stock or a shared-sampling pipeline."""
        super().__init__()
        self._pipe: Any = SharedSamplingPipeline.from_pipe(pipeline)
        if not is_trainable(type(self._pipe)):
            raise UnsupportedError(
                f"{cast(Any, self._pipe).family.stock} can be sampled, but not fine-tuned; fine-tune one of "
                f"{', '.join(trainable())}"
            )
        if getattr(self._pipe._network, "is_quantized", False):
            raise UnsupportedError(
                f"{type(self._pipe._network).__name__} is quantised, and training needs float weights; load it without "
                "quantization_config; for less memory train an adapter with precision bf16 or fp8"
            )
        self._precision, self._frozen = precision, frozen
        self.guidance_scale = self._pipe._default_guidance if guidance_scale is None else guidance_scale
        self._calls: dict[tuple[int, ...], Any] = {}
        lora.fuse(self._pipe)
        self.network: Any = self._pipe._network
        self.texts = nn.ModuleDict()
        self._given_device = device
        if not frozen:
            # All parts, because a pipeline with a float32 network cannot sample with the text states of a half encoder.
            cast(Any, self._pipe).to(dtype=torch.float32)
            cast_training_params(self.network)

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        if self._given_device is not None:
            return torch.device(self._given_device)
        return next(self.network.parameters()).device  # type: ignore[no-any-return]

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the network, so that no step is evaluated without text."""
        return bool(self._pipe.embeds_guidance)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the network's output as float32 on the network's device; inputs may be on the CPU."""
        device = next(self.network.parameters()).device
        height, width = x_t.shape[-2:]
        condition = {name: values.to(device) for name, values in condition.items()}
        options = self._options((height, width))
        if options["size"] not in self._calls:
            self._calls[options["size"]] = self._call(2, options["size"], condition)
        call, scale = self._calls[options["size"]], self.guidance_scale if self.embeds_guidance else 0.0
        with self._autocast(device):
            output = call._predict(call.packed(x_t.to(device)), t.to(device), condition, scale, options)
        return call.unpacked(output, height, width).float()  # type: ignore[no-any-return]

    def times(self, scheduler: Any, steps: int, latents: Tensor, condition: Condition) -> Tensor:
        """Return the training timesteps at which a sampler evaluates the network, as `sage.diffusion.visited` does.

        scheduler  the sampler's
        steps      number of sampler steps
        latents    latents, (n, channels, height, width): the times may depend on their size
        condition  conditions, (n, ...)
        """
        call = self._call(steps, self._options(latents.shape[-2:])["size"], condition, scheduler)
        return diffusion.visited(call.scheduler)

    def frozen(self) -> Network:
        """Return the frozen base: a copy of the network as it is now, or with an adapter, the network without it.

        It reads the conditions that it is given; adapters of text encoders are not its concern.
        """
        if lora.present(self.network):

            def base(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
                with lora.off(self.network):
                    return self(x_t, t, condition)  # type: ignore[no-any-return]

            return base
        twin = Denoiser(self._pipe, self._precision, guidance_scale=self.guidance_scale)
        twin.network = copy.deepcopy(self.network).requires_grad_(False).eval()
        setattr(twin._pipe, "unet" if hasattr(twin._pipe, "unet") else "transformer", twin.network)
        return twin

    def check_width(self, condition: Condition) -> None:
        """Raise UnsupportedError for text states of another width than the network reads."""
        states = condition["prompt_embeds"]
        config, found = self._pipe._network.config, states.shape[-1]
        expected = next((config[name] for name in _WIDTHS if config.get(name) is not None), found)
        if expected != found:
            raise UnsupportedError(
                f"the base reads text states {expected} wide, but its text encoder gives {found}; use matching parts."
            )

    @torch.no_grad()
    def encode_texts(
        self,
        texts: Sequence[str],
        size: Sequence[int],
        batch_size: int = 64,
        advance: Callable[[int], None] = lambda n: None,
    ) -> dict[str, Tensor]:
        """Return the conditions of prompts, (n, ...) on the CPU, for images of this size (height, width) in pixels.

        The empty prompt has the condition that guidance takes without a negative prompt, which for SDXL may be zeros.
        `advance(n)` is called after every n of them.
        """
        parts = []
        with self._present(self._encoders):
            for start in range(0, len(texts), batch_size):
                some = list(texts[start : start + batch_size])
                parts.append({name: values.cpu() for name, values in self._encoded(some, size).items()})
                advance(len(some))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def train_texts(self, encoders: Mapping[str, nn.Module]) -> None:
        """Train the adapters of these text encoders, too; then all text encoders stay on the device."""
        self.texts = nn.ModuleDict(dict(encoders))
        for encoder in self._encoders if encoders else ():
            encoder.to(self.device)

    def current_texts(self, texts: Sequence[str], size: Sequence[int]) -> dict[str, Tensor]:
        """Return the conditions of prompts by the text encoders as they are now, with gradients, on the device."""
        with self._autocast(self.device):
            return self._encoded(list(texts), size)

    def _encoded(self, texts: list[str], size: Sequence[int]) -> dict[str, Tensor]:
        pipe = copy.copy(self._pipe)
        vars(pipe)["_device"] = self.device
        call = pipe.for_reading(size)
        rows = call._encode(texts, None, False, {}, {**self._pipe._options, "size": tuple(size)})
        conditions = {name: values[:, 0] for name, values in rows.items()}
        if self._pipe.config.get("force_zeros_for_empty_prompt"):
            empty = torch.tensor([not text for text in texts])
            for name in ("prompt_embeds", "pooled_prompt_embeds"):
                shape = (-1, *[1] * (conditions[name].ndim - 1))
                conditions[name] = conditions[name].masked_fill(empty.to(conditions[name].device).view(shape), 0)
        return conditions

    @torch.no_grad()
    def encode_images(self, images: Tensor, batch_size: int = 16) -> Tensor:
        """Return the scaled latents of uint8 images (n, height, width, 3): float32, on the CPU."""
        vae, parts = self._pipe.vae, []
        with self._present([vae]), _in_float32(vae):
            for part in torch.split(images, batch_size):
                x = part.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
                parts.append(encode(vae, x).cpu())
        return _scaled(torch.cat(parts), vae.config)

    @contextmanager
    def drawing(self, pipeline: Any) -> Iterator[None]:
        """Let a pipeline of these parts sample within the context, though some of them may rest on the CPU."""
        if not self._frozen or self.device.type == "cpu":
            yield
            return
        pipeline.enable_model_cpu_offload(device=self.device)
        try:
            yield
        finally:
            pipeline.remove_all_hooks()
            self.to(self.device)

    @property
    def _encoders(self) -> list[nn.Module]:
        parts = (getattr(self._pipe, name, None) for name in lora.ENCODERS)
        return [part for part in parts if part is not None]

    @contextmanager
    def _present(self, parts: Sequence[Any]) -> Iterator[None]:
        """Hold parts of the pipeline on the device within the context; those that are trained stay there."""
        moved = [(part, part.device) for part in parts if part.device != self.device]
        for part, _ in moved:
            part.to(self.device)
        yield
        for part, home in moved:
            part.to(home)

    def _autocast(self, device: torch.device) -> torch.autocast:
        if self._frozen and self._precision != "fp32":  # its weights are bfloat16, whatever is faster
            return torch.autocast(device.type, torch.bfloat16)
        return autocast(device, self._precision != "fp32")

    @torch.no_grad()
    def _call(self, steps: int, size: tuple[int, ...], condition: Condition, scheduler: Any = None) -> Any:
        """Return the pipeline's copy for training at this size in pixels, with its own scheduler or another one."""
        pipe = copy.copy(self._pipe)
        # Not set as attributes, which would look the classes up for the saved configuration.
        vars(pipe).update(_device=self.device, **({} if scheduler is None else {"scheduler": scheduler}))
        return pipe.for_training(steps, size, condition, self.guidance_scale)

    def _options(self, latent_size: Sequence[int]) -> dict[str, Any]:
        size = tuple(side * self._pipe.vae_scale_factor for side in latent_size)
        return {**self._pipe._options, "size": size}


@contextmanager
def _in_float32(module: Any) -> Iterator[None]:
    """Hold a module in float32 within the context: what it holds in less is that exactly."""
    kept = module.dtype
    if kept != torch.float32:
        module.to(torch.float32)
    try:
        yield
    finally:
        if kept != torch.float32:
            module.to(kept)


def _scaled(latents: Tensor, config: Any) -> Tensor:
    """Return autoencoder latents shifted and scaled for the network; pipelines do the inverse before they decode."""
    if (mean := config.get("latents_mean")) is not None and (deviation := config.get("latents_std")) is not None:
        mean, deviation = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, deviation))
        return (latents - mean) / deviation * config.scaling_factor  # type: ignore[no-any-return]
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor  # type: ignore[no-any-return]
