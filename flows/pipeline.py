"""The Prefect flow: the stages of `dvc repro`, a task each, then registration. The only file that imports prefect.

DVC decides what is up to date; Prefect's own caching is off, for two caches disagree one day.
"""

import json
import os
from pathlib import Path
from typing import Any

# Before prefect is imported, which reads them: nothing is reported home.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# Two busy cores start the temporary server in 12 to 15 s; the default limit of 20 s is near that.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows import tables, tracking, versioning
from sage.config import load_params

MODEL = Path("models/sage")
METRICS = Path("metrics")
GROUPS = Path("data/groups")
REPORT = Path("report/index.html")


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def reproduce(stage: str, environment: dict[str, str]) -> dict[str, Any]:
    """Bring one stage up to date; return what became of it and how long it took."""
    log = get_run_logger()
    outcome = versioning.reproduce(_lines(log.info), stage, alone=True, environment=environment)[stage]
    log.info("%s: %s in %.1f s", stage, outcome.state, outcome.seconds)
    return {"stage": stage, "state": outcome.state, "seconds": round(outcome.seconds, 1)}


@task(cache_policy=NO_CACHE)
def register() -> dict[str, Any]:
    """Register the model if it passed its gates, once."""
    done = tracking.register(MODEL, METRICS, GROUPS, load_params())
    return {"version": done.version, "new": done.new, "reasons": done.reasons}


@flow(name="sage-pipeline")
def sage_pipeline() -> dict[str, Any]:
    """Bring every stage up to date in the order of dvc.yaml, show the results, register the model."""
    with versioning.only_writer(), tracking.pipeline_run() as pipeline:
        outcomes = [reproduce(stage, pipeline.environment) for stage in versioning.stages()]
        executed = sum(outcome["state"] == "executed" for outcome in outcomes)
        if executed:
            pipeline.finish("FINISHED", METRICS)
        _show(outcomes)
        registration = register() if tracking.address() else None
    return {"stages": outcomes, "executed": executed, "registration": registration}


def _show(outcomes: list[dict[str, Any]]) -> None:
    """Leave the tables where Prefect shows them, each under a key, so that runs can be compared."""
    evaluate = json.loads((METRICS / "evaluate.json").read_text(encoding="utf-8"))
    create_table_artifact(outcomes, key="stages", description="What each stage did")
    create_table_artifact(tables.arms(evaluate), key="arms", description="Held-out prompts, value [interval]")
    create_table_artifact(tables.gates(evaluate), key="gates", description="Verdicts")
    create_link_artifact(REPORT.resolve().as_uri(), key="report", link_text="report", description="The report page")


def _lines(log: Any) -> versioning.Write:
    """Return a writer that logs whole lines; stages print at most one every few seconds."""
    rest = ""

    def write(text: str) -> None:
        nonlocal rest
        *whole, rest = (rest + text).split("\n")
        for line in filter(None, whole):
            log(line)

    return write
