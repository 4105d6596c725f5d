"""Prefect artifacts of a run: tables, images, links and progress, each with a key, so that runs can be compared."""

import base64
import io
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import flows.orchestration.settings  # noqa: F401

from PIL import Image
from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows import leash
from flows.report import tables
from flows.report.sheet import opened, sheet
from flows.tracking import runs
from flows.versioning.repository import FINAL, Output, StageError, Write
from sage.evaluation import arms
from sage.evaluation.manifest import image_path, read_manifest
from sage.evaluation.results import read

_SIDE = 64  # pixels
_COLUMNS = 12
_PROGRESS = re.compile(r"^(?P<what>[a-z][a-z -]*): (?P<done>\d+)/(?P<total>\d+) \((?P<rest>.*)\)$")


def stages(outcomes: Sequence[dict[str, Any]], overrides: Sequence[str] = ()) -> None:
    """Show the state and duration of each stage, and the overrides of this run."""
    create_table_artifact(list(outcomes), key="stages", description="What each stage did")
    if overrides:
        lines = "\n".join(f"- `{override}`" for override in overrides)
        create_markdown_artifact(lines, key="overrides", description="Parameters of this run only")


def results(folder: Path) -> bool:
    """Show the arms, the gates, some images of each arm, and links to more; return whether all gates passed."""
    evaluate = read(folder / "metrics/evaluate.json")
    create_table_artifact(tables.arms(evaluate), key="arms", description="Held-out prompts, value [interval]")
    create_table_artifact(tables.gates(evaluate), key="gates", description="Verdicts")
    image = grid(folder / "data/generated")
    create_image_artifact(
        as_url(image), key="pictures", description="A row for each arm: " + ", ".join(map(arms.label, evaluate.arms))
    )
    if folder == Path():  # a temporary work tree is removed with its report, which remains in MLflow
        report = (folder / "report/index.html").resolve().as_uri()
        create_link_artifact(report, key="report", link_text="report", description="On the worker's machine")
    if (link := runs.link(folder / "metrics/evaluate.json")) is not None:
        create_link_artifact(link, key="mlflow", link_text="MLflow", description="The run of stage evaluate")
    return evaluate.passed


def grid(generated: Path) -> Image.Image:
    """Return pictures of the largest groups of the first seed, a row for each arm."""
    lines = read_manifest(generated)
    sizes = Counter(line.group for line in lines)
    first = [line for line in lines if line.seed == lines[0].seed]
    first.sort(key=lambda line: (-sizes[line.group], line.group or 0))
    rows = [
        [image_path(generated, arm, line.seed, line.id) for line in first if line.arm == arm][:_COLUMNS]
        for arm in dict.fromkeys(line.arm for line in lines)
    ]
    return sheet([[opened(path) for path in row] for row in rows], size=(_SIDE, _SIDE))


def as_url(image: Image.Image) -> str:
    """Return an image as a data URL, so that no server must store it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def lines(what: str) -> Write:
    """Return a function that logs text line by line; lines with progress also update a progress artifact.

    `what` is the prefix of the artifact's key.
    """
    log, rest, bars = get_run_logger(), "", dict[str, UUID]()

    def write(text: str) -> None:
        nonlocal rest
        *whole, rest = (rest + text).split("\n")
        for line in filter(None, whole):
            log.info("%s", line)
            if match := _PROGRESS.match(line):
                thing, total = match["what"], int(match["total"])
                if thing not in bars:
                    key = f"{what}-{thing}".replace(" ", "-")
                    bars[thing] = cast(UUID, create_progress_artifact(0.0, key=key, description=thing))
                percent = 100 * int(match["done"]) / total if total else 100.0
                update_progress_artifact(bars[thing], percent, line)

    return write


def run(what: str, module: str, *arguments: str) -> None:
    """Run a module of this project as a process, and show what it prints; raise StageError if it fails."""
    output = Output(lines(what))
    code = leash.run([sys.executable, "-m", module, *arguments], output.feed)
    if code:
        said = [line for line in output.lines if line.startswith("error: ")] or [f"it ended with code {code}"]
        raise StageError(f"{what} failed: {said[0].removeprefix('error: ')}", code not in FINAL)
