"""Stages finetune and generate with bases as people have them: of every family, with other schedulers, as saved."""

import json
import logging
import re
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import single_files
import tiny
import tiny_families
import tiny_judges
import torch
import typer
import yaml
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from huggingface_hub import constants
from PIL import Image
from prepared_files import write_split
from rich.console import Console
from tracked import database  # noqa: F401
from typer.testing import CliRunner

from flows import evaluations, machine, preflight
from flows.commands import plan
from flows.preflight import Job, check, doubts, verdicts
from flows.stages import finetune, generate, group
from sage.config import load_params
from sage.data import dataset
from sage.errors import ConfigurationError, UnsupportedError
from sage.files import write_json
from sage.sampling import hub
from sage.sampling.pipeline import SharedSamplingPipeline

pytestmark = pytest.mark.slow

TEXTS = ["red cat", "red dog", "blue cat", "tall tree", "big tree"]
GROUPS = [["p0", "p1", "p2"], ["p3", "p4"]]
FINETUNE = {"steps": 1, "warmup": 0, "decay": 0, "batch_size": 3, "precision": "fp32"}
SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
GATE = {"metric": "nfe_per_image", "reference": "independent", "relative": True}
EASY = GATE | {"worse_by_at_most": 0.1}
DDIM, FLOW = "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"
GENERATE = {"split": "validation", "steps": 6, "share_ratio": 0.5, "seeds": [0], "batch_size": 4}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with prepared images of 16 pixels and groups."""
    folder = tmp_path_factory.mktemp("project")
    random = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        images = [Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in TEXTS]
        rows = ({"id": f"p{i}", "text": TEXTS[i], "image": image} for i, image in enumerate(images))
        write_split(folder / "prepared" / split, rows)
        groups = {"groups": [{"ids": ids, "similarity": 0.8} for ids in GROUPS]}
        write_json(folder / f"groups/{split}.json", groups)
    dataset.write_sums(folder / "prepared")
    return folder


def params_of(**changes):
    """Return the shipped parameters for the tiny project, with changes, each named SECTION__KEY."""
    params = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
    params["finetune"] |= FINETUNE
    params["generate"] |= GENERATE
    params["evaluate"] |= {"gates": [EASY]} | tiny_judges.own()
    for name, value in changes.items():
        section, key = name.split("__")
        params[section][key] = value
    return params


@pytest.fixture
def chain(project, tmp_path, monkeypatch):
    """Run both stages on a base that is saved in a folder; return their figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_DEVICE", "cpu")

    def run(base, **changes):
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params_of(**changes)))
        data, groups = project / "prepared", project / "groups"
        finetune.main(base, data, groups, tmp_path / "tuned", tmp_path / "f.json", tmp_path / "work")
        generate.main(base, tmp_path / "tuned", data, groups, tmp_path / "images", tmp_path / "g.json")
        return [json.loads((tmp_path / name).read_text()) for name in ("f.json", "g.json")]

    return run


def saved(pipe, folder, monkeypatch=None, family="stable_diffusion", **how):
    """Save a tiny pipeline; limit its calls to what it has room for."""
    if family in tiny.OPTIONS:
        shared = type(SharedSamplingPipeline.from_pipe(pipe))
        monkeypatch.setattr(shared, "_options", {**shared._options, **tiny.OPTIONS[family]})
    pipe.save_pretrained(folder, **how)
    return folder


def drawn(folder, arm="sage"):
    with Image.open(folder / f"images/{arm}/seed-0/p0.png") as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("family", tiny.TRAINED)
def test_every_family_is_tuned_and_drawn(family, chain, tmp_path, monkeypatch):
    base = saved(tiny.pipeline(family, tmp_path), tmp_path / "base", monkeypatch, family)
    tuned, made = chain(base, finetune__learning_rate=0.01)
    assert tuned["losses"]["loss"] > 0
    # 3 steps of 2 groups, then 3 of 5 prompts
    assert made["arms"]["sage"]["nfe"] == 3 * 2 + 3 * 5
    assert made["arms"]["independent_same_nfe"]["steps"] == 5
    assert drawn(tmp_path).std() > 1 and np.abs(drawn(tmp_path) - drawn(tmp_path, "shared")).max() > 0


# An adapter in a frozen base: the family, the precision, whether text encoders are trained, and the guidance scale.
ADAPTED = {
    "SD 1.5": ("stable_diffusion", "bf16", True, 1.0),
    "SDXL": ("stable_diffusion_xl", "fp8", True, 2.0),
    "SD 3": ("stable_diffusion_3", "bf16", False, 2.0),
    "FLUX": ("flux", "fp8", False, 3.5),
    "FLUX, texts": ("flux", "fp32", True, 3.5),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_is_trained_in_a_frozen_base_and_drawn_beside_it(name, chain, tmp_path, monkeypatch):
    family, precision, texts, guidance = ADAPTED[name]
    base = saved(tiny.pipeline(family, tmp_path).to(torch.bfloat16), tmp_path / "base", monkeypatch, family)
    changes = {"finetune__adapter": {"rank": 4, "alpha": 8, "text_encoders": texts}, "finetune__learning_rate": 0.05}
    changes |= {"finetune__steps": 4, "finetune__ema": 0.0, "generate__guidance_scale": guidance}
    changes["finetune__weights"] = {"diffusion": 1.0, "shared": 1.0, "branch": 1.0, "consistency": 0.1}
    tuned, made = chain(base, finetune__precision=precision, generate__precision=precision, **changes)
    assert tuned["losses"]["loss"] > 0
    a_step = 1 if family == "flux" or guidance <= 1 else 2
    assert made["arms"]["sage"]["nfe"] == a_step * (3 * 2 + 3 * 5)
    assert tuned["sampling_evaluations"] % a_step == 0
    assert drawn(tmp_path).std() > 1 and np.abs(drawn(tmp_path) - drawn(tmp_path, "shared")).max() > 0
    # The merged model is the base in float32 with the adapter, whatever precision that was trained in.
    stock, merged = (SharedSamplingPipeline.from_pretrained(tmp_path / part) for part in ("base", "tuned"))
    call = {"num_inference_steps": 2, "height": 16, "width": 16, "seed": 0, "output_type": "np"}

    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(["red cat"], **call).images

    before = images(stock)
    stock.load_lora_weights(tmp_path / "tuned", weight_name="pytorch_lora_weights.safetensors")
    np.testing.assert_allclose(images(merged), images(stock), atol=1e-4)
    assert np.abs(images(merged) - before).max() > 1e-2
    trained = {name for name, adapters in stock.get_list_adapters().items() if adapters}
    assert ("text_encoder" in trained) is texts


def stable_diffusion_15(folder):
    pipe = tiny.pipeline("stable_diffusion", folder)
    pipe.scheduler = PNDMScheduler(**SD15, skip_prk_steps=True, set_alpha_to_one=False)
    return pipe


def as_single_file(folder, monkeypatch):
    pipe = stable_diffusion_15(folder)
    single_files.write(
        pipe, single_files.configuration(pipe, folder / "elsewhere") / "model.safetensors", torch.float16
    )
    return folder / "elsewhere"


def as_pin(folder, monkeypatch):
    commit = "a" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    saved(stable_diffusion_15(folder), folder / "cache/models--some--model/snapshots" / commit)
    return folder / hub.pin(hub.Model("some/model", commit), folder)


def without_t5(folder, monkeypatch):
    pipe = tiny.pipeline("stable_diffusion_3", folder)
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    return saved(pipe.to(torch.bfloat16), folder / "elsewhere", monkeypatch, "stable_diffusion_3")


def half(family, **how):
    def make(folder, monkeypatch):
        pipe = stable_diffusion_15(folder) if family == "stable_diffusion" else tiny.pipeline(family, folder)
        return saved(pipe.to(torch.float16), folder / "elsewhere", monkeypatch, family, **how)

    return make


# Name: how the base is saved outside the project, and whether its scheduler takes no branch noise.
BASES = {
    "SD 1.5 in fp16": (half("stable_diffusion"), True),
    "SDXL as variant fp16": (half("stable_diffusion_xl", variant="fp16"), False),
    "SD 3 in bf16, without T5": (without_t5, False),
    "PixArt in fp16": (half("pixart_alpha"), False),
    "a single file in fp16": (as_single_file, True),
    "a pin of a model on a hub": (as_pin, True),
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_as_people_keep_it_goes_from_data_to_images(name, project, tmp_path, monkeypatch):
    make, pndm = BASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    base = make(tmp_path, monkeypatch)
    changes = {"finetune__steps": 2, "finetune__learning_rate": 0.01, "finetune__precision": "bf16"}
    changes |= {"group__by": "prediction", "group__threshold": -1.0, "group__near_duplicate": 1.0}
    params = params_of(generate__scheduler=DDIM if pndm else None, **changes)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params | {"base": str(base)}))
    data, groups = project / "prepared", tmp_path / "groups"
    group.main(data, base, groups, tmp_path / "metrics.json")
    finetune.main(base, data, groups, tmp_path / "tuned", tmp_path / "f.json", tmp_path / "work")
    generate.main(base, tmp_path / "tuned", data, groups, tmp_path / "images", tmp_path / "g.json")
    made = json.loads((tmp_path / "g.json").read_text())["arms"]
    assert 0 < made["sage"]["nfe"] < made["independent"]["nfe"] == 5 * 6
    assert made["independent"]["model"] == str(base)
    assert drawn(tmp_path).std() > 1 and np.abs(drawn(tmp_path) - drawn(tmp_path, "shared")).max() > 0


def test_a_family_that_is_not_trained_is_refused_by_name_before_its_weights_are_read(chain, tmp_path, monkeypatch):
    base = saved(tiny_families.tiny("LTXPipeline").pipe, tmp_path / "base")
    for weights in base.rglob("*.safetensors"):
        weights.unlink()
    said = (
        "base model .*base is a LTXPipeline, .* but not fine-tuned; set base in params.yaml to one of StableDiffusion"
    )
    refused(chain, base, tmp_path, UnsupportedError, said)


@pytest.mark.parametrize(("kind", "evaluations"), [(PNDMScheduler, 7), (HeunDiscreteScheduler, 11)])
def test_plans_count_what_the_scheduler_evaluates(kind, evaluations, chain, tmp_path):
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    pipe.scheduler = kind(**SD15, **({"skip_prk_steps": True} if kind is PNDMScheduler else {}))
    tuned, made = chain(saved(pipe, tmp_path / "base"), generate__branch_noise=0.0)
    shared = evaluations // 2
    arms = made["arms"]
    assert arms["independent"]["nfe"] == 5 * evaluations
    assert arms["sage"]["nfe"] == arms["shared"]["nfe"] == 2 * shared + 5 * (evaluations - shared)
    assert arms["sage"]["nfe"] <= arms["independent_same_nfe"]["nfe"] < arms["independent"]["nfe"]
    assert arms["independent"]["steps"] == 6 > arms["independent_same_nfe"]["steps"]
    assert 1 <= tuned["sampling_evaluations"] <= 2 * shared


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_scheduler_that_is_named_trains_draws_and_stays_with_the_model(kind, chain, tmp_path):
    """Stable Diffusion 1.5 comes with PNDM, which takes no branch noise."""
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    pipe.scheduler = PNDMScheduler(**SD15, skip_prk_steps=True, set_alpha_to_one=False)
    _, made = chain(saved(pipe, tmp_path / "base"), generate__scheduler=kind.__name__)
    assert made["arms"]["independent"]["nfe"] == 5 * 6
    tuned = SharedSamplingPipeline.from_pretrained(tmp_path / "tuned").scheduler
    assert type(tuned) is kind and tuned.config["beta_end"] == 0.012 and not tuned.config.get("clip_sample")


def refused(chain, base, tmp_path, error, said, **changes):
    with pytest.raises(error, match=said):
        chain(base, **changes)
    assert not (tmp_path / "work").exists() and not (tmp_path / "tuned").exists()


def test_what_cannot_be_drawn_is_refused_before_training(chain, tmp_path):
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    pipe.scheduler = PNDMScheduler(**SD15, skip_prk_steps=True)
    base = saved(pipe, tmp_path / "base")
    said = r"stage generate cannot draw with this model: branch noise.*not PNDMScheduler.*generate.scheduler"
    refused(chain, base, tmp_path, UnsupportedError, said)
    refused(chain, base, tmp_path, UnsupportedError, "FlowMatch.*cannot replace PNDM", generate__scheduler=FLOW)
    said = "timesteps logit_normal is for flow matching, but DDIMScheduler"
    wrong = {"generate__scheduler": DDIM, "finetune__timesteps": "logit_normal"}
    refused(chain, base, tmp_path, UnsupportedError, said, **wrong)
    said = "generate.share_ratio 0.1 of 6 steps is less than one step.* at least 0.17"
    refused(chain, base, tmp_path, ConfigurationError, said, generate__scheduler=DDIM, generate__share_ratio=0.1)
    pipe.unet.register_to_config(sample_size=16)
    said = "the prepared images have 16x16 pixels, but the model draws 32x32; set prepare.image_size to 32"
    refused(chain, saved(pipe, tmp_path / "large"), tmp_path, ConfigurationError, said)
    pipe.unet.register_to_config(sample_size=8)
    pipe.scheduler = DDIMScheduler(**SD15, clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    said = "stage generate cannot draw with this model: DDIMScheduler has prediction type epsilon and zero terminal SNR"
    refused(chain, saved(pipe, tmp_path / "zero"), tmp_path, UnsupportedError, said)


DOUBTS = {
    "nothing": ({}, None),
    "share ratio above": ({"generate__share_ratio": 0.67}, "shares 4 of 6 steps, but training covers 1 to 3"),
    "share ratio below": (
        {"generate__share_ratio": 0.17, "finetune__share_ratios": [0.34, 0.5]},
        r"share_ratio 0.17 shares 1 of 6 steps, but training covers 2 to 3 \(finetune.share_ratios \[0.34, 0.5",
    ),
    "nothing shared": ({"generate__share_ratio": 0.0}, None),
    "guidance": (
        {"generate__guidance_scale": 7.5, "finetune__drop_text": 0.0},
        r"generate.guidance_scale 7.5 needs .*finetune.drop_text 0.0",
    ),
    "guidance, dropped": ({"generate__guidance_scale": 7.5}, None),
    # 5 prompts in 2 groups, half of the steps shared: 30% saved
    "gate": (
        {"evaluate__gates": [GATE | {"worse_by_at_most": -0.31}]},
        "the gate on nfe_per_image cannot pass: .* save 0.3 of the evaluations, and the gate needs 0.31",
    ),
    "few groups": (
        {"evaluate__gates": [GATE | {"metric": "group_diversity", "worse_by_at_most": 0.1}]},
        "the gate on group_diversity cannot pass: its interval needs 20 groups of two or more prompts, .* has 2",
    ),
    "gate in reach": ({"evaluate__gates": [GATE | {"worse_by_at_most": -0.29}]}, None),
    "absolute gate": (
        {"evaluate__gates": [GATE | {"worse_by_at_most": -2.0, "relative": False}]},
        "save 1.8 evaluations per image, and the gate needs 2",
    ),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_what_is_likely_a_mistake_is_said_before_training(name, project, tmp_path, caplog):
    changes, said = DOUBTS[name]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params_of(**changes)))
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", tmp_path))
    with caplog.at_level(logging.WARNING, "flows.preflight"):
        check(pipe, load_params(tmp_path / "params.yaml"), project / "prepared", project / "groups")
    assert len(caplog.messages) == (said is not None) and (said is None or re.search(said, caplog.messages[0]))


def test_a_gate_on_diversity_over_seeds_needs_two(tmp_path):
    gates = [GATE | {"metric": "seed_diversity", "worse_by_at_most": 0.1}]
    for seeds, count in (([0], 1), ([0, 1], 0)):
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params_of(evaluate__gates=gates, generate__seeds=seeds)))
        said = list(doubts(load_params(tmp_path / "params.yaml"), 6, [[number] for number in range(30)]))
        assert said == ["the gate on seed_diversity cannot pass: generate.seeds [0] are fewer than two"] * count


@pytest.mark.parametrize("stage", [finetune, generate])
def test_a_hub_name_is_no_folder_whose_hash_could_be_recorded(stage, project):
    app = typer.Typer()
    app.command()(stage.main)
    names = {"base": "some/model", "data": str(project / "prepared"), "groups": str(project / "groups")}
    names |= {"model": str(project)} if stage is generate else {}
    arguments = [word for name, value in names.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(app, [*arguments, "--out", "out", "--metrics", "metrics.json"])
    assert result.exit_code == 2 and "'some/model' does not exist" in " ".join(result.output.split())


# sage plan: the verdict of every check, and what the stages then count


def job_of(project, tmp_path, pipe=None, **changes):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params_of(**changes)))
    pipe = SharedSamplingPipeline.from_pipe(pipe or tiny.pipeline("stable_diffusion", tmp_path))
    return Job(pipe, load_params(tmp_path / "params.yaml"), project / "prepared", project / "groups")


def verdict_of(job, name):
    found = {verdict.check: verdict for verdict in verdicts(job)}
    others = {other: verdict for other, verdict in found.items() if other != name and verdict.state != "ok"}
    assert not others
    return found[name]


def test_a_project_without_faults_passes_every_check(project, tmp_path):
    found = list(verdicts(job_of(project, tmp_path)))
    assert {verdict.state for verdict in found} == {"ok"} and len(found) == len(preflight.DRAWING | preflight.TRAINING)


SETTINGS = {
    "share ratio of at least one step": ({"generate__share_ratio": 0.1}, "failed", "less than one step"),
    "share ratio within the trained range": ({"generate__share_ratio": 0.67}, "warning", "training covers 1 to 3"),
    "empty prompt for guidance": (
        {"generate__guidance_scale": 7.5, "finetune__drop_text": 0.0},
        "warning",
        "never sees it",
    ),
    "gates that the groups can meet": (
        {"evaluate__gates": [GATE | {"worse_by_at_most": -0.31}]},
        "warning",
        "needs 0.31",
    ),
    "scheduler and branch noise": ({"generate__scheduler": "PNDMScheduler"}, "failed", "branch noise needs one of"),
    "timesteps that fit the scheduler": (
        {"finetune__timesteps": "logit_normal"},
        "failed",
        "finetune.timesteps logit_normal is for flow matching, but DDIMScheduler has prediction type epsilon",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_cannot_work_has_its_verdict(name, project, tmp_path):
    changes, state, said = SETTINGS[name]
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    if "generate__scheduler" in changes:
        pipe.scheduler = PNDMScheduler(**SD15, skip_prk_steps=True)
        changes = {"generate__share_ratio": 0.43}  # 3 of its 7 evaluations
    found = verdict_of(job_of(project, tmp_path, pipe, **changes), name)
    assert found.state == state and said in found.found


def test_training_at_another_size_than_drawing_has_its_verdict(project, tmp_path):
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    pipe.unet.register_to_config(sample_size=16)
    found = verdict_of(job_of(project, tmp_path, pipe), "image size")
    assert found.state == "failed" and "have 16x16 pixels, but the model draws 32x32" in found.found
    # Before data are prepared, the size to prepare counts.
    job = job_of(tmp_path / "nowhere", tmp_path, pipe, prepare__image_size=64)
    found = {verdict.check: verdict for verdict in verdicts(job)}["image size"]
    assert found.state == "failed" and "have 64x64 pixels, but the model draws 32x32" in found.found


def test_captions_that_are_not_read_to_their_end_are_counted(project, tmp_path):
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    pipe.tokenizer.model_max_length = 9  # "blue cat" has a start, 7 letters and an end; "tall tree" has 8 letters
    found = verdict_of(job_of(project, tmp_path, pipe), "captions within the text encoder's limit")
    assert found.state == "warning"
    assert (
        "does not read 1 of 5 captions of split train (20.0%) to their end, but leaves out up to 1 tok" in found.found
    )


def test_flux_is_checked_at_the_size_of_the_data_and_without_an_empty_prompt(project, tmp_path, monkeypatch):
    pipe = tiny.pipeline("flux", tmp_path)
    shared = type(SharedSamplingPipeline.from_pipe(pipe))
    monkeypatch.setattr(shared, "_options", {**shared._options, **tiny.OPTIONS["flux"]})
    changes = {"generate__guidance_scale": 3.5, "finetune__drop_text": 0.0}
    job = job_of(project, tmp_path, pipe, **changes)
    assert {verdict.state for verdict in verdicts(job)} == {"ok"}
    assert evaluations.drawing(job)["independent"] == 5 * 6
    job = job_of(tmp_path / "nowhere", tmp_path, pipe, prepare__image_size=18, **changes)
    found = {verdict.check: verdict for verdict in verdicts(job)}["image size"]
    assert found.state == "failed" and "sides are multiples of 4; set prepare.image_size to 20" in found.found


def test_text_encoders_without_a_clip_have_their_verdict(project, tmp_path):
    job = job_of(project, tmp_path, finetune__adapter={"rank": 2, "text_encoders": True})
    assert {verdict.state for verdict in verdicts(job)} == {"ok"}
    job.pipe.register_modules(text_encoder=tiny.t5(16))
    with pytest.raises(UnsupportedError, match="the text encoders are T5EncoderModel; leave text_encoders out"):
        list(preflight.TRAINING["base that can be trained"](job))


def test_an_empty_split_has_its_verdict(project, tmp_path, monkeypatch):
    read = preflight.read_split
    monkeypatch.setattr(preflight, "read_split", lambda data, split: read(data, split)[: 0 if split == "train" else 9])
    found = {verdict.check: verdict for verdict in verdicts(job_of(project, tmp_path))}["splits with images"]
    assert found.state == "failed" and "split train of" in found.found and "has no image" in found.found


def test_what_memory_and_disk_do_not_hold_has_its_verdict(project, tmp_path, monkeypatch):
    job = job_of(project, tmp_path)
    certain, disk = job.memory.certain, preflight.disk(job)
    total = job.memory.total - job.memory.weights  # the weights are there already
    for free, whole, state in (
        (total, certain, "ok"),
        (total - 1, certain, "warning"),
        (total - 1, certain - 1, "failed"),
    ):
        monkeypatch.setattr(machine, "memory", lambda device, found=(free, whole): found)
        assert verdict_of(job, "memory").state == state
    monkeypatch.setattr(machine, "memory", lambda device: (total, total))
    usage = namedtuple("usage", "total used free")
    for free, state in ((disk, "ok"), (disk - 1, "failed")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        assert verdict_of(job, "disk").state == state


def test_a_scheduler_that_training_cannot_follow_has_its_verdict(project, tmp_path, monkeypatch):
    pipe = tiny.pipeline("stable_diffusion_3", tmp_path)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    shared = type(SharedSamplingPipeline.from_pipe(pipe))
    monkeypatch.setattr(shared, "_options", {**shared._options, **tiny.OPTIONS["stable_diffusion_3"]})
    job = job_of(project, tmp_path, pipe, generate__branch_noise=0.0)
    found = {verdict.check: verdict for verdict in verdicts(job)}["base that can be trained"]
    assert found.state == "failed" and "FlowMatchHeunDiscreteScheduler has prediction type None" in found.found


def with_buckets(project, folder, *sizes):
    """Return a copy of the project in which the training images have these sizes, by turns, each group one of them."""
    shutil.copytree(project, folder)
    shutil.rmtree(folder / "prepared/train")
    order = [sizes[n % len(sizes)] for n in range(10)]
    rows = [
        {"id": f"t{n}", "text": TEXTS[n % 5], "image": Image.new("RGB", size[::-1]), "bucket": size}
        for n, size in enumerate(order)
    ]
    write_split(folder / "prepared/train", sorted(rows, key=lambda row: row["bucket"]))
    groups = [[f"t{n}" for n in range(10) if order[n] == size] for size in sizes]
    write_json(folder / "groups/train.json", {"groups": [{"ids": ids, "similarity": 0.8} for ids in groups]})
    return folder


BUCKETS = "aspect-ratio buckets"


def test_buckets_that_the_base_draws_pass_and_are_counted(project, tmp_path):
    made = with_buckets(project, tmp_path / "made", (16, 16), (8, 32))
    job = job_of(made, tmp_path)
    assert verdict_of(job, BUCKETS).state == "ok"
    plain, varied = (
        job.memory,
        job_of(made, tmp_path, finetune__flip=True, finetune__shuffle_tags={"keep": 1, "orders": 4}).memory,
    )
    latents, state = 4 * 10 * 4 * 8 * 8, 4 * 16 * 16
    assert plain.data == latents + state * (5 + 5 + 2)  # five captions in each bucket, and the empty one
    assert varied.data == 2 * latents + state * (4 * (5 + 5) + 2) and varied.certain == plain.certain
    assert evaluations.training(job).trained == 3


def test_buckets_that_cannot_work_or_hardly_have_their_verdict(project, tmp_path):
    odd = with_buckets(project, tmp_path / "odd", (16, 16), (15, 17))
    found = verdict_of(job_of(odd, tmp_path), BUCKETS)
    assert found.state == "failed" and "cannot draw bucket 17x15: " in found.found
    assert found.found.endswith("must be multiples of 2; set prepare.buckets.step to such a multiple")
    few = with_buckets(project, tmp_path / "few", (16, 16), (8, 32))
    found = verdict_of(job_of(few, tmp_path, finetune__batch_size=6), BUCKETS)
    assert found.state == "warning" and "2 of 2 buckets have fewer images" in found.found
    assert "(finetune.batch_size 6), so their steps repeat images: 32x8 (5), 16x16 (5); give" in found.found
    ids = [[f"t{n}"] for n in range(1, 10, 2)] + [[f"t{n}" for n in range(0, 10, 2)]]
    write_json(few / "groups/train.json", {"groups": [{"ids": one, "similarity": 1.0} for one in ids]})
    found = verdict_of(job_of(few, tmp_path), BUCKETS)
    assert found.state == "warning" and "1 of 2 buckets have no group of two prompts" in found.found
    alone = {"diffusion": 0.0, "shared": 0.0, "branch": 1.0, "consistency": 0.0}
    found = verdict_of(job_of(few, tmp_path, finetune__weights=alone), BUCKETS)
    assert found.state == "failed" and "no two prompts of bucket 32x8 are in one group" in found.found


def test_a_bucket_above_a_transformers_largest_size_has_its_verdict(project, tmp_path, monkeypatch):
    pipe = tiny.pipeline("stable_diffusion_3", tmp_path)
    shared = type(SharedSamplingPipeline.from_pipe(pipe))
    monkeypatch.setattr(shared, "_options", {**shared._options, **tiny.OPTIONS["stable_diffusion_3"]})
    step = pipe.vae_scale_factor * pipe.transformer.config.patch_size
    largest = step * pipe.transformer.config.pos_embed_max_size
    made = with_buckets(project, tmp_path / "made", (16, 16), (step, largest + step))
    found = verdict_of(job_of(made, tmp_path, pipe), BUCKETS)
    assert found.state == "failed" and f"its sides go up to {largest} pixels" in found.found


def test_latents_that_are_there_are_not_asked_of_the_disk_again(project, tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_CACHE", str(tmp_path / "cache"))
    job = job_of(project, tmp_path)
    needed = preflight.disk(job)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - job.memory.data))
    found = verdict_of(job, "disk")
    assert found.state == "failed" and "latents and text states" in found.found
    (tmp_path / "cache/encoded/some").mkdir(parents=True)
    (tmp_path / "cache/encoded/some/latents").write_bytes(bytes(job.memory.data))
    assert verdict_of(job, "disk").state == "ok"


def test_what_is_not_made_yet_is_unknown_and_nothing_fails(tmp_path):
    found = list(verdicts(job_of(tmp_path / "nowhere", tmp_path, prepare__image_size=16)))
    assert {verdict.state for verdict in found} == {"ok", "unknown"}
    assert all("is not made yet; `sage run " in verdict.found for verdict in found if verdict.state == "unknown")


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_plan_counts_what_the_stages_count(scale, chain, project, tmp_path):
    base = saved(tiny.pipeline("stable_diffusion", tmp_path), tmp_path / "base")
    changes = {"generate__guidance_scale": scale, "finetune__steps": 3, "generate__seeds": [0, 1]}
    changes["finetune__weights"] = {"diffusion": 1.0, "shared": 0.0, "branch": 1.0, "consistency": 0.5}
    tuned, made = chain(base, **changes)
    job = job_of(project, tmp_path, **changes)
    found = evaluations.training(job)
    assert found.exact and found.trained == tuned["evaluations"] and found.frozen == tuned["base_evaluations"]
    assert found.sampled == tuned["sampling_evaluations"] > 0
    assert evaluations.drawing(job) == {arm: figures["nfe"] for arm, figures in made["arms"].items()}


def test_the_command_says_what_a_run_costs_and_what_is_wrong(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    monkeypatch.setenv("SAGE_TRACKING_URI", "off")
    for name in ("prepared", "groups"):
        shutil.copytree(project / name, tmp_path / "data" / name)
    shutil.copy(Path(__file__).parents[2] / "dvc.yaml", tmp_path)
    saved(tiny.pipeline("stable_diffusion", tmp_path), tmp_path / "models/base")
    for changes, fit in (({}, True), ({"generate__share_ratio": 0.1}, False)):
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params_of(**changes)))
        assert plan.report(Console(width=160)) is fit
    shown = capsys.readouterr().out
    assert "unknown: no finished run on a machine like this one" in shown
    assert re.search(r"evaluations, SAGE +│ 21, 4.20 an image", shown)
    assert re.search(r"share ratio of at least one step +│ failed +│ generate.share_ratio 0.1 of 6 steps", shown)
    monkeypatch.setenv("SAGE_DEVICE", "cuda:7")
    assert not plan.report(Console(width=160))
    assert "torch cannot compute on the device cuda:7" in capsys.readouterr().out
