"""`sage distil` on a tiny model: what it writes groups prompts in every place, and a killed run goes on."""

import json
import shutil

import numpy as np
import pytest
import tiny
import yaml
from examples import ROOT
from prepared_files import write_split
from safetensors import safe_open

from flows.commands import calibrate, distil
from flows.prompts import generate, shards
from flows.prompts import group as prompts_group
from flows.stages import group as stage
from flows.tracking import content
from sage.config import load_params
from sage.data.dataset import SPLITS
from sage.errors import ConfigurationError, DataError
from sage.evaluation import bootstrap
from sage.files import sha256_tree
from sage.grouping.auto import Grouping
from sage.grouping.cost import model_digest, read_damage
from sage.grouping.distilled import kept_at, read_distilled
from sage.grouping.groups import group
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Plan

pytestmark = pytest.mark.slow

COLOURS = ["red", "green", "blue", "black", "old", "big"]
THINGS = ["fox", "house", "apple", "guitar", "train", "cloud", "sword", "nurse"]
TEXTS = [f"{colour} {thing}" for thing in THINGS for colour in COLOURS]
TINY = {"captions": 100, "steps": 6, "warmup": 1, "decay": 1, "batch_size": 8}


def configure(folder, group=None, generate=None, distil=None):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["base"] = "model"
    params["group"] = {"max_size": 6, "near_duplicate": 0.999, "threshold": 0.5} | (group or {})
    params["generate"] |= {"steps": 3, "share_ratio": 0.4, "batch_size": 64} | (generate or {})
    params["pretrain"]["distil"] |= TINY | (distil or {})
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def prepare(folder):
    """Write a tiny model, prepared data and parameters."""
    for number, split in enumerate(SPLITS):
        rows = ({"id": f"{split}-{k}", "text": text} for k, text in enumerate(TEXTS[number:]))
        write_split(folder / "prepared" / split, rows)
    tiny.stable_diffusion(folder).save_pretrained(folder / "model")
    configure(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project whose model was distilled."""
    folder = tmp_path_factory.mktemp("distilled")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        prepare(folder)
        run(folder)
    return folder


def enter(folder, patch):
    patch.chdir(folder)
    patch.setenv("SAGE_CACHE", str(folder / "cache"))
    patch.setenv("SAGE_DEVICE", "cpu")


def run(folder):
    distil.main(folder / "model", folder / "prepared", folder / "work")
    return kept_at(folder / "model").read_bytes()


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    """A copy of that project."""
    folder = tmp_path / "project"
    shutil.copytree(made, folder)
    enter(folder, monkeypatch)
    return folder


def test_a_killed_run_goes_on_to_the_same_bytes(project, monkeypatch, capsys):
    before = model_digest(project / "model"), sha256_tree(project / "model")
    done = kept_at(project / "model").read_bytes()
    shutil.rmtree(project / "work")
    kept_at(project / "model").unlink()
    monkeypatch.setattr(distil, "_PIECE", 16)
    drawn = []

    def predict(self, texts, **arguments):
        drawn.append(len(texts))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return predictions(self, texts, **arguments)

    predictions = SharedSamplingPipeline.first_predictions
    monkeypatch.setattr(SharedSamplingPipeline, "first_predictions", predict)
    with pytest.raises(KeyboardInterrupt):
        run(project)
    assert not kept_at(project / "model").exists()
    again = run(project)
    assert drawn == [16, 16, 16, 16, 24, 23], "what was kept was predicted again"
    assert again != done  # components of fewer captions at a time
    monkeypatch.setattr(SharedSamplingPipeline, "first_predictions", lambda *_, **__: pytest.fail("all was kept"))
    assert run(project) == again
    assert (model_digest(project / "model"), sha256_tree(project / "model")) == before
    shown = capsys.readouterr().out
    assert "of the variance of first predictions explained" in shown and "prediction" in shown
    with safe_open(kept_at(project / "model"), "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["measured"]["prediction.rank_correlation"] == pytest.approx(1, abs=1e-3)
    assert facts["measured"]["prediction.m"] <= facts["measured"]["distilled.m"] + 1e-3
    assert facts["measured"]["prompts"] == len(TEXTS) - 1 and facts["made_for"][0] == "DDIMScheduler"


def test_too_few_captions_and_a_missing_model_are_refused(project):
    with pytest.raises(DataError, match=r"there is no .*missing; give a folder"):
        distil.main(project / "missing", project / "prepared", project / "work")
    configure(project, distil={"captions": 19})
    with pytest.raises(DataError, match=r"19 different captions to learn from .* at least 20"):
        run(project)


def test_captions_are_chosen_whatever_their_order():
    assert distil.chosen(TEXTS * 2, 9) == distil.chosen(reversed(TEXTS), 9)
    assert len(set(distil.chosen(TEXTS, 9))) == 9 and set(distil.chosen(TEXTS, 99)) == set(TEXTS)


def no_evaluation(patch):
    patch.setattr(SharedSamplingPipeline, "first_predictions", lambda *_, **__: pytest.fail("it was evaluated"))
    patch.setattr(SharedSamplingPipeline, "__call__", lambda *_, **__: pytest.fail("it was drawn"))


def test_the_stage_groups_by_it(project, monkeypatch):
    no_evaluation(monkeypatch)
    encoder = read_distilled(project / "model")
    configure(project, {"by": "distilled", "threshold": round(encoder.threshold, 3)})
    stage.main(project / "prepared", project / "model", project / "groups", project / "metrics.json")
    found = json.loads((project / "groups/train.json").read_text())
    assert found["encoder"] == "distilled"
    wanted = group(encoder.embed(TEXTS), round(encoder.threshold, 3), 6, 0.999)
    assert [members["ids"] for members in found["groups"]] == [[f"train-{k}" for k in own] for own in wanted]
    assert "network_evaluations" not in json.loads((project / "metrics.json").read_text())["train"]


def test_other_settings_weights_or_no_encoder_are_refused_before_work_starts(project, monkeypatch):
    no_evaluation(monkeypatch)

    def stage_run():
        stage.main(project / "prepared", project / "model", project / "groups", project / "metrics.json")

    by = {"by": "distilled", "threshold": 0.9}
    configure(project, by, {"guidance_scale": 3.0})
    with pytest.raises(ConfigurationError, match=r"guidance scale 1\.0, not 3\.0"):
        stage_run()
    configure(project, by, {"scheduler": "EulerDiscreteScheduler"})
    with pytest.raises(ConfigurationError, match="scheduler DDIMScheduler, not EulerDiscreteScheduler"):
        stage_run()
    configure(project, by)
    kept_at(project / "model").rename(project / "elsewhere")
    with pytest.raises(ConfigurationError, match="no distilled encoder"):
        stage_run()
    assert not (project / "groups").exists()


def test_a_list_is_grouped_and_drawn_and_shards_need_the_encoder_for_the_plan_only(project, capsys):
    encoder = read_distilled(project / "model")
    configure(project, {"by": "distilled", "threshold": 0.9})
    (project / "prompts.txt").write_text("\n".join(TEXTS[:8]) + "\n")
    wanted = len(group(encoder.embed(TEXTS[:8]), 0.9, 6, 0.999))
    # The command with --by, whatever params.yaml says.
    configure(project)
    prompts_group.main("prompts.txt", by="distilled", threshold=0.9)
    assert f"8 prompts in {wanted} groups" in capsys.readouterr().out
    configure(project, {"by": "distilled", "threshold": 0.9})
    generate.main("prompts.txt", project / "whole", model="model", negative_prompt="")
    said = capsys.readouterr().out
    assert f"8 prompts in {wanted} groups" in said and "first predictions" not in said
    options = {"steps": 3, "share_ratio": 0.4, "guidance_scale": 1.0, "batch_size": 64}
    shards.plan("prompts.txt", str(project / "sharded"), "model", **options)
    kept_at(project / "model").unlink()
    shards.draw(str(project / "sharded"), "1/1")
    shards.finish(str(project / "sharded"))
    images = [sorted((project / name).glob("*.png")) for name in ("whole", "sharded")]
    assert len(images[0]) == 8 and [path.read_bytes() for path in images[0]] == [
        path.read_bytes() for path in images[1]
    ]
    with pytest.raises(ConfigurationError, match="Run `sage distil --model model`"):
        generate.main("prompts.txt", project / "other", model="model", negative_prompt="")


def test_a_call_of_the_pipeline_groups_by_it_and_evaluates_nothing_for_it(project):
    pipe = SharedSamplingPipeline.from_pretrained(project / "model")
    pipe.set_progress_bar_config(disable=True)
    rows = read_distilled(project / "model").embed(TEXTS[:8])
    threshold = float(np.median((rows @ rows.T)[np.triu_indices(8, 1)]))
    groups = Grouping(by="distilled", model=project / "model", threshold=threshold, near_duplicate=1.0)
    call = {"num_inference_steps": 3, "share_ratio": 0.4, "branch_noise": 1.0, "seed": 0, "image_steps": 0}
    out = pipe(TEXTS[:8], groups=groups, guidance_scale=1.0, **call)
    assert out.plan == Plan.shared(group(rows, threshold, 6, 1.0), 3, 0.4) and out.plan.saving > 0
    assert out.cost.network_evaluations == out.plan.nfe(guidance=False)
    with pytest.raises(ConfigurationError, match=r"guidance scale 1\.0, not 3\.0"):
        pipe(TEXTS[:8], groups=groups, guidance_scale=3.0, **call)


def test_damage_is_measured_in_its_space(project, monkeypatch):
    monkeypatch.setattr(bootstrap, "LEAST_GROUPS", 1)
    encoder = read_distilled(project / "model")
    rows = encoder.embed(TEXTS[1:])
    low = np.quantile((rows @ rows.T)[np.triu_indices(len(rows), 1)], [0.5, 0.9, 0.97]).tolist()
    monkeypatch.setitem(calibrate.THRESHOLDS, "distilled", low)
    configure(project, {"by": "distilled", "threshold": 0.9, "near_duplicate": 1.0})
    calibrate.main(project / "model", project / "prepared", project / "damage")
    assert read_damage(project / "model", 0.4, 6, "distilled").points
    with pytest.raises(ConfigurationError, match="measured on groups by distilled, but prompts are grouped by minilm"):
        read_damage(project / "model", 0.4, 6)


def test_a_registered_version_says_that_it_groups_by_it(project):
    configure(project, {"by": "distilled"})
    assert content.describe(load_params(), 0.9, "hash")["group"]["by"] == "distilled"
