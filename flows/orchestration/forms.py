"""What a person or a program may ask of a flow: small models that Prefect shows as forms, with help and limits."""

from typing import Annotated, Literal, Self, get_args

import flows.orchestration.settings  # noqa: F401

from prefect.input import RunInput
from pydantic import BaseModel, ConfigDict, Field, model_validator

Stage = Literal["prepare", "group", "finetune", "generate", "evaluate"]
STAGES: tuple[str, ...] = get_args(Stage)
Override = Annotated[str, Field(min_length=3, max_length=500, pattern=r"^[A-Za-z_][A-Za-z0-9_.]*=.+$")]
Version = Annotated[str, Field(pattern=r"^([0-9]+|[a-z][a-z0-9_-]*)$")]


class Form(BaseModel):
    """What every form shares: a field that it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(Form):
    """Which stages are brought up to date, and with which parameters."""

    from_stage: Stage = Field(
        "prepare", title="From", description="The first stage looked at; what stands before it is taken as it is."
    )
    until: Stage = Field("evaluate", title="Until", description="The last stage; a model is registered after evaluate.")
    overrides: list[Override] = Field(
        [],
        max_length=50,
        title="Overrides",
        description="Parameters for this run only, as in `dvc exp run -S`: finetune.steps=500. The run is then a DVC "
        "experiment of the committed state, named as this run, in a work tree of its own; nothing is registered.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if STAGES.index(self.from_stage) > STAGES.index(self.until):
            raise ValueError(f"from_stage {self.from_stage} comes after until {self.until}; the order is {STAGES}")
        return self


class Judged(Form):
    """Which registered version is judged on this folder's held-out set."""

    version: Version = Field("champion", title="Version", description="A number, or an alias: champion, challenger.")


class Promotion(Form):
    """Which version becomes champion, and who decides."""

    version: Version = Field("challenger", title="Version", description="A number, or an alias.")
    ask: bool = Field(
        False,
        title="Ask a person",
        description="Show figures and pictures, and wait here for a yes or no.",
    )
    wait_hours: float = Field(
        24, gt=0, le=24 * 14, title="Wait at most, hours", description="Without an answer by then the run fails."
    )
    prompts: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        ["red heart", "smiling cat", "house", "waving hand", "banana", "full moon"],
        min_length=1,
        max_length=12,
        title="Prompts",
        description="What is drawn for the person who decides, by both versions from the same seeds.",
    )


class Batch(Form):
    """Which prompts are drawn, with what, and among how many."""

    prompts: str = Field(
        min_length=1,
        max_length=1000,
        title="Prompts",
        description="A .txt, .jsonl or .csv file where every worker finds it: a path, s3://..., any fsspec address.",
    )
    out: str = Field(min_length=1, max_length=1000, title="Pictures", description="Where they go: a folder or s3://...")
    model: str = Field(
        "models:/sage@champion",
        min_length=1,
        max_length=1000,
        title="Model",
        description="A registered version, models:/sage@champion or models:/sage/3, or a pipeline's folder.",
    )
    shards: int = Field(1, ge=1, le=10_000, title="Shards", description="Parts that machines draw on their own.")
    judge: bool = Field(
        False, title="Judge", description="Also measure alignment and diversity within groups: evaluation.json."
    )
    seed: int = Field(0, ge=0, lt=2**31, title="Seed", description="The same seed gives the same pictures.")
    steps: int | None = Field(None, ge=1, le=1000, title="Steps", description="Else as the version was judged.")
    share_ratio: float | None = Field(
        None, ge=0, lt=1, title="Share ratio", description="Of the steps, what a group takes together; else as judged."
    )
    guidance_scale: float | None = Field(None, ge=0, le=100, title="Guidance", description="Else as judged.")
    batch_size: int | None = Field(
        None, ge=1, le=100_000, title="Batch size", description="Prompts a network call at most; else as judged."
    )


class Approval(RunInput):
    """The answer of the person who decides."""

    promote: bool = Field(False, title="Promote", description="Yes makes it champion; no leaves everything as it is.")
    by: str = Field("", max_length=100, title="Your name", description="Kept with the answer.")
    reason: str = Field("", max_length=1000, title="Why", description="Kept with the answer.")
