"""`dvc repro` from photographs to a promoted version with bases of every family that is fine-tuned, saved elsewhere.

Judged by CLIP and by clean-fid's Inception, both with tiny weights. SDXL with LoRA goes this way in tests/test_docs.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import photographs
import pytest
import small
import tiny
import tiny_judges
import torch
import yaml
from diffusers import PNDMScheduler
from inside import inside  # noqa: F401
from waiting import wait_for

from sage.evaluation import extractors
from sage.files import sha256
from sage.sampling.pipeline import SharedSamplingPipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # the form of clean-fid's file
]

GATE = {"metric": "nfe_per_image", "reference": "independent", "worse_by_at_most": -0.05, "relative": True}
SHIPPED_INCEPTION = extractors._INCEPTION_SHA256


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A project with photographs under DVC, for tiny judges and few steps, with everything committed."""
    folder = tmp_path_factory.mktemp("own")
    project = small.shipped(folder / "project")
    judges = tiny_judges.inception(folder / "inception/inception-2015-12-05.pt"), tiny_judges.clip(folder / "clip")
    # Processes of their own compare with this hash, too.
    code = project / "sage/evaluation/extractors.py"
    code.write_text(code.read_text().replace(SHIPPED_INCEPTION, sha256(judges[0])))
    small.set_params(
        project,
        prepare__source="folder",
        prepare__image_size=16,
        prepare__test=0.3,
        group__threshold=0.0,
        finetune__steps=6,
        finetune__warmup=0,
        finetune__decay=0,
        finetune__batch_size=4,
        finetune__checkpoint_every=2,
        generate__steps=4,
        generate__guidance_scale=3.0,
        generate__seeds=[0, 1],
        generate__batch_size=4,
        evaluate__features=str(judges[0].parent),
        evaluate__alignment=str(judges[1]),
        evaluate__references=None,
        evaluate__resamples=100,
        evaluate__gates=[GATE],
    )
    small.commit_all(project)
    photographs.write(project / "data/raw/photos")  # now, because DVC refuses what is in git
    add = [sys.executable, "-m", "dvc", "add", "data/raw/photos"]
    subprocess.run(add, cwd=project, check=True, capture_output=True)
    return project


@pytest.fixture
def project(committed, monkeypatch):
    monkeypatch.chdir(committed)
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    monkeypatch.setenv("SAGE_TRACKING_URI", f"sqlite:///{committed / 'mlflow.db'}")
    weights = Path(yaml.safe_load((committed / "params.yaml").read_text())["evaluate"]["features"])
    monkeypatch.setattr(extractors, "_INCEPTION_SHA256", sha256(weights / "inception-2015-12-05.pt"))
    return committed


def sd15(folder):
    pipe = tiny.pipeline("stable_diffusion", folder)
    pipe.scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, skip_prk_steps=True
    )
    return pipe


# Family, whether its scheduler has to be replaced, the adapter, and the precision of drawing.
BASES = {
    "SD 1.5, all weights": ("stable_diffusion", "DDIMScheduler", None, "fp32"),
    "SD 3, LoRA": ("stable_diffusion_3", None, {"rank": 2}, "fp32"),
    "PixArt, all weights": ("pixart_alpha", None, None, "fp32"),
    "FLUX.1, LoRA": ("flux", None, {"rank": 2, "text_encoders": True}, "bf16"),
}


@pytest.mark.parametrize("name", BASES)
def test_from_photographs_to_a_promoted_version(name, project, inside, tmp_path, monkeypatch):
    family, scheduler, adapter, precision = BASES[name]
    pipe = sd15(tmp_path) if family == "stable_diffusion" else tiny.pipeline(family, tmp_path)
    shared = type(SharedSamplingPipeline.from_pipe(pipe))
    monkeypatch.setattr(shared, "_options", {**shared._options, **tiny.OPTIONS.get(family, {})})
    pipe.to(torch.float16).save_pretrained(tmp_path / "elsewhere")
    small.set_params(
        project,
        base=str(tmp_path / "elsewhere"),
        generate__scheduler=scheduler,
        generate__precision=precision,
        finetune__adapter=adapter,
    )
    said = [done(inside(command)) for command in ("dvc repro", "sage register", "sage promote")]
    version = said[1].split()[-1]
    assert f"version {version} of sage is champion" in said[2]
    judged = json.loads(Path("metrics/evaluate.json").read_text())
    assert judged["features"] == "inception" and judged["alignment"] == "CLIP score" and judged["passed"]
    assert Path("models/sage/pytorch_lora_weights.safetensors").exists() == (adapter is not None)
    assert inside.stages[-4:] == small.STAGES[1:]


def done(result):
    assert result.code == 0, result.said
    return result.said


def killed(folder, seen):
    """Run `dvc repro` in processes of their own, and kill them all when a file is seen that the pattern fits."""
    command = [sys.executable, "-m", "dvc", "repro"]
    process = subprocess.Popen(command, cwd=folder, env=small.environment(folder), start_new_session=True)
    wait_for(lambda: list(folder.glob(seen)), process=process, every=0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_what_is_killed_in_training_and_in_drawing_goes_on_to_the_same_files(project, inside, tmp_path):
    sd15(tmp_path).to(torch.float16).save_pretrained(tmp_path / "elsewhere")
    elsewhere = str(tmp_path / "elsewhere")
    # Steps enough that the training is not over before it is killed.
    changes = {"generate__scheduler": "DDIMScheduler", "generate__precision": "fp32"}
    changes |= {"finetune__adapter": None, "finetune__steps": 30}
    small.set_params(project, base=elsewhere, **changes)
    done(inside("dvc repro group"))
    inside.stages.clear()
    killed(project, "work/finetune/*/step-*")
    assert not Path("models/sage").exists()
    killed(project, "work/generate/*/seed-*-pack-*")
    assert not Path("data/generated").exists()
    done(inside("dvc repro"))
    assert inside.stages == ["generate", "evaluate"] and not list(Path("data").glob(".generated*"))
    lock = Path("dvc.lock").read_bytes()
    shutil.rmtree("work")
    done(inside("dvc repro --force --single-item finetune"))
    done(inside("dvc repro --force --single-item generate"))
    assert Path("dvc.lock").read_bytes() == lock
