"""Judges registered versions on today's held-out set, so that versions of different days can be compared.

Today's held-out set is that of the project's results: its prepared data, groups, seeds, sampling settings, judges and
gates. The version draws its arm with stage `generate`; the arms of the base model are those that the project has drawn.
Stage `evaluate` measures them. The evaluation is recorded in a run, which a tag of the version names, and is found
again as long as nothing that it was judged under has changed. The tags from its registration stay as they are.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows import leash
from flows.tracking import content, registry
from flows.tracking.runs import RESULT, ending, new_run
from flows.versioning import repository
from flows.versioning.repository import Output, Write
from sage.config import Params, load_params
from sage.errors import ConfigurationError, RegistryError, SageError
from sage.evaluation.arms import JUDGED
from sage.evaluation.manifest import MANIFEST, read_manifest, read_unread, write_lines, write_unread
from sage.evaluation.results import Results, parse, read
from sage.files import digest, sha256, write_json

JUDGED_IN = "sage.judged_in"  # tag of a version: the run with its last evaluation
_VERSION = "sage.judged_version"
_CONDITIONS = "sage.conditions"  # tag of such a run: hash of everything but the version that the figures depend on
_NEEDED = ("prepare", "group", "generate", "evaluate")


@dataclass(frozen=True)
class HeldOut:
    """The project's results on its held-out set, all up to date.

    params: the project's parameters, which name the base model.
    data, groups, generated: output folders of the stages.
    metrics: folder of the stages' figures.
    """

    params: Params
    data: Path = Path("data/prepared")
    groups: Path = Path("data/groups")
    generated: Path = Path("data/generated")
    metrics: Path = Path("metrics")

    def conditions(self) -> str:
        """Return a hash of what the figures of a version depend on besides the version."""
        results = read(self.metrics / "evaluate.json")
        references = [asdict(line) for line in read_manifest(self.generated) if line.arm != JUDGED]
        settings = self.params.model_dump(include={"generate", "evaluate"})
        judges = [results.features, results.alignment, results.measured_by]
        return digest({"set": results.set.digest, "references": references, "settings": settings, "judges": judges})


@dataclass(frozen=True)
class Judgement:
    """The results of a version on today's held-out set, and the id of the run that records them."""

    version: str
    run: str
    results: Results


def today() -> HeldOut:
    """Return the held-out set of this folder's project.

    Raises RegistryError if nothing is registered, ConfigurationError if the project's results are not up to date.
    """
    registry.connect()
    params = load_params()
    if old := [stage for stage in repository.stale() if stage in _NEEDED]:
        raise ConfigurationError(
            f"versions are judged on the held-out set of this folder, but {', '.join(old)} is not up to date. "
            "Run `sage run` first."
        )
    return HeldOut(params)


def judge_named(names: Sequence[str], held_out: HeldOut, write: Write) -> list[Judgement]:
    """Judge versions given by number or alias of this project's model, or as models:/NAME/VERSION or @ALIAS."""
    tracker, _ = registry.connect()
    found = []
    for name in names:
        model, version = registry.split(name) if name.startswith("models:/") else (registry.MODEL, name)
        found.append(registry.find(tracker, registry.aliases(tracker, model).get(version, version), model))
    return judge(found, held_out, write)


def judge(versions: Sequence[Any], held_out: HeldOut, write: Write) -> list[Judgement]:
    """Judge versions of the registry; one that was judged under the same conditions before is not drawn again.

    `write` receives what the stages print. Raises RegistryError if a version is damaged or cannot draw this set.
    """
    tracker, home = registry.connect()
    conditions = held_out.conditions()
    return [
        _recorded(tracker, home, version, conditions) or _judge(tracker, home, version, conditions, held_out, write)
        for version in versions
    ]


def _recorded(tracker: Any, home: str, version: Any, conditions: str) -> Judgement | None:
    """Return the recorded evaluation of a version, if there is one; raise RegistryError if it was altered."""
    wanted = {_CONDITIONS: conditions, content.FILES_HASH: version.tags.get(content.FILES_HASH)}
    same = " and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items())
    found = tracker.search_runs([home], filter_string=f"{same} and attributes.status = 'FINISHED'", max_results=1)
    if not found:
        return None
    run = found[0]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(tracker.download_artifacts(run.info.run_id, "metrics/evaluate.json", temporary))
        if sha256(path) != run.data.tags.get(RESULT):
            raise RegistryError(
                f"the evaluation of version {version.version} in run {run.info.run_id} was altered: its hash is not "
                "the recorded one. Delete the run in MLflow and judge the version again."
            )
        results = parse(json.loads(path.read_text(encoding="utf-8")), f"evaluate.json of run {run.info.run_id}")
    return Judgement(str(version.version), run.info.run_id, results)


def _judge(tracker: Any, home: str, version: Any, conditions: str, held_out: HeldOut, write: Write) -> Judgement:
    """Evaluate a version and record the evaluation in a run."""
    number = str(version.version)
    tags = {
        "sage.stage": "judge",
        _VERSION: f"models:/{version.name}/{number}",
        _CONDITIONS: conditions,
        content.FILES_HASH: str(version.tags.get(content.FILES_HASH)),
        "sage.params": held_out.params.model_dump_json(exclude={"pretrain"}),
    }
    run = new_run(tracker, home, f"judge {version.name} {number}", tags)
    with ending(run, tracker), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(f"version {number} of {version.name}:\n")
        weights = content.download(tracker, version, folder / "version").weights
        try:
            _evaluate(held_out, weights, folder, write)
        except SageError as error:
            raise RegistryError(
                f"version {number} of {version.name} cannot be judged on this folder's held-out set: {error}"
            ) from error
        results = read(folder / "metrics/evaluate.json")
        run.tags(registry.evaluation_tags(results))
        run.artifact(folder / "metrics", "metrics")
        run.artifact(folder / "report", "report")
        run.result(folder / "metrics/evaluate.json")
    tracker.set_model_version_tag(version.name, number, JUDGED_IN, run.id)
    return Judgement(number, str(run.id), results)


def _evaluate(held_out: HeldOut, weights: Path, folder: Path, write: Write) -> None:
    """Draw a version's arm and evaluate it beside the project's other arms; write folders `metrics` and `report`."""
    given = {"data": held_out.data, "groups": held_out.groups}
    drawn, costs = folder / "drawn", folder / "metrics/generate.json"
    made = {"out": drawn, "metrics": costs, "work": folder / "work"}
    _stage("generate", write, **given, base=held_out.params.base, model=weights, only=JUDGED, **made)

    generated = folder / "generated"
    references = [line for line in read_manifest(held_out.generated) if line.arm != JUDGED]
    for arm in dict.fromkeys(line.arm for line in references):
        shutil.copytree(held_out.generated / arm, generated / arm)
    shutil.copytree(drawn / JUDGED, generated / JUDGED)
    write_lines(generated / MANIFEST, [*references, *read_manifest(drawn)])
    write_unread(generated, read_unread(drawn))
    counted, own = (
        json.loads(path.read_text(encoding="utf-8")) for path in (held_out.metrics / "generate.json", costs)
    )
    others = {arm: figures for arm, figures in counted["arms"].items() if arm != JUDGED}
    write_json(costs, own | {"arms": others | own["arms"]})

    paths = {"report": folder / "report", "metrics": folder / "metrics/evaluate.json"}
    _stage("evaluate", write, **given, generated=generated, costs=costs, **paths)


def _stage(stage: str, write: Write, **options: object) -> None:
    """Run a stage with its own folders, unrecorded; raise SageError with its message if it fails."""
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    output = Output(write)
    environment = os.environ | {"SAGE_TRACKING_URI": "off"}
    code = leash.run([sys.executable, "-m", f"flows.stages.{stage}", *arguments], output.feed, environment=environment)
    if code:
        said = [line for line in output.lines if line.startswith("error: ")] or [f"error: it ended with code {code}"]
        raise SageError(f"stage {stage}: {said[-1].removeprefix('error: ')}")
