"""Every example of the documentation runs as it stands, with tiny stand-ins for what it leaves open."""

import json
import runpy
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import sage.torchvision_ops  # noqa: F401

import diffusers
import photographs
import pytest
import served
import small
import tiny
import tiny_judges
import torch
import yaml
from diffusers import DiffusionPipeline
from examples import PAGES, ROOT, commands, parsed, python, ran, session
from huggingface_hub import constants
from inside import inside  # noqa: F401
from PIL import Image

from flows.cli import main
from sage.packaged import minilm_folder
from sage.sampling.pipeline import SharedSamplingPipeline

pytestmark = pytest.mark.slow

# Similar enough for one group, and one that is not.
PROMPTS = ["a red fox in the snow", "a red fox in deep snow", "the fox in the snow is red", "a stock market crash"]
LOADED = "StableDiffusionPipeline.from_pretrained(...)"


def test_every_page_with_python_is_run_below_or_in_the_tests_of_its_room():
    shown = {page.relative_to(ROOT).as_posix(): len(python(str(page))) for page in PAGES}
    assert {page: count for page, count in shown.items() if count} == {
        "README.md": 1,
        "docs/grouping.md": 4,
        "docs/own-model.md": 1,
        "docs/sampling.md": 6,
        "docs/serving.md": 1,  # tests/serving/test_app.py
        "docs/training.md": 1,
        "models/base/README.md": 1,
    }


@pytest.fixture
def stock(tmp_path):
    return tiny.stable_diffusion(tmp_path)


def test_the_readmes_five_lines(stock):
    (code,) = python("README.md")
    names = ran(code, {"stock": stock, "prompts": PROMPTS}, model=(LOADED, "stock"))
    assert len(names["out"].images) == len(PROMPTS)
    assert names["out"].cost.network_evaluations == names["out"].plan.nfe(guidance=True)


def test_sampling(stock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    call, proof, custom, loaded_by, saved, template = python("docs/sampling.md")
    names = ran(call, {"stock": stock, "prompts": PROMPTS}, model=(LOADED, "stock"))
    assert len(names["out"].images) == len(PROMPTS) and names["out"].cost.saving > 0

    stock.save_pretrained("model")
    loaded = 'DiffusionPipeline.from_pretrained("model")'
    names = ran(proof, names, model=('DiffusionPipeline.from_pretrained(...).to("cuda")', loaded))
    assert isinstance(names["pipe"], SharedSamplingPipeline)

    assert "Shared" in ran(custom, {})
    Path("shared.py").write_text(custom)
    found = ran(loaded_by, {**names, "model": "model"})
    assert type(found["pipe"]).__name__ == "SharedStableDiffusionPipeline"

    shutil.copytree(ROOT / "models/base", "models/sage")
    ran(saved, {})
    assert type(DiffusionPipeline.from_pretrained("folder")) is diffusers.StableDiffusionPipeline

    names["pipe"].set_progress_bar_config(disable=True)
    assert len(ran(template, names)["out"].images) == 5


def test_grouping(stock, monkeypatch):
    monkeypatch.chdir(ROOT)
    groups, call, prediction, budget = python("docs/grouping.md")
    names = ran(groups, {"prompts": PROMPTS})
    assert names["groups"] == [[0, 1, 2], [3]] and names["worst"][1] == 1
    names["pipe"] = SharedSamplingPipeline.from_pipe(stock)
    names["pipe"].set_progress_bar_config(disable=True)
    ran(call, names, folder=("folder/of/another/encoder", str(minilm_folder())))
    first = ran(prediction, names)["first"]
    assert len(first.embeddings()) == len(PROMPTS) and first.network_evaluations == 2 * len(PROMPTS)  # under guidance
    assert ran(budget, names)["budget"].plan.prompts == len(PROMPTS)


def test_training(stock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = python("docs/training.md")
    before = {name: weight.clone() for name, weight in stock.unet.state_dict().items()}
    texts, images = [["red cat"], ["red dog"], ["blue cat"], ["tree"]], torch.zeros(4, 16, 16, 3, dtype=torch.uint8)
    names = {"pipe": stock, "texts": texts, "images": images, "groups": [[0, 1, 2], [3]]}
    ran(code, names, steps=("Schedule(600, ", "Schedule(2, "))
    assert any(not torch.equal(weight, before[name]) for name, weight in stock.unet.state_dict().items())


def test_the_base_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = python("models/base/README.md")
    assert isinstance(ran(code, {})["pipe"], SharedSamplingPipeline)


COMMANDS = sorted(set().union(*map(commands, PAGES)))
HELP = defaultdict(set)
for _command in COMMANDS:
    _program, _options = parsed(_command)
    if "flows.stages.name" not in map(str.lower, _program):
        HELP[_program] |= set(_options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'.*' found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("program", sorted(HELP), ids=" ".join)
def test_a_command_is_there_with_its_options(program, monkeypatch, capsys):
    if program[0].startswith("scripts/"):
        assert subprocess.run(["bash", "-n", ROOT / program[0]], check=False).returncode == 0
    elif program[0] == "python" and len(program) == 3 and not HELP[program]:
        assert find_spec(program[2])  # some take no options, not even --help, and would do their work
    else:
        code, said = _help(program, monkeypatch, capsys)
        assert code == 0, said
        for option in HELP[program]:
            assert option in said, f"{' '.join(program)}: {option} is unknown"


def _help(program, monkeypatch, capsys):
    """Return the exit code of a command with --help, and what it prints; our own commands run in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(ROOT)
    if program[0] not in ("sage", "python"):
        call = [Path(sys.executable).with_name(program[0]), *program[1:], "--help"]
        shown = subprocess.run(call, capture_output=True, text=True, check=False)
        return shown.returncode, shown.stdout + shown.stderr
    arguments = program[1:] if program[0] == "sage" else program[3:]
    monkeypatch.setattr(sys, "argv", [program[0], *arguments, "--help"])
    with pytest.raises(SystemExit) as ended:
        _in_this_process(program)
    shown = capsys.readouterr()
    return ended.value.code or 0, shown.out + shown.err


def _in_this_process(program):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        main() if program[0] == "sage" else runpy.run_module(program[2], run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, handler)


# Those with a server or a registered model are run in tests/prompts/test_remote.py and tests/tracking.
LISTS = [
    line
    for line in COMMANDS
    if line.startswith(("sage group prompts.txt", "sage generate prompts.txt"))
    and not {"--server", "--model"} & set(parsed(line)[1])
]


@pytest.fixture
def project(stock, tmp_path, monkeypatch):
    """A project whose model is a tiny one, with a list of prompts and the values of a template."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    stock.save_pretrained("models/sage")
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    Path("wildcards").mkdir()
    Path("wildcards/animal.txt").write_text("fox\nwolf\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("line", LISTS)
def test_a_list_of_prompts_goes_through_the_commands(line, project, monkeypatch, capsys):
    prompts = Path("prompts.txt")
    if "--expand" in line:
        prompts.write_text("a {red|blue|grey} {big|tiny|thin|fat} {fox|wolf}\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as ended:
        _in_this_process(("sage",))
    shown = capsys.readouterr()
    assert not ended.value.code, shown.err
    drawn = len(list(Path("pictures").glob("*.png")))
    if line.startswith("sage group") or "--plan" in line:
        assert drawn == 0 and "4 prompts" in shown.out
    else:
        assert drawn == (20 if "--expand 20" in line else 24 if "--expand all" in line else 4)


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture
def photographer(tmp_path, monkeypatch):
    """Where docs/own-model.md begins: a checkout, photographs at home, and a hub cache that has what the page names.

    Tiny are the model, the judges, their sizes and the number of photographs, steps and gates.
    """
    project = small.shipped(tmp_path / "project")
    monkeypatch.chdir(project)
    for name in ("HOME", "MLFLOW_TRACKING_URI", "SAGE_TRACKING_URI"):
        monkeypatch.setenv(name, str(tmp_path) if name == "HOME" else f"sqlite:///{project / 'mlflow.db'}")
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "test")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "test@localhost")
    photographs.write(tmp_path / "photographs")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    pipe = tiny.pipeline("stable_diffusion_xl", tmp_path).to(torch.float16)
    pipe.save_pretrained(tmp_path / "sdxl", variant="fp16")
    for name, save in (
        (SDXL, pipe.save_pretrained),
        ("facebook/dinov2-base", tiny_judges.dinov2),
        ("openai/clip-vit-large-patch14", tiny_judges.clip),
    ):
        photographs.cached(tmp_path / "hub", name, save)
    Path("data/raw").mkdir()
    shutil.copy(ROOT / "data/raw/README.md", "data/raw")
    settings = yaml.safe_load((ROOT / "configs/sdxl_lora_16gb.yaml").read_text(encoding="utf-8"))
    settings["prepare"] |= {"image_size": 16, "buckets": {"step": 8, "max_aspect": 2.0}}
    settings["finetune"] |= {"batch_size": 4, "accumulate": 2, "adapter": {"rank": 2}}
    settings["generate"] |= {"steps": 4}
    Path("configs").mkdir()
    Path("configs/sdxl_lora_16gb.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    gate = {"metric": "nfe_per_image", "reference": "independent", "worse_by_at_most": -0.05, "relative": True}
    few = {"finetune__steps": 2, "finetune__warmup": 0, "finetune__decay": 0, "evaluate__resamples": 100}
    few |= {"prepare__test": 0.3, "group__threshold": 0.0, "evaluate__gates": [gate], "generate__seeds": [0, 1]}
    small.set_params(project, **few)
    small.commit_all(project)
    Path("prompts.txt").write_text("a red boat\na blue boat\nan old raft\n", encoding="utf-8")
    return tmp_path


def test_own_model(photographer, inside, tmp_path):
    said = {}
    for line in session("docs/own-model.md"):
        command = line.replace("COMMIT", photographs.COMMIT).replace("/models/sdxl", str(tmp_path / "sdxl"))
        if command.startswith("sage serve"):
            _is_served(command.split()[2], tmp_path)
            continue
        inside.stages.clear()
        done = inside(command)
        assert done.code == 0, f"{command}: {done.said}"
        said[line] = done.said, inside.stages.copy()
    assert said["dvc repro group"][1] == ["prepare", "group"]
    assert said["dvc repro"][1] == ["finetune", "generate", "evaluate"]
    assert said["sage judge challenger"][1] == ["generate", "evaluate"]
    assert said["dvc exp run -S base=/models/sdxl"][1] == ["group", "finetune", "generate", "evaluate"]
    assert f"hub/{SDXL}@{photographs.COMMIT}: in the hub cache" in said["sage doctor"][0]
    assert "failed" not in said["sage plan"][0] and "unknown:" not in said["sage plan"][0].partition("checks")[2]
    assert "registered as version 1" in said["sage register"][0]
    assert "version 1 of sage is champion" in said["sage promote"][0]

    prepared = json.loads(Path("metrics/prepare.json").read_text())
    assert prepared["kept"] == len(photographs.CAPTIONS) and prepared["reasons"] == {"no_caption": 1}
    judged = json.loads(Path("metrics/evaluate.json").read_text())
    assert judged["features"].startswith("dinov2 (") and judged["alignment"] == "CLIP score"
    assert [_size(path) for path in Path("work/pictures").glob("*.png")] == [(16, 16)] * 3
    kept = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout.split("\0")
    made = ("data/raw/photos/", "data/prepared/", "data/generated/", "models/sage/", "work/")
    assert "data/raw/photos.dvc" in kept and not [name for name in kept if name.startswith(made)]

    (code,) = python("docs/own-model.md")
    base = f'from_pretrained("{tmp_path / "sdxl"}", variant="fp16")'
    names = ran(code, {}, base=(f'from_pretrained("{SDXL}")', base))
    assert names["pipe"].get_active_adapters() == ["default_0"]
    names["pipe"].unload_lora_weights()
    names["pipe"].load_lora_weights("photographs.safetensors")
    assert names["pipe"].get_active_adapters() == ["default_0"]


def _size(path):
    with Image.open(path) as image:
        return image.size


def _is_served(model, folder):
    with served.sage(model, folder) as server:
        server.wait()
        answer = server.ask("red boat", seed=1)
        assert answer.status_code == 200 and answer.json()["data"][0]["b64_json"]
