"""The segment driver: any stock pipeline of diffusers whose loop calls `scheduler.step` once in each step.

The stock `__call__` is not written again for a family; it is run in segments. A segment's scheduler is a copy whose
`set_timesteps` sets one timestep of the whole schedule, or none. The call gets the latents at that step and the
conditions, and stops at `scheduler.step`: what it hands over there is the guided prediction. A segment without
timesteps decodes. So embeddings, guidance, positions and decoding are the stock pipeline's own, and the denoising loop
(`sage.sampling.loop`) is the same for every family.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType, SimpleNamespace
from typing import Any, ClassVar, Literal

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from sage.errors import ConfigurationError, UnsupportedError
from sage.numbers import whole
from sage.sampling.conditions import Condition, stacked
from sage.sampling.families.image_prompts import ImagePrompted, image_embeddings
from sage.sampling.pipeline import IMAGE_PROMPTS, TEXTS, SharedSamplingPipeline, stock_class

# Arguments of the stock call that the driver gives itself; the others are options of the shared call.
DRIVEN = {
    "self", "prompt", "negative_prompt", "height", "width", "num_inference_steps", "num_images_per_prompt",
    "num_videos_per_prompt", "num_waveforms_per_prompt", "generator", "latents", "output_type", "return_dict",
    "callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
}  # fmt: skip


# Arguments of the stock call that are not supported unless a row says so: they bring an image or a sound of one prompt.
UNSUPPORTED = {
    "image", *IMAGE_PROMPTS, *(f"negative_{name}" for name in IMAGE_PROMPTS), "initial_audio_waveforms",
    "initial_audio_sampling_rate",
}  # fmt: skip

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# By the `sample_size` of a PixArt network, the sizes that it was trained on. An image is drawn at the size whose aspect
# ratio is nearest to the requested one, then resized and cropped.
_BINS = {
    128: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
    64: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
    32: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
}
# Sizes that SDXL reads.
_PAIRS = tuple(
    prefix + name for prefix in ("", "negative_") for name in ("original_size", "crops_coords_top_left", "target_size")
)
# The name of the condition that holds the control images, or their latents.
_CONTROL = "control"
# Noise that is drawn for the latents of control images, in the order of their rows.
_CONTROL_NOISE = ("control_noise_without", "control_noise")


@dataclass(frozen=True)
class Family:
    """What the driver must know of a stock pipeline.

    stock       name of its class
    inputs      name of each condition, and the argument of the call that takes it; the argument without text is the
                same with "negative_" before it. The mask of condition x is called x_mask.
    encoded     for each call of `encode_prompt`: the arguments that its results become, in order; None: not an argument
    guidance    the argument that takes the guidance scale
    embedded    the guidance scale is an input of the network, which is evaluated once
    asks        guidance needs a negative prompt: without one the stock pipeline does not guide
    implicit    without a negative prompt the stock pipeline guides by zeros that it makes itself
    encode      instead of `encoded`, if `encode_prompt` returns no arguments of the call: (pipeline, prompts, negative
                prompts or None) to embeddings by argument
    control     the argument that takes a control image for each prompt, or one for all
    posterior   None, or by what the stock call draws the control images' latents from the autoencoder's posterior:
                "generator", each image's before its noise, or "global", torch's own generator, also without text
    images      image prompts (IP-Adapter) as the stock call takes them
    fixed       options that have to keep their default: the stock loop counts its steps with them, or may
    defaults    defaults of options that mean the same as the stock ones, but do not wait for the device in each step
    output      the attribute of the stock output: images, frames, audios
    trained     whether it can be fine-tuned: its latents are those of one image, its network takes a time for each row
    sized       whether the network's configuration has the size of the images that it is made for, `sample_size`
    counted     whether what the text encoders leave out of a text is told: those of CLIP and BERT read what their
                tokenizers say, those of T5 `max_sequence_length` tokens
    callbacks   what callbacks get beside the latents, by its name in the stock loop: the name of a condition, of which
                the rows without text come first, or a function of the call's pipeline that returns one row of each
    """

    stock: str
    inputs: Mapping[str, str]
    encoded: tuple[tuple[str | None, ...], ...] = ()
    guidance: str = "guidance_scale"
    embedded: bool = False
    asks: bool = False
    implicit: bool = False
    encode: "Callable[[Any, list[str], list[str] | None], dict[str, Any]] | None" = None
    control: str | None = None
    posterior: Literal["generator", "global"] | None = None
    images: bool = False
    fixed: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    output: str = "images"
    trained: bool = False
    sized: bool = False
    counted: bool = False
    callbacks: "Mapping[str, str | Callable[[Any], tuple[Tensor, Tensor]]]" = field(default_factory=dict)


class _Stopped(Exception):
    """A stock call has reached the point that it was run for; `value` is what it had there."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


@dataclass
class _Call:
    """What a call of the shared pipeline keeps: arguments of its stock calls, and how the stock one draws noise."""

    arguments: dict[str, Any] = field(default_factory=dict)
    example: Condition = field(default_factory=dict)
    # The conditions of the call's first prompts, until they are taken: the example is one of them.
    first: Condition = field(default_factory=dict)
    guided: bool = False
    noise: dict[str, Any] = field(default_factory=dict)
    # What `prepare_latents` returns beside the latents, by number of rows.
    positions: dict[int, Any] = field(default_factory=dict)
    networks: dict[str, Any] = field(default_factory=dict)
    # The shape (channels, height, width) of a control image, if the stock call encodes it to latents, and how these lie
    # in memory, which decides how what reads them rounds.
    pixels: tuple[int, ...] = ()
    layout: torch.memory_format = torch.contiguous_format
    # Whether a guidance scale guides, by scale.
    guides: dict[float, bool] = field(default_factory=dict)
    steps: "_Steps | None" = None
    # Whether its stock calls keep gradients.
    trains: bool = False


class SegmentedPipeline(SharedSamplingPipeline):
    """A shared-sampling pipeline that drives its stock pipeline in segments; `family` says what it must know of it."""

    # Of the base class; that of a family gets the parameters of its stock call.
    __call__ = SharedSamplingPipeline.__call__

    # Provided by the stock class, if it has a ControlNet.
    controlnet: Any
    control_image_processor: Any
    image_processor: Any

    family: ClassVar[Family]
    _stock: ClassVar[Any]
    _segmented: _Call

    def _begin_call(self) -> Any:
        call = super()._begin_call()
        vars(call)["_segmented"] = _Call()
        return call

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
        """Set the timesteps as the stock pipeline does for this size, and learn how it draws its noise.

        Of the prompts, the first `batch_size` are encoded for it; the others are later.
        """
        for name in self.family.fixed:
            if options[name] != self._options[name]:
                raise UnsupportedError(
                    f"{name}={options[name]!r} of {self.family.stock} may depend on the number of the step, which a "
                    f"segment does not know; leave it at {self._options[name]!r}"
                )
        for name in _PAIRS:
            if options.get(name) is not None and len(options[name]) != 2:
                raise ConfigurationError(f"{name} is {options[name]}; give two numbers, (height, width)")
        height, width = options["size"]
        if self.family.control is not None:
            count = len(given["prompt_embeds"] if prompts is None else prompts)
            images = self._control_images(given.get(self.family.control), count, height, width)
            given[self.family.control] = images
        self._begin_segments(steps, scale, options)
        self._segmented.guided = self._is_guided(scale, negatives, given)
        mixed = self._segmented.guided and options.get("negative_original_size") and options.get("negative_target_size")
        for name in ("unet", "transformer", "transformer_2"):
            if (network := getattr(self, name, None)) is not None:
                self._segmented.networks[name] = _Counted(network, self._count, _sizes_apart if mixed else None)
        if self._encodes_control:
            self._segmented.pixels = tuple(images.shape[1:])
            given |= self._control_noise(count)
        # The latents of control images, which are encoded here, are not drawn yet.
        count = 1 if self._encodes_control else batch_size
        some = None if prompts is None else prompts[:count], None if negatives is None else negatives[:count]
        device = self._execution_device
        rows = {
            name: [row.to(device) if torch.is_tensor(row) else row for row in values[:count]]
            if isinstance(values, list)
            else values[:count].to(device)
            for name, values in given.items()
        }
        with _own_schedule(self.scheduler, options):
            first = self._encode(*some, self._segmented.guided, rows, options)
            self._segmented.example = {name: values[:1] for name, values in first.items()}
            self._segmented.first = {} if self._encodes_control else first
            conditions = self._example(1)
            self.scheduler = self._reach("set_timesteps", conditions)
        self._segmented.noise = self._reach("prepare_latents", conditions)

    def _first_conditions(self) -> Condition:
        """Return, once, the conditions of the call's first prompts, as `_encode` returns them; {} if there are none."""
        first, self._segmented.first = self._segmented.first, {}
        return first

    def _begin_segments(self, steps: int, scale: float, options: dict[str, Any]) -> None:
        """Begin the state of a call with the arguments that all of its stock calls have."""
        height, width = options["size"]
        # Some stock calls write into a dictionary that they are given.
        arguments = {
            name: dict(value) if isinstance(value, dict) else value for name, value in options.items() if name != "size"
        }
        arguments |= {"num_inference_steps": steps, self.family.guidance: scale}
        arguments |= {name: side for name, side in (("height", height), ("width", width)) if side is not None}
        vars(self)["_device"] = self._execution_device
        if "negative_prompt" in inspect.signature(self._stock.__call__).parameters:
            arguments["negative_prompt"] = None
        self._segmented.arguments = arguments

    def for_reading(self, size: Sequence[int]) -> Any:
        """Return a copy whose `_encode` works without a call that is under way; it keeps gradients."""
        call = self._begin_call()
        call._begin_segments(1, 0.0, self._training_options(size))
        call._segmented.trains = True
        return call

    def for_training(self, steps: int, size: Sequence[int], condition: Condition, scale: float) -> Any:
        """Return a copy for training, as the base class does; its latents are those of `packed`."""
        call = self._begin_call()
        options = self._training_options(size)
        given = call._arguments({name: values[:1] for name, values in condition.items()}, guided=False)
        call._prepare_call(None, None, given, steps, scale if self.family.embedded else 0.0, options)
        call._segmented.trains = True
        return call

    def _training_options(self, size: Sequence[int]) -> dict[str, Any]:
        """Return the options of a call for images of this size in pixels, whatever sizes the family draws at."""
        binning = {"use_resolution_binning": False} if "use_resolution_binning" in self._options else {}
        return {**self._options, **binning, "size": tuple(size)}

    def packed(self, latents: Tensor) -> Tensor:
        """Return latents (n, channels, height, width) as the network takes them: some take rows of patches."""
        if not hasattr(self, "_pack_latents"):
            return latents
        return self._pack_latents(latents, *latents.shape)  # type: ignore[no-any-return]

    def unpacked(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Return what `packed` has packed; height and width are those of the unpacked latents."""
        if not hasattr(self, "_unpack_latents"):
            return latents
        factor = self.vae_scale_factor
        return self._unpack_latents(latents, height * factor, width * factor, factor)  # type: ignore[no-any-return]

    def _check_prompts(self, prompt: str | Sequence[str] | None, given: dict[str, Any]) -> list[str] | None:
        return super()._check_prompts(prompt, {name: v for name, v in given.items() if name != self.family.control})

    def _control_images(self, images: Any, count: int, height: int | None, width: int | None) -> Tensor:
        """Return control images (count, channels, height, width) in [0, 1], from one for each prompt or one for all."""
        argument = self.family.control
        if images is None:
            raise ConfigurationError(f"{self.family.stock} needs {argument}: one for each prompt, or one for all")
        if not hasattr(self.controlnet, "config"):
            raise UnsupportedError(f"{self.family.stock} with several ControlNets cannot share sampling; give it one")
        if self.family.posterior is None:
            images = self.control_image_processor.preprocess(images, height=height, width=width)
        elif not torch.is_tensor(images):  # tensors are taken as they are
            images = self.image_processor.preprocess(images, height=height, width=width)
        found: Tensor = images.float()
        if len(found) not in (1, count):
            raise ConfigurationError(
                f"{len(found)} of {argument} were given for {count} prompts; give one, or one each"
            )
        return found.expand(count, *found.shape[1:])

    @property
    def _encodes_control(self) -> bool:
        """Whether the stock call encodes control images to latents; a ControlNet may read the pixels itself."""
        return self.family.posterior is not None and getattr(self.controlnet, "input_hint_block", None) is None

    def _posterior_shape(self) -> tuple[int, ...]:
        _, height, width = self._segmented.pixels
        return self.vae.config.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def _control_noise(self, count: int) -> dict[str, Tensor]:
        """Return the noise of the control images' latents: of torch's own generator, or 0 until the images' draw it."""
        if self.family.posterior == "generator":
            return {_CONTROL_NOISE[1]: torch.zeros(1).expand(count, *self._posterior_shape())}
        names = _CONTROL_NOISE if self._segmented.guided else _CONTROL_NOISE[1:]
        shape = (len(names) * count, *self._posterior_shape())
        drawn = randn_tensor(shape, device=self._execution_device, dtype=self._network.dtype)
        return dict(zip(names, drawn.split(count), strict=True))

    def _drawn_before(self, generators: Any, count: int) -> dict[str, Tensor]:
        """Return the noise of the control images' latents if the stock call draws it from the images' generators."""
        if self.family.posterior != "generator" or not self._encodes_control:
            return {}
        shape = (count, *self._posterior_shape())
        return {_CONTROL_NOISE[1]: randn_tensor(shape, generators, self._execution_device, self.vae.dtype)}

    def _control_conditions(self, given: Mapping[str, Any], images: Tensor) -> dict[str, Tensor]:
        """Return the control images of some prompts as a condition, or their latents if the stock call encodes them."""
        if not self._encodes_control:
            return {_CONTROL: images}
        dtype = self.vae.dtype if self.family.posterior == "generator" else self._network.dtype
        noise = {name: given[name] for name in _CONTROL_NOISE if name in given}
        pixels = images.to(self._execution_device, dtype).repeat(len(noise), 1, 1, 1)
        posterior = self.vae.encode(pixels).latent_dist
        drawn = posterior.mean + posterior.std * torch.cat([*noise.values()])
        if drawn.is_contiguous(memory_format=torch.channels_last):
            self._segmented.layout = torch.channels_last
        latents = drawn.split(len(images))
        return dict(zip(("negative_" + _CONTROL, _CONTROL)[-len(noise) :], latents, strict=True))

    def _is_guided(self, scale: float, negatives: Any, given: Mapping[str, Any]) -> bool:
        asked = negatives is not None or any(name.startswith("negative_") for name in given)
        return self._guides(scale) and (asked or not self.family.asks)

    def _guides(self, scale: float) -> bool:
        if self.family.embedded:
            return False
        own = getattr(self._stock, "do_classifier_free_guidance", None)
        if own is None:
            return scale > 1
        known = self._segmented.guides if "_segmented" in vars(self) else {}
        if scale not in known:
            inner = copy.copy(self)
            vars(inner)["_guidance_scale"] = scale
            known[scale] = bool(own.fget(inner))
        return known[scale]

    def _size(self, height: int | None, width: int | None) -> Any:
        """Return the height and width of the images, None for what the stock call decides; raise for what none has."""
        if not self.family.sized:
            return height, width
        config = self._network.config
        default = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        size = (
            whole("height", height) if height else default[0] * self.vae_scale_factor,
            whole("width", width) if width else default[1] * self.vae_scale_factor,
        )
        multiple = self.vae_scale_factor * config.get("patch_size", 1)
        if size[0] % multiple or size[1] % multiple:
            raise ConfigurationError(f"height {size[0]} and width {size[1]} must be multiples of {multiple}")
        return size

    def drawn_size(self, height: int | None = None, width: int | None = None) -> Any:
        """Return the size at which images of this height and width are drawn, before they are resized and cropped.

        (None, None) if the network is made for no size and none is given.
        """
        size = self._size(height, width)
        ratios = _BINS.get(self._network.config.get("sample_size"))
        if not self.family.sized or ratios is None or not self._options.get("use_resolution_binning"):
            return size
        return self.image_processor.classify_height_width_bin(*size, ratios=ratios)

    def _encode(
        self,
        prompts: list[str] | None,
        negatives: list[str] | None,
        guided: bool,
        given: dict[str, Any],
        options: dict[str, Any],
    ) -> Condition:
        beside = self._beside(given, guided)
        if prompts is not None and self.family.encode is not None:
            given = self.family.encode(self, prompts, negatives if guided else None)
        elif prompts is not None or self._reads_embeddings(given, guided):
            given = self._encoded(prompts, negatives, guided, given)
        without = guided and not (self.family.implicit and not any(name.startswith("negative_") for name in given))
        found: dict[str, Tensor] = {}
        for prefix in ("negative_", "") if without else ("",):
            found |= {prefix + name: rows for name, rows in self._condition(given, prefix).items()}
        return stacked(found | beside)

    def _reads_embeddings(self, given: Mapping[str, Any], guided: bool) -> bool:
        """Return whether `encode_prompt` adds to embeddings that are given: negative ones, or what a subclass has."""
        if not self.family.encoded:
            return False
        if self._stock.encode_prompt is not stock_class(type(self)).encode_prompt:
            return True
        has_encoder = any(getattr(self, name, None) is not None for name in TEXT_ENCODERS)
        needed = [argument for name, argument in self.family.inputs.items() if not name.endswith("_mask")]
        return guided and has_encoder and any("negative_" + argument not in given for argument in needed)

    def _encoded(
        self, prompts: list[str] | None, negatives: list[str] | None, guided: bool, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the embeddings, by argument, that the stock call makes of prompts or of given embeddings."""
        embeddings = [prefix + name for name in self.family.inputs.values() for prefix in ("negative_", "")]
        further = (*TEXTS, self.family.control, *(embeddings if prompts is None else ()))
        arguments = {name: given[name] for name in further if name is not None and name in given}
        if prompts is not None:
            arguments["prompt"] = list(prompts)  # some stock pipelines write into the list
        if not guided and not self.family.embedded:
            arguments[self.family.guidance] = 0.0
        elif "negative_prompt" in self._segmented.arguments:
            # Of some stock pipelines "", which is not the same as None.
            default = inspect.signature(self._stock.__call__).parameters["negative_prompt"].default
            arguments["negative_prompt"] = default if negatives is None else negatives
        found: dict[str, Any] = self._reach("encode_prompt", arguments)
        made = {name: rows for name, rows in found.items() if rows is not None}
        return made if prompts is not None else {**given, **made}

    def _beside(self, given: Mapping[str, Any], guided: bool) -> dict[str, Tensor]:
        """Return the conditions beside the text."""
        return {} if self.family.control is None else self._control_conditions(given, given[self.family.control])

    def _condition(self, given: Mapping[str, Any], prefix: str) -> Condition:
        """Return the conditions among embeddings by argument; lists of tensors become rows with a mask."""
        found: dict[str, Tensor] = {}
        for name, argument in self.family.inputs.items():
            rows = given.get(prefix + argument)
            if isinstance(rows, list):
                lengths = torch.tensor([len(row) for row in rows])
                rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
                found[f"{name}_mask"] = (torch.arange(rows.shape[1]) < lengths[:, None]).to(rows.device)
            elif rows is None and name.endswith("_mask"):
                states = found[name.removesuffix("_mask")]
                rows = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            elif rows is None:
                raise ConfigurationError(
                    f"{self.family.stock} needs {prefix + argument} beside the other embeddings; give it, or prompts"
                )
            elif name.endswith("_mask") and rows.shape[1] > (states := found[name.removesuffix("_mask")]).shape[1]:
                rows = rows.view_as(states)[..., 0]  # AuraFlow's has a value for each feature of a token
            found[name] = rows
        return found

    def _arguments(self, condition: Condition, guided: bool) -> dict[str, Any]:
        """Return the arguments of the stock call for conditions (n, ...)."""
        found: dict[str, Any] = {}
        without = guided and any(name.startswith("negative_") for name in condition)
        for prefix in ("negative_", "") if without else ("",):
            for name, argument in self.family.inputs.items():
                rows: Any = condition[prefix + name]
                masks = condition.get(f"{prefix}{name}_mask")
                if masks is not None and f"{name}_mask" not in self.family.inputs:  # came as a list, see `_condition`
                    rows = [row[mask] for row, mask in zip(rows, masks, strict=True)]
                found[prefix + argument] = rows
        if self.family.control is not None:
            rows = condition[_CONTROL]
            if (without_text := condition.get("negative_" + _CONTROL)) is not None and guided:
                rows = torch.cat([without_text, rows])
            found[self.family.control] = rows
        return found

    def _predict(self, x: Tensor, t: Tensor, condition: Condition, scale: float, options: dict[str, Any]) -> Tensor:
        guided, steps = self._segmented.guided and self._guides(scale), self._segmented.steps
        if steps is None or steps.condition is not condition or steps.guided != guided:
            steps = self._segmented.steps = _Steps(self, condition, guided)
        # Without guidance the stock call may say of every scale above 1 that it does not guide.
        told = scale if guided or self.family.embedded else min(scale, 0.0)
        return steps.predicted(x, t, told)

    def _finish(self, latents: Tensor, output_type: str, options: dict[str, Any]) -> tuple[Any, list[bool] | None]:
        self._segmented.steps = None  # the pack has ended, and its copy of the pipeline refers to this one
        scheduler = _segment(self.scheduler, lambda: self.scheduler.timesteps[:0], None)
        self._finite = [True] * len(latents)
        processors = {
            name: self._watched(name) for name in ("image_processor", "video_processor") if hasattr(self, name)
        }
        inner = self._inner(scheduler, prepare_latents=lambda *args, **kwargs: self._placed(latents), **processors)
        arguments = self._segmented.arguments | self._example(len(latents)) | {"output_type": output_type}
        result = self._call_stock(inner, arguments)
        out = getattr(result, self.family.output)
        if not processors and output_type != "latent":
            self._finite = torch.as_tensor(out).isfinite().flatten(1).all(1).tolist()
        return out, getattr(result, "nsfw_content_detected", None)

    def _watched(self, name: str) -> Any:
        """Return a copy of a processor that notes which images it gets are finite."""
        own = getattr(self, name)
        processor = copy.copy(own)

        def watched(original: Callable[..., Any]) -> Callable[..., Any]:
            def postprocess(*args: Any, **kwargs: Any) -> Any:
                bound = inspect.signature(original).bind(*args, **kwargs)
                name, images = next(iter(bound.arguments.items()))  # `image` or `video`
                finite = images.isfinite().flatten(1).all(1)
                # A safety checker gets them, too, and blanks some before the other call.
                self._finite = [a and b for a, b in zip(self._finite, finite.tolist(), strict=True)]
                bound.arguments[name] = images.where(finite.reshape(-1, *[1] * (images.ndim - 1)), 0)
                return original(*bound.args, **bound.kwargs)

            return postprocess

        for method in ("postprocess", "postprocess_video"):
            if hasattr(own, method):
                # Bound to the own one: postprocess_video calls postprocess for each clip, which has its frames as rows.
                setattr(processor, method, watched(getattr(own, method)))
        return processor

    def _example(self, rows: int) -> dict[str, Any]:
        """Return arguments of the stock call for this many rows, all with the conditions of the first prompt."""
        example = self._segmented.example
        repeated = {name: values[:, 0].expand(rows, *values.shape[2:]) for name, values in example.items()}
        return self._arguments(repeated, self._segmented.guided)

    def _noise(self, generators: Generator | Sequence[Generator], count: int, options: dict[str, Any]) -> Tensor:
        self._drawn_before(generators, count)
        drawn = self._drawn(generators, count)
        latents: Tensor = drawn[0] if isinstance(drawn, tuple) else drawn
        return latents

    def _as_drawn(self, latents: Tensor, options: dict[str, Any]) -> Tensor:
        if latents.ndim == 1 + len(self._latents_shape(options)):
            return latents
        drawn = self._drawn(Generator(), len(latents), latents)  # of other stock calls the latents are packed by it
        packed: Tensor = drawn[0] if isinstance(drawn, tuple) else drawn
        return packed

    def _latents_shape(self, options: dict[str, Any]) -> tuple[int, ...]:
        return tuple(self._noise(Generator(), 1, options).shape[1:])

    def _scheduled(self, steps: int, height: int | None = None, width: int | None = None) -> Any:
        """Return the scheduler with timesteps set; a shift by the image size changes neither their number nor 1."""
        scheduler = copy.copy(self.scheduler)
        scheduler.set_timesteps(steps, **({"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}))
        return scheduler

    def _drawn(self, generators: Any, count: int, latents: Tensor | None = None) -> Any:
        """Return what the stock `prepare_latents` returns, by default for fresh noise: latents, maybe positions."""
        inner = self._inner(_segment(self.scheduler, lambda: self.scheduler.timesteps, None))
        changed = {"batch_size": count, "generator": generators, "latents": latents}
        return self._stock.prepare_latents(inner, **(self._segmented.noise | changed))

    def _placed(self, latents: Tensor) -> Any:
        """Return latents as `prepare_latents` returns them: with their positions, if it returns these, too."""
        count, known = len(latents), self._segmented.positions
        if count not in known:
            drawn = self._drawn(Generator(), count)
            known[count] = drawn[1:] if isinstance(drawn, tuple) else None
        positions = known[count]
        return latents if positions is None else (latents, *positions)

    def _tokenizers(self, options: Mapping[str, Any]) -> list[tuple[Any, int]]:
        """Return the tokenizers of the text encoders that there are, with the number of tokens that these read."""
        ends = [name.removeprefix("text_encoder") for name in TEXT_ENCODERS if getattr(self, name, None) is not None]
        found = [tokenizer for end in ends if (tokenizer := getattr(self, "tokenizer" + end, None)) is not None]
        longest = options.get("max_sequence_length")
        return [
            (one, int(one.model_max_length if longest is None or "CLIP" in type(one).__name__ else longest))
            for one in found
        ]

    def _count_truncated(self, texts: list[str], options: Mapping[str, Any]) -> list[int]:
        """Return the number of each text's tokens beyond the limit; of several encoders, of the one that reads most."""
        tokenizers = self._tokenizers(options) if self.family.counted else []
        if not tokenizers:
            return [0] * len(texts)
        if hasattr(self, "_text_preprocessing"):
            texts = self._text_preprocessing(texts, options["clean_caption"])
        beyond = []
        for tokenizer, limit in tokenizers:
            # Textual inversions of several tokens.
            convert = getattr(self, "maybe_convert_prompt", lambda texts, tokenizer: texts)
            beyond.append([max(0, len(ids) - limit) for ids in tokenizer(convert(texts, tokenizer)).input_ids])
        return [min(counts) for counts in zip(*beyond, strict=True)]

    # Callbacks.

    def _callback_tensors(self, names: Sequence[str], condition: Condition) -> dict[str, Tensor]:
        """Return what a callback gets of a pack's conditions: under guidance the rows without text come first."""
        found = {}
        for name in names:
            source = self.family.callbacks[name]
            if callable(source):
                rows = len(next(iter(condition.values())))
                pair = [one.expand(rows, *one.shape[1:]) for one in source(self)]
            else:
                pair = [condition[prefix + source] for prefix in ("negative_", "") if prefix + source in condition]
            found[name] = torch.cat(pair) if self._segmented.guided else pair[-1]
        return found

    # Stock calls.

    def _inner(self, scheduler: Any, **replaced: Any) -> Any:
        """Return a copy of this pipeline for one stock call, with this scheduler and these methods."""
        inner = copy.copy(self)
        vars(inner).update(self._segmented.networks)
        vars(inner).update(scheduler=scheduler, maybe_free_model_hooks=lambda: None, **replaced)
        # It is not interrupted: a step that has begun is finished.
        vars(inner).update(progress_bar=_NoBar, _called=None, _interrupts=0)
        return inner

    def _call_stock(self, inner: Any, arguments: dict[str, Any]) -> Any:
        return self._stock_call(inner, **self._taken(inner, arguments))

    @property
    def _stock_call(self) -> Any:
        """The stock call, for training without the decorator that turns gradients off."""
        return inspect.unwrap(self._stock.__call__) if self._segmented.trains else self._stock.__call__

    def _taken(self, inner: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments as the stock call takes them; control images that it encodes come as their latents.

        For these `inner` gets an autoencoder that encodes blank images to them.
        """
        control = self.family.control
        if control is None or not self._encodes_control:
            return arguments
        latents = arguments[control].contiguous(memory_format=self._segmented.layout)
        channels, height, width = self._segmented.pixels
        rows = len(arguments["prompt"] if "prompt" in arguments else arguments["prompt_embeds"])
        vars(inner)["vae"] = _Encoded(self.vae, latents)
        return arguments | {control: latents.new_zeros(1).expand(rows, channels, height, width)}

    def _reach(self, point: str, arguments: Mapping[str, Any]) -> Any:
        """Run the stock call until a point before its loop, and return what it has there.

        encode_prompt    the embeddings, by argument
        set_timesteps    a scheduler with the timesteps of the whole schedule
        prepare_latents  the arguments of `prepare_latents`
        """
        found: dict[str, Any] = {}
        calls = iter(self.family.encoded)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            results = self._stock.encode_prompt(self, *args, **kwargs)
            found.update((name, value) for name, value in zip(next(calls), results, strict=True) if name)
            return results

        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(self._stock.prepare_latents).bind(self, *args, **kwargs).arguments
            _stop({name: value for name, value in bound.items() if name != "self"})

        replaced: dict[str, Any] = {}
        if point == "encode_prompt":
            # A call that encodes control images does so before it prepares the latents.
            ends = ("prepare_image",) if self._encodes_control else ("prepare_latents",)
            replaced = {"encode_prompt": encode_prompt} | dict.fromkeys(ends, lambda *args, **kwargs: _stop(None))
        if point == "prepare_latents":
            replaced = {"prepare_latents": prepare_latents}
            scheduler = _segment(self.scheduler, lambda: self.scheduler.timesteps, None)
        else:
            scheduler = _recorder(self.scheduler)
        try:
            self._call_stock(self._inner(scheduler, **replaced), self._segmented.arguments | dict(arguments))
        except _Stopped as stopped:
            return found if point == "encode_prompt" else stopped.value
        raise self._ended_before(point)

    def _ended_before(self, point: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.family.stock} ended before {point}; its loop is not one that segments can drive"
        )


class _Steps:
    """The steps of a pack: stock calls of one timestep each, on one copy of the pipeline and with one condition.

    The stock call encodes even embeddings, and SDXL's makes its size ids: in the first step only, so that no other
    copies to the device, or waits.
    """

    def __init__(self, pipe: SegmentedPipeline, condition: Condition, guided: bool) -> None:
        self.condition, self.guided = condition, guided
        self._pipe, self._now = pipe, SimpleNamespace(latents=None, timesteps=None)
        now = self._now
        # As diffusers reads embeddings: what a subclass makes of them is done.
        encode_prompt = stock_class(type(pipe)).encode_prompt
        self._encoded = _Once(MethodType(encode_prompt, pipe._inner(pipe.scheduler)))
        self._size_ids = _Once(self._size_ids_on_device)
        self._inner = pipe._inner(
            _segment(pipe.scheduler, lambda: now.timesteps, _stop),
            prepare_latents=lambda *args, **kwargs: pipe._placed(now.latents),
            encode_prompt=self._encoded,
            **({"_get_add_time_ids": self._size_ids} if hasattr(pipe, "_get_add_time_ids") else {}),
        )
        self._arguments = pipe._taken(self._inner, pipe._segmented.arguments | pipe._arguments(condition, guided))

    def _size_ids_on_device(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return size ids of SDXL, which the stock call makes on the host."""
        pipe: Any = self._pipe
        ids: Tensor = pipe._get_add_time_ids(*args, **kwargs)
        return ids.to(pipe._execution_device)

    def predicted(self, x: Tensor, t: Tensor, scale: float) -> Tensor:
        """Return the prediction for latents at a timestep, under this guidance scale."""
        self._now.latents, self._now.timesteps = x, t[None]
        self._encoded.again()
        self._size_ids.again()
        pipe = self._pipe
        try:
            pipe._stock_call(self._inner, **self._arguments | {pipe.family.guidance: scale})
        except _Stopped as stopped:
            prediction: Tensor = stopped.value
            return prediction
        raise pipe._ended_before("step")


class ImagePromptedSegments(ImagePrompted, SegmentedPipeline):
    """A pipeline that is driven in segments, and whose prompts may have image prompts."""

    # Of the base class; that of a family gets the parameters of its stock call.
    __call__ = SharedSamplingPipeline.__call__

    def _beside(self, given: Mapping[str, Any], guided: bool) -> dict[str, Tensor]:
        without, with_image = self._image_conditions(given, guided)
        negative = {f"negative_{name}": rows for name, rows in without.items()}
        return super()._beside(given, guided) | negative | with_image

    def _arguments(self, condition: Condition, guided: bool) -> dict[str, Any]:
        found = super()._arguments(condition, guided)
        images = image_embeddings(condition)
        if images and guided:
            images = [torch.cat(pair) for pair in zip(image_embeddings(condition, "negative_"), images, strict=True)]
        if images:
            found[IMAGE_PROMPTS[1]] = images[0] if self._has_one_adapter else images
        return found

    def _inner(self, scheduler: Any, **replaced: Any) -> Any:
        # What the stock call gets is what this method of it returned.
        return super()._inner(
            scheduler, prepare_ip_adapter_image_embeds=lambda images, embeddings, *more: embeddings, **replaced
        )


class _NoBar:
    """In place of a stock call's progress bar, whose making is a quarter of what the call does outside its network."""

    def __init__(self, iterable: Any = None, total: int | None = None) -> None:
        self._iterable = iterable

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __iter__(self) -> Any:
        return iter(self._iterable)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None  # update, close and the like


class _Encoded:
    """An autoencoder that encodes whatever it is given to these latents."""

    def __init__(self, autoencoder: Any, latents: Tensor) -> None:
        self._autoencoder = autoencoder
        self._posterior = SimpleNamespace(sample=lambda generator=None: latents)

    def encode(self, images: Tensor) -> Any:
        """Return a posterior of which every sample is the latents."""
        return SimpleNamespace(latent_dist=self._posterior)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._autoencoder, name)


class _Counted:
    """A network for one call of the pipeline, which counts its evaluations.

    A hook would count, too, but torch.compile would compile it with the network.
    """

    def __init__(
        self,
        network: Any,
        count: Callable[[Any, Any, Any], None],
        changed: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self._network, self._count, self._changed = network, count, changed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._count(self._network, args, kwargs)
        return self._network(*args, **kwargs if self._changed is None else self._changed(kwargs))

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The network's precision: looked for once in a call, because diffusers looks at every module."""
        found: torch.dtype = self._network.dtype
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def _sizes_apart(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a U-Net's arguments with its size ids without text before those with text.

    The stock call of SDXL repeats the pair of them, which mixes them up in batches.
    """
    added = kwargs["added_cond_kwargs"]
    pairs = added["time_ids"].unflatten(0, (-1, 2))
    return kwargs | {"added_cond_kwargs": added | {"time_ids": pairs.transpose(0, 1).flatten(0, 1)}}


def segmented(family: Family, stock: type) -> type:
    """Return the shared-sampling class of a stock pipeline class."""
    parameters = inspect.signature(stock.__call__).parameters.values()
    conditions = {prefix + argument for argument in family.inputs.values() for prefix in ("", "negative_")}
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    names = {parameter.name for parameter in named}
    beside = {*TEXTS, family.control, *(IMAGE_PROMPTS if family.images else ())}
    given = DRIVEN | UNSUPPORTED | conditions | beside | {family.guidance}
    body = {
        "__doc__": f"A {stock.__name__} whose similar prompts share their early steps.",
        "family": family,
        "makes": family.output,
        "embeds_guidance": family.embedded,
        "_callback_names": tuple(family.callbacks),
        "_stock": stock,
        "_default_guidance": next(p.default for p in parameters if p.name == family.guidance),
        "_embeddings": tuple(sorted(names & (conditions | beside))),
        "_options": {p.name: p.default for p in named if p.name not in given} | dict(family.defaults),
    }
    if family.callbacks:
        body["_callback_tensor_inputs"] = ["latents", *family.callbacks]
    driver = ImagePromptedSegments if family.images else SegmentedPipeline
    return type(f"Shared{stock.__name__}", (driver, stock), body)


class _Once:
    """A function whose first, second, ... call of a step runs it in the first step only."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function, self._results, self._calls = function, list[Any](), 0

    def again(self) -> None:
        """Begin another step."""
        self._calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._calls == len(self._results):
            self._results.append(self._function(*args, **kwargs))
        self._calls += 1
        return self._results[self._calls - 1]


@contextmanager
def _own_schedule(scheduler: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn what diffusers raises for timesteps or sigmas that a scheduler does not take into a ConfigurationError."""
    own = [name for name in ("timesteps", "sigmas") if options.get(name) is not None]
    try:
        yield
    except ValueError as error:
        reason = str(error).split(". Please")[0]
        if not any(name.removesuffix("s") in reason for name in own):
            raise
        raise ConfigurationError(
            f"{type(scheduler).__name__} does not take {' and '.join(own)}: {reason}; leave them out, or exchange the "
            "scheduler"
        ) from error


def _stop(value: Any) -> Any:
    raise _Stopped(value)


def _segment(scheduler: Any, timesteps: Callable[[], Tensor], step: Callable[[Any], Any] | None) -> Any:
    """Return a copy of a scheduler that has these timesteps, whatever it is told to set, and calls `step` instead."""
    child = copy.copy(scheduler)
    child.__class__ = _segment_class(scheduler.__class__)

    def set_timesteps(own: Any, *args: Any, **kwargs: Any) -> None:
        own.timesteps = timesteps()
        own.num_inference_steps = len(own.timesteps)

    vars(child).update(_on_set=set_timesteps, _on_step=step)
    return child


def _recorder(scheduler: Any) -> Any:
    """Return a copy of a scheduler that stops the call with another copy as soon as that one's timesteps are set."""
    child, real = copy.copy(scheduler), copy.copy(scheduler)
    child.__class__ = _segment_class(scheduler.__class__)

    def set_timesteps(own: Any, *args: Any, **kwargs: Any) -> None:
        if (device := kwargs.get("device")) is not None and torch.device(device).type == "meta":
            kwargs["device"] = "cpu"  # schedulers read their values
        real.set_timesteps(*args, **kwargs)
        _stop(real)

    vars(child).update(_on_set=set_timesteps, _on_step=None)
    return child


@functools.cache
def _segment_class(scheduler: Hashable) -> Any:
    """Return a subclass of a scheduler class whose instances ask `_on_set` and `_on_step`."""
    base: Any = scheduler

    class Segment(base):  # type: ignore[misc]
        # The loop has scaled the latents.
        init_noise_sigma = property(lambda self: 1.0)

        @functools.wraps(base.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            self._on_set(self, *args, **kwargs)

        @functools.wraps(base.step)
        def step(self, model_output: Any, *args: Any, **kwargs: Any) -> Any:
            return self._on_step(model_output)

        def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return sample

        def set_begin_index(self, *args: Any, **kwargs: Any) -> None:
            pass

    # As errors of diffusers name it.
    Segment.__qualname__, Segment.__module__ = base.__qualname__, base.__module__
    # Stock calls look at the signature in each step.
    Segment.set_timesteps.__signature__ = inspect.signature(base.set_timesteps)  # type: ignore[attr-defined]
    return Segment
