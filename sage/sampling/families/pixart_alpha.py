"""PixArt-alpha: T5 text states with an attention mask, and a transformer that also predicts a variance."""

from typing import Any, ClassVar

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers import PixArtAlphaPipeline
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as stock
from torch import Tensor

from sage.sampling import pipeline
from sage.sampling.conditions import Condition, stacked

# By the model's latent size, the image sizes it was trained on. An image is generated at the size whose aspect ratio is
# nearest to the requested one, then resized and cropped.
_SHAPES = {128: stock.ASPECT_RATIO_1024_BIN, 64: stock.ASPECT_RATIO_512_BIN, 32: stock.ASPECT_RATIO_256_BIN}


class SharedPixArtAlphaPipeline(pipeline.SharedSamplingPipeline, PixArtAlphaPipeline):  # type: ignore[misc]
    """A PixArt-alpha pipeline whose similar prompts share their early steps."""

    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds"]
    _default_guidance: ClassVar = 4.5
    _options: ClassVar = {
        "eta": 0.0,
        "clean_caption": False,
        "max_sequence_length": 120,
        "use_resolution_binning": True,
        "timesteps": None,
        "sigmas": None,
    }
    _embeddings: ClassVar = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_attention_mask",
    )

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the last step, which callbacks may set; the stock class takes none of these."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the last call."""
        return self._num_timesteps

    def _size(self, height: int | None, width: int | None, options: dict[str, Any]) -> tuple[int, int]:
        size = super()._size(height, width, options)
        shapes = _SHAPES.get(self.transformer.config.sample_size)
        if options["use_resolution_binning"] and shapes is not None:
            options["asked_size"] = size
            size = self.image_processor.classify_height_width_bin(*size, ratios=shapes)
        return size

    def _tokenizers(self, options: dict[str, Any]) -> list[tuple[Any, int]]:
        return [(self.tokenizer, int(options["max_sequence_length"]))]

    def _count_truncated(self, texts: list[str], options: dict[str, Any]) -> list[int]:
        return super()._count_truncated(self._text_preprocessing(texts, options["clean_caption"]), options)

    def _encode(
        self,
        prompts: list[str] | None,
        negatives: list[str] | None,
        guided: bool,
        given: dict[str, Tensor],
        options: dict[str, Any],
    ) -> Condition:
        with_text, mask, without, mask_without = self.encode_prompt(
            prompts,
            guided,
            negative_prompt=negatives or "",
            device=self._execution_device,
            num_images_per_prompt=1,
            clean_caption=options["clean_caption"],
            max_sequence_length=options["max_sequence_length"],
            **given,
        )
        return stacked(
            {"states": without, "mask": mask_without} if guided else None, {"states": with_text, "mask": mask}
        )

    def _predict(self, x: Tensor, t: Tensor, condition: Condition, scale: float, options: dict[str, Any]) -> Tensor:
        states = condition["states"]
        extra: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.transformer.config.sample_size == 128:
            height, width = options["size"]
            extra["resolution"] = states.new_tensor([[height, width]]).expand(len(states), -1)
            extra["aspect_ratio"] = states.new_tensor([[height / width]]).expand(len(states), -1)
        output = self._evaluate(
            torch.cat([x] * (len(states) // len(x))),
            encoder_hidden_states=states,
            encoder_attention_mask=condition["mask"],
            timestep=t.to(x.device).expand(len(states)),
            added_cond_kwargs=extra,
        )
        prediction = pipeline.guided(output, len(x), scale)
        # The second half of the channels is the variance, which no supported scheduler uses.
        return prediction[:, : x.shape[1]]

    def _decode(self, latents: Tensor, output_type: str, options: dict[str, Any]) -> tuple[Any, None]:
        images = self._decoded(latents / self.vae.config.scaling_factor)
        if "asked_size" in options:
            height, width = options["asked_size"]
            images = self.image_processor.resize_and_crop_tensor(images, width, height)
        return self.image_processor.postprocess(images, output_type=output_type), None
