"""`sage plan`: what a run will do and cost, and the verdict of every check, before anything is trained or drawn."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flows import machine
from flows.evaluations import drawing, training
from flows.preflight import Job, Verdict, check_trainable, disk, verdicts
from flows.tracking.durations import Duration, durations
from flows.versioning import repository
from sage.config import Params, load_params
from sage.errors import SageError
from sage.evaluation.arms import label

_DATA = Path("data/prepared")
_GROUPS = Path("data/groups")
Row = tuple[str, str]


def report(console: Console) -> bool:
    """Print stages, costs and checks; return whether no check failed.

    What depends on data or groups that are not made yet is said to be unknown.
    """
    params = load_params()
    console.print(_stages(params))
    try:
        machine.device()
        job = _opened(params)
    except SageError as error:
        console.print(_checks([Verdict("device and base", "failed", str(error))]))
        return False
    console.print(_costs(job))
    found = [Verdict("device and base", "ok"), *verdicts(job)]
    console.print(_checks(found))
    return not any(verdict.state == "failed" for verdict in found)


def _opened(params: Params) -> Job:
    """Return the job with the base on the CPU, which is enough to count."""
    from flows.drawing import open_pipeline

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    check_trainable(params.base)
    pipe = open_pipeline(params.base, "cpu", params.generate.scheduler, params.finetune.kept_in)
    return Job(pipe, params, _DATA, _GROUPS)


def _stages(params: Params) -> Table:
    """Return the stages in order: whether each runs, and how long it last took on a machine like this one."""
    try:
        stale = set(repository.stale())
        states = {name: "runs" if name in stale else "up to date" for name in repository.stages()}
    except SageError as error:
        states = {name: f"unknown: {str(error).splitlines()[0]}" for name in repository.stages()}
    try:
        measured = durations({name: getattr(params, name).model_dump(exclude_none=True) for name in states})
    except SageError:
        measured = {}
    table = Table("stage", "state", "last run here", title="stages", title_justify="left")
    for name, state in states.items():
        table.add_row(name, state, _took(measured.get(name)))
    return table


def _took(duration: Duration | None) -> str:
    if duration is None:
        return "unknown: no finished run on a machine like this one"
    other = f"; with other {', '.join(duration.changed)}" if duration.changed else ""
    return f"{duration.seconds:,.0f} s{other}"


def _costs(job: Job) -> Table:
    table = Table("what", "how much", title="steps, evaluations, memory, disk", title_justify="left")
    for rows in (_training, _drawing, _memory, _disk):
        try:
            for row in rows(job):
                table.add_row(*row)
        except SageError as error:
            table.add_row(rows.__name__.removeprefix("_"), f"unknown: {error}")
    return table


def _training(job: Job) -> Iterator[Row]:
    settings = job.params.finetune
    yield "training steps", f"{settings.steps:,} of {settings.batch_size} items"
    found = training(job)
    about = "" if found.exact else "about "
    yield "evaluations of the trained network", f"{about}{found.trained:,}"
    yield "of the frozen base", f"{about}{found.frozen:,}"
    yield "of shared steps that training simulates", f"{about}{found.sampled:,}"


def _drawing(job: Job) -> Iterator[Row]:
    settings = job.params.generate
    scheduler = type(job.pipe.scheduler).__name__
    yield "sampler steps, in training and drawing", f"{settings.steps} ({scheduler}, {job.evaluations} evaluations)"
    images = len(job.drawn) * len(settings.seeds)
    yield "images", f"{images:,} for each arm: {len(job.drawn):,} prompts of {settings.split}, seeds {settings.seeds}"
    for arm, nfe in drawing(job).items():
        yield f"evaluations, {label(arm)}", f"{nfe:,}, {nfe / images:.2f} an image"


def _memory(job: Job) -> Iterator[Row]:
    needed, (free, _) = job.memory, job.free_memory
    parts = ("weights", needed.weights), ("training states", needed.training), ("activations", needed.activations)
    listed = ", ".join(f"{name} {_gb(size)}" for name, size in parts)
    yield "memory of training, at most", f"{_gb(needed.total)} ({listed}); {_gb(free)} are free"


def _disk(job: Job) -> Iterator[Row]:
    free = shutil.disk_usage(Path.cwd()).free
    encoded = f"{_gb(job.memory.data)} of it latents and text states"
    yield "disk for checkpoints, model and images, at most", f"{_gb(disk(job))}, {encoded}; {_gb(free)} are free"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _checks(found: list[Verdict]) -> Table:
    table = Table("check", "verdict", "found", title="checks", title_justify="left")
    for verdict in found:
        table.add_row(verdict.check, verdict.state, verdict.found)
    return table
