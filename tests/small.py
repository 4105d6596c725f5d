"""A small project in a folder of its own: the shipped code, graph and models, few pictures, few steps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import tiny_judges
import yaml
from PIL import Image, ImageDraw

from sage.evaluation.attributes import AttributeClassifier, AttributeJudge, save

ROOT = Path(__file__).parents[1]
STAGES = ["prepare", "group", "finetune", "generate", "evaluate"]
_COLOURS = ["red", "green", "blue", "orange", "purple", "black", "brown", "pink"]
_SHAPES = ["circle", "square", "triangle", "line", "cross", "ring"]
# What the small run asks of the model: only that sharing saved evaluations, which does not depend on training.
_GATE = {"metric": "nfe_per_image", "reference": "independent", "worse_by_at_most": -0.05, "relative": True}


def project(folder: Path) -> Path:
    """Make the project and return its folder; a git and DVC repository with everything committed."""
    shipped(folder)
    shutil.copytree(ROOT / "models/base", folder / "models/base")
    images(folder / "data/raw")
    tiny_judges.clip(folder / "models/clip")
    set_params(
        folder,
        prepare__source="folder",
        evaluate__alignment="models/clip",
        evaluate__references=None,
        prepare__test=0.3,
        group__threshold=0.5,
        finetune__steps=2,
        finetune__warmup=1,
        finetune__decay=1,
        finetune__batch_size=8,
        generate__steps=4,
        generate__share_ratio=0.5,
        generate__seeds=[0],
        evaluate__resamples=100,
        evaluate__gates=[_GATE],
    )
    commit_all(folder)
    return folder


def shipped(folder: Path) -> Path:
    """Make a folder with the shipped code and graph and an untrained judge, but no base, no data and no parameters."""
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("sage", "flows"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("dvc.yaml", "prefect.yaml", ".gitignore", ".dvcignore", "data/.gitignore", "models/.gitignore"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    # A dependency of stage evaluate, whatever judges.
    judge = AttributeJudge(AttributeClassifier({"moods": {"mouth": ["frowning", "smirking"]}}, 8), {})
    save(judge, folder / "models/attributes", "tests")
    return folder


def commit_all(folder: Path) -> None:
    """Make a folder a git and DVC repository with everything committed."""
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (
        ["git", "init", "-q"],
        [sys.executable, "-m", "dvc", "init", "-q"],
        ["git", "add", "-A"],
        [*git, "commit", "-qm", "start"],
    ):
        subprocess.run(command, check=True, cwd=folder)


def images(folder: Path) -> None:
    """Write 48 pictures with captions: every colour of every shape."""
    folder.mkdir(parents=True)
    lines = []
    for colour in _COLOURS:
        for shape in _SHAPES:
            image = Image.new("RGB", (64, 64), "white")
            _draw(ImageDraw.Draw(image), shape, colour)
            name = f"{colour}-{shape}.png"
            image.save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": f"{colour} {shape}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def _draw(canvas: ImageDraw.ImageDraw, shape: str, colour: str) -> None:
    box = (12, 12, 52, 52)
    match shape:
        case "circle":
            canvas.ellipse(box, fill=colour)
        case "ring":
            canvas.ellipse(box, outline=colour, width=8)
        case "square":
            canvas.rectangle(box, fill=colour)
        case "triangle":
            canvas.polygon([(32, 10), (54, 52), (10, 52)], fill=colour)
        case "line":
            canvas.line((10, 10, 54, 54), fill=colour, width=8)
        case "cross":
            canvas.line((10, 32, 54, 32), fill=colour, width=8)
            canvas.line((32, 10, 32, 54), fill=colour, width=8)


def set_params(folder: Path, **changes: object) -> None:
    """Change values of the shipped parameters, or of those that the folder has; "__" stands between keys."""
    path = folder / "params.yaml"
    values = yaml.safe_load((path if path.exists() else ROOT / "params.yaml").read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = values
        for key in parents:
            place = place[key]
        place[last] = value
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which the project's copy of the code is used, and runs are recorded in the project."""
    found = os.environ | {"PYTHONPATH": str(folder), "SAGE_DEVICE": "cpu"}
    found.pop("SAGE_TRACKING_URI", None)
    return found


def sage(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the `sage` command in the project."""
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600)
