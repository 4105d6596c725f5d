"""Versions of the registry judged on today's held-out set: a tiny project that has drawn and evaluated its arms."""

import json
import shutil
from pathlib import Path

import sage.torchvision_ops  # noqa: F401

import pytest
import tiny_judges
import torch
import tracked
import yaml
from PIL import Image
from prepared_files import write_split
from tracked import client, database, register, small_model, weights  # noqa: F401

from flows import cli
from flows.report import tables
from flows.stages import evaluate, generate
from flows.tracking import judging
from flows.versioning import repository
from sage.config import Params
from sage.data.accounting import write_accounting
from sage.errors import ConfigurationError, RegistryError
from sage.evaluation.results import read
from sage.sampling import base

pytestmark = pytest.mark.slow

TEXTS = ["red heart", "blue heart", "green tree", "tall tree"]
GATE = {"metric": "nfe_per_image", "reference": "independent", "worse_by_at_most": -0.05, "relative": True}


@pytest.fixture(scope="module")
def other(weights, tmp_path_factory):
    """Weights that draw other pictures."""
    pipe = base.load(weights)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(3)
    folder = tmp_path_factory.mktemp("other") / "sage"
    base.save(pipe, folder)
    return folder


@pytest.fixture(scope="module")
def drawn(weights, other, tmp_path_factory):
    """A project whose model is `other`, with the results of its stages; a test's own results are in metrics/."""
    folder = tmp_path_factory.mktemp("drawn")
    for split in ("test", "train"):
        rows = [
            {
                "id": f"{split}{number}",
                "text": text,
                "family": text,
                "image": Image.effect_noise((16, 16), 20 + 40 * number).convert("RGB"),
            }
            for number, text in enumerate(TEXTS)
        ]
        write_split(folder / "prepared" / split, rows)
    write_accounting(folder / "prepared", [])
    ids = [f"test{k}" for k in range(4)]
    (folder / "held_out").mkdir()
    groups = {"threshold": 0.7, "groups": [{"ids": pair, "similarity": 0.8} for pair in (ids[:2], ids[2:])]}
    (folder / "held_out/test.json").write_text(json.dumps(groups))
    tiny_judges.clip(folder / "models/clip")
    shutil.copytree(weights, folder / "base")
    values = tracked.params().model_dump(mode="json") | {"base": "base"}
    values["generate"] |= {"split": "test", "seeds": [0]}
    values["evaluate"] |= {"resamples": 100, "gates": [GATE], "alignment": "models/clip", "references": None}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("SAGE_TRACKING_URI", "off")
        monkeypatch.setenv("SAGE_DEVICE", "cpu")
        found = held_out(folder)
        given = {"data": found.data, "groups": found.groups}
        costs = found.metrics / "generate.json"
        generate.main(base=Path("base"), model=other, out=found.generated, metrics=costs, **given)
        results = found.metrics / "evaluate.json"
        evaluate.main(generated=found.generated, costs=costs, report=Path("report"), metrics=results, **given)
    return folder


def held_out(folder: Path, **changes) -> judging.HeldOut:
    values = yaml.safe_load((folder / "params.yaml").read_text())
    values["evaluate"] |= changes
    params = Params.model_validate(values)
    return judging.HeldOut(params, *map(Path, ("prepared", "held_out", "generated", "figures")))


@pytest.fixture
def project(drawn, database, tmp_path, monkeypatch):
    """The project, with an empty database."""
    monkeypatch.chdir(drawn)
    shutil.copy(database, tmp_path / "mlflow.db")
    monkeypatch.setenv("SAGE_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    return drawn


def said(text: str) -> None:
    """Take what the stages print."""


def judge(*names: str) -> list[judging.Judgement]:
    return judging.judge_named(names, held_out(Path()), said)


def test_a_version_is_judged_as_the_project_judges_its_own_model_and_only_once(project, weights, other, monkeypatch):
    register(weights)
    register(other, held_out="b" * 64)
    first, second = judge("1", "challenger")
    own = read(Path("figures/evaluate.json"))
    assert second.version == "2"
    # The manifest, which names every picture, is the same one: the version draws what the model drew.
    assert second.results == own
    assert first.results.set.digest == own.set.digest
    assert first.results.arms["independent"] == own.arms["independent"]
    assert first.results.arms["sage"]["kernel_distance"].value != own.arms["sage"]["kernel_distance"].value
    rows = {row["metric"]: row for row in tables.versions({"1": first.results, "2": second.results})}
    assert rows["Gates"] == {"metric": "Gates", "1": "passed", "2": "passed"}
    assert rows["kernel distance"]["1"] != rows["kernel distance"]["2"] != "-"

    version = client().get_model_version("sage", "1")
    assert version.tags[judging.JUDGED_IN] == first.run
    assert version.tags["sage.heldout_set"] == "a" * 64, "the evaluation of its registration stays"
    run = client().get_run(first.run)
    assert run.data.tags["sage.heldout_set"] == own.set.digest
    assert {file.path for file in client().list_artifacts(first.run, "metrics")} == {
        "metrics/evaluate.json",
        "metrics/generate.json",
    }

    monkeypatch.setattr(judging, "_evaluate", None)
    assert judge("1", "2") == [first, second]
    assert held_out(Path(), resamples=200).conditions() != held_out(Path()).conditions()
    path = Path(run.info.artifact_uri.removeprefix("file://")) / "metrics/evaluate.json"
    path.write_text(path.read_text().replace('"n": 4', '"n": 5'))
    with pytest.raises(RegistryError, match=r"evaluation of version 1 .* was altered"):
        judge("1")


def test_the_command_shows_the_figures_and_what_is_not_up_to_date_is_named(project, weights, monkeypatch, capsys):
    register(weights)
    shown = held_out(Path())
    monkeypatch.setattr(repository, "stale", lambda: ["finetune"])
    assert judging.today() == judging.HeldOut(shown.params)
    monkeypatch.setattr(repository, "stale", lambda: ["group", "finetune", "generate"])
    with pytest.raises(ConfigurationError, match=r"group, generate is not up to date. Run `sage run` first"):
        judging.today()
    found = [judging.Judgement("1", "the-run", read(Path("figures/evaluate.json")))]
    monkeypatch.setattr(judging, "today", lambda: shown)
    monkeypatch.setattr(judging, "judge_named", lambda names, at, write: found if (names, at) == (["1"], shown) else [])
    cli.judge(["1"])
    said = capsys.readouterr().out
    assert "version 1: run the-run" in said and "kernel distance" in said and "passed" in said


def test_what_a_version_cannot_draw_is_said(project, weights):
    register(weights)
    shutil.copytree("held_out", "other_groups", dirs_exist_ok=True)
    groups = json.loads(Path("other_groups/test.json").read_text())
    groups["groups"].pop()
    Path("other_groups/test.json").write_text(json.dumps(groups))
    damaged = judging.HeldOut(held_out(Path()).params, *map(Path, ("prepared", "other_groups", "generated", "figures")))
    said_of = r"version 1 of sage cannot be judged on this folder's held-out set: stage generate: .*test.json"
    with pytest.raises(RegistryError, match=said_of):
        judging.judge_named(["1"], damaged, said)
    runs = client().search_runs([client().get_experiment_by_name("sage").experiment_id])
    assert next(run for run in runs if run.data.tags["sage.stage"] == "judge").info.status == "FAILED"
