"""The flow `sage-generate`: images for a large list of prompts with a registered version, in shards.

Shards run one after the other on the worker, or, with SAGE_DASK set to the address of a Dask scheduler, on all of that
scheduler's workers; a shard whose worker is lost goes to another one, and continues from the images that exist.
"""

import os
from typing import Any

import flows.orchestration.settings  # noqa: F401

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff

from flows.orchestration import shown
from flows.orchestration.forms import Batch
from flows.orchestration.graph import may_pass, reach_tracking


def _runner() -> "TaskRunner[Any]":
    """Return the task runner for the shards; it depends on the machine, so an environment variable chooses it."""
    if address := os.environ.get("SAGE_DASK"):
        from prefect_dask.task_runners import DaskTaskRunner

        return DaskTaskRunner(address=address)
    return ThreadPoolTaskRunner(max_workers=1)


@task(cache_policy=NO_CACHE, retries=3, retry_delay_seconds=exponential_backoff(2), retry_condition_fn=may_pass)
def plan(batch: Batch) -> None:
    """Group the prompts and write the plan of the run."""
    shown.run("plan", "flows.prompts.shards", "plan", batch.prompts, "--out", batch.out, *_options(batch))


@task(cache_policy=NO_CACHE, retries=3, retry_delay_seconds=exponential_backoff(2), retry_condition_fn=may_pass)
def draw_on_server(batch: Batch) -> None:
    """Let a running `sage serve` draw the missing images; write manifest and contact sheet."""
    options = [*_options(batch), f"--server={batch.server}"]
    shown.run("generate", "flows.prompts.generate", batch.prompts, "--out", batch.out, *options)


def _options(batch: Batch) -> list[str]:
    values = batch.model_dump(exclude={"prompts", "out", "shards", "judge", "literal", "server"})
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    return options + (["--literal"] if batch.literal else [])


@task(
    task_run_name="shard {number} of {count}",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=exponential_backoff(2),
    retry_condition_fn=may_pass,
)
def draw(out: str, number: int, count: int, judge: str | None) -> None:
    """Draw the missing images of one shard in a separate process; with `judge`, a CLIP, also measure the shard."""
    options = [] if judge is None else [f"--judge={judge}"]
    shown.run(f"shard-{number}", "flows.prompts.shards", "draw", "--out", out, "--shard", f"{number}/{count}", *options)


@task(cache_policy=NO_CACHE, retries=3, retry_delay_seconds=exponential_backoff(2), retry_condition_fn=may_pass)
def finish(out: str, judged: int) -> None:
    """Write manifest and contact sheet, and evaluation.json if the number of judged shards is not 0."""
    shown.run("finish", "flows.prompts.shards", "finish", "--out", out, f"--judged={judged}")


@flow(name="sage-generate", task_runner=_runner())
def generate_batch(batch: Batch) -> dict[str, Any]:
    """Draw images for a list of prompts; the bytes do not depend on the number of shards or workers."""
    if batch.server is not None:
        draw_on_server(batch)
        return {"out": batch.out, "server": batch.server}
    reach_tracking()
    plan(batch)
    shards = [draw.submit(batch.out, number, batch.shards, batch.judge) for number in range(1, batch.shards + 1)]
    wait(shards)
    for shard in shards:
        shard.result()
    finish(batch.out, 0 if batch.judge is None else batch.shards)
    return {"out": batch.out, "shards": batch.shards}
