"""SharedSamplingPipeline: a diffusers pipeline whose similar prompts share their early steps.

Each supported stock pipeline class (a family, `sage.sampling.families`) has a subclass that also derives from this one.
It keeps the stock components, loaders, LoRA, offloading and memory options; only the call differs. A saved pipeline
loads as the stock class.

    pipe = SharedSamplingPipeline.from_pipe(StableDiffusionPipeline.from_pretrained(...))
    out = pipe(prompts, num_inference_steps=30, guidance_scale=7.5, share_ratio=0.4, seed=0)
    out.images, out.plan, out.cost
"""

import copy
import functools
import inspect
import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import sage.torchvision_ops  # noqa: F401

import numpy as np
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from safetensors import SafetensorError
from torch import Generator, Tensor

from sage import diffusion
from sage.errors import ConfigurationError, DataError, PlanError, UnsupportedError
from sage.numbers import real, single, whole
from sage.sampling import loop, saved
from sage.sampling.branch_noise import safe_image_steps
from sage.sampling.caches import StepCaches
from sage.sampling.first_prediction import FirstPredictions, first_predictions, made_for
from sage.sampling.hooks import check_hooks
from sage.sampling.partition import as_groups, check_keys, equal, share_keys
from sage.sampling.plan import Plan, shared_steps
from sage.sampling.seeds import prompt_seed as prompt_seed
from sage.sampling.stream import ONE_AT_A_TIME, Cost, Stream

if TYPE_CHECKING:
    from sage.grouping.auto import Grouping

# With sage.grouping.auto.DEFAULT the operating point of params.yaml, but for branch noise (tests/test_config.py).
SHARE_RATIO = 0.34
BATCH_SIZE = 8
# Texts beside the prompts, for further text encoders; one for each prompt, or one for all.
TEXTS = ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3")
# Image prompts of IP-Adapters, as the stock classes that have them call them.
IMAGE_PROMPTS = ("ip_adapter_image", "ip_adapter_image_embeds")
# Why some arguments of stock classes are refused.
_REASONS = {
    "ip_adapter_image": "image prompts (IP-Adapter) are for Stable Diffusion 1.x, XL, 3, FLUX.1 and their ControlNets",
    "image": "sharing starts from text and noise, and an image belongs to a single prompt",
}
# Arguments of a call that its first step does not depend on.
_NOT_FIRST = {
    "groups", "share_key", "plan", "share_ratio", "num_images_per_prompt", "image_steps", "predictions", "seed",
    "generator", "latents", "branch_noise", "output_type", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
}  # fmt: skip


@dataclass
class SharedSamplingOutput(BaseOutput):  # type: ignore[misc]
    """Images in the order of the prompts, with their plan and its cost.

    `finished`: false for images that an interruption left unfinished (as in diffusers, they are the latents of the step
    that was reached) or unbegun (None; `images` is then a list).
    `seeds`: the seed of each image; `torch.Generator().manual_seed(seed)` gives the stock pipeline the same noise.
    `truncated_tokens`: the number of each prompt's tokens beyond the text encoder's limit; of several encoders, beyond
    the limit of the one that reads most.
    """

    images: Any
    plan: Plan
    cost: Cost
    seeds: list[int]
    truncated_tokens: list[int]
    finished: list[bool]
    nsfw_content_detected: list[bool] | None = None


class SharedSamplingPipeline:
    """A diffusers pipeline whose similar prompts share their early steps.

    Make one with `from_pipe` or `from_pretrained`, then call it with a list of prompts. The output's `cost` holds
    `network_evaluations`, what `independent` sampling would have needed, and the `saving`.

    With given groups and an integer seed, an image depends on its text, its seed, its group and the settings; order,
    batch size and prompts outside the group do not matter, apart from rounding (about 1e-5 of the latents in single
    precision). Groups that the pipeline forms itself depend on all prompts. One generator for all images draws their
    noise in order.

    For maintainers: the segment driver (`sage.sampling.segments`) derives from it, and each family from that.
    """

    # Provided by the stock class.
    scheduler: Any
    tokenizer: Any
    unet: Any
    transformer: Any
    vae: Any
    vae_scale_factor: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the call of a family the parameters of the stock class, in their order, and those of its own."""
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):
            return
        stock = inspect.signature(stock_class(cls).__call__).parameters
        own = inspect.signature(SharedSamplingPipeline.stream).parameters
        keyword = inspect.Parameter.KEYWORD_ONLY
        more = [p.replace(kind=keyword) for p in own.values() if p.name not in stock and p.kind == keyword]
        named = [p for p in stock.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        signature = inspect.Signature([*named, *more])

        @functools.wraps(SharedSamplingPipeline.__call__)
        def call(self: Any, *values: Any, **arguments: Any) -> Any:
            _, *names = signature.bind_partial(self, *values).arguments.items()
            return SharedSamplingPipeline.__call__(self, **dict(names), **arguments)

        vars(call)["__signature__"] = signature
        setattr(cls, "__call__", call)  # noqa: B010 - mypy allows no assignment to a method

    @classmethod
    def from_pipe(cls, pipeline: Any) -> "SharedSamplingPipeline":
        """Return a shared-sampling pipeline with the parts and settings of a stock one; nothing is copied or converted.

        What a subclass of the stock class overrides is kept. Enable offloading on the returned pipeline. Raises
        UnsupportedError for an unsupported pipeline class, and for a subclass that overrides what shared sampling does
        not call.
        """
        stock: Any = type(pipeline)
        return adopted(_family(stock), pipeline)  # type: ignore[no-any-return]

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> "SharedSamplingPipeline":
        """Load a saved pipeline: a folder or hub name as in diffusers, or a folder of this project's base model.

        It is loaded in single precision from safetensors (`sage.sampling.saved`); `kwargs` are those of diffusers.
        Raises UnsupportedError for an unsupported pipeline class before the weights are read, and DataError if it
        cannot be loaded.
        """
        stock = saved.stock_class(path, **kwargs)
        if stock is not None and "custom_pipeline" not in kwargs:
            _family(stock)
        return SharedSamplingPipeline.from_pipe(saved.load(path, **kwargs))

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Load an adapter as the stock class does; raise DataError if it is missing or not saved as safetensors."""
        named = kwargs.get("weight_name")
        if named is not None and not str(named).endswith(".safetensors"):
            raise DataError(f"{named} is no safetensors file; save the adapter again, with safe_serialization=True")
        with _loading(args[0] if args and not isinstance(args[0], dict) else "the adapter"):
            super().load_lora_weights(*args, **kwargs | {"use_safetensors": True})  # type: ignore[misc]

    def to_json_string(self) -> str:
        """Return the configuration to save; it names the stock class, so that diffusers alone can load it."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        return json.dumps(config | {"_class_name": stock_class(type(self)).__name__}, indent=2, sort_keys=True) + "\n"

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str] | None = None, **arguments: Any
    ) -> SharedSamplingOutput | tuple[Any, ...]:
        """Return the images of all prompts; takes the arguments of `stream`, and `return_dict`.

        The images are a list for `output_type` "pil", one array for "np" and one tensor for "pt" and "latent". Raises
        DivergedError if any image is not finite; `stream` gives the others.
        """
        return_dict = arguments.pop("return_dict", True)
        stream = self.stream(prompt, **arguments)
        results = {result.index: result for result in stream}
        found = [results.get(index) for index in range(stream.plan.prompts)]
        images: Any = [None if result is None else result.image for result in found]
        if all(isinstance(image, np.ndarray) for image in images):
            images = np.stack(images)
        elif all(torch.is_tensor(image) for image in images):
            images = torch.stack(images)
        checked = any(result.nsfw is not None for result in results.values())
        nsfw = [bool(result and result.nsfw) for result in found] if checked else None
        if not return_dict:
            return (images, nsfw) if hasattr(self, "safety_checker") else (images,)
        return SharedSamplingOutput(
            images,
            stream.plan,
            stream.cost,
            stream.seeds,
            stream.truncated_tokens,
            finished=[result is not None and result.finished for result in found],
            nsfw_content_detected=nsfw,
        )

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
        image_steps: int | None = None,
        predictions: FirstPredictions | None = None,
        seed: int | Sequence[int] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | Sequence[int] = BATCH_SIZE,
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
        num_images_per_prompt  images of each prompt
        image_steps            number of first steps that the images of one prompt share, also those of a prompt that is
                               repeated in the list, unless you give groups or a plan; 0: none; None: the first, if the
                               call shares steps at all, `branch_noise` is 1, and the schedule begins with noise alone
                               (`sage.sampling.branch_noise`), else none
        predictions            the prompts' `first_predictions` with these settings: what their first steps need not
                               evaluate again, if the schedule begins with noise alone
        seed                   seed of the run, from which each image's seed is derived with its prompt and the number
                               of earlier copies of that prompt; or a list with one seed for each image; None: drawn
                               from torch's global generator
        generator              instead of `seed`: one for all noise, or one for each image
        latents                standard normal initial noise, one row for each image
        height, width          size in pixels; None: default of the network
        batch_size             latents in a network call (under guidance twice as many rows); or the sizes that network
                               calls may have, such as (1, 2, 4, 8): smaller batches are padded to the next of them,
                               so that torch.compile builds no more graphs than these
        group_condition        "mean" of the members' conditions, or "medoid", the member nearest to the mean
        branch_noise           in [0, 1], makes the members of a group differ more (`sage.sampling.branch_noise`); the
                               published figures use 1, which not every scheduler supports, so the default is 0
        output_type            "pil", "np", "pt" or "latent"
        callback_on_step_end   as in diffusers, called after each step of each batch. The pipeline that it gets is this
                               call's own copy: `_guidance_scale` set on it is for the images of the batch, `_interrupt`
                               stops this call (set on the pipeline itself, all its calls)
        callback_on_step_end_tensor_inputs  what the callback gets: latents, to change, and embeddings, to read
        options                embeddings (`prompt_embeds`, ...) and other arguments of the stock pipeline

        Raises ConfigurationError, DataError, PlanError or UnsupportedError before anything is generated, and
        DivergedError after all other images if some are not finite.
        """
        numbers = {
            "num_inference_steps": num_inference_steps,
            "num_images_per_prompt": num_images_per_prompt,
        }
        for name, number in numbers.items():
            if not isinstance(number, (int, np.integer)):
                raise ConfigurationError(f"{name} is {number!r}; give a whole number, or leave it out for the default")
        needed = {
            "share_ratio": share_ratio,
            "branch_noise": branch_noise,
            "group_condition": group_condition,
            "output_type": output_type,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }
        if absent := sorted(name for name, value in needed.items() if value is None):
            raise ConfigurationError(f"{', '.join(absent)} is None; leave it out for the default")
        options = self._given_options(options)
        call = self._begin_call()
        given = {name: options.pop(name) for name in self._embeddings if options.get(name) is not None}
        prompts = self._check_prompts(prompt, given)
        if unknown := sorted(set(options) - set(self._options)):
            allowed = ", ".join(sorted((*self._options, *self._embeddings)))
            reason = next((f" ({why})" for name, why in _REASONS.items() if any(name in one for one in unknown)), "")
            raise ConfigurationError(
                f"{type(self).__name__} takes no {', '.join(unknown)}{reason}; further options are {allowed}, and "
                "groups=sage.Grouping(...) for how groups are formed"
            )
        scale = real("guidance_scale", self._default_guidance if guidance_scale is None else guidance_scale)
        batch_size, padded_sizes = _batch_sizes(batch_size)
        num_inference_steps = whole("num_inference_steps", num_inference_steps)
        num_images_per_prompt = whole("num_images_per_prompt", num_images_per_prompt)
        branch_noise = real("branch_noise", branch_noise)
        if not math.isfinite(scale):
            raise ConfigurationError(f"guidance_scale is {scale}; give a finite number, 1 or less for no guidance")
        if batch_size < 1 or num_images_per_prompt < 1 or num_inference_steps < 1:
            raise ConfigurationError(
                f"batch_size {batch_size}, num_images_per_prompt {num_images_per_prompt} and num_inference_steps "
                f"{num_inference_steps} must each be at least 1"
            )
        inputs = _callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if extra := sorted(set(inputs) - {"latents", *self._callback_names}):
            allowed = ", ".join(("latents", *self._callback_names))
            raise ConfigurationError(f"the callback can get {allowed}, not {', '.join(extra)}")
        loop.check_scheduler(self.scheduler, branch_noise)
        for network in self._networks:
            check_hooks(network)
        image_steps = None if image_steps is None else whole("image_steps", image_steps)
        if image_steps and not branch_noise:
            raise ConfigurationError(
                f"image_steps is {image_steps}, but branch_noise is 0: the images of a prompt would come out alike; "
                "give branch_noise=1, or image_steps=0"
            )
        if self._network.config.get("time_cond_proj_dim") is not None:
            raise UnsupportedError(
                "this network takes the guidance scale as an input (time_cond_proj_dim), as consistency models do; use "
                "a network without it"
            )
        options = {**self._options, **options}
        options["size"] = self._size(height, width)
        count = len(prompts) if prompts is not None else len(given["prompt_embeds"])
        negatives = _negatives(negative_prompt, count)
        given |= {name: _texts(name, given[name], prompts) for name in TEXTS if name in given}
        with ONE_AT_A_TIME:
            call._prepare_call(prompts, negatives, given, num_inference_steps, scale, options, batch_size)
        diffusion.check_start(call.scheduler)
        steps = len(call.scheduler.timesteps)
        if plan is not None and groups is not None:
            raise ConfigurationError("give either groups or a plan, and not both")
        sharing = np.any(np.asarray(share_ratio) != 0) if plan is None else plan.saving > 0
        if image_steps is None:
            image_steps = safe_image_steps(call.scheduler, branch_noise) if sharing and steps > 1 else 0
        copies = [[number] for number in range(count)]
        if plan is None:
            keys = share_keys(share_key, negatives if scale > 1 else None, given, count)
            own_images = any("image" in name for name in given)  # equal texts with other images are other prompts
            if image_steps and prompts is not None and not own_images and not isinstance(groups, (Iterable, Tensor)):
                copies = _copies(prompts, keys, seed, num_images_per_prompt)
            by_prediction = getattr(groups, "by", None) == "prediction" and getattr(groups, "embeddings", None) is None
            if predictions is None and by_prediction and count > 1 and sharing:
                # Made by the copy of this call, which so counts them.
                predictions = call._first_predictions(prompts, negatives, given, scale, batch_size, options)
            rows = None if predictions is None else predictions.embeddings
            found = _groups(groups, prompts, keys, copies, share_ratio, steps, rows, made_for(call.scheduler, scale))
            plan = Plan.shared(found, steps, share_ratio)
        if plan.prompts != len(copies):
            raise PlanError(f"the plan is for {plan.prompts} prompts, but {count} were given; build a plan for these")
        if plan.steps != steps:
            raise PlanError(
                f"the plan has {plan.steps} steps, but {type(self.scheduler).__name__} evaluates the network {steps} "
                f"times at num_inference_steps={num_inference_steps}; build the plan for {steps} steps"
            )
        if share_key is not None:
            check_keys(plan, [share_key[numbers[0]] for numbers in copies] if len(copies) < count else share_key)
        caches = vars(call)["_caches"] = StepCaches(self._networks)
        caches.check(plan, call._is_guided(scale, negatives, given))
        call._guidance_scale, call._num_timesteps = scale, steps
        times = num_images_per_prompt
        images = [[number * times + r for number in numbers for r in range(times)] for numbers in copies]
        return Stream(
            call,
            plan.for_images(images, image_steps),
            prompts=prompts,
            given=given,
            negatives=negatives,
            images=num_images_per_prompt,
            predictions=predictions,
            guidance_scale=scale,
            seed=seed,
            generator=generator,
            latents=latents,
            batch_size=batch_size,
            padded_sizes=padded_sizes,
            caches=caches,
            medoid=group_condition == "medoid",
            branch_noise=branch_noise,
            output_type=output_type,
            callback=callback_on_step_end,
            callback_inputs=inputs,
            options=options,
        )

    def evaluations(self, num_inference_steps: int, height: int | None = None, width: int | None = None) -> int:
        """Return how often the network is evaluated for one image alone, without guidance: the steps of a plan.

        Some schedulers evaluate more than once in an inference step.
        """
        return len(self._scheduled(num_inference_steps, height, width).timesteps)

    def made_for(
        self, num_inference_steps: int, guidance_scale: float, height: int | None = None, width: int | None = None
    ) -> tuple[str, float, float]:
        """Return the scheduler, first timestep and guidance scale of a call, which its first predictions depend on."""
        return made_for(self._scheduled(num_inference_steps, height, width), guidance_scale)

    def evaluations_a_step(self, guidance_scale: float) -> int:
        """Return 2 if a step under this guidance scale evaluates the network without and with text, else 1."""
        return 2 if self._is_guided(guidance_scale, None, {}) else 1

    def first_predictions(self, prompt: str | Sequence[str] | None = None, **arguments: Any) -> FirstPredictions:
        """Return what the model expects of each prompt at its first step (`sage.sampling.first_prediction`).

        `arguments` are those of `stream` that its first step depends on: num_inference_steps, guidance_scale,
        negative_prompt, height, width, batch_size, embeddings and options. Prompts are grouped by them with
        `groups=Grouping(by="prediction")`, and a call that gets them as `predictions` does not evaluate them again.
        """
        if unknown := sorted(set(arguments) & _NOT_FIRST):
            raise ConfigurationError(f"first predictions do not depend on {', '.join(unknown)}; leave these out")
        return first_predictions(self.stream(prompt, share_ratio=0.0, seed=0, **arguments))

    def _first_predictions(
        self,
        prompts: list[str] | None,
        negatives: list[str] | None,
        given: dict[str, Tensor],
        scale: float,
        batch_size: int,
        options: dict[str, Any],
    ) -> FirstPredictions:
        """Return the first predictions of a call that is under way, on its own copy of the pipeline."""
        count = len(prompts) if prompts is not None else len(given["prompt_embeds"])
        self._guidance_scale, self._num_timesteps = scale, len(self.scheduler.timesteps)
        stream = Stream(
            self,
            Plan.independent(count, len(self.scheduler.timesteps)),
            prompts=prompts,
            given=given,
            negatives=negatives,
            images=1,
            predictions=None,
            guidance_scale=scale,
            seed=0,
            generator=None,
            latents=None,
            batch_size=batch_size,
            padded_sizes=(),
            caches=StepCaches(self._networks),
            medoid=False,
            branch_noise=0.0,
            output_type="latent",
            callback=None,
            callback_inputs=(),
            options=options,
        )
        return first_predictions(stream)

    def safe_image_steps(self, num_inference_steps: int, branch_noise: float) -> int:
        """Return how many steps the images of one prompt share by default, 0 or 1 (`sage.sampling.branch_noise`)."""
        scheduler = self._scheduled(num_inference_steps)
        return safe_image_steps(scheduler, branch_noise) if len(scheduler.timesteps) > 1 else 0

    # What the segment driver (`sage.sampling.segments`) says of a family.

    # What it makes, as the stock output names it: images, frames, audios.
    makes: ClassVar = "images"
    # Whether the guidance scale is an input of the network, which is then evaluated once a step.
    embeds_guidance: ClassVar = False
    # The names of what callbacks get beside the latents.
    _callback_names: ClassVar[tuple[str, ...]] = ()
    _default_guidance: ClassVar = 7.5
    # Options for the encoder, scheduler, network or decoder, with the stock pipeline's defaults.
    _options: ClassVar[Mapping[str, Any]] = {}
    # Tensors that can be given instead of prompts, further texts and image prompts.
    _embeddings: ClassVar[tuple[str, ...]] = ()

    def _size(self, height: int | None, width: int | None) -> Any:
        """Return the height and width of the images, None for what the stock call decides."""
        raise NotImplementedError

    def _prepare_call(
        self,
        prompts: list[str] | None,
        negatives: list[str] | None,
        given: dict[str, Tensor],
        steps: int,
        scale: float,
        options: dict[str, Any],
        batch_size: int = 1,
    ) -> None:
        """Set the timesteps; called once, on the call's own copy of the pipeline."""
        raise NotImplementedError

    def _scheduled(self, steps: int, height: int | None = None, width: int | None = None) -> Any:
        """Return the scheduler with timesteps set as a call sets them for images of this size."""
        raise NotImplementedError

    def _is_guided(self, scale: float, negatives: list[str] | None, given: Mapping[str, Tensor]) -> bool:
        """Return whether each latent takes two evaluations, without and with text."""
        raise NotImplementedError

    # The state of a call is in a copy of the pipeline, so that calls in several threads or streams do not meet.

    _evaluations = 0
    _caches = StepCaches(())
    _interrupts = 0
    _interrupts_before = 0
    _called: Any = None
    _current_timestep: Tensor | None = None
    _guidance_scale: float
    _num_timesteps: int
    _finite: list[bool]

    def _begin_call(self) -> Any:
        """Return a copy for one call, with the same networks and a scheduler and a state of its own."""
        call = copy.copy(self)
        # Not set as an attribute, which would look the class up for the saved configuration.
        state = {"_called": self, "_evaluations": 0, "_interrupts": 0, "_interrupts_before": self._interrupts}
        vars(call).update(state, scheduler=copy.copy(self.scheduler))
        return call

    def _end_call(self) -> None:
        """Move offloaded networks back, and leave what diffusers leaves on a pipeline after a call."""
        vars(self._called).update(_guidance_scale=self._guidance_scale, _num_timesteps=self._num_timesteps)
        self._called.maybe_free_model_hooks()

    @property
    def _interrupt(self) -> bool:
        """Whether a call is interrupted: set on its copy, or on the pipeline itself since the call began."""
        if self._called is None:
            return self._interrupts > 0
        return self._interrupts > 0 or self._called._interrupts > self._interrupts_before

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._interrupts += bool(value)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the last step, which callbacks may set."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The timestep of the step under way, for callbacks of step caches; None between steps."""
        return self._current_timestep

    @property
    def _execution_device(self) -> torch.device:
        """The device of the networks: where it was noted, because diffusers looks at every module, else the stock's."""
        return vars(self).get("_device") or super()._execution_device  # type: ignore[misc, no-any-return]

    @property
    def _networks(self) -> list[Any]:
        """The networks that are evaluated: one, or two of which each has its part of the steps."""
        found = [getattr(self, name, None) for name in ("unet", "transformer", "transformer_2")]
        return [network for network in found if network is not None]

    @property
    def _network(self) -> Any:
        return self.unet if hasattr(self, "unet") else self.transformer

    def _count(self, network: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Add the rows of a network call to the count of evaluations; raise UnsupportedError if a cache mixes them."""
        rows = len(args[0] if args else kwargs["hidden_states"])
        self._caches.check_call(network, rows)
        self._evaluations += rows

    def _given_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options without those that are None or have the stock call's default."""
        stock = inspect.signature(stock_class(type(self)).__call__).parameters
        plain = (bool, int, float, str)
        return {
            name: value
            for name, value in options.items()
            if not (name in stock or name in self._options)
            or not (value is None or (isinstance(value, plain) and name in stock and value == stock[name].default))
        }

    def _check_prompts(self, prompt: str | Sequence[str] | None, given: dict[str, Tensor]) -> list[str] | None:
        """Return the prompts as a list, or None if embeddings are given instead."""
        if (prompt is None) == ("prompt_embeds" not in given):
            raise ConfigurationError("give either prompts or prompt_embeds, and not both")
        for name, rows in given.items():
            if name in (*TEXTS, *IMAGE_PROMPTS):
                continue
            bad = [number for number, row in enumerate(rows) if not torch.isfinite(row).all()]
            if bad:
                raise DataError(f"{name} holds values that are not finite, in rows {bad}; leave those out")
        if prompt is None:
            return None
        if all(getattr(self, name, None) is None for name in ("text_encoder", "text_encoder_2", "text_encoder_3")):
            raise ConfigurationError("this pipeline was loaded without a text encoder; give prompt_embeds, not prompts")
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


@contextmanager
def _loading(path: str | Path) -> Iterator[None]:
    """Turn what the libraries raise for a pipeline that cannot be loaded into a DataError of one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        where = "" if Path(path).exists() else "there is no such folder; as a name on the hub: "
        raise DataError(
            f"{path} cannot be loaded ({where}{reason}); give a folder or hub name of diffusers' form, with weights as "
            "safetensors"
        ) from error


def _copies(prompts: Sequence[str], keys: Sequence[Hashable], seed: Any, images: int) -> list[list[int]]:
    """Return lists of the numbers of equal prompts, by the seeds of their first images if each image's is given."""
    found = equal(list(zip(prompts, keys, strict=True)))
    if seed is None or single(seed) or len(seed) != len(prompts) * images:
        return found
    # The order of the list must not decide which copy shares with which of another prompt.
    return [sorted(numbers, key=lambda number: int(seed[number * images])) for numbers in found]


def _groups(
    groups: Any,
    prompts: list[str] | None,
    keys: Sequence[Hashable],
    copies: Sequence[Sequence[int]],
    share_ratio: float | Sequence[float],
    steps: int,
    predicted: Callable[[], np.ndarray] | None,
    made_for: tuple[str, float, float],
) -> list[list[int]]:
    """Return the groups that are given, or form groups of `copies`: lists of the numbers of equal prompts.

    groups       as given to the call
    prompts      the prompts, or None
    keys         a share key for each prompt
    copies       numbers of equal prompts
    share_ratio  one, or one for each given group
    steps        steps of the plan
    predicted    returns the embeddings of the prompts' first predictions, if it is to group by them
    made_for     scheduler, first timestep and guidance scale of the call
    """
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
    if share_ratio == 0 or len(copies) == 1:
        return [[number] for number in range(len(copies))]
    first = [numbers[0] for numbers in copies]
    # A budget counts whole steps, as the plan does.
    ratio = shared_steps(share_ratio, steps) / steps  # type: ignore[arg-type]
    texts = None if prompts is None else [prompts[number] for number in first]
    if grouping.by == "prediction" and grouping.embeddings is None and predicted is not None:
        grouping = replace(grouping, embeddings=predicted())
    return grouping.of_rows(first, len(keys)).groups(texts, [keys[number] for number in first], ratio, made_for)


def adopted(family: Any, pipeline: Any) -> Any:
    """Return an instance of a shared-sampling class with the parts and settings of a stock pipeline."""
    # Not constructed anew, which would change the configuration of the scheduler.
    shared = family.__new__(family)
    vars(shared).update(vars(pipeline))
    return shared


def is_known(stock: Any) -> bool:
    """Return whether a stock class, or a class it derives from, is supported without a proof."""
    from sage.sampling.families.table import TABLE

    return any(base.__name__ in TABLE for base in stock.__mro__)


def trainable() -> list[str]:
    """Return the names of the stock classes that `sage.training` can fine-tune, with the classes derived from them."""
    from sage.sampling.families.table import TABLE

    return [name for name, family in TABLE.items() if family.trained]


def is_trainable(stock: Any) -> bool:
    """Return whether a stock class, or a shared-sampling class, can be fine-tuned."""
    known = trainable()
    return any(base.__name__ in known for base in stock.__mro__)


def stock_class(family: type) -> Any:
    """Return the class of diffusers that a family derives from."""
    return next(base for base in family.__mro__ if base.__module__.startswith("diffusers."))


@functools.cache
def _family(stock: Any) -> Any:
    """Return the shared-sampling class for a stock class, or for a subclass of one with what it overrides."""
    from sage.sampling.families import derived
    from sage.sampling.families.table import TABLE, shared_class

    if issubclass(stock, SharedSamplingPipeline):
        return stock
    for base in stock.__mro__:
        if base.__name__ in TABLE:
            if stock.__call__ is not base.__call__:
                raise UnsupportedError(
                    f"{stock.__name__} overrides __call__, whose loop may be another one; use {base.__name__}, or "
                    "override what that calls, such as encode_prompt"
                )
            return shared_class(stock)
    known = ", ".join(sorted(TABLE))
    try:
        derived.candidates(stock)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}; supported are {known}") from None
    raise UnsupportedError(
        f"{stock.__name__} can share sampling only if it is proved to: `sage doctor --pipeline` tries it, and "
        f"sage.sampling.proof.proved(pipeline) returns it; supported without are {known}"
    )


def _callback_inputs(callback: Any, names: Sequence[str]) -> Sequence[str]:
    """Return the names of the tensors that a callback gets; those of diffusers name what they need."""
    for one in callback.callbacks if isinstance(callback, MultiPipelineCallbacks) else [callback]:
        if isinstance(one, IPAdapterScaleCutoffCallback):
            raise UnsupportedError(
                "IPAdapterScaleCutoffCallback changes the networks, and batches are not all at the same step; leave it "
                "out, or call set_ip_adapter_scale before the call"
            )
    return callback.tensor_inputs if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)) else names


def _batch_sizes(batch_size: int | Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Return the largest number of latents in a network call, and the sizes that calls are padded to, ascending."""
    given: Any = batch_size
    if isinstance(given, (list, tuple)):
        sizes = tuple(sorted({whole("a size in batch_size", size) for size in given}))
        if not sizes or sizes[0] < 1:
            raise ConfigurationError(f"batch_size is {batch_size}; give one number or several, each at least 1")
        return sizes[-1], sizes
    if not isinstance(given, (int, np.integer)):
        raise ConfigurationError(
            f"batch_size is {batch_size!r}; give a whole number, or several, or leave it out for the default"
        )
    return whole("batch_size", given), ()


def _negatives(negative: str | Sequence[str] | None, count: int) -> list[str] | None:
    if negative is None or isinstance(negative, str):
        return None if negative is None else [negative] * count
    if len(negative) != count:
        raise ConfigurationError(
            f"{len(negative)} negative prompts were given for {count} prompts; give one, or one for each"
        )
    return list(negative)


def _texts(name: str, texts: str | Sequence[str], prompts: list[str] | None) -> list[str]:
    """Return the texts of a further encoder, one for each prompt."""
    if prompts is None:
        raise ConfigurationError(f"{name} is for prompts, but embeddings were given instead of them; leave it out")
    found = [texts] * len(prompts) if isinstance(texts, str) else list(texts)
    if len(found) != len(prompts) or not all(isinstance(text, str) for text in found):
        raise ConfigurationError(
            f"{name} has {len(found)} entries for {len(prompts)} prompts; give a text, or one each"
        )
    return found
