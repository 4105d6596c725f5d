"""DVC runs the stages again when what `base` names has changed: a folder elsewhere, its content, a pin of a hub."""

import subprocess
import sys

import pytest
import small
import yaml

from sage.sampling import hub

pytestmark = pytest.mark.slow

GRAPH = yaml.safe_load((small.ROOT / "dvc.yaml").read_text())["stages"]
STAGES = ["group", "finetune", "generate"]


@pytest.fixture
def project(tmp_path):
    """A repository with the shipped stages that read the base, which print their arguments instead of working."""
    folder = tmp_path / "project"
    (folder / "models/base").mkdir(parents=True)
    (folder / "models/base/weights").write_text("shipped")
    stages = {}
    for name in STAGES:
        arguments = GRAPH[name]["cmd"].split(f"flows.stages.{name} ")[1]
        deps = [dep for dep in GRAPH[name]["deps"] if "base}" in dep]
        stages[name] = {"cmd": f"printf '%s|' {name} {arguments} >> log; echo >> log", "deps": deps}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (folder / ".gitignore").write_text("log\n")
    small.set_params(folder, generate__seeds=[0])
    small.commit_all(folder)
    return folder


def bases(folder, *command):
    """Run DVC; return for each stage that ran the base that it was given."""
    (folder / "log").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in (folder / "log").read_text().splitlines()]
    return {words[0]: words[words.index("--base") + 1] for words in lines}


def test_stages_depend_on_what_base_names(project, tmp_path):
    assert bases(project, "repro") == dict.fromkeys(STAGES, "models/base")
    assert bases(project, "repro") == {}
    elsewhere = tmp_path / "my models"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("mine")
    assert bases(project, "exp", "run", "-S", f"base='{elsewhere}'") == dict.fromkeys(STAGES, str(elsewhere))
    assert bases(project, "repro") == {}
    (elsewhere / "weights").write_text("changed")
    assert bases(project, "repro") == dict.fromkeys(STAGES, str(elsewhere))
    pinned = hub.pin(hub.Model("owner/name", "a" * 40), project)
    assert bases(project, "exp", "run", "-S", f"base={pinned}") == dict.fromkeys(STAGES, str(pinned))
    file = elsewhere / "weights"
    small.set_params(project, base=str(file))
    assert bases(project, "repro") == dict.fromkeys(STAGES, str(file))
    file.write_text("changed again")
    assert bases(project, "repro") == dict.fromkeys(STAGES, str(file))


def test_a_base_that_is_not_there_is_named(project):
    missing = f"hub/owner/name@{'a' * 40}"
    small.set_params(project, base=missing)
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode and missing in done.stderr
