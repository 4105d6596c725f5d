"""`params.yaml` as strict, frozen pydantic models, one per section; all problems are reported together, by path.

The comments in `params.yaml` explain each field.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from sage.errors import ConfigurationError
from sage.evaluation.arms import REFERENCES
from sage.evaluation.registry import GATEABLE
from sage.grouping.guard import Kind
from sage.grouping.policy import By
from sage.sampling import hub

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
HeldOut = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]

# The keys of sage.sampling.loop.HISTORY.
Scheduler = Literal[
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]


def _one_of(names: Sequence[str]) -> AfterValidator:
    """Return a check that a text is one of some names, worded as pydantic words it for a Literal."""

    def check(value: str) -> str:
        if value not in names:
            *most, last = map(repr, names)
            raise PydanticCustomError("literal_error", f"Input should be {', '.join(most)} or {last}")
        return value

    return AfterValidator(check)


def _source(value: str) -> str:
    """Check that a text names a source of images or is an fsspec address."""
    if value not in ("figures", "folder", "kohya") and "://" not in value:
        raise PydanticCustomError(
            "literal_error",
            "Input should be 'figures', 'folder' or 'kohya', or an address such as s3://bucket/*.tar",
        )
    return value


def _in_float32(value: Any) -> Any:
    """Refuse an optimizer of 8 bits by what there is instead."""
    if isinstance(value, str) and "8bit" in value.lower().replace("-", "").replace("_", ""):
        raise PydanticCustomError(
            "literal_error",
            "Input should be 'adamw' or 'adafactor': optimizers of 8 bits need bitsandbytes, which is not "
            "installed with this project; adafactor keeps less than they do",
        )
    return value


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, types are not converted, values do not change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Figures(Section):
    """Composed figures (`sage.data.figures`): styles, figures in each split, and combinations held out for each."""

    styles: Annotated[list[str], Field(min_length=1)]
    train: Count
    validation: Count
    test: Count
    held_out: HeldOut


class Buckets(Section):
    """Aspect-ratio buckets of the training images (`sage.data.buckets`)."""

    step: Annotated[int, Field(ge=8)]
    max_aspect: Annotated[float, Field(ge=1, le=8)]


class Prepare(Section):
    """Source of the images, their size, and the fractions held out for validation and test."""

    source: Annotated[str, AfterValidator(_source)]
    figures: Figures
    image_size: Annotated[int, Field(ge=8, le=2048)]
    resize: Literal["pad", "crop"]
    buckets: Buckets | None
    validation: HeldOut
    test: HeldOut
    near_duplicate: Annotated[int, Field(ge=0, le=16)] | None
    seed: Seed

    @model_validator(mode="after")
    def _leave_training(self) -> "Prepare":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation {self.validation} + test {self.test} leave nothing to train on; their sum must be below 1"
            )
        if self.buckets is not None and self.image_size % self.buckets.step:
            raise ValueError(
                f"buckets.step {self.buckets.step} does not divide image_size {self.image_size}, so no bucket is "
                "square; give a divisor, such as 64 for photographs at 512 or more"
            )
        return self


class NetworkTraining(Section):
    """Training schedule of one network of the base model."""

    steps: Count
    learning_rate: Positive
    warmup: Annotated[int, Field(ge=0)]
    decay: Annotated[int, Field(ge=0)]
    batch_size: Count
    ema: Share
    seed: Seed


class Autoencoder(NetworkTraining):
    """The autoencoder (VAE) between images and latents."""

    kl_weight: Weight


class Denoiser(NetworkTraining):
    """The U-Net that denoises the latents; `compile`: its blocks with torch.compile, which needs a C++ compiler."""

    drop_text: Share
    compile: bool


class AttributeReader(NetworkTraining):
    """The network that reads the attributes of composed figures; `figures` of them are drawn for its training."""

    figures: Count


class Distil(NetworkTraining):
    """The encoder of first predictions that `sage distil` trains, on at most so many different captions."""

    captions: Count


class Pretrain(Section):
    """Training of the base model and of the attribute judge by `sage pretrain`, of the encoder by `sage distil`."""

    autoencoder: Autoencoder
    denoiser: Denoiser
    attributes: AttributeReader
    distil: Distil


class Group(Section):
    """The grouping policy (`sage.grouping.policy.Policy`): exactly one of threshold, saving and max_damage is set."""

    threshold: Cosine | None = None
    saving: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_damage: Weight | None = None
    max_size: Count
    near_duplicate: Cosine
    guard: list[Kind] | None = None
    by: By | None = None

    @model_validator(mode="after")
    def _one_of_three(self) -> "Group":
        given = [name for name in ("threshold", "saving", "max_damage") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of threshold, saving and max_damage; given: {given or 'none'}")
        return self


class Weights(Section):
    """Weights of the terms of L_SAGE (`sage.training.loss`)."""

    diffusion: Weight
    shared: Weight
    branch: Weight
    consistency: Weight

    @model_validator(mode="after")
    def _something(self) -> "Weights":
        if self.diffusion + self.shared + self.branch + self.consistency == 0:
            raise ValueError("all weights are 0, so there is nothing to train; set at least one above 0")
        return self


Precision = Literal["bf16", "fp8", "fp32"]


class Adapter(Section):
    """LoRA: trained low-rank matrices on frozen weights, of the denoiser or of its CLIP text encoders, too."""

    rank: Count
    alpha: Count | None = None
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    text_encoders: bool | None = None


class ShuffleTags(Section):
    """Shuffling of tags, the parts of a caption between commas (`sage.data.tags`)."""

    keep: Annotated[int, Field(ge=0)]
    orders: Annotated[int, Field(ge=2, le=100)]


class Validation(Section):
    """The held-out loss during training (`sage.training.validation`), and what it decides."""

    every: Count
    images: Count
    keep: Literal["last", "best"]
    patience: Count | None = None


class Finetune(Section):
    """Fine-tuning of the base model with L_SAGE."""

    steps: Count
    optimizer: Annotated[Literal["adamw", "adafactor"], BeforeValidator(_in_float32)]
    learning_rate: Positive
    warmup: Annotated[int, Field(ge=0)]
    decay: Annotated[int, Field(ge=0)]
    # A batch is split between three terms: diffusion, shared and branch.
    batch_size: Annotated[int, Field(ge=3)]
    share_ratios: Annotated[list[Share], Field(min_length=2, max_length=2)]
    soft_target: Literal["mean", "posterior"]
    branch_start: Literal["sampled", "mixture", "plain"]
    weights: Weights
    drop_text: Share
    flip: bool
    shuffle_tags: ShuffleTags | None
    ema: Share
    min_snr: Positive | None
    timesteps: Literal["uniform", "logit_normal"]
    adapter: Adapter | None
    init: str | None
    precision: Precision
    accumulate: Count
    gradient_checkpointing: bool
    validation: Validation | None
    checkpoint_every: Count
    watch_every: Count
    seed: Seed

    @property
    def kept_in(self) -> Precision:
        """The precision in which the base's weights are kept: float32, unless an adapter alone is trained."""
        return "fp32" if self.adapter is None else self.precision

    @model_validator(mode="after")
    def _consistent(self) -> "Finetune":
        low, high = self.share_ratios
        if low > high:
            raise ValueError(f"share_ratios {self.share_ratios} are not in order; give [lowest, highest]")
        if high == 0 and self.weights.shared > 0:
            raise ValueError(
                f"share_ratios end at 0, so no step is shared, but weights.shared is {self.weights.shared}; "
                "raise share_ratios or set weights.shared to 0"
            )
        if self.warmup + self.decay > self.steps:
            raise ValueError(
                f"warmup {self.warmup} + decay {self.decay} are more than the {self.steps} steps; shorten them"
            )
        if self.init is not None and (self.adapter is None or self.adapter.targets is not None):
            raise ValueError(
                f"init {self.init!r} goes on with an earlier adapter on its own targets; give adapter its rank, and "
                f"alpha if that is another number, without targets (found adapter {self.adapter})"
            )
        if self.shuffle_tags is not None and not self.weights.diffusion + self.weights.consistency:
            raise ValueError(
                "shuffle_tags has no effect, because only plain diffusion draws shuffled captions, and "
                f"weights.diffusion and weights.consistency are {self.weights.diffusion}; raise one of them, or set "
                "shuffle_tags to null"
            )
        if self.precision == "fp8" and self.adapter is None:
            raise ValueError(
                "precision fp8 stores frozen weights, but adapter is null, so all weights are trained; give an "
                "adapter, for example {rank: 16}, or set precision to bf16"
            )
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate {self.accumulate} is more than batch_size {self.batch_size}; lower it")
        return self


class Generate(Section):
    """Sampling of the images to evaluate; every arm uses the same prompts and seeds."""

    split: Literal["validation", "test"]
    scheduler: Scheduler | None
    steps: Annotated[int, Field(ge=2, le=1000)]
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    share_ratio: Share
    branch_noise: Annotated[float, Field(ge=0, le=1)]
    image_steps: Annotated[int, Field(ge=0)] | None
    precision: Precision
    seeds: Annotated[list[Seed], Field(min_length=1)]
    batch_size: Count

    @model_validator(mode="after")
    def _distinct(self) -> "Generate":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat; list each once, or the same images are counted twice")
        if self.image_steps and (not self.branch_noise or self.image_steps >= self.steps):
            raise ValueError(
                f"image_steps {self.image_steps} needs branch_noise above 0 (found {self.branch_noise}) and more steps "
                f"(found {self.steps}), or the images of a prompt come out alike"
            )
        return self

    def sampling(self) -> dict[str, Any]:
        """Return the settings that apply to any prompts; split and seeds belong to the evaluation alone."""
        names = {"steps", "share_ratio", "branch_noise", "image_steps", "guidance_scale", "batch_size"}
        return self.model_dump(include=names)


class Gate(Section):
    """One condition for promotion: `metric` is worse than in arm `reference` by at most `worse_by_at_most`.

    `relative`: the limit is a fraction of the reference's value.
    """

    metric: Annotated[str, _one_of(GATEABLE)]
    reference: Annotated[str, _one_of(REFERENCES)]
    worse_by_at_most: Annotated[float, Field(allow_inf_nan=False)]
    relative: bool


class Evaluate(Section):
    """What judges the images, bootstrap intervals of the metrics, and the gates."""

    features: Annotated[str, Field(min_length=1, pattern=r"\S")]
    alignment: Annotated[str, Field(min_length=1, pattern=r"\S")]
    references: Count | None
    resamples: Annotated[int, Field(ge=100)]
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    seed: Seed
    gates: Annotated[list[Gate], Field(min_length=1)]


def _base(value: str) -> str:
    """Return the name of a base model; raise ValueError for one that no stage could read or that is not pinned."""
    if value.startswith(f"{hub.FOLDER}/") and hub.pinned(value) is None:
        raise ValueError(
            "a model on a hub is named with its commit; `sage base OWNER/NAME` pins it and prints what to set"
        )
    if not value or value != value.strip() or value[0] in "~-" or set(value) & set('"$`\\\n'):
        raise ValueError('give a path without ~ at its start and without " $ ` \\, which a shell would change')
    return value


class Params(Section):
    """The whole of `params.yaml`; `base` names the base model (`sage.sampling.saved`)."""

    base: Annotated[str, AfterValidator(_base)]
    prepare: Prepare
    pretrain: Pretrain
    group: Group
    finetune: Finetune
    generate: Generate
    evaluate: Evaluate

    @model_validator(mode="after")
    def _judged(self) -> "Params":
        """Refuse judging by attributes, which only composed figures have."""
        source, found = self.prepare.source, self.evaluate
        wrong = []
        if found.alignment == "attributes":
            wrong.append("evaluate.alignment is 'attributes'; set it to clip, a folder or a hub name")
        if found.references is not None:
            wrong.append(f"evaluate.references is {found.references}; set it to null")
        if source != "figures" and wrong:
            raise ValueError(
                f"prepare.source is {source!r}, whose images have no known attributes, but {', and '.join(wrong)}"
            )
        return self


class _Loader(yaml.SafeLoader):
    """Parses 1e-05 (DVC's form of 0.00001) as a float, as YAML 1.2 does; in PyYAML's YAML 1.1 it is a string."""


_NUMBER = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Return the parsed configuration.

    Raises ConfigurationError if the file is missing or not YAML, or with one line per problem in it.
    """
    try:
        values: Any = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path} does not exist. Run from the project's top folder.") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from error
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        lines = [_line(problem) for problem in error.errors(include_url=False)]
        raise ConfigurationError("\n".join([f"{path} has {len(lines)} problem(s):", *lines])) from error


def _line(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"]) or "(top)"
    if problem["type"] == "extra_forbidden":
        return f"  {path}: unknown key; allowed are {', '.join(_keys(problem['loc'][:-1]))}"
    return f"  {path}: {problem['msg']}" + (f", found {problem['input']!r}" if problem["loc"] else "")


def _keys(location: tuple[str | int, ...]) -> list[str]:
    """Return the keys allowed in the section at this location."""
    model: Any = Params
    for part in location:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = annotation.__args__[0] if hasattr(annotation, "__args__") else annotation
    return list(model.model_fields)
