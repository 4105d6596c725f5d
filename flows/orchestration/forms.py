"""Parameters of the flows: pydantic models that Prefect shows as forms, with help and limits."""

from typing import Annotated, Literal, Self, get_args

import flows.orchestration.settings  # noqa: F401

from prefect.input import RunInput
from pydantic import BaseModel, ConfigDict, Field, model_validator

Stage = Literal["prepare", "group", "finetune", "generate", "evaluate"]
STAGES: tuple[str, ...] = get_args(Stage)
# What `dvc exp run -S` takes: NAME=VALUE changes a parameter, +NAME=VALUE adds one, ++ does either, ~NAME removes one.
_NAME = "[A-Za-z_][A-Za-z0-9_.]*"
Override = Annotated[str, Field(max_length=500, pattern=rf"^(params\.yaml:)?((\+\+?)?{_NAME}=.*|~{_NAME}(=.*)?)$")]
Version = Annotated[str, Field(pattern=r"^([0-9]+|[a-z][a-z0-9_-]*)$")]


class Form(BaseModel):
    """Base of all forms: immutable, and unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(Form):
    """Parameters of `sage-pipeline`: the stages to bring up to date, and changes to params.yaml."""

    from_stage: Stage = Field(
        "prepare", title="From", description="First stage to bring up to date; earlier stages are not checked."
    )
    until: Stage = Field(
        "evaluate", title="Until", description="Last stage; the model is registered only after evaluate."
    )
    overrides: list[Override] = Field(
        [],
        max_length=50,
        title="Overrides",
        description="Parameters for this run only, as in `dvc exp run -S`: finetune.steps=500, "
        "+group.saving=0.3 for one that params.yaml leaves out, ~group.threshold to remove one. The run becomes a DVC "
        "experiment on the current commit, in its own work tree, with the name of the run; nothing is registered.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if STAGES.index(self.from_stage) > STAGES.index(self.until):
            raise ValueError(f"from_stage {self.from_stage} comes after until {self.until}; the order is {STAGES}")
        return self


class Judged(Form):
    """Parameters of `sage-evaluate`: the registered version to evaluate on this folder's held-out set."""

    version: Version = Field("champion", title="Version", description="A number, or an alias: champion, challenger.")


class Promotion(Form):
    """Parameters of `sage-promote`: the version to promote, and whether a person must approve."""

    version: Version = Field("challenger", title="Version", description="A number, or an alias.")
    ask: bool = Field(
        False,
        title="Ask a person",
        description="Show figures and images, and pause until someone approves or declines.",
    )
    wait_hours: float = Field(
        24, gt=0, le=24 * 14, title="Wait at most, hours", description="The run fails if there is no answer by then."
    )
    prompts: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        ["red heart", "smiling cat", "house", "waving hand", "banana", "full moon"],
        min_length=1,
        max_length=12,
        title="Prompts",
        description="Shown to the person who decides: images from both versions with the same seeds.",
    )


class Batch(Form):
    """Parameters of `sage-generate`: prompts, model, sampling settings and number of shards."""

    prompts: str = Field(
        min_length=1,
        max_length=1000,
        title="Prompts",
        description="A .txt, .jsonl or .csv file that all workers can read: a path, s3://..., any fsspec address.",
    )
    out: str = Field(min_length=1, max_length=1000, title="Images", description="Output folder: a path or s3://...")
    model: str = Field(
        "models:/sage@champion",
        min_length=1,
        max_length=1000,
        title="Model",
        description="A registered version (models:/sage@champion, models:/sage/3) or a pipeline folder.",
    )
    shards: int = Field(
        1, ge=1, le=10_000, title="Shards", description="Number of parts that workers draw independently."
    )
    judge: str | None = Field(
        None,
        min_length=1,
        max_length=1000,
        title="Judge",
        description="Also measure diversity within groups, and alignment by this CLIP: clip, a folder or a hub name. "
        "The figures are in evaluation.json.",
    )
    server: Annotated[str, Field(max_length=1000, pattern=r"^https?://[^\s@?#]+$")] | None = Field(
        None,
        title="Server",
        description="A running `sage serve` of this model, which draws instead of the worker: http://HOST:PORT. Its "
        "token is the worker's environment variable SAGE_SERVER_TOKEN. Prompts and images are paths on the worker.",
    )
    seed: int = Field(0, ge=0, lt=2**31, title="Seed", description="The same seed gives the same images.")
    steps: int | None = Field(None, ge=1, le=1000, title="Steps", description="Default: the model's setting.")
    share_ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        title="Share ratio",
        description="Fraction of the steps that a group shares. Default: the model's setting.",
    )
    guidance_scale: float | None = Field(
        None, ge=0, le=100, title="Guidance", description="Default: the model's setting."
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        le=100_000,
        title="Batch size",
        description="Maximum prompts per network call. Default: the model's setting.",
    )

    expand: Annotated[str, Field(pattern=r"^(all|[1-9][0-9]{0,4})$")] | None = Field(
        None,
        title="Expand templates",
        description="all: every combination of {red|blue} vase; a number: so many random ones of each template.",
    )
    wildcards: str | None = Field(
        None,
        min_length=1,
        max_length=1000,
        title="Wildcards",
        description="Folder of the files that __name__ in a template stands for; a path on the worker.",
    )
    literal: bool = Field(
        False, title="Literal", description="Draw {a|b}, (word:1.3) and the like as the text they are."
    )

    @model_validator(mode="after")
    def _one_engine(self) -> Self:
        if self.server is not None and (self.shards > 1 or self.judge or self.batch_size is not None):
            raise ValueError(
                "a server draws the whole list by itself; leave out shards, judge and batch_size, or server"
            )
        if self.server is not None and ("://" in self.prompts or "://" in self.out):
            raise ValueError(
                "with a server, prompts and images are paths on the worker; leave the server out for others"
            )
        return self


class Approval(RunInput):
    """The answer of the person who decides."""

    promote: bool = Field(False, title="Promote", description="Yes makes the version champion; no changes nothing.")
    by: str = Field("", max_length=100, title="Your name", description="Logged with the answer.")
    reason: str = Field("", max_length=1000, title="Why", description="Logged with the answer.")
