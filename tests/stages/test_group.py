"""Stage group on a small prepared folder, with threshold, budget and bound."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_judges
import yaml
from prepared_files import write_split

from flows.stages.group import main
from sage.data.dataset import SPLITS
from sage.errors import ConfigurationError
from sage.files import write_json
from sage.grouping.cost import FILE, Damage, Point, kept_form
from sage.grouping.policy import Policy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TEXTS = [
    "woman pilot dark skin tone",
    "woman pilot light skin tone",
    "man pilot",
    "green apple",
    "red apple",
    "flag of Chile",
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    for number, split in enumerate(SPLITS):
        rows = ({"id": f"{split}-{k}", "text": text} for k, text in enumerate(TEXTS[number:]))
        write_split(tmp_path / "prepared" / split, rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path


RATIO, STEPS = 0.4, 6
SHARED = 2


def configure(folder, **group):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["group"] = {"max_size": 6, "near_duplicate": 0.999} | group
    params["generate"]["share_ratio"] = RATIO
    params["evaluate"] |= tiny_judges.own()
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def stage(folder):
    main(folder / "prepared", folder / "base", folder / "groups", folder / "metrics" / "group.json")
    groups = {split: json.loads((folder / "groups" / f"{split}.json").read_text()) for split in SPLITS}
    return groups, json.loads((folder / "metrics" / "group.json").read_text())


def test_the_stage_writes_a_partition_of_every_split_and_its_figures(project):
    configure(project, threshold=0.6)
    groups, metrics = stage(project)
    for number, split in enumerate(SPLITS):
        found = groups[split]
        ids = [id for members in found["groups"] for id in members["ids"]]
        assert sorted(ids) == [f"{split}-{k}" for k in range(len(TEXTS) - number)]
        assert (found["encoder"], found["threshold"], found["max_size"]) == ("minilm", 0.6, 6)
        assert all(1 >= members["similarity"] >= 0.6 for members in found["groups"])
        figures = metrics[split]
        assert figures["prompts"] == len(ids) and figures["groups"] == len(found["groups"])
        assert figures["saving"] == pytest.approx(1 - len(found["groups"]) / len(ids), abs=1e-4)
        assert figures["worst_similarity"] == min(members["similarity"] for members in found["groups"])
    assert metrics.keys() == set(SPLITS)
    together = {tuple(sorted(members["ids"])) for members in groups["train"]["groups"]}
    assert ("train-3", "train-4") in together and ("train-5",) in together


def test_prompts_whose_images_differ_in_size_are_never_in_one_group(project):
    configure(project, threshold=0.6)
    together = {frozenset(one["ids"]) for one in stage(project)[0]["train"]["groups"]}
    assert {"train-3", "train-4"} in together
    sizes = [(16, 16), (16, 16), (16, 16), (8, 32), (16, 16), (8, 32)]
    rows = [
        {"id": f"train-{k}", "text": text, "bucket": size}
        for k, (text, size) in enumerate(zip(TEXTS, sizes, strict=True))
    ]
    shutil.rmtree(project / "prepared/train")
    write_split(project / "prepared/train", rows)
    groups = [one["ids"] for one in stage(project)[0]["train"]["groups"]]
    assert sorted(id for ids in groups for id in ids) == [row["id"] for row in rows]
    assert all(len({sizes[int(id[-1])] for id in ids}) == 1 for ids in groups)
    assert {frozenset(ids) for ids in groups} != together and any(len(ids) > 1 for ids in groups)


def test_the_same_input_gives_the_same_bytes(project):
    configure(project, threshold=0.6)
    stage(project)
    first = {path.name: path.read_bytes() for path in (project / "groups").iterdir()}
    stage(project)
    assert first == {path.name: path.read_bytes() for path in (project / "groups").iterdir()}


def test_a_budget_is_met(project):
    configure(project, saving=0.1)
    _, metrics = stage(project)
    assert all(SHARED / STEPS * metrics[split]["saving"] >= 0.1 for split in SPLITS)


def test_the_stage_prints_the_saving_and_says_at_once_that_a_gate_on_it_cannot_pass(project, capsys):
    configure(project, threshold=0.6)
    _, metrics = stage(project)
    said = capsys.readouterr()
    assert f"{SHARED / STEPS * metrics['train']['saving']:.1%}" in said.out and "2 of 6 steps" in said.out
    assert metrics["test"]["saving"] / 3 < 0.15 and "the test prompts save 8.3%, but a gate asks for 15.0%" in said.err
    configure(project, threshold=0.0)
    stage(project)
    assert "a gate asks" not in capsys.readouterr().err


def test_the_stage_groups_by_first_prediction_and_counts_it(project, tmp_path):
    tiny.stable_diffusion(tmp_path).save_pretrained(project / "base")
    configure(project, by="prediction", threshold=0.9)
    groups, metrics = stage(project)
    for number, split in enumerate(SPLITS):
        assert groups[split]["encoder"] == "prediction"
        ids = sorted(id for members in groups[split]["groups"] for id in members["ids"])
        assert ids == [f"{split}-{k}" for k in range(len(TEXTS) - number)]
        assert metrics[split]["network_evaluations"] == len(TEXTS[number:])


def test_damage_measured_in_another_space_is_refused(project):
    measured_model(project)
    path = project / "base" / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder": "minilm"}))
    with pytest.raises(ConfigurationError, match="measured on groups by minilm, but prompts are grouped by prediction"):
        Policy(6, 0.999, max_damage=0.1, by="prediction").choose_threshold(np.zeros((2, 3)), 0.3, project / "base")


def measured_model(folder, share_ratio=RATIO):
    """A model folder with a measurement whose bad ends lie on a line from 0.3 at 0.5 to 0.1 at 0.9."""
    (folder / "base" / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "base" / "unet" / "weights").write_text("weights")
    points = [Point(0.5, 0.2, 0.1, 0.3, 9, 20), Point(0.9, 0.05, 0.0, 0.1, 9, 20)]
    write_json(folder / "base" / FILE, kept_form(Damage(share_ratio, 6, points), folder / "base", {}))


def test_a_bound_on_quality_is_read_from_what_was_measured_on_the_model(project):
    measured_model(project)
    configure(project, max_damage=0.2)
    groups, _ = stage(project)
    assert groups["test"]["threshold"] == pytest.approx(0.7)
    assert all(members["similarity"] >= 0.7 for members in groups["test"]["groups"])
    # Groups that a looser bound allows cost too much for this one: their prompts are sampled independently.
    configure(project, max_damage=0.3)
    loose, _ = stage(project)
    configure(project, max_damage=0.11)
    strict, _ = stage(project)
    refused = [members for members in loose["train"]["groups"] if members["similarity"] < 0.88]
    alone = {id for members in strict["train"]["groups"] if len(members["ids"]) == 1 for id in members["ids"]}
    assert refused and all(set(members["ids"]) <= alone for members in refused)


def test_a_bound_needs_a_measurement_of_this_model_and_of_as_much_sharing(project):
    configure(project, max_damage=0.2)
    (project / "base").mkdir()
    with pytest.raises(ConfigurationError, match="does not exist, so the damage of sharing is unknown"):
        stage(project)
    measured_model(project, share_ratio=0.2)
    with pytest.raises(ConfigurationError, match=r"share ratio 0\.2 .* less than the 0\.3333"):
        stage(project)
    measured_model(project)
    configure(project, max_damage=0.05)
    with pytest.raises(ConfigurationError, match=r"least measured is 0\.1 at 0\.9"):
        stage(project)
    (project / "base" / "unet" / "weights").write_text("other weights")
    with pytest.raises(ConfigurationError, match="other weights"):
        stage(project)


def test_the_guard_parts_what_params_ask_for(project):
    configure(project, threshold=0.6)
    plain, _ = stage(project)
    configure(project, threshold=0.6, guard=["colour"])
    groups, metrics = stage(project)
    pair = {"train-3", "train-4"}  # green and red apple
    assert any(pair <= set(members["ids"]) for members in plain["train"]["groups"])
    assert not any(pair <= set(members["ids"]) for members in groups["train"]["groups"])
    assert metrics["train"]["groups"] == len(plain["train"]["groups"]) + 1
    configure(project, threshold=0.6, guard=["shape"])
    with pytest.raises(ConfigurationError, match=r"group\.guard"):
        stage(project)


def test_an_impossible_budget_leaves_the_old_groups(project):
    configure(project, threshold=0.6)
    groups, _ = stage(project)
    configure(project, saving=0.39)
    with pytest.raises(ConfigurationError, match="these prompts allow"):
        stage(project)
    assert json.loads((project / "groups" / "train.json").read_text()) == groups["train"]


@pytest.mark.parametrize("group", [{}, {"threshold": 0.5, "saving": 0.2}, {"threshold": 1.5}, {"saving": 0.0}])
def test_how_alike_is_said_exactly_once(project, group):
    configure(project, **group)
    with pytest.raises(ConfigurationError, match="group"):
        stage(project)


def test_as_a_command_a_fault_is_one_message(project):
    configure(project, threshold=7)
    command = [sys.executable, "-m", "flows.stages.group", "--data", "prepared", "--base", ".", "--out", "groups"]
    command += ["--metrics", "m.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "group.threshold" in done.stderr and "Traceback" not in done.stderr
