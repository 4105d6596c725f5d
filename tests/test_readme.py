"""What the README tells people to type is there, and what any page links to; CI runs its two commands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import sage.torchvision_ops  # noqa: F401

import pytest
from tiny import PROMPTS, stable_diffusion

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```", "", TEXT, flags=re.S | re.M), flags=re.M)
INLINE = re.findall(r"`((?:(?:sage|dvc|prefect|mlflow|python -m) |scripts/)[^`]*)`", TEXT)
COMMANDS = sorted({command.split("#")[0].strip() for command in BLOCKS + INLINE})
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/raw/*.md"), *ROOT.glob("models/*/*.md")])


def test_the_readme_names_its_commands():
    assert {"scripts/run", "scripts/test", "dvc repro"} <= set(COMMANDS)
    assert any(command.startswith("sage generate") for command in COMMANDS)


# A program that shows its help takes seconds to start.
STARTED = [command for command in COMMANDS if not command.startswith("scripts/")]


@pytest.mark.parametrize(
    "command", [pytest.param(command, marks=pytest.mark.slow if command in STARTED else ()) for command in COMMANDS]
)
def test_a_command_of_the_readme_is_there(command):
    program, *arguments = shlex.split(command)
    if program.startswith("scripts/"):
        assert subprocess.run(["bash", "-n", ROOT / program], check=False).returncode == 0
        assert (ROOT / program).stat().st_mode & 0o111
        return
    options = [argument for argument in arguments if argument.startswith("--")]
    words = [argument for argument in arguments if not argument.startswith("-")]
    # Only what names a subcommand: what follows are files and values.
    path = words[: 2 if program in ("prefect",) or words[:1] == ["exp"] else 1]
    call = (
        [sys.executable, "-m", path[0]]
        if program == "python"
        else [str(Path(sys.executable).with_name(program)), *path]
    )
    shown = subprocess.run([*call, "--help"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    for option in options:
        assert option in shown.stdout, f"{command}: {option} is unknown"


def anchors(page):
    """Return the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_links_to_is_there(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
        file = page.parent / target if target else page
        assert file.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(file), f"{file.name} has no heading #{anchor}"


def test_every_picture_of_the_docs_is_linked():
    linked = {Path(name).name for page in PAGES for name in re.findall(r"\(([^()]+\.(?:png|svg))\)", page.read_text())}
    assert {path.name for path in ROOT.glob("docs/*.*") if path.suffix in (".png", ".svg")} == linked


def test_the_five_lines_run_as_they_stand(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    assert "StableDiffusionPipeline.from_pretrained(...)" in code
    names = {"stock": stable_diffusion(tmp_path), "prompts": PROMPTS}
    exec(code.replace("StableDiffusionPipeline.from_pretrained(...)", "stock"), names)
    out = names["out"]
    assert len(out.images) == len(PROMPTS)
    assert out.cost.network_evaluations == out.plan.nfe(guidance=True)
