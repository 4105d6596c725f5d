"""SharedSamplingPipeline: a diffusers pipeline whose similar prompts share their early steps.

Each supported stock pipeline class (a family, `sage.sampling.families`) has a subclass that also derives from this one.
It keeps the stock components, loaders, LoRA, offloading and memory options; only the call differs. A saved pipeline
loads as the stock class.

    pipe = SharedSamplingPipeline.from_pipe(StableDiffusionPipeline.from_pretrained(...))
    out = pipe(prompts, num_inference_steps=30, guidance_scale=7.5, share_ratio=0.4, seed=0)
    out.images, out.plan, out.cost
"""

import importlib
import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
from sage.sampling.partition import as_groups, check_keys, share_keys
from sage.sampling.plan import Plan
from sage.sampling.seeds import prompt_seed as prompt_seed
from sage.sampling.stream import Cost, Stream

if TYPE_CHECKING:
    from sage.grouping.auto import Grouping

# Each supported stock class and the module with its subclass.
FAMILIES = {
    "StableDiffusionPipeline": "sage.sampling.families.stable_diffusion",
    "StableDiffusionXLPipeline": "sage.sampling.families.stable_diffusion_xl",
    "StableDiffusion3Pipeline": "sage.sampling.families.stable_diffusion_3",
    "PixArtAlphaPipeline": "sage.sampling.families.pixart_alpha",
}
# With sage.grouping.auto.DEFAULT the operating point of params.yaml, but for branch noise (tests/test_config.py).
SHARE_RATIO = 0.34
BATCH_SIZE = 8


@dataclass
class SharedSamplingOutput(BaseOutput):  # type: ignore[misc]
    """Images in the order of the prompts, with their plan and its cost.

    `seeds`: the seed of each image; `torch.Generator().manual_seed(seed)` gives the stock pipeline the same noise.
    `truncated_tokens`: the number of each prompt's tokens beyond the text encoder's limit.
    """

    images: Any
    plan: Plan
    cost: Cost
    seeds: list[int]
    truncated_tokens: list[int]
    nsfw_content_detected: list[bool] | None = None


class SharedSamplingPipeline:
    """A diffusers pipeline whose similar prompts share their early steps.

    Make one with `from_pipe` or `from_pretrained`, then call it with a list of prompts. The output's `cost` holds
    `network_evaluations`, what `independent` sampling would have needed, and the `saving`.

    With given groups and an integer seed, an image depends on its text, its seed, its group and the settings; order,
    batch size and prompts outside the group do not matter, apart from rounding (about 1e-5 of the latents in single
    precision). Groups that the pipeline forms itself depend on all prompts. One generator for all images draws their
    noise in order.

    For maintainers: this is the base class of the families (`sage.sampling.families`), which override the methods that
    raise NotImplementedError here.
    """

    # Provided by the stock class.
    scheduler: Any
    tokenizer: Any
    unet: Any
    transformer: Any
    vae_scale_factor: int
    _execution_device: torch.device

    @classmethod
    def from_pipe(cls, pipeline: Any) -> "SharedSamplingPipeline":
        """Return a shared-sampling pipeline with the components of a stock one; nothing is copied or converted.

        Enable offloading on the returned pipeline. Raises UnsupportedError for an unsupported pipeline class.
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
        """Load a saved pipeline: a folder or hub name as in diffusers, or a folder of this project's base model."""
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
        """Return the configuration to save; it names the stock class, so that diffusers alone can load it."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        stock = next(base for base in type(self).__mro__ if base.__module__.startswith("diffusers."))
        return json.dumps(config | {"_class_name": stock.__name__}, indent=2, sort_keys=True) + "\n"

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str] | None = None, **arguments: Any
    ) -> SharedSamplingOutput | tuple[Any]:
        """Return the images of all prompts; takes the arguments of `stream`, and `return_dict`.

        The images are a list for `output_type` "pil", one array for "np" and one tensor for "pt" and "latent".
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
        groups: "Sequence[Sequence[int]] | Sequence[int | str] | np.ndarray | Tensor | Grouping | None" = None,
        share_key: Sequence[Hashable] | None = None,
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
        """Return an iterator of `Result`s in the order in which images finish; memory holds a few batches.

        prompt                 one prompt or several
        groups                 lists of prompt numbers, or a label (text or integer) for each prompt, also as arrays or
                               tensors; or how to form groups, a `sage.Grouping`; None: `Grouping()`, groups of MiniLM
                               embeddings (English), with cosine 0.5 or more between all pairs and at most 6 prompts
        share_key              one key for each prompt, such as the tenant of a server: prompts whose keys differ never
                               share; nor do prompts whose negative prompts differ, in groups that are formed here
        plan                   a plan to use instead of `groups` and `share_ratio`
        share_ratio            fraction of the steps that a group shares, in [0, 1), or one for each group
        num_inference_steps    sampler steps
        guidance_scale         guidance if above 1; None: default of the stock class
        negative_prompt        one for all prompts or one for each
        num_images_per_prompt  images of each prompt; they do not share steps with each other
        seed                   seed of the run, from which each image's seed is derived with its prompt and the number
                               of earlier copies of that prompt; or a list with one seed for each image; None: drawn
                               from torch's global generator
        generator              instead of `seed`: one for all noise, or one for each image
        latents                standard normal initial noise, one row for each image
        height, width          size in pixels; None: default of the network
        batch_size             latents in a network call (under guidance twice as many rows)
        group_condition        "mean" of the members' conditions, or "medoid", the member nearest to the mean
        branch_noise           in [0, 1], makes the members of a group differ more (`sage.sampling.branch_noise`); the
                               published figures use 1, which not every scheduler supports, so the default is 0
        output_type            "pil", "np", "pt" or "latent"
        callback_on_step_end   as in diffusers, called after each step of each batch
        callback_on_step_end_tensor_inputs  what the callback gets: "latents" only
        options                embeddings (`prompt_embeds`, ...) and other arguments of the stock pipeline

        Raises ConfigurationError, DataError, PlanError or UnsupportedError before anything is generated.
        """
        given = {name: options.pop(name) for name in self._embeddings if options.get(name) is not None}
        prompts = self._check_prompts(prompt, given)
        if unknown := sorted(set(options) - set(self._options)):
            allowed = ", ".join(sorted((*self._options, *self._embeddings)))
            raise ConfigurationError(
                f"{type(self).__name__} takes no {', '.join(unknown)}; further options are {allowed}, and "
                "groups=sage.Grouping(...) for how groups are formed"
            )
        scale = self._default_guidance if guidance_scale is None else guidance_scale
        if not math.isfinite(scale):
            raise ConfigurationError(f"guidance_scale is {scale}; give a finite number, 1 or less for no guidance")
        if batch_size < 1 or num_images_per_prompt < 1 or num_inference_steps < 1:
            raise ConfigurationError(
                f"batch_size {batch_size}, num_images_per_prompt {num_images_per_prompt} and num_inference_steps "
                f"{num_inference_steps} must each be at least 1"
            )
        if extra := sorted(set(callback_on_step_end_tensor_inputs) - {"latents"}):
            raise ConfigurationError(f"the callback can get latents only, not {', '.join(extra)}")
        loop.check_scheduler(self.scheduler, branch_noise)
        if self._network.config.get("time_cond_proj_dim") is not None:
            raise UnsupportedError(
                "this network takes the guidance scale as an input (time_cond_proj_dim), as consistency models do; use "
                "a network without it"
            )
        options = {**self._options, **options}
        height, width = options["size"] = self._size(height, width, options)
        self._set_timesteps(num_inference_steps, height, width)

        count = len(prompts) if prompts is not None else len(given["prompt_embeds"])
        negatives = _negatives(negative_prompt, count)
        steps = len(self.scheduler.timesteps)
        if plan is None:
            keys = share_keys(share_key, negatives if scale > 1 else None, given, count)
            plan = Plan.shared(_groups(groups, prompts, keys, share_ratio), steps, share_ratio)
        elif groups is not None:
            raise ConfigurationError("give either groups or a plan, and not both")
        if plan.prompts != count:
            raise PlanError(f"the plan is for {plan.prompts} prompts, but {count} were given; build a plan for these")
        if plan.steps != steps:
            raise PlanError(
                f"the plan has {plan.steps} steps, but {type(self.scheduler).__name__} evaluates the network {steps} "
                f"times at num_inference_steps={num_inference_steps}; build the plan for {steps} steps"
            )
        if share_key is not None:
            check_keys(plan, share_key)
        return Stream(
            self,
            plan.repeat(num_images_per_prompt),
            prompts=prompts,
            given=given,
            negatives=negatives,
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

    # Overridden by families.

    _default_guidance: ClassVar = 7.5
    # Options for the encoder, scheduler, network or decoder, with the stock pipeline's defaults.
    _options: ClassVar[Mapping[str, Any]] = {}
    # Tensors that can be given instead of prompts.
    _embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")

    def _encode(
        self,
        prompts: list[str] | None,
        negatives: list[str] | None,
        guided: bool,
        given: dict[str, Tensor],
        options: dict[str, Any],
    ) -> Condition:
        """Return the conditions of some prompts, or of the embeddings in `given`, each of shape (n, g, ...)."""
        raise NotImplementedError

    def _predict(self, x: Tensor, t: Tensor, condition: Condition, scale: float, options: dict[str, Any]) -> Tensor:
        """Return the guided prediction for latents x, shape (n, ...), from one network call."""
        raise NotImplementedError

    def _decode(self, latents: Tensor, output_type: str, options: dict[str, Any]) -> tuple[Any, list[bool] | None]:
        """Return the images in this output type, and whether the safety checker blanked each (None: no checker)."""
        raise NotImplementedError

    def _set_timesteps(self, steps: int, height: int, width: int) -> None:
        self.scheduler.set_timesteps(steps, device=self._execution_device)

    def _max_tokens(self, options: dict[str, Any]) -> int:
        return int(self.tokenizer.model_max_length)

    def _count_tokens(self, texts: list[str]) -> list[int]:
        return [len(tokens) for tokens in self.tokenizer(texts).input_ids]

    # Used by families.

    _evaluations = 0

    @property
    def _network(self) -> Any:
        return self.unet if hasattr(self, "unet") else self.transformer

    def _evaluate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the network and add the rows of its batch to the count of evaluations."""
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
        """Return the prompts as a list, or None if embeddings are given instead."""
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


def _groups(
    groups: Any, prompts: list[str] | None, keys: Sequence[Hashable], share_ratio: float | Sequence[float]
) -> list[list[int]]:
    """Return the groups that are given, or form them."""
    if isinstance(groups, (Iterable, Tensor)):
        return as_groups(groups, len(keys))
    if np.ndim(share_ratio):
        raise ConfigurationError(f"share_ratio {share_ratio} is for given groups; give groups=, or one share ratio")
    # Imported late: most callers give groups.
    from sage.grouping.auto import Grouping

    grouping = Grouping() if groups is None else groups
    if not isinstance(grouping, Grouping):
        raise ConfigurationError(
            f"groups is {groups!r}; give lists of prompt numbers, a label for each prompt, or sage.Grouping(...)"
        )
    if share_ratio == 0 or len(keys) == 1:
        return [[number] for number in range(len(keys))]
    return grouping.groups(prompts, keys, float(share_ratio))  # type: ignore[arg-type]


def _family(pipeline: Any) -> Any:
    """Return the shared-sampling class for pipelines of this class."""
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
    """Return the guided prediction, (rows, ...), from the network output without and with text, (2 * rows, ...).

    An output of `rows` rows is unguided and stays as it is. `rescale` brings the prediction's standard deviation back
    towards the deviation of the output with text (Lin et al., 2023, section 3.4).
    """
    if len(output) == rows:
        return output
    without, with_text = output.chunk(2)
    prediction = without + scale * (with_text - without)
    return rescale_noise_cfg(prediction, with_text, guidance_rescale=rescale) if rescale > 0 else prediction
