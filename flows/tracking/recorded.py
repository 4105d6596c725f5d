"""Reads recorded runs from MLflow: results, parameters of the stages, and sample images."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.tracking.registry import aliases, connect, find, split
from flows.tracking.runs import flattened, run_of
from sage.errors import SageError
from sage.evaluation.results import Results, parse

_TAGS = ("sage.", "prefect.", "mlflow.source.git.commit")
_ELSEWHERE = ("sage.metric.", "sage.params", "sage.pipeline", "sage.process")  # part of the results, or not for display


@dataclass(frozen=True)
class Recorded:
    """A run that has results.

    id, name: of the MLflow run.
    start, seconds: start as a Unix time, and duration; None if the run has not ended.
    tags: the tags to show.
    params: parameters of all stages under dotted names.
    evaluate: the results of the evaluation.
    samples: content of report/samples.json, or None.
    """

    id: str
    name: str
    start: float
    seconds: float | None
    tags: Mapping[str, str]
    params: Mapping[str, str]
    evaluate: Results
    samples: Mapping[str, Any] | None


def recorded(name: str) -> Recorded:
    """Return a recorded run of a pipeline or of a registration.

    `name` is the run's id, or models:/NAME@ALIAS or models:/NAME/VERSION for the run that registered a version. The
    parameters include stages that were up to date and did not execute. Raises SageError if there is no such run or it
    has no results.
    """
    from mlflow.exceptions import MlflowException

    tracker, _ = connect()
    if name.startswith("models:/"):
        model, version = split(name)
        name = find(tracker, aliases(tracker, model).get(version, version), model).run_id
    try:
        run = tracker.get_run(name)
    except MlflowException as error:
        raise SageError(f"there is no run {name}; MLflow shows the ids of runs.") from error
    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = Path(tracker.download_artifacts(name, "metrics", temporary))
        except (MlflowException, OSError) as error:
            raise SageError(f"run {name} has no results; give a pipeline's run that finished.") from error
        results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
        if "evaluate" not in results:
            raise SageError(f"run {name} was not evaluated; give a pipeline's run that finished.")
        home = run.info.experiment_id
        return Recorded(
            name,
            run.info.run_name,
            run.info.start_time / 1000,
            (run.info.end_time - run.info.start_time) / 1000 if run.info.end_time else None,
            {k: v for k, v in run.data.tags.items() if k.startswith(_TAGS) and not k.startswith(_ELSEWHERE)},
            _params(tracker, run, temporary),
            parse(results["evaluate"], f"evaluate.json of run {name}"),
            _samples(tracker, run_of(tracker, home, folder / "evaluate.json"), temporary),
        )


def _params(tracker: Any, run: Any, folder: str) -> dict[str, str]:
    """Return parameters under dotted names, from the tag of a registration or the recorded dvc.lock of a pipeline."""
    if kept := run.data.tags.get("sage.params"):
        return dict(flattened(json.loads(kept)))
    if not any(file.path == "dvc.lock" for file in tracker.list_artifacts(run.info.run_id)):
        return {}
    lock = yaml.safe_load(Path(tracker.download_artifacts(run.info.run_id, "dvc.lock", folder)).read_text("utf-8"))
    stages = [stage.get("params", {}).get("params.yaml", {}) for stage in lock["stages"].values()]
    return {name: text for params in stages for name, text in flattened(params)}


def _samples(tracker: Any, run: str | None, folder: str) -> Any:
    """Return report/samples.json of the evaluation's run; None if `run` is None or has no such file."""
    if run is None or not any(file.path == "report/samples.json" for file in tracker.list_artifacts(run, "report")):
        return None
    return json.loads(Path(tracker.download_artifacts(run, "report/samples.json", folder)).read_text(encoding="utf-8"))
