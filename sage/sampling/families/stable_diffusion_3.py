"""Stable Diffusion 3: three text encoders and a transformer that predicts the flow, eps - x_0."""

from typing import Any, ClassVar

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from sage.sampling import pipeline
from sage.sampling.conditions import Condition, stacked
from sage.sampling.families.image_prompts import ImagePrompted, image_embeddings


class SharedStableDiffusion3Pipeline(ImagePrompted, StableDiffusion3Pipeline):  # type: ignore[misc]
    """A Stable Diffusion 3 pipeline whose similar prompts share their early steps."""

    _default_guidance: ClassVar = 7.0
    _options: ClassVar = {
        "clip_skip": None,
        "joint_attention_kwargs": None,
        "max_sequence_length": 256,
        "sigmas": None,
    }
    _callback_conditions: ClassVar = {"prompt_embeds": "states", "pooled_prompt_embeds": "pooled"}
    _embeddings: ClassVar = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
        *pipeline.TEXTS,
        *pipeline.IMAGE_PROMPTS,
    )

    def _shift(self, height: int, width: int) -> dict[str, Any]:
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        patch = self.vae_scale_factor * self.transformer.config.patch_size
        limits = ("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.16)
        length = (height // patch) * (width // patch)
        return {"mu": calculate_shift(length, *(config.get(name, default) for name, default in limits))}

    def _tokenizers(self, options: dict[str, Any]) -> list[tuple[Any, int]]:
        t5 = [] if self.text_encoder_3 is None else [(self.tokenizer_3, int(options["max_sequence_length"]))]
        return [*super()._tokenizers(options), *t5]

    def _encode(
        self,
        prompts: list[str] | None,
        negatives: list[str] | None,
        guided: bool,
        given: dict[str, Any],
        options: dict[str, Any],
    ) -> Condition:
        without_image, with_image = self._image_conditions(given, guided)
        texts = {name: rows for name, rows in given.items() if name not in pipeline.IMAGE_PROMPTS}
        with_text, without, pooled, pooled_without = self.encode_prompt(
            prompts,
            device=self._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negatives,
            clip_skip=options["clip_skip"],
            max_sequence_length=options["max_sequence_length"],
            lora_scale=(options["joint_attention_kwargs"] or {}).get("scale"),
            **{"prompt_2": None, "prompt_3": None} | texts,
        )
        return stacked(
            {"states": without, "pooled": pooled_without, **without_image} if guided else None,
            {"states": with_text, "pooled": pooled, **with_image},
        )

    def _predict(self, x: Tensor, t: Tensor, condition: Condition, scale: float, options: dict[str, Any]) -> Tensor:
        states = condition["states"]
        attention = options["joint_attention_kwargs"]
        if images := image_embeddings(condition):
            attention = (attention or {}) | {"ip_adapter_image_embeds": images[0]}
        output = self._evaluate(
            hidden_states=torch.cat([x] * (len(states) // len(x))),
            timestep=t.expand(len(states)),
            encoder_hidden_states=states,
            pooled_projections=condition["pooled"],
            joint_attention_kwargs=attention,
        )
        return pipeline.guided(output, len(x), scale)

    def _decode(self, latents: Tensor, output_type: str, options: dict[str, Any]) -> tuple[Any, None]:
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        images = self._decoded(latents)
        return self.image_processor.postprocess(images, output_type=output_type), None
