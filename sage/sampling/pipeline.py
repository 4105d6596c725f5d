"""SharedSamplingPipeline: a diffusers pipeline whose similar prompts share their early steps.

A stock pipeline class and this one together make a family (`sage.families`): what the stock class has stays (its parts,
loaders, LoRA, offloading, memory options), and only the call is another. A saved pipeline is a stock folder.

    pipe = SharedSamplingPipeline.from_pipe(StableDiffusionPipeline.from_pretrained(...))
    out = pipe(prompts, num_inference_steps=30, guidance_scale=7.5, share_ratio=0.4, seed=0)
    out.images, out.plan, out.cost
"""

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import sage.torchvision_ops  # noqa: F401

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils import BaseOutput
from torch import Generator, Tensor

from sage.errors import ConfigurationError, DataError, PlanError, UnsupportedError
from sage.sampling import loop
from sage.sampling.conditions import Condition
from sage.sampling.plan import Plan
from sage.sampling.seeds import prompt_seed as prompt_seed
from sage.sampling.stream import Cost, Stream

# Stock class and the module with its family.
FAMILIES = {
    "StableDiffusionPipeline": "sage.sampling.families.stable_diffusion",
    "StableDiffusionXLPipeline": "sage.sampling.families.stable_diffusion_xl",
    "StableDiffusion3Pipeline": "sage.sampling.families.stable_diffusion_3",
    "PixArtAlphaPipeline": "sage.sampling.families.pixart_alpha",
}
# With sage.grouping.auto.DEFAULT the library's operating point, that of params.yaml (tests/test_config.py).
SHARE_RATIO = 0.34
BATCH_SIZE = 8


@dataclass
class SharedSamplingOutput(BaseOutput):  # type: ignore[misc]
    """Images in the order of the prompts, the plan followed and its cost.

    `seeds`: each image's, `torch.Generator().manual_seed(seed)` in the stock pipeline gives the same noise;
    `truncated_tokens`: for each prompt how many tokens the text encoder did not read.
    """

    images: Any
    plan: Plan
    cost: Cost
    seeds: list[int]
    truncated_tokens: list[int]
    nsfw_content_detected: list[bool] | None = None


class SharedSamplingPipeline:
    """What every family shares; a family adds the methods that raise NotImplementedError here.

    Images depend on their prompt, seed and group, not on order, batch or company, but for the arithmetic: a network
    rounds differently in batches of another size (some 1e-5 of the latents in single precision).
    """

    # Of the stock class.
    scheduler: Any
    tokenizer: Any
    unet: Any
    transformer: Any
    vae_scale_factor: int
    _execution_device: torch.device

    @classmethod
    def from_pipe(cls, pipeline: Any) -> "SharedSamplingPipeline":
        """Return a pipeline on the parts of a stock one; nothing is copied or converted.

        Raises UnsupportedError for a pipeline of another family. Enable offloading on what is returned.
        """
        family = _family(pipeline)
        names = family._get_signature_keys(family)[1]
        shared = family(
            **pipeline.components, **{name: pipeline.config[name] for name in names if name in pipeline.config}
        )
        shared.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        return shared  # type: ignore[no-any-return]

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> "SharedSamplingPipeline":
        """Return a saved pipeline: a folder or hub name as diffusers takes them, or a folder of this project's base."""
        folder = Path(path)
        index = folder / "model_index.json"
        if (
            index.exists()
            and "text_encoder" in json.loads(index.read_text())
            and not (folder / "text_encoder").exists()
        ):
            from sage.sampling import base

            return SharedSamplingPipeline.from_pipe(base.load(folder))
        return SharedSamplingPipeline.from_pipe(DiffusionPipeline.from_pretrained(path, **kwargs))

    def to_json_string(self) -> str:
        """Return the configuration to save, which names the stock class: what is saved loads without this package."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        stock = next(base for base in type(self).__mro__ if base.__module__.startswith("diffusers."))
        return json.dumps(config | {"_class_name": stock.__name__}, indent=2, sort_keys=True) + "\n"

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str] | None = None, **arguments: Any
    ) -> SharedSamplingOutput | tuple[Any]:
        """Return the images of all prompts; the arguments are those of `stream`, and `return_dict`.

        `output_type` is "pil" (a list), "np", "pt" or "latent" (one array or tensor).
        """
        return_dict = arguments.pop("return_dict", True)
        stream = self.stream(prompt, **arguments)
        results = sorted(stream, key=lambda result: result.index)
        images: Any = [result.image for result in results]
        if isinstance(images[0], np.ndarray):
            images = np.stack(images)
        elif torch.is_tensor(images[0]):
            images = torch.stack(images)
        nsfw = [bool(result.nsfw) for result in results] if results[0].nsfw is not None else None
        if not return_dict:
            return (images,)
        return SharedSamplingOutput(images, stream.plan, stream.cost, stream.seeds, stream.truncated_tokens, nsfw)

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        plan: Plan | None = None,
        share_ratio: float | Sequence[float] = SHARE_RATIO,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = BATCH_SIZE,
        group_condition: Literal["mean", "medoid"] = "mean",
        branch_noise: float = 0.0,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options: Any,
    ) -> "Stream":
        """Return an iterator over finished images, each as soon as it is ready; memory is that of a few batches.

        `groups` partition the prompts; without, they are grouped by the similarity of their MiniLM embeddings. `plan`
        goes beyond both and `share_ratio`. `batch_size` is how many latents a network call takes (twice as many rows
        under guidance, `guidance_scale` > 1). `seed` gives every image its own noise, a function of seed, prompt and
        how often the prompt came before; a list of seeds or generators has one for each image. `group_condition`:
        what a block's network sees, the mean of its members' text states or the member nearest to it. `branch_noise`
        in [0, 1] makes the members of a group differ more (see `sage.sampling.loop`). A callback is
        called after each step of each batch. Embeddings (`prompt_embeds`, ...) and what else the family's stock
        pipeline takes are `options`.
        Raises ConfigurationError, DataError, PlanError or UnsupportedError before anything is generated.
        """
        given = {name: options.pop(name) for name in self._embeddings if options.get(name) is not None}
        prompts = self._check_prompts(prompt, given)
        if unknown := sorted(set(options) - set(self._options)):
            allowed = ", ".join(sorted((*self._options, *self._embeddings)))
            raise ConfigurationError(
                f"{type(self).__name__} takes no {', '.join(unknown)}; further options are {allowed}"
            )
        scale = self._default_guidance if guidance_scale is None else guidance_scale
        if not math.isfinite(scale):
            raise ConfigurationError(f"guidance_scale is {scale}; give a number, 1 or less for no guidance")
        if batch_size < 1 or num_images_per_prompt < 1 or num_inference_steps < 1:
            raise ConfigurationError(
                f"batch_size {batch_size}, num_images_per_prompt {num_images_per_prompt} and num_inference_steps "
                f"{num_inference_steps} must each be at least 1"
            )
        if extra := sorted(set(callback_on_step_end_tensor_inputs) - {"latents"}):
            raise ConfigurationError(f"a callback can be given latents only, not {', '.join(extra)}")
        loop.check_scheduler(self.scheduler, branch_noise)
        if self._network.config.get("time_cond_proj_dim") is not None:
            raise UnsupportedError(
                "this network takes the guidance scale as an input (a consistency model); use another"
            )
        options = {**self._options, **options}
        height, width = options["size"] = self._size(height, width, options)
        self._set_timesteps(num_inference_steps, height, width)

        count = len(prompts) if prompts is not None else len(given["prompt_embeds"])
        steps = len(self.scheduler.timesteps)
        if plan is None:
            if groups is None:
                groups = [[i] for i in range(count)] if share_ratio == 0 or count == 1 else _group(prompts)
            plan = Plan.shared(groups, steps, share_ratio)
        if plan.prompts != count:
            raise PlanError(f"the plan is for {plan.prompts} prompts, but {count} were given; build a plan for these")
        if plan.steps != steps:
            raise PlanError(
                f"the plan has {plan.steps} steps, but {type(self.scheduler).__name__} evaluates the network {steps} "
                f"times at num_inference_steps={num_inference_steps}; build the plan for {steps} steps"
            )
        return Stream(
            self,
            plan.repeat(num_images_per_prompt),
            prompts=prompts,
            given=given,
            negatives=_negatives(negative_prompt, count),
            images=num_images_per_prompt,
            guidance_scale=scale,
            seed=seed,
            generator=generator,
            latents=latents,
            batch_size=batch_size,
            medoid=group_condition == "medoid",
            branch_noise=branch_noise,
            output_type=output_type,
            callback=callback_on_step_end,
            options=options,
        )

    # What a family says.

    _default_guidance: ClassVar = 7.5
    # What it passes on to its encoder, scheduler, network or decoder, with the stock pipeline's defaults.
    _options: ClassVar[Mapping[str, Any]] = {}
    # The tensors that a caller may give instead of prompts.
    _embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")

    def _encode(
        self,
        prompts: list[str] | None,
        negatives: list[str] | None,
        guided: bool,
        given: dict[str, Tensor],
        options: dict[str, Any],
    ) -> Condition:
        """Return the conditions of some prompts, or of given embeddings, each of shape (n, g, ...)."""
        raise NotImplementedError

    def _predict(self, x: Tensor, t: Tensor, condition: Condition, scale: float, options: dict[str, Any]) -> Tensor:
        """Return the guided prediction for latents x, shape (n, ...), in one call of the network."""
        raise NotImplementedError

    def _decode(self, latents: Tensor, output_type: str, options: dict[str, Any]) -> tuple[Any, list[bool] | None]:
        """Return the images in this form, and which of them a safety checker blanked."""
        raise NotImplementedError

    def _set_timesteps(self, steps: int, height: int, width: int) -> None:
        self.scheduler.set_timesteps(steps, device=self._execution_device)

    def _max_tokens(self, options: dict[str, Any]) -> int:
        return int(self.tokenizer.model_max_length)

    def _count_tokens(self, texts: list[str]) -> list[int]:
        return [len(tokens) for tokens in self.tokenizer(texts).input_ids]

    # What families use.

    _evaluations = 0

    @property
    def _network(self) -> Any:
        return self.unet if hasattr(self, "unet") else self.transformer

    def _evaluate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the network and count the images that it evaluated."""
        output: Tensor = self._network(*args, **kwargs, return_dict=False)[0]
        self._evaluations += len(output)
        return output

    def _size(self, height: int | None, width: int | None, options: dict[str, Any]) -> tuple[int, int]:
        default = self._network.config.sample_size
        default = (default, default) if isinstance(default, int) else default
        size = (height or default[0] * self.vae_scale_factor, width or default[1] * self.vae_scale_factor)
        multiple = self.vae_scale_factor * self._network.config.get("patch_size", 1)
        if size[0] % multiple or size[1] % multiple:
            raise ConfigurationError(f"height {size[0]} and width {size[1]} must be multiples of {multiple}")
        return size

    def _check_prompts(self, prompt: str | Sequence[str] | None, given: dict[str, Tensor]) -> list[str] | None:
        """Return the prompts as a list, or None where embeddings are given instead."""
        if (prompt is None) == ("prompt_embeds" not in given):
            raise ConfigurationError("give either prompts or prompt_embeds, and not both")
        for name, rows in given.items():
            if not torch.isfinite(rows).all():
                raise DataError(f"{name} holds values that are not finite, in rows {_bad_rows(rows)}; leave those out")
        if prompt is None:
            return None
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise DataError("there are no prompts; give at least 1")
        for number, text in enumerate(prompts):
            if not isinstance(text, str):
                raise DataError(f"prompt {number} is {type(text).__name__}, not text: {text!r}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"prompt {number} is no valid Unicode at character {error.start}: {text!r}") from error
        return prompts


def _group(prompts: list[str] | None) -> Sequence[Sequence[int]]:
    # Late: most callers bring their groups, and the encoder takes seconds to load.
    from sage.grouping.auto import group_prompts

    return group_prompts(prompts)


def _family(pipeline: Any) -> Any:
    """Return the class that shares sampling for pipelines of this class."""
    for base in type(pipeline).__mro__:
        if base.__name__ in FAMILIES:
            return getattr(importlib.import_module(FAMILIES[base.__name__]), f"Shared{base.__name__}")
    raise UnsupportedError(
        f"{type(pipeline).__name__} cannot share sampling; supported are {', '.join(sorted(FAMILIES))}"
    )


def _negatives(negative: str | Sequence[str] | None, count: int) -> list[str] | None:
    if negative is None or isinstance(negative, str):
        return None if negative is None else [negative] * count
    if len(negative) != count:
        raise ConfigurationError(
            f"{len(negative)} negative prompts were given for {count} prompts; give one, or one for each"
        )
    return list(negative)


def _bad_rows(rows: Tensor) -> list[int]:
    return torch.nonzero(~torch.isfinite(rows).flatten(1).all(1)).flatten().tolist()


def guided(output: Tensor, rows: int, scale: float, rescale: float = 0.0) -> Tensor:
    """Return the guided prediction, (rows, ...), from the network's output for rows, or for them without and with text.

    `rescale` brings its deviation back towards that with text (Lin et al., 2023, section 3.4).
    """
    if len(output) == rows:
        return output
    without, with_text = output.chunk(2)
    prediction = without + scale * (with_text - without)
    return rescale_noise_cfg(prediction, with_text, guidance_rescale=rescale) if rescale > 0 else prediction
