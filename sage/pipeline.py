"""SharedSamplingPipeline: a diffusers pipeline whose similar prompts share their early steps.

A stock pipeline class and this one together make a family (`sage.families`): what the stock class has stays (its parts,
loaders, LoRA, offloading, memory options), and only the call is another. A saved pipeline is a stock folder.

    pipe = SharedSamplingPipeline.from_pipe(StableDiffusionPipeline.from_pretrained(...))
    out = pipe(prompts, num_inference_steps=30, guidance_scale=7.5, share_ratio=0.4, seed=0)
    out.images, out.plan, out.cost
"""

import hashlib
import importlib
import inspect
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import sage.torchvision_ops  # noqa: F401

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from sage import sampling
from sage.errors import ConfigurationError, DataError, PlanError, UnsupportedError
from sage.plan import Plan
from sage.sampling import Condition

# Stock class and the module with its family.
FAMILIES = {
    "StableDiffusionPipeline": "sage.families.stable_diffusion",
    "StableDiffusionXLPipeline": "sage.families.stable_diffusion_xl",
    "StableDiffusion3Pipeline": "sage.families.stable_diffusion_3",
    "PixArtAlphaPipeline": "sage.families.pixart_alpha",
}
# Prompts are grouped as params.yaml groups this project's.
THRESHOLD = 0.72
MAX_GROUP_SIZE = 6
NEAR_DUPLICATE = 0.999
SHARE_RATIO = 0.4
BATCH_SIZE = 8


@dataclass(frozen=True)
class Cost:
    """What a call cost: evaluations counted at the network, those of independent sampling, and seconds.

    `network_evaluations` counts images, not calls: one image with and without its text is two. It equals the plan's
    formula, `plan.nfe(guidance)`, or the call fails. `saving` is the share of `independent` that was not needed.
    """

    network_evaluations: int
    formula: int
    independent: int
    saving: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """One finished image: `index` is prompt * num_images_per_prompt + its number; `seed` that of its generator."""

    index: int
    image: Any
    seed: int
    nsfw: bool | None


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


def prompt_seed(seed: int, key: str) -> int:
    """Return the seed of one image: 63 bits of the SHA-256 of a run's seed and what names the image in it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode(errors="surrogatepass")).digest()[:8]) >> 1


def image_seeds(seed: int, prompts: Sequence[str]) -> list[int]:
    """Return a seed for each image of a run: a function of its prompt and of how often that came before."""
    times: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(prompt_seed(seed, f"{times[prompt]}:{prompt}"))
        times[prompt] += 1
    return seeds


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
            from sage import base

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
        in [0, 1] makes the members of a group differ more (see `sage.sampling`). A callback is
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
        if batch_size < 1 or num_images_per_prompt < 1 or num_inference_steps < 1:
            raise ConfigurationError(
                f"batch_size {batch_size}, num_images_per_prompt {num_images_per_prompt} and num_inference_steps "
                f"{num_inference_steps} must each be at least 1"
            )
        if extra := sorted(set(callback_on_step_end_tensor_inputs) - {"latents"}):
            raise ConfigurationError(f"a callback can be given latents only, not {', '.join(extra)}")
        sampling.check_scheduler(self.scheduler, branch_noise)
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
                groups = self._group(prompts, count, share_ratio)
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
            guidance_scale=self._default_guidance if guidance_scale is None else guidance_scale,
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

    def _group(
        self, prompts: list[str] | None, count: int, share_ratio: float | Sequence[float]
    ) -> Sequence[Sequence[int]]:
        """Return groups of similar prompts; copies of a prompt share with others, not with each other."""
        if share_ratio == 0 or count == 1:
            return [[prompt] for prompt in range(count)]
        if prompts is None:
            raise ConfigurationError(
                "prompt_embeds cannot be grouped; give groups=[[0, 1], ...], a plan, or share_ratio=0 for none"
            )
        from sage.embedding import embed
        from sage.grouping import group

        return group(embed(prompts), THRESHOLD, MAX_GROUP_SIZE, NEAR_DUPLICATE)


class Stream:
    """An iterator over the images of one call as they are finished; `cost` is what it has cost so far."""

    def __init__(
        self,
        pipe: Any,
        plan: Plan,
        *,
        prompts: list[str] | None,
        given: dict[str, Tensor],
        negatives: list[str] | None,
        images: int,
        guidance_scale: float,
        seed: int | Sequence[int] | None,
        generator: Generator | Sequence[Generator] | None,
        latents: Tensor | None,
        batch_size: int,
        medoid: bool,
        branch_noise: float,
        output_type: str,
        callback: Any,
        options: dict[str, Any],
    ) -> None:
        """Take what `SharedSamplingPipeline.stream` has checked; `plan` is over images, `images` of each prompt."""
        self.plan = plan
        self._pipe, self._prompts, self._given, self._negatives = pipe, prompts, given, negatives
        self._images, self._scale, self._batch_size = images, guidance_scale, batch_size
        self._medoid, self._branch_noise = medoid, branch_noise
        self._output_type, self._callback, self._options = output_type, callback, options
        self._guided = guidance_scale > 1
        self._device, self._dtype = pipe._execution_device, pipe._network.dtype
        self._shape = (pipe._network.config.in_channels, *options["size"])
        self._scheduler = pipe.scheduler
        self._latents = latents
        self._keys = [_key(prompts, given, number) for number in range(plan.prompts // images) for _ in range(images)]
        self._generators: list[Generator] | None = None
        self.seeds = self._take_seeds(seed, generator)
        self.truncated_tokens = [0] * (plan.prompts // images)
        self._encoded: dict[int, Condition] = {}
        self._evaluations, self._seconds = 0, 0.0
        if self._latents is not None and len(self._latents) != plan.prompts:
            raise ConfigurationError(
                f"{len(self._latents)} latents were given for {plan.prompts} images; give one for each"
            )
        self._results = self._run()

    def __iter__(self) -> Iterator[Result]:
        """Return the stream itself."""
        return self

    def __next__(self) -> Result:
        """Return the next finished image."""
        begin = time.perf_counter()
        try:
            return next(self._results)
        finally:
            self._seconds += time.perf_counter() - begin

    @property
    def cost(self) -> Cost:
        """What was spent so far."""
        formula = self.plan.nfe(self._guided)
        independent = (2 if self._guided else 1) * self.plan.prompts * self.plan.steps
        return Cost(self._evaluations, formula, independent, self.plan.saving, self._seconds)

    @torch.no_grad()
    def _run(self) -> Iterator[Result]:
        pipe = self._pipe
        pipe._interrupt, pipe._guidance_scale, pipe._num_timesteps = False, self._scale, self.plan.steps
        accepts_eta = "eta" in inspect.signature(self._scheduler.step).parameters
        with pipe.progress_bar(total=self.plan.nfe(guidance=False)) as self._bar:
            packs = sampling.sample(
                self.plan,
                self._scheduler,
                predict=self._predict,
                encode=self._encode,
                noise=self._noise,
                generator=self._generator,
                rank=lambda image: (self.seeds[image], self._keys[image], image),
                batch_size=self._batch_size,
                medoid=self._medoid,
                branch_noise=self._branch_noise,
                step_kwargs={"eta": self._options["eta"]} if accepts_eta and "eta" in self._options else {},
                on_step=self._on_step,
                interrupted=lambda: pipe._interrupt,
            )
            for indices, latents in packs:
                images, nsfw = latents, None
                if self._output_type != "latent":
                    images, nsfw = pipe._decode(latents, self._output_type, self._options)
                for row, index in enumerate(indices):
                    yield Result(index, images[row], self.seeds[index], None if nsfw is None else nsfw[row])
        pipe.maybe_free_model_hooks()
        if self._evaluations != self.plan.nfe(self._guided) and not pipe._interrupt:
            raise PlanError(
                f"the network was evaluated {self._evaluations} times, but the plan says {self.cost.formula}; "
                "this is a fault of this package, please report it"
            )

    def _predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        before = self._pipe._evaluations
        output: Tensor = self._pipe._predict(x, t, condition, self._scale, self._options)
        self._evaluations += self._pipe._evaluations - before
        return output

    def _on_step(self, step: int, t: Tensor, latents: Tensor) -> Tensor:
        self._bar.update(len(latents))
        if self._callback is None:
            return latents
        changed = self._callback(self._pipe, step, t, {"latents": latents})
        return changed.get("latents", latents)  # type: ignore[no-any-return]

    def _encode(self, images: list[int]) -> Condition:
        """Return the conditions of images, encoding prompts at most a batch at a time and keeping the last few."""
        wanted = list(dict.fromkeys(image // self._images for image in images))
        missing = [number for number in wanted if number not in self._encoded]
        for start in range(0, len(missing), self._batch_size):
            numbers = missing[start : start + self._batch_size]
            texts = None if self._prompts is None else [self._prompts[number] for number in numbers]
            if texts is not None:
                for number, tokens in zip(numbers, self._pipe._count_tokens(texts), strict=True):
                    self.truncated_tokens[number] = max(0, tokens - self._pipe._max_tokens(self._options))
            negatives = None if self._negatives is None else [self._negatives[number] for number in numbers]
            given = {name: rows[numbers] for name, rows in self._given.items()}
            rows = self._pipe._encode(texts, negatives, self._guided, given, self._options)
            for place, number in enumerate(numbers):
                self._encoded[number] = {name: values[place : place + 1] for name, values in rows.items()}
        found = [self._encoded[image // self._images] for image in images]
        for number in list(self._encoded)[: max(0, len(self._encoded) - 4 * self._batch_size)]:
            del self._encoded[number]
        return {name: torch.cat([row[name] for row in found]) for name in found[0]}

    def _noise(self, images: list[int], generators: list[Generator]) -> Tensor:
        channels, height, width = self._shape
        given = None if self._latents is None else self._latents[images]
        latents: Tensor = self._pipe.prepare_latents(
            len(images), channels, height, width, self._dtype, self._device, generators, given
        )
        return latents

    def _generator(self, image: int) -> Generator:
        if self._generators is not None:
            return self._generators[image]
        return Generator().manual_seed(self.seeds[image])

    def _take_seeds(
        self, seed: int | Sequence[int] | None, generator: Generator | Sequence[Generator] | None
    ) -> list[int]:
        """Return a seed for each image."""
        count = self.plan.prompts
        if seed is not None and generator is not None:
            raise ConfigurationError("give either seed or generator, and not both")
        if isinstance(generator, Generator):
            if count > 1:
                return self._draw_from_one(generator)
            generator = [generator]
        if generator is not None:
            self._generators = list(generator)
            if len(self._generators) != count or len(set(map(id, self._generators))) != count:
                raise ConfigurationError(
                    f"{len(set(map(id, self._generators)))} different generators were given for {count} images; "
                    "give each image one of its own"
                )
            return [one.initial_seed() for one in self._generators]
        if seed is None:
            # As in diffusers, torch.manual_seed decides where nothing else does.
            seed = int(torch.randint(2**62, ()))
        if isinstance(seed, int):
            return image_seeds(seed, self._keys)
        if len(seed) != count:
            raise ConfigurationError(f"{len(seed)} seeds were given for {count} images; give one for each")
        return list(seed)

    def _draw_from_one(self, generator: Generator) -> list[int]:
        """Draw all noise at once from one generator, as diffusers does, then a seed for each image's later draws."""
        if self._latents is None:
            channels, height, width = self._shape
            factor = self._pipe.vae_scale_factor
            shape = (self.plan.prompts, channels, height // factor, width // factor)
            self._latents = randn_tensor(shape, generator=generator, device=self._device, dtype=self._dtype)
        draws = torch.randint(2**62, (self.plan.prompts,), generator=generator, device=generator.device)
        return [int(draw) for draw in draws.tolist()]


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


def _key(prompts: list[str] | None, given: dict[str, Tensor], number: int) -> str:
    """Return what names a prompt: its text, or the hash of its embedding."""
    if prompts is not None:
        return prompts[number]
    return hashlib.sha256(given["prompt_embeds"][number].float().cpu().numpy().tobytes()).hexdigest()


def _bad_rows(rows: Tensor) -> list[int]:
    return torch.nonzero(~torch.isfinite(rows).flatten(1).all(1)).flatten().tolist()


def stacked(without: Condition | None, with_text: Condition) -> Condition:
    """Return conditions (n, ...) as (n, g, ...): without and with text under guidance, else with text alone."""
    if without is None:
        return {name: rows[:, None] for name, rows in with_text.items()}
    return {name: torch.stack([without[name], rows], dim=1) for name, rows in with_text.items()}


def guided(output: Tensor, rows: int, scale: float, rescale: float = 0.0) -> Tensor:
    """Return the guided prediction, (rows, ...), from the network's output for rows, or for them without and with text.

    `rescale` brings its deviation back towards that with text (Lin et al., 2023, section 3.4).
    """
    if len(output) == rows:
        return output
    without, with_text = output.chunk(2)
    prediction = without + scale * (with_text - without)
    return rescale_noise_cfg(prediction, with_text, guidance_rescale=rescale) if rescale > 0 else prediction
