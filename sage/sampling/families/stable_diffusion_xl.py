"""Stable Diffusion XL: two text encoders, and a U-Net that also reads a pooled text state and the image size."""

from typing import Any, ClassVar

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from sage.errors import ConfigurationError
from sage.sampling import pipeline
from sage.sampling.conditions import Condition, stacked
from sage.sampling.families.image_prompts import ImagePrompted, network_inputs


class SharedStableDiffusionXLPipeline(ImagePrompted, StableDiffusionXLPipeline):  # type: ignore[misc]
    """A Stable Diffusion XL pipeline whose similar prompts share their early steps."""

    _default_guidance: ClassVar = 5.0
    _options: ClassVar = {
        "eta": 0.0,
        "guidance_rescale": 0.0,
        "clip_skip": None,
        "cross_attention_kwargs": None,
        "original_size": None,
        "crops_coords_top_left": (0, 0),
        "target_size": None,
        "negative_original_size": None,
        "negative_crops_coords_top_left": (0, 0),
        "negative_target_size": None,
        "timesteps": None,
        "sigmas": None,
    }
    _callback_conditions: ClassVar = {
        "prompt_embeds": "states",
        "add_text_embeds": "pooled",
        "add_time_ids": "sizes",
    }
    _embeddings: ClassVar = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "prompt_2",
        "negative_prompt_2",
        *pipeline.IMAGE_PROMPTS,
    )

    def _encode(
        self,
        prompts: list[str] | None,
        negatives: list[str] | None,
        guided: bool,
        given: dict[str, Any],
        options: dict[str, Any],
    ) -> Condition:
        without_image, with_image = self._image_conditions(given, guided)
        with_text, without, pooled, pooled_without = self.encode_prompt(
            prompts,
            device=self._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negatives,
            lora_scale=(options["cross_attention_kwargs"] or {}).get("scale"),
            clip_skip=options["clip_skip"],
            **{name: rows for name, rows in given.items() if name not in pipeline.IMAGE_PROMPTS},
        )
        sizes = self._sizes(pooled, "", options).to(with_text)
        # As in diffusers, both sizes have to be given.
        given = options["negative_original_size"] and options["negative_target_size"]
        without_sizes = self._sizes(pooled, "negative_", options).to(with_text) if given else sizes
        return stacked(
            {"states": without, "pooled": pooled_without, "sizes": without_sizes, **without_image} if guided else None,
            {"states": with_text, "pooled": pooled, "sizes": sizes, **with_image},
        )

    def _sizes(self, pooled: Tensor, prefix: str, options: dict[str, Any]) -> Tensor:
        """Return the size ids (n, 6) of the options with this prefix, for n pooled states."""
        values = []
        for name in ("original_size", "crops_coords_top_left", "target_size"):
            pair = options[prefix + name] or options["size"]
            if len(pair) != 2:
                raise ConfigurationError(f"{prefix}{name} is {pair}; give two numbers, (height, width)")
            values.append(tuple(pair))
        ids: Tensor = self._get_add_time_ids(*values, dtype=pooled.dtype, text_encoder_projection_dim=pooled.shape[-1])
        return ids.expand(len(pooled), -1)

    def _predict(self, x: Tensor, t: Tensor, condition: Condition, scale: float, options: dict[str, Any]) -> Tensor:
        output = self._evaluate(
            torch.cat([x] * (len(condition["states"]) // len(x))),
            t,
            encoder_hidden_states=condition["states"],
            cross_attention_kwargs=options["cross_attention_kwargs"],
            added_cond_kwargs={
                "text_embeds": condition["pooled"],
                "time_ids": condition["sizes"],
                **network_inputs(condition),
            },
        )
        return pipeline.guided(output, len(x), scale, options["guidance_rescale"])

    def _decode(self, latents: Tensor, output_type: str, options: dict[str, Any]) -> tuple[Any, None]:
        # The autoencoder of SDXL overflows in half precision.
        upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if upcast:
            self.vae.to(dtype=torch.float32)
        latents = latents.to(self.vae.dtype)
        mean, deviation = self.vae.config.get("latents_mean"), self.vae.config.get("latents_std")
        if mean is not None and deviation is not None:
            mean, deviation = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, deviation))
            latents = latents * deviation / self.vae.config.scaling_factor + mean
        else:
            latents = latents / self.vae.config.scaling_factor
        images = self._decoded(latents)
        if upcast:
            self.vae.to(dtype=torch.float16)
        if self.watermark is not None:
            images = self.watermark.apply_watermark(images)
        return self.image_processor.postprocess(images, output_type=output_type), None
