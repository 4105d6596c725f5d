"""Stable Diffusion 1.x and 2.x, and this project's base model: one text encoder, a U-Net and a VAE."""

from typing import Any, ClassVar

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from sage.sampling import pipeline
from sage.sampling.conditions import Condition, stacked
from sage.sampling.families.image_prompts import ImagePrompted, network_inputs


class SharedStableDiffusionPipeline(ImagePrompted, StableDiffusionPipeline):  # type: ignore[misc]
    """A Stable Diffusion pipeline whose similar prompts share their early steps."""

    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds"]
    _embeddings: ClassVar = ("prompt_embeds", "negative_prompt_embeds", *pipeline.IMAGE_PROMPTS)
    _options: ClassVar = {
        "eta": 0.0,
        "guidance_rescale": 0.0,
        "clip_skip": None,
        "cross_attention_kwargs": None,
        "timesteps": None,
        "sigmas": None,
    }

    def _encode(
        self,
        prompts: list[str] | None,
        negatives: list[str] | None,
        guided: bool,
        given: dict[str, Any],
        options: dict[str, Any],
    ) -> Condition:
        without_image, with_image = self._image_conditions(given, guided)
        with_text, without = self.encode_prompt(
            prompts,
            self._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negatives,
            lora_scale=(options["cross_attention_kwargs"] or {}).get("scale"),
            clip_skip=options["clip_skip"],
            **{name: rows for name, rows in given.items() if name not in pipeline.IMAGE_PROMPTS},
        )
        return stacked({"states": without, **without_image} if guided else None, {"states": with_text, **with_image})

    def _predict(self, x: Tensor, t: Tensor, condition: Condition, scale: float, options: dict[str, Any]) -> Tensor:
        states = condition["states"]
        output = self._evaluate(
            torch.cat([x] * (len(states) // len(x))),
            t,
            encoder_hidden_states=states,
            cross_attention_kwargs=options["cross_attention_kwargs"],
            added_cond_kwargs=network_inputs(condition) or None,
        )
        return pipeline.guided(output, len(x), scale, options["guidance_rescale"])

    def _decode(self, latents: Tensor, output_type: str, options: dict[str, Any]) -> tuple[Any, list[bool] | None]:
        images = self._decoded(latents / self.vae.config.scaling_factor)
        images, nsfw = self.run_safety_checker(images, self._execution_device, latents.dtype)
        keep = [True] * len(images) if nsfw is None else [not found for found in nsfw]
        return self.image_processor.postprocess(images, output_type=output_type, do_denormalize=keep), nsfw
