"""The model registry: registration of models that passed their gates, and lookup of versions and aliases.

A version is complete before it is visible. Its files are uploaded first, then one call creates the version with all its
tags, then the alias moves. If the process is killed in between, it leaves files without a version, or a version without
an alias, which the next call finds.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.tracking import content, place
from flows.tracking.runs import address, client, ending, experiment, new_run
from flows.versioning.repository import revision
from sage.config import Params
from sage.data.groups import read_threshold
from sage.errors import MetricError, RegistryError
from sage.evaluation.arms import JUDGED
from sage.evaluation.results import Results, parse, parse_figure
from sage.files import digest, sha256_tree

MODEL = "sage"
CHALLENGER = "challenger"
CHAMPION = "champion"

# Names of the tags of a version. Values are text of at most 5,000 characters.
_MODEL_HASH = "sage.model_sha256"
_METRICS_HASH = "sage.metrics_sha256"
SET = "sage.heldout_set"
JUDGES = "sage.judges"
GATES = "sage.gates"
METRIC = "sage.metric."


@dataclass(frozen=True)
class Registration:
    """The outcome of `register`.

    version: its number, or None if the model failed a gate.
    new: whether this call recorded something: a new version, or the reasons of a new failure.
    reasons: why there is no version; empty if there is one.
    """

    version: str | None
    new: bool
    reasons: list[str]


def register(model: Path, metrics: Path, groups: Path, params: Params) -> Registration:
    """Register a model that passed its gates as a new version; if it failed one, record only the reasons, in a run.

    `metrics` is the folder of the stages' results, `groups` the folder of the evaluated groups. The same model with the
    same results is registered only once. Raises RegistryError if a result is missing, the results belong to another
    model, or tracking is off.
    """
    results = {path.stem: _read(path) for path in sorted(metrics.glob("*.json"))}
    _check(model, results)
    tracker, home = _open(_address())
    evaluate = _evaluation(results["evaluate"], metrics / "evaluate.json")
    tags = _tags(results, evaluate, params)
    reasons = _failures(evaluate, params)
    if reasons:
        return Registration(None, _record_failure(tracker, home, tags, reasons, metrics), reasons)
    version = _find(tracker, tags)
    new = version is None
    if version is None:
        threshold = read_threshold(groups / f"{params.generate.split}.json")
        says = content.describe(params, threshold, tags[_MODEL_HASH])
        version = _create(tracker, home, model, metrics, says, tags)
    if version != aliases(tracker).get(CHAMPION):
        name_alias(tracker, MODEL, CHALLENGER, version)
    return Registration(version, new, [])


def name_alias(tracker: Any, model: str, alias: str, version: str) -> None:
    """Let an alias name a version, also if another process gives a model the same new alias at this moment."""
    from mlflow.exceptions import MlflowException

    try:
        tracker.set_registered_model_alias(model, alias, version)
    except MlflowException as error:
        if "registered_model_aliases" not in str(error):
            raise
        # MLflow looks for the alias and then inserts it; the other process was between. Now it is there to be changed.
        tracker.set_registered_model_alias(model, alias, version)


def fetch(name: str, folder: Path) -> content.Version:
    """Download a version into a folder, verify its hash, and return it.

    `name` is a version number or an alias of this project's model, or models:/NAME@ALIAS or models:/NAME/VERSION for
    any model. No file is parsed or run before the hash is verified. Raises RegistryError if there is no such version or
    the hash differs.
    """
    tracker, _ = connect()
    model, version = split(name) if name.startswith("models:/") else (MODEL, name)
    return content.download(tracker, find(tracker, aliases(tracker, model).get(version, version), model), folder)


def current(address: str) -> str:
    """Return the number of the version that a models:/ URI names now; raise RegistryError if there is none."""
    tracker, _ = connect()
    model, version = split(address)
    return str(find(tracker, aliases(tracker, model).get(version, version), model).version)


def split(address: str) -> tuple[str, str]:
    """Split a models:/ URI into model name and version or alias; raise RegistryError if it has another form."""
    match = re.fullmatch(r"models:/([^/@]+)[/@]([^/@]+)", address)
    if match is None:
        raise RegistryError(f"{address} names no version; write models:/{MODEL}@{CHAMPION} or models:/{MODEL}/1.")
    return match[1], match[2]


def versions(model: str = MODEL) -> list[dict[str, str]]:
    """Return a row for each version, newest first, with version, aliases, metrics and revision as text."""
    tracker, _ = connect()
    names: dict[str, list[str]] = {}
    for alias, version in aliases(tracker, model).items():
        names.setdefault(version, []).append(alias)
    rows = []
    for found in tracker.search_model_versions(f"name = '{model}'"):
        row = {"version": str(found.version), "alias": ", ".join(sorted(names.get(str(found.version), [])))}
        for key, value in sorted(found.tags.items()):
            if key.startswith(METRIC):
                figure = parse_figure(value)
                measured = None if figure is None else figure.value
                row[key.removeprefix(METRIC)] = "-" if measured is None else f"{measured:.4g}"
        rows.append(row | {"revision": found.tags.get("sage.revision", "")[:12]})
    return sorted(rows, key=lambda row: -int(row["version"]))


def connect() -> tuple[Any, str]:
    """Return an MLflow client and the id of the experiment; raise RegistryError if there is nothing to read."""
    uri = _address()
    if file := place.missing(uri):
        raise RegistryError(f"nothing is registered: {file} does not exist. Run `sage run`, in the project's folder.")
    return _open(uri)


def _address() -> str:
    uri = address()
    if uri is None:
        raise RegistryError("tracking is off (SAGE_TRACKING_URI=off), and with it the registry.")
    return uri


def _open(uri: str) -> tuple[Any, str]:
    tracker = client(uri)
    return tracker, experiment(tracker, uri)


def _read(path: Path) -> dict[str, Any]:
    def refuse(text: str) -> None:
        raise RegistryError(f"{path} holds {text}; a result that is not finite counts as none.")

    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise RegistryError(f"{path} is not JSON: {error}") from error
    return value


def _evaluation(values: Any, path: Path) -> Results:
    """Return the parsed results of the evaluation; raise RegistryError if they are damaged."""
    try:
        return parse(values, str(path))
    except MetricError as error:
        raise RegistryError(f"nothing is registered: {error}\nRun `dvc repro --force evaluate`.") from error


def _check(model: Path, results: Mapping[str, dict[str, Any]]) -> None:
    """Raise RegistryError if a result is missing or the results belong to another model."""
    missing = [name for name in ("prepare", "finetune", "generate", "evaluate") if name not in results]
    if missing or not model.is_dir():
        raise RegistryError(f"no results of {', '.join(missing) or 'a model'} here. Run `sage run` first.")
    found, trained = sha256_tree(model), results["finetune"]["model_sha256"]
    if found != trained:
        raise RegistryError(
            f"{model} has SHA-256 {found[:12]}, but the results are of {trained[:12]}. Delete damaged copies with "
            "`sage verify --repair`, then `sage run`."
        )


def _tags(results: Mapping[str, dict[str, Any]], evaluate: Results, params: Params) -> dict[str, str]:
    """Return the tags of a version: hashes, gates, parameters and figures, all as text."""
    return evaluation_tags(evaluate) | {
        _MODEL_HASH: results["finetune"]["model_sha256"],
        _METRICS_HASH: digest(results["evaluate"]),
        "sage.data_digest": results["prepare"]["digest"],
        "sage.revision": revision(),
        "sage.params": params.model_dump_json(exclude={"pretrain"}),
    }


def evaluation_tags(evaluate: Results) -> dict[str, str]:
    """Return the tags of an evaluation: held-out set, judges, gates and figures."""
    gates = [gate.model_dump(include={"metric", "reference", "passed"}) for gate in evaluate.gates]
    judges = evaluate.model_dump(include={"features", "alignment", "measured_by"})
    figures = evaluate.arms.get(JUDGED, {})
    return {
        SET: evaluate.set.digest,
        JUDGES: json.dumps(judges, sort_keys=True),
        GATES: json.dumps(gates),
        **{METRIC + name: json.dumps(figure.model_dump()) for name, figure in figures.items()},
    }


def _failures(evaluate: Results, params: Params) -> list[str]:
    """Return the reasons against registration, none if every gate passed; a gate without a verdict is a failure."""
    judged = {(gate.metric, gate.reference): gate for gate in evaluate.gates}
    reasons = []
    for wanted in params.evaluate.gates:
        gate = judged.get((wanted.metric, wanted.reference))
        if gate is None:
            reasons.append(f"{wanted.metric} against {wanted.reference}: not judged")
        elif not gate.passed:
            reasons.append(f"{wanted.metric} against {wanted.reference}: {gate.reason}")
    if not reasons and not evaluate.passed:
        reasons.append("the evaluation as a whole did not pass")
    return reasons


def _find(tracker: Any, tags: Mapping[str, str]) -> str | None:
    """Return the version with the same model and the same results, or None."""
    same = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in (_MODEL_HASH, _METRICS_HASH))
    found = tracker.search_model_versions(f"name = '{MODEL}' and {same}")
    return str(min(int(version.version) for version in found)) if found else None


def _record_failure(tracker: Any, home: str, tags: Mapping[str, str], reasons: list[str], metrics: Path) -> bool:
    """Record the reasons of a failure in a run, unless there is one for this model and these results.

    Returns whether a run was created. `tags` are the tags that a version would have, `home` is the id of the
    experiment, `metrics` the folder of results.
    """
    same = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in (_MODEL_HASH, _METRICS_HASH))
    if tracker.search_runs([home], filter_string=f"{same} and tags.`sage.verdict` = 'failed'", max_results=1):
        return False
    run = new_run(tracker, home, "register", {"sage.stage": "register", "sage.verdict": "failed", **tags})
    with ending(run, tracker):
        run.tags({f"sage.reason.{number}": reason for number, reason in enumerate(reasons)})
        run.artifact(metrics, "metrics")
    return True


def _create(tracker: Any, home: str, model: Path, metrics: Path, says: Mapping[str, Any], tags: dict[str, str]) -> str:
    """Upload the files, then create the version with all its tags in one call; return its number.

    tracker  MLflow client
    home     id of the experiment
    model    folder of the weights
    metrics  folder of the results
    says     settings of the version, from `describe`
    tags     tags of the version
    """
    run = new_run(tracker, home, "register", {"sage.stage": "register", "sage.verdict": "passed", **tags})
    with ending(run, tracker), tempfile.TemporaryDirectory() as temporary:
        # Hash and upload the same copy, because the original could change in between.
        weights, files = Path(temporary) / "model", Path(temporary) / "version"
        shutil.copytree(model, weights)
        if sha256_tree(weights) != tags[_MODEL_HASH]:
            raise RegistryError(f"{model} changed while it was being registered. Try again.")
        if says["group"].get("by") == "distilled":
            from sage.grouping.distilled import kept_at, read_distilled  # late: they need torch

            read_distilled(model)
            shutil.copy(kept_at(model), kept_at(weights))
        content.save(files, weights, says)
        tags = tags | {content.FILES_HASH: content.files_hash(files)}
        run.artifact(metrics, "metrics")
        run.artifact(files, "model")
        if (weights / content.ADAPTER).exists():
            adapter = Path(temporary) / "lora"
            content.save_adapter(adapter, weights / content.ADAPTER, says["base"], tags[_MODEL_HASH])
            run.artifact(adapter, "lora")
        _ensure_model(tracker)
        source = f"{tracker.get_run(run.id).info.artifact_uri}/model"
        return str(tracker.create_model_version(MODEL, source, run.id, tags=tags).version)


def _ensure_model(tracker: Any) -> None:
    from mlflow.exceptions import MlflowException

    try:
        tracker.create_registered_model(MODEL)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def aliases(tracker: Any, model: str = MODEL) -> dict[str, str]:
    """Return a mapping from alias to version number; empty if no version has an alias or nothing is registered."""
    found = tracker.search_registered_models(f"name = '{model}'")
    return {alias: str(version) for alias, version in found[0].aliases.items()} if found else {}


def find(tracker: Any, version: str | None, model: str = MODEL, what: str = CHALLENGER) -> Any:
    """Return a version from the registry; raise RegistryError if it does not exist. `what` names a missing alias."""
    from mlflow.exceptions import MlflowException

    if version is None:
        raise RegistryError(f"there is no {what} of {model}. `sage run` registers a model that passes its gates.")
    try:
        return tracker.get_model_version(model, version)
    except MlflowException as error:
        raise RegistryError(f"there is no version {version} of {model}; `sage compare` lists them.") from error
