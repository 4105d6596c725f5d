"""The flows on registered versions: evaluate one on this folder's held-out set; promote one, on approval if asked."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flows.orchestration.settings  # noqa: F401

from prefect import flow, get_run_logger, pause_flow_run, task
from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from flows.orchestration import shown
from flows.orchestration.forms import Approval, Judged, Promotion
from flows.orchestration.graph import MODEL, may_pass, reach_tracking, reproduce, run_tags
from flows.report import tables
from flows.report.sheet import opened, sheet
from flows.report.tables import TableRow
from flows.tracking import judging, promotion, registry, runs
from flows.versioning import experiments
from sage.errors import RegistryError
from sage.evaluation.results import Results
from sage.training import curves

_CHAMPION = "champion"
LOSSES = Path("plots/losses.csv")
_POLL = 5  # seconds between checks for an answer


@task(cache_policy=NO_CACHE, retries=4, retry_delay_seconds=exponential_backoff(2), retry_condition_fn=may_pass)
def fetch(version: str, out: str) -> None:
    """Verify the weights of a version and copy them into a folder, which is replaced."""
    with tempfile.TemporaryDirectory() as temporary:
        weights = registry.fetch(version, Path(temporary)).weights
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(weights, out)


@task(cache_policy=NO_CACHE, retries=4, retry_delay_seconds=exponential_backoff(2), retry_condition_fn=may_pass)
def promote(version: str) -> str:
    """Make a version champion unless it is damaged, failed a gate or is worse than the champion; return its number."""
    return promotion.promote(version, judge=_judge)


def _judge(versions: Sequence[Any]) -> list[Results]:
    """Judge versions of the registry on this folder's held-out set, and show the figures."""
    judgements = judging.judge(versions, judging.today(), shown.lines("judge"))
    results = {f"version {found.version}": found.results for found in judgements}
    create_table_artifact(tables.versions(results), key="versions", description="Judged on one held-out set")
    return list(results.values())


@task(task_run_name="draw with {version}", cache_policy=NO_CACHE)
def draw(version: str, prompts: list[str], out: str) -> None:
    """Generate images for prompts with a registered version, in a separate process."""
    folder = Path(out)
    folder.mkdir(parents=True)
    source = folder / "prompts.txt"
    source.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    images, model = str(folder / "pictures"), f"models:/sage/{version}"
    shown.run(f"version-{version}", "flows.prompts.generate", str(source), "--out", images, "--model", model)


@flow(name="sage-evaluate")
def evaluate_version(judged: Judged = Judged()) -> dict[str, Any]:  # noqa: B008  # frozen
    """Evaluate a registered version on the held-out set of this folder's commit, in a temporary work tree."""
    reach_tracking()
    name = run_tags()["prefect.flow_run"]
    tags = run_tags() | {"sage.judged_version": judged.version}
    with experiments.work_tree(name) as tree, runs.pipeline_run(tags) as pipeline:
        environment = pipeline.environment | {"SAGE_TRACKING_URI": runs.address() or "off"}
        outcomes = [reproduce(stage, environment, str(tree)) for stage in ("prepare", "group")]
        fetch(judged.version, str(tree / MODEL))
        curves.write_curves(tree / LOSSES, [])  # stage evaluate shows them, but a version does not keep its own
        outcomes += [reproduce(stage, environment, str(tree)) for stage in ("generate", "evaluate")]
        pipeline.finish("FINISHED", tree / "metrics")
        shown.stages(outcomes)
        passed = shown.results(tree)
    return {"version": judged.version, "passed": passed, "stages": outcomes}


@flow(name="sage-promote")
def promote_version(promotion: Promotion = Promotion()) -> dict[str, Any]:  # noqa: B008  # frozen
    """Make a version champion; if `ask` is set, a person decides after seeing figures and images."""
    reach_tracking()
    rows = _compared(promotion.version)
    number = rows[0]["version"]
    if promotion.ask:
        answer = _ask(rows, promotion)
        get_run_logger().info("%s by %s: %s", "yes" if answer.promote else "no", answer.by or "?", answer.reason or "-")
        if not answer.promote:
            return {"version": number, "champion": False, "by": answer.by, "reason": answer.reason}
    promote(number)
    return {"version": number, "champion": True}


def _compared(version: str) -> list[TableRow]:
    """Return the rows of a version and of the champion, if there is one; raise RegistryError for an unknown version."""
    found = registry.versions()
    candidate = next((row for row in found if version in (row["version"], *row["alias"].split(", "))), None)
    if candidate is None:
        raise RegistryError(f"there is no version {version}; `sage compare` lists them.")
    return [candidate, *(row for row in found if _CHAMPION in row["alias"].split(", ") and row is not candidate)]


def _ask(rows: list[TableRow], promotion: Promotion) -> Approval:
    """Show both versions and wait for the answer."""
    with tempfile.TemporaryDirectory() as temporary:
        places = [Path(temporary) / row["version"] for row in rows]
        for row, place in zip(rows, places, strict=True):
            draw(row["version"], promotion.prompts, str(place))
        names = [f"{number:06d}.png" for number in range(1, len(promotion.prompts) + 1)]
        image = sheet([[opened(place / "pictures" / name) for name in names] for place in places], size=(64, 64))
    url = shown.as_url(image)
    create_image_artifact(
        url, key="candidates", description="A row for each version: " + ", ".join(r["version"] for r in rows)
    )
    columns = dict.fromkeys(name for row in rows for name in row)
    lines = [f"| {name} | " + " | ".join(row.get(name, "-") for row in rows) + " |" for name in columns]
    table = "\n".join([lines[0], "|---" * (len(rows) + 1) + "|", *lines[1:]])
    asked = f"It passed its gates. Make version {rows[0]['version']} champion?"
    text = f"{asked}\n\n{table}\n\nImages, a row for each version:\n\n![images]({url})"
    form = Approval.with_initial_data(description=text)
    return pause_flow_run(wait_for_input=form, timeout=round(promotion.wait_hours * 3600), poll_interval=_POLL)
