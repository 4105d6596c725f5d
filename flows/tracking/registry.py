"""The registry: which models passed the gates, which one is champion, and that neither is ever half there.

A version is complete before it is visible: its files are uploaded first, then one call makes it with all its tags, then
the alias moves. A process killed between leaves files that nothing points to, or a version that the next call finds.
"""

import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from flows.tracking.runs import Run, address, client, ending, experiment
from flows.versioning import revision
from sage.config import Params
from sage.errors import RegistryError
from sage.files import digest, sha256_tree
from sage.gates import HIGHER_IS_BETTER, JUDGED

MODEL = "sage"
CHALLENGER = "challenger"
CHAMPION = "champion"

# Tags of a version. Values are text of at most 5,000 characters, names start with "sage.".
_MODEL_HASH = "sage.model_sha256"
_METRICS_HASH = "sage.metrics_sha256"
_FILES_HASH = "sage.files_sha256"
_SET = "sage.heldout_set"
_GATES = "sage.gates"
_REPLACED = "sage.replaced"
_METRIC = "sage.metric."


@dataclass(frozen=True)
class Registration:
    """What `register` did: the version, or None with the reasons why there is none."""

    version: str | None
    new: bool
    reasons: list[str]


def register(model: Path, metrics: Path, groups: Path, params: Params) -> Registration:
    """Make a version of a model that passed its gates; of one that failed keep the reasons, and no version.

    `metrics` and `groups` are the folders with the stages' results and with the groups that were judged. The same
    model with the same results is registered once. Raises RegistryError where the results are not those of this model
    or tracking is off.
    """
    tracker, home = _connect()
    results = {path.stem: _read(path) for path in sorted(metrics.glob("*.json"))}
    tags = _tags(model, results, params)
    reasons = _failures(results["evaluate"], params)
    if reasons:
        return Registration(None, _record_failure(tracker, home, tags, reasons, metrics), reasons)
    version = _find(tracker, tags)
    new = version is None
    if version is None:
        version = _create(tracker, home, model, metrics, _sampling(groups, params), tags)
    if version != _aliases(tracker).get(CHAMPION):
        tracker.set_registered_model_alias(MODEL, CHALLENGER, version)
    return Registration(version, new, [])


def promote(version: str | None = None) -> str:
    """Make a version, by default the challenger, the champion; return it.

    Raises RegistryError where it is damaged, failed a gate, was judged on another held-out set than the champion, or
    is worse than the champion beyond both intervals in anything that a gate rests on.
    """
    tracker, _ = _connect()
    aliases = _aliases(tracker)
    candidate = _version(tracker, version or aliases.get(CHALLENGER))
    number, champion = str(candidate.version), aliases.get(CHAMPION)
    if number != champion:
        _check(tracker, candidate)
        if champion is not None:
            _check_against(candidate, _version(tracker, champion))
            # Remembered before the alias moves, so that a way back exists at every instant.
            tracker.set_model_version_tag(MODEL, number, _REPLACED, champion)
        tracker.set_registered_model_alias(MODEL, CHAMPION, number)
    if aliases.get(CHALLENGER) == number:
        tracker.delete_registered_model_alias(MODEL, CHALLENGER)
    return number


def rollback() -> str:
    """Make the version that the champion replaced the champion again; return it."""
    tracker, _ = _connect()
    champion = _version(tracker, _aliases(tracker).get(CHAMPION), "champion")
    before = champion.tags.get(_REPLACED)
    if not before:
        raise RegistryError(f"version {champion.version} replaced no champion, so there is none to go back to.")
    _check(tracker, _version(tracker, before))
    tracker.set_registered_model_alias(MODEL, CHAMPION, before)
    return str(before)


def fetch(name: str, folder: Path) -> Path:
    """Download a version into a folder, verify its hash, and return the folder of the model in it.

    `name` is a version or an alias. Nothing of it is loaded or run before the hash is seen to fit.
    """
    tracker, _ = _connect()
    found = _version(tracker, _aliases(tracker).get(name, name))
    return _verified(tracker, found, folder) / "artifacts" / "model"


def versions() -> list[dict[str, str]]:
    """Return all versions, newest first: version, aliases, revision, and each metric as text."""
    tracker, _ = _connect()
    aliases: dict[str, list[str]] = {}
    for alias, version in _aliases(tracker).items():
        aliases.setdefault(version, []).append(alias)
    rows = []
    for found in tracker.search_model_versions(f"name = '{MODEL}'"):
        row = {"version": str(found.version), "alias": ", ".join(sorted(aliases.get(str(found.version), [])))}
        for key, value in sorted(found.tags.items()):
            if key.startswith(_METRIC):
                row[key.removeprefix(_METRIC)] = f"{json.loads(value)['value']:.4g}"
        rows.append(row | {"revision": found.tags.get("sage.revision", "")[:12]})
    return sorted(rows, key=lambda row: -int(row["version"]))


def _connect() -> tuple[Any, str]:
    uri = address()
    if uri is None:
        raise RegistryError("tracking is off (SAGE_TRACKING_URI=off), and with it the registry.")
    tracker = client(uri)
    return tracker, experiment(tracker, uri)


def _read(path: Path) -> dict[str, Any]:
    def refuse(text: str) -> None:
        raise RegistryError(f"{path} holds {text}; a result that is not finite counts as none.")

    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return value


def _tags(model: Path, results: Mapping[str, dict[str, Any]], params: Params) -> dict[str, str]:
    """Return what a version says of itself, all as text."""
    missing = [name for name in ("prepare", "finetune", "generate", "evaluate") if name not in results]
    if missing or not model.is_dir():
        raise RegistryError(f"no results of {', '.join(missing) or 'a model'} here. Run `sage run` first.")
    found, trained = sha256_tree(model), results["finetune"]["model_sha256"]
    if found != trained:
        raise RegistryError(
            f"{model} has SHA-256 {found[:12]}, but the results are of {trained[:12]}. Run `dvc repro`, then again."
        )
    evaluate = results["evaluate"]
    gates = [{key: gate[key] for key in ("metric", "reference", "passed")} for gate in evaluate["gates"]]
    tags = {
        _MODEL_HASH: found,
        # The run that recorded the figures is no part of them.
        _METRICS_HASH: digest({key: value for key, value in evaluate.items() if key != "run_id"}),
        _SET: evaluate["set"]["digest"],
        _GATES: json.dumps(gates),
        "sage.data_digest": results["prepare"]["digest"],
        "sage.revision": revision(),
        "sage.params": params.model_dump_json(exclude={"pretrain"}),
    }
    return tags | {_METRIC + name: json.dumps(figure) for name, figure in evaluate["arms"].get(JUDGED, {}).items()}


def _failures(evaluate: Mapping[str, Any], params: Params) -> list[str]:
    """Return why a model must not be registered; nothing that is missing counts as passed."""
    judged = {(gate["metric"], gate["reference"]): gate for gate in evaluate["gates"]}
    reasons = []
    for wanted in params.evaluate.gates:
        gate = judged.get((wanted.metric, wanted.reference))
        if gate is None:
            reasons.append(f"{wanted.metric} against {wanted.reference}: not judged")
        elif gate["passed"] is not True:
            reasons.append(f"{wanted.metric} against {wanted.reference}: {gate['reason']}")
    if not reasons and evaluate["passed"] is not True:
        reasons.append("the evaluation as a whole did not pass")
    return reasons


def _find(tracker: Any, tags: Mapping[str, str]) -> str | None:
    """Return the version of this model with these results, or None."""
    same = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in (_MODEL_HASH, _METRICS_HASH))
    found = tracker.search_model_versions(f"name = '{MODEL}' and {same}")
    return str(min(int(version.version) for version in found)) if found else None


def _record_failure(tracker: Any, home: str, tags: Mapping[str, str], reasons: list[str], metrics: Path) -> bool:
    """Keep the reasons in a run, once; return whether this was the first time."""
    same = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in (_MODEL_HASH, _METRICS_HASH))
    if tracker.search_runs([home], filter_string=f"{same} and tags.`sage.verdict` = 'failed'", max_results=1):
        return False
    run = _new_run(tracker, home, "failed", tags)
    with ending(run, tracker):
        run.tags({f"sage.reason.{number}": reason for number, reason in enumerate(reasons)})
        run.artifact(metrics, "metrics")
    return True


def _create(
    tracker: Any, home: str, model: Path, metrics: Path, sampling: Mapping[str, Any], tags: dict[str, str]
) -> str:
    """Upload the files, then make the version with all its tags in one call."""
    run = _new_run(tracker, home, "passed", tags)
    with ending(run, tracker), tempfile.TemporaryDirectory() as temporary:
        # A copy, so that what was hashed is what is uploaded.
        weights, content = Path(temporary) / "model", Path(temporary) / "version"
        shutil.copytree(model, weights)
        if sha256_tree(weights) != tags[_MODEL_HASH]:
            raise RegistryError(f"{model} changed while it was being registered. Try again.")
        _save(content, weights, {"model_sha256": tags[_MODEL_HASH], **sampling})
        tags = tags | {_FILES_HASH: sha256_tree(content)}
        run.artifact(metrics, "metrics")
        run.artifact(content, "model")
        _ensure_model(tracker)
        source = f"{tracker.get_run(run.id).info.artifact_uri}/model"
        return str(tracker.create_model_version(MODEL, source, run.id, tags=tags).version)


def _new_run(tracker: Any, home: str, verdict: str, tags: Mapping[str, str]) -> Run:
    own = {"sage.stage": "register", "sage.verdict": verdict, "mlflow.source.git.commit": tags["sage.revision"]}
    return Run(tracker, tracker.create_run(home, run_name="register", tags={**tags, **own}).info.run_id)


def _sampling(groups: Path, params: Params) -> dict[str, Any]:
    """Return how the judged pictures were made, for the version to make its own in the same way."""
    generate = params.generate
    judged = json.loads((groups / f"{generate.split}.json").read_text(encoding="utf-8"))
    return {
        "sampling": {
            "num_inference_steps": generate.steps,
            "guidance_scale": generate.guidance_scale,
            "share_ratio": generate.share_ratio,
            "batch_size": generate.batch_size,
        },
        # The threshold that was used, also where the parameters ask for a budget.
        "group": [judged["threshold"], params.group.max_size, params.group.near_duplicate],
    }


def _save(folder: Path, model: Path, config: Mapping[str, Any]) -> None:
    """Write the content of a version: the weights, how to sample, and code that loads them; no pickle."""
    _pyfunc().save_model(
        str(folder),
        python_model=str(Path(__file__).with_name("served.py")),
        artifacts={"model": str(model)},
        model_config=dict(config),
        pip_requirements=[line for line in requires("sage-diffusion") or [] if "extra ==" not in line],
    )


def _pyfunc() -> Any:
    """Return MLflow's module of generic models, without what it says of its own type hints while it is imported."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        import mlflow.pyfunc
    return mlflow.pyfunc


def _ensure_model(tracker: Any) -> None:
    from mlflow.exceptions import MlflowException

    try:
        tracker.create_registered_model(MODEL)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _aliases(tracker: Any) -> dict[str, str]:
    """Return alias -> version; none where nothing was ever registered."""
    found = tracker.search_registered_models(f"name = '{MODEL}'")
    return {alias: str(version) for alias, version in found[0].aliases.items()} if found else {}


def _version(tracker: Any, version: str | None, what: str = CHALLENGER) -> Any:
    from mlflow.exceptions import MlflowException

    if version is None:
        raise RegistryError(f"there is no {what}. `sage run` registers a model that passes its gates.")
    try:
        return tracker.get_model_version(MODEL, version)
    except MlflowException as error:
        raise RegistryError(f"there is no version {version}; `sage compare` lists them.") from error


def _verified(tracker: Any, version: Any, folder: Path) -> Path:
    """Download a version's files and compare them with the hash that the registry keeps."""
    from mlflow.artifacts import download_artifacts

    files = Path(
        download_artifacts(artifact_uri=version.source, dst_path=str(folder), tracking_uri=tracker.tracking_uri)
    )
    found, wanted = sha256_tree(files), str(version.tags.get(_FILES_HASH))
    if found != wanted:
        raise RegistryError(f"version {version.version} is damaged: SHA-256 {found[:12]}, not {wanted[:12]}.")
    return files


def _check(tracker: Any, version: Any) -> None:
    """Refuse a version that failed a gate, is damaged, or cannot draw a picture."""
    gates = json.loads(version.tags.get(_GATES, "[]"))
    if not gates or not all(gate["passed"] is True for gate in gates):
        raise RegistryError(f"version {version.version} has not passed its gates.")
    with tempfile.TemporaryDirectory() as temporary:
        files = _verified(tracker, version, Path(temporary))
        answer = _pyfunc().load_model(str(files)).predict(["red heart"])
        if len(answer) != 1:
            raise RegistryError(f"version {version.version} answered one prompt with {len(answer)} pictures.")


def _check_against(candidate: Any, champion: Any) -> None:
    if candidate.tags[_SET] != champion.tags[_SET]:
        raise RegistryError(
            f"version {candidate.version} was judged on held-out set {candidate.tags[_SET][:12]}, champion "
            f"{champion.version} on {champion.tags[_SET][:12]}: they cannot be compared. Evaluate both on one set."
        )
    worse = []
    for metric in sorted({gate["metric"] for gate in json.loads(candidate.tags[_GATES])}):
        new, old = (_interval(version, metric) for version in (candidate, champion))
        more = metric in HIGHER_IS_BETTER
        if new["high"] < old["low"] if more else new["low"] > old["high"]:
            interval = f"[{new['low']:.4g}, {new['high']:.4g}]"
            worse.append(f"{metric} {new['value']:.4g} {interval}, champion {old['value']:.4g}")
    if worse:
        raise RegistryError(
            f"version {candidate.version} is worse than champion {champion.version}:\n  " + "\n  ".join(worse)
        )


def _interval(version: Any, metric: str) -> dict[str, float]:
    """Return value, low and high of a version's metric; raise RegistryError where one is not a finite number."""
    figure: dict[str, Any] = json.loads(version.tags.get(_METRIC + metric, "{}"))
    ends = {key: figure.get(key) for key in ("value", "low", "high")}
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends.values()):
        raise RegistryError(f"version {version.version} has no usable {metric}: {ends}.")
    return figure
