"""The flow `sage-pipeline`: the stages of dvc.yaml, one task for each, then registration."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flows.orchestration.settings  # noqa: F401

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import get_run_context
from prefect.tasks import Task, exponential_backoff

from flows.orchestration import shown
from flows.orchestration.forms import STAGES, Range
from flows.tracking import registry, runs
from flows.versioning import experiments, locks, repository
from sage.config import load_params
from sage.errors import ConfigurationError, RegistryError

MODEL = Path("models/sage")
METRICS = Path("metrics")
GROUPS = Path("data/groups")
_WHOLE = Range()


def may_pass(task: "Task[..., Any]", run: TaskRun, state: "State[Any]") -> bool:
    """Return whether a retry may help: not if a person must fix something first."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, repository.StageError):
        return error.transient
    return not isinstance(error, ConfigurationError | RegistryError)


@task(
    task_run_name="{stage}", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[2, 20], retry_condition_fn=may_pass
)
def reproduce(stage: str, environment: dict[str, str], folder: str = ".") -> dict[str, Any]:
    """Bring one stage up to date; return its outcome and duration. A killed training resumes at its checkpoint."""
    log = get_run_logger()
    # Print progress as lines: in a log, a progress bar would be thousands of lines.
    environment = {**environment, "TTY_COMPATIBLE": "0"}
    write = shown.lines(stage)
    outcome = repository.reproduce(write, stage, alone=True, environment=environment, folder=Path(folder))[stage]
    log.info("%s: %s in %.1f s", stage, outcome.state, outcome.seconds)
    return {"stage": stage, "state": outcome.state, "seconds": round(outcome.seconds, 1)}


@task(cache_policy=NO_CACHE, retries=4, retry_delay_seconds=exponential_backoff(2), retry_condition_fn=may_pass)
def reach_tracking() -> None:
    """Check that MLflow answers, before hours of work depend on it."""
    if (uri := runs.address()) is not None:
        runs.check(uri)


@task(cache_policy=NO_CACHE, retries=4, retry_delay_seconds=exponential_backoff(2), retry_condition_fn=may_pass)
def register() -> dict[str, Any]:
    """Register the model if it passed its gates and is not registered yet."""
    done = registry.register(MODEL, METRICS, GROUPS, load_params())
    return {"version": done.version, "new": done.new, "reasons": done.reasons}


@flow(name="sage-pipeline")
def sage_pipeline(run: Range = _WHOLE) -> dict[str, Any]:
    """Bring stages up to date in the order of dvc.yaml, show the results, register the model."""
    if run.overrides and repository.stages()[-1] not in STAGES[: STAGES.index(run.until) + 1]:
        raise ConfigurationError(
            f"a run with overrides is an experiment, which needs all stages, but `until` is {run.until}; remove "
            "`until` or the overrides."
        )
    reach_tracking()
    with _place(run.overrides) as (tree, tags), runs.pipeline_run(tags) as pipeline:
        # The work tree of an experiment has no outputs yet, so the stages before the range must run too.
        first = 0 if run.overrides else STAGES.index(run.from_stage)
        wanted = STAGES[first : STAGES.index(run.until) + 1]
        environment = pipeline.environment | {"SAGE_TRACKING_URI": runs.address() or "off"}
        stages = [stage for stage in repository.stages() if stage in wanted]
        outcomes = [reproduce(stage, environment, str(tree)) for stage in stages]
        executed = sum(outcome["state"] == "executed" for outcome in outcomes)
        whole = run.until == STAGES[-1]
        pipeline.finish("FINISHED", tree / METRICS if whole else None)
        shown.stages(outcomes, run.overrides)
        if whole:
            shown.results(tree)
        if run.overrides:
            experiments.save(tree, tree.name)
        registers = whole and not run.overrides and runs.address() is not None
        registration = register() if registers else None
    return {"stages": outcomes, "executed": executed, "registration": registration}


def run_tags() -> dict[str, str]:
    """Return the MLflow tags that name the current Prefect run."""
    found = get_run_context().flow_run  # type: ignore[union-attr]
    assert found is not None
    return {"prefect.flow_run": found.name or "", "prefect.flow_run_id": str(found.id)}


@contextmanager
def _place(overrides: list[str]) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the folder that the stages run in and the tags of its runs: this folder, or a work tree for overrides."""
    tags = run_tags()
    if not overrides:
        log = get_run_logger()
        # A lock of the operating system, not of the server: it ends with its run, even if the server restarts.
        with locks.only_writer(on_wait=lambda: log.info("another run works in this folder; waiting for it")):
            yield Path(), tags
        return
    name = tags["prefect.flow_run"]
    with experiments.work_tree(name) as tree:
        experiments.set_parameters(tree, overrides)
        yield tree, tags | {"sage.experiment": name, "sage.overrides": "\n".join(overrides)}
