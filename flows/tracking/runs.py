"""MLflow runs: one for each execution of a stage and one for each pipeline, with the results that the stages write."""

import json
import logging
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from flows.tracking import place
from flows.tracking.place import EXPERIMENT
from flows.versioning.repository import revision
from sage.errors import SageError
from sage.evaluation.results import Results, read
from sage.files import sha256

if TYPE_CHECKING:
    from PIL.Image import Image

# A variable of our own, because MLFLOW_RUN_ID would make every stage write into the pipeline's run.
PIPELINE = "SAGE_PIPELINE"
_PIPELINE_TAGS = "SAGE_PIPELINE_TAGS"
_PROCESS = "sage.process"  # tag of a run: the process that records it
RESULT = "sage.result_sha256"  # tag of a run: hash of the file in metrics/ that the stage wrote
_DIGEST_LENGTH = 36  # most characters of a dataset's digest that MLflow stores


def address() -> str | None:
    """Return the tracking URI: SAGE_TRACKING_URI, or mlflow.db in the working directory; None if it is "off"."""
    value = os.environ.get("SAGE_TRACKING_URI") or place.database()
    return None if value == "off" else value


def client(uri: str) -> Any:
    """Return an MLflow client with few log messages and, by default, no telemetry and two retries of a request."""
    place.follow(uri)
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment(tracker: Any, uri: str) -> str:
    """Return the id of the experiment; create it if it is missing.

    Raises SageError if the address does not answer.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = tracker.get_experiment_by_name(EXPERIMENT)
        if found is None:
            # A server chooses its own artifact location; for a plain database MLflow would use ./mlruns.
            home = place.artifacts(uri)
            return str(tracker.create_experiment(EXPERIMENT, artifact_location=home.as_uri() if home else None))
        return str(found.experiment_id)
    except MlflowException as error:
        raise SageError(
            f"tracking at {uri} does not answer: {error.message}\n"
            "Start it, correct SAGE_TRACKING_URI, or set SAGE_TRACKING_URI=off to record nothing."
        ) from error


def check(uri: str) -> None:
    """Raise SageError if the address does not answer."""
    experiment(client(uri), uri)


def link(result: Path) -> str | None:
    """Return the web address of the run that wrote a result file; None if no server is used or no run is recorded."""
    uri = address()
    if uri is None or not uri.startswith("http"):
        return None
    tracker = client(uri)
    home = experiment(tracker, uri)
    run_id = run_of(tracker, home, result)
    return None if run_id is None else f"{uri}/#/experiments/{home}/runs/{run_id}"


def run_of(tracker: Any, home: str, result: Path) -> str | None:
    """Return the id of the latest run that wrote a result file with the same content, or None.

    Runs are found by the hash of the file. So the result of a stage that is up to date, or was restored from the cache,
    leads to the run that produced it, and the file itself needs no run id.
    """
    same = f"tags.`{RESULT}` = '{sha256(result)}'"
    found = tracker.search_runs([home], filter_string=same, order_by=["attributes.start_time DESC"], max_results=1)
    return found[0].info.run_id if found else None


class Run:
    """Writer of one MLflow run; if tracking is off, `id` is None and nothing is recorded."""

    def __init__(self, tracker: Any = None, run_id: str | None = None) -> None:
        """Record with an MLflow client; if `tracker` is None, nothing is recorded."""
        self._tracker = tracker
        self.id = run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; nested mappings get dotted names, lists are written as JSON."""
        if self._tracker is not None:
            from mlflow.entities import Param

            self._tracker.log_batch(self.id, params=[Param(key, text) for key, text in flattened(values)])

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics; with `step` they are points of curves."""
        if self._tracker is not None:
            from mlflow.entities import Metric

            now = round(time.time() * 1000)
            points = [Metric(key, float(value), now, step or 0) for key, value in values.items()]
            self._tracker.log_batch(self.id, metrics=points)

    def image(self, image: "Image", key: str, step: int = 0) -> None:
        """Record an image under a key; if a key has several steps, MLflow shows a slider."""
        if self._tracker is not None:
            self._tracker.log_image(self.id, image, key=key, step=step, synchronous=True)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file, or all files below a directory, in the artifact folder `folder`."""
        if self._tracker is not None:
            log = self._tracker.log_artifacts if path.is_dir() else self._tracker.log_artifact
            log(self.id, str(path), folder or None)

    def dataset(self, name: str, digest: str, context: str) -> None:
        """Record a dataset by name and digest; `context` is "training" or "evaluation"."""
        if self._tracker is not None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            data = Dataset(name, digest[:_DIGEST_LENGTH], source_type="dvc", source=json.dumps({"digest": digest}))
            self._tracker.log_inputs(self.id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def result(self, path: Path) -> None:
        """Record the hash of a result file, so that `run_of` finds this run."""
        self.tags({RESULT: sha256(path)})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Record tags; values are converted to text."""
        if self._tracker is not None:
            from mlflow.entities import RunTag

            self._tracker.log_batch(self.id, tags=[RunTag(key, str(value)) for key, value in values.items()])


@contextmanager
def stage_run(stage: str, params: Mapping[str, Any]) -> Iterator[Run]:
    """Yield the run that records this execution of a stage; on exit it is marked as finished, failed or killed.

    Inside a pipeline run it is a child of the pipeline's run. Raises SageError if the address does not answer.
    """
    uri = address()
    if uri is None:
        yield Run()
        return
    tracker = client(uri)
    home = experiment(tracker, uri)
    tags = {"sage.stage": stage}
    if pipeline := os.environ.get(PIPELINE):
        tags["mlflow.parentRunId"] = _find_parent(tracker, home, pipeline) or _new_parent(tracker, home, pipeline)
    run = new_run(tracker, home, stage, tags)
    with ending(run, tracker), _watched(run, uri):
        run.params(params)
        yield run


def new_run(tracker: Any, home: str, name: str, tags: Mapping[str, str]) -> Run:
    """Create a run tagged with revision, machine and recording process; `tags` take precedence.

    Runs whose process is gone are first marked as killed, because nothing else would ever end them.
    """
    end_killed(tracker, home)
    own = {"mlflow.source.git.commit": revision(), _PROCESS: _process(), "sage.profile": profile()}
    return Run(tracker, tracker.create_run(home, run_name=name, tags={**own, **tags}).info.run_id)


def end_killed(tracker: Any, home: str) -> None:
    """Mark running runs as killed if they were started on this machine and their process is gone."""
    mine = f"attributes.status = 'RUNNING' and tags.`{_PROCESS}` LIKE '{socket.gethostname()}:%'"
    for found in tracker.search_runs([home], filter_string=mine):
        if not _alive(found.data.tags[_PROCESS]):
            tracker.set_terminated(found.info.run_id, "KILLED")


@contextmanager
def ending(run: Run, tracker: Any) -> Iterator[None]:
    """Mark the run as finished, failed or killed when the block ends."""
    try:
        yield
    except BaseException as error:
        tracker.set_terminated(run.id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    tracker.set_terminated(run.id, "FINISHED")


@contextmanager
def _watched(run: Run, uri: str) -> Iterator[None]:
    """Record system metrics every ten seconds, unless MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false or 0."""
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("false", "0"):
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run.id, tracking_uri=uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


class Pipeline:
    """One execution of the whole pipeline; the runs of its stages are children of the pipeline's run.

    The first stage that executes creates the pipeline's run, so a pipeline that is up to date has no run.
    """

    def __init__(self, tags: Mapping[str, str] | None = None) -> None:
        """Choose an id; nothing is recorded yet. `tags` are set on its run."""
        self._id = uuid4().hex
        # Tag the run with this process, because the stage that creates the run ends before the run does.
        self._tags = {_PROCESS: _process(), **(tags or {})}

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables by which the processes of the stages find their parent run."""
        return {PIPELINE: self._id, _PIPELINE_TAGS: json.dumps(self._tags)}

    def finish(self, status: str, metrics: Path | None = None) -> None:
        """End the pipeline's run, if there is one; `metrics`, the folder of results, is recorded in it."""
        uri = address()
        if uri is None:
            return
        tracker = client(uri)
        home = experiment(tracker, uri)
        end_killed(tracker, home)
        parent = _find_parent(tracker, home, self._id)
        if parent is None:
            return
        run = Run(tracker, parent)
        if metrics is not None:
            run.artifact(metrics, "metrics")
            evaluate = read(metrics / "evaluate.json")
            run.metrics(headline(evaluate))
            run.tags({"sage.gates": "passed" if evaluate.passed else "failed"})
            lock, prepare = metrics.parent / "dvc.lock", metrics / "prepare.json"
            run.tags({"sage.data_digest": json.loads(prepare.read_text(encoding="utf-8"))["digest"]})
            if lock.exists():
                run.tags({"sage.dvc_lock": sha256(lock)})
                run.artifact(lock)
        tracker.set_terminated(parent, status)


@contextmanager
def pipeline_run(tags: Mapping[str, str] | None = None) -> Iterator[Pipeline]:
    """Yield a pipeline; if the block fails, its run ends as failed. On success the caller calls `finish`."""
    pipeline = Pipeline(tags)
    try:
        yield pipeline
    except BaseException:
        pipeline.finish("FAILED")
        raise


def headline(evaluate: Results) -> dict[str, float]:
    """Return all measured figures under names of the form "arm/metric"."""
    return {
        f"{arm}/{metric}": figure.value
        for arm, figures in evaluate.arms.items()
        for metric, figure in figures.items()
        if figure.value is not None
    }


def _find_parent(tracker: Any, home: str, pipeline: str) -> str | None:
    found = tracker.search_runs([home], filter_string=f"tags.`sage.pipeline` = '{pipeline}'", max_results=1)
    return found[0].info.run_id if found else None


def _new_parent(tracker: Any, home: str, pipeline: str) -> str:
    tags = {"sage.pipeline": pipeline} | json.loads(os.environ.get(_PIPELINE_TAGS, "{}"))
    return str(new_run(tracker, home, "pipeline", tags).id)


def profile() -> str:
    """Return a description of the hardware, which run times depend on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, device {os.environ.get('SAGE_DEVICE', 'chosen')}"


def _process() -> str:
    """Return a unique name of this process: host name, process id and start time in seconds."""
    import psutil

    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.0f}"


def _alive(process: str) -> bool:
    """Return whether a process of this machine is running; start times may differ by a second after clock changes."""
    import psutil

    _, number, start = process.rsplit(":", 2)
    try:
        found = psutil.Process(int(number))
        return bool(found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - float(start)) < 2)
    except psutil.NoSuchProcess:
        return False


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested values as (dotted name, text); values other than text are written as JSON."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)
