"""`sage calibrate` on a tiny model: what it writes is what a bound reads, and a killed run goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import single_files
import tiny
import yaml
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from huggingface_hub import constants
from prepared_files import write_split

from flows.commands import calibrate
from flows.drawing import open_pipeline
from sage.errors import DataError
from sage.evaluation import bootstrap
from sage.evaluation.damage import distances
from sage.grouping.cost import FILE, kept_at, read_damage
from sage.grouping.groups import worst_similarity
from sage.sampling import hub

ROOT = Path(__file__).parents[2]
COLOURS = ["red", "green", "blue", "black"]
THINGS = ["fox", "house", "apple", "guitar", "train", "cloud", "sword", "nurse"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    split = tmp_path / "prepared" / "validation"
    texts = [f"{colour} {thing}" for thing in THINGS for colour in COLOURS]
    write_split(split, ({"id": f"p{k}", "text": text} for k, text in enumerate(texts)))
    tiny.stable_diffusion(tmp_path).save_pretrained(tmp_path / "model")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["generate"] |= {"steps": 3, "share_ratio": 0.4, "batch_size": 64}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    return tmp_path


def measure(folder, model="model"):
    calibrate.main(folder / model, folder / "prepared", folder / "work")
    return kept_at(folder / model).read_bytes()


@pytest.mark.slow
def test_a_measurement_is_read_back_and_a_killed_run_goes_on_to_the_same_bytes(project, monkeypatch, capsys):
    # The small split forms 13 groups; they stand for as many as a real one has.
    monkeypatch.setattr(bootstrap, "LEAST_GROUPS", 1)
    draw, calls = calibrate._images, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(calibrate, "_images", dies)
    with pytest.raises(KeyboardInterrupt):
        measure(project)
    assert not (project / "model" / FILE).exists()
    first = measure(project)
    pieces = len(list((project / "work").rglob("*.npy")))
    assert len(calls) == pieces + 1, "what was kept was drawn again"
    monkeypatch.setattr(calibrate, "_images", lambda *arguments: pytest.fail("everything was kept"))
    assert measure(project) == first
    found = read_damage(project / "model", 0.4, 6)
    assert len(found.points) == 8 and found.share_ratio == 0.4
    similarity = [point.similarity for point in found.points]
    assert similarity == sorted(similarity) and all(point.low <= point.damage <= point.high for point in found.points)
    assert "worst pair" in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_and_a_pin_have_the_damage_of_the_folder_that_they_hold(project, monkeypatch):
    monkeypatch.setattr(bootstrap, "LEAST_GROUPS", 1)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(project / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    few_prompts(project)
    shutil.copytree(project / "model", project / f"cache/models--some--model/snapshots/{'a' * 40}")
    pin = hub.pin(hub.Model("some/model", "a" * 40))
    made = tiny.stable_diffusion(project)
    file = single_files.configuration(made, project / "single") / "model.safetensors"
    single_files.write(made, file)
    expected = json.loads(measure(project))["points"]
    for model in (str(pin), "single/model.safetensors"):
        points = json.loads(measure(project, model))["points"]
        # A single file rounds nothing, but other kernels may be taken for weights laid out otherwise.
        assert [list(point.values()) for point in points] == [
            pytest.approx(list(point.values()), abs=2e-3) for point in expected
        ]
        assert read_damage(project / model, 0.4, 6).threshold(10.0) == points[0]["similarity"]


def test_a_model_that_is_not_there_is_named(project):
    with pytest.raises(DataError, match=r"there is no .*owner/name; give a folder, .* `sage base` writes"):
        measure(project, "owner/name")


def test_groups_of_every_threshold_are_measured_once():
    random = np.random.default_rng(0)
    x = random.normal(size=(6, 8)).repeat(4, axis=0) + 0.5 * random.normal(size=(24, 8))
    found = calibrate.groups_at((0.3, 0.5, 0.7), x, 4, 0.999)
    assert len({tuple(members) for members in found}) == len(found)
    assert all(len(members) > 1 for members in found)
    worst = worst_similarity(x, found)
    assert min(worst) < 0.6 and max(worst) > 0.7


def test_independent_pictures_have_no_damage(project):
    from sage.config import load_params
    from sage.data.dataset import read_split

    examples, settings = read_split(project / "prepared", "validation")[:4], load_params().generate
    pipe = open_pipeline(project / "model")
    alone = np.stack(calibrate._images(pipe, examples, [[0], [1], [2], [3]], settings))
    features = alone.reshape(4, 2, -1).astype(float)
    above, below = distances(features, features)
    assert (above == below).all() and (below > 0).all()


@pytest.mark.parametrize("kind", [PNDMScheduler, HeunDiscreteScheduler])
def test_a_scheduler_that_evaluates_the_network_more_often_than_it_steps_is_measured(project, kind):
    from sage.config import load_params
    from sage.data.dataset import read_split

    examples, settings = read_split(project / "prepared", "validation")[:3], load_params().generate
    settings = settings.model_copy(update={"branch_noise": 0.0, "steps": 4, "share_ratio": 0.5})
    pipe = open_pipeline(project / "model")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    alone, shared = ({}, {})
    for images, groups in ((alone, [[0], [1], [2]]), (shared, [[0, 1], [2]])):
        images |= enumerate(calibrate._images(pipe, examples, groups, settings))
    assert pipe.evaluations(settings.steps) > settings.steps
    # Members of a group differ from their independent images, an image alone in its group does not.
    assert [bool((alone[place] != shared[place]).any()) for place in range(6)] == [True] * 4 + [False] * 2


def few_prompts(project, texts=("red fox", "blue fox", "red house", "blue house")):
    shutil.rmtree(project / "prepared/validation")
    write_split(project / "prepared/validation", ({"id": f"p{k}", "text": text} for k, text in enumerate(texts)))


def test_too_few_groups_are_refused(project):
    few_prompts(project)
    with pytest.raises(DataError, match="too few"):
        measure(project)


def test_a_part_without_an_interval_is_refused_before_anything_is_drawn(project, monkeypatch):
    monkeypatch.setattr(calibrate, "draw", lambda *arguments: pytest.fail("it was drawn"))
    with pytest.raises(DataError, match=f"forms 13 groups, too few .* at least {bootstrap.LEAST_GROUPS} are needed"):
        measure(project)
