import os
import subprocess
import sys

import operated
import pytest

from flows.versioning import experiments, repository
from sage.config import load_params
from sage.errors import ConfigurationError, SageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return operated.project(tmp_path_factory.mktemp("experiments") / "project")


@pytest.fixture
def project(template, monkeypatch):
    monkeypatch.chdir(template)
    return template


def status(project):
    return subprocess.run(
        ["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True, check=True
    ).stdout


def test_parameters_change_in_the_tree_and_nowhere_else(project):
    before = (project / "params.yaml").read_bytes()
    with experiments.work_tree("one") as tree:
        experiments.set_parameters(tree, ["group.max_size=3", "finetune.learning_rate=1e-5", "generate.seeds=[4,5]"])
        values = load_params(tree / "params.yaml")
        assert values.group.max_size == 3
        assert values.finetune.learning_rate == 1e-5
        assert values.generate.seeds == [4, 5]
        with pytest.raises(SageError, match="experiment one is running"), experiments.work_tree("one"):
            pass
    assert not tree.exists()
    assert (project / "params.yaml").read_bytes() == before
    assert status(project) == ""


def test_a_parameter_is_added_removed_and_named_with_its_file(project):
    changes = ["~group.threshold", "+group.saving=0.3", "++group.max_size=3", "params.yaml:finetune.steps=700"]
    with experiments.work_tree("signs") as tree:
        experiments.set_parameters(tree, changes)
        values = load_params(tree / "params.yaml")
    assert (values.group.threshold, values.group.saving, values.group.max_size) == (None, 0.3, 3)
    assert values.finetune.steps == 700


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("finetune.stepz=3", "'finetune.stepz=3'.*stepz"),
        ("finetune.steps=-1", "finetune.steps: .*greater than or equal to 1"),
        ("finetune.steps=many", "finetune.steps: .*valid integer"),
        ("=3", "override '=3'"),
        ("../other.yaml:group.max_size=3", "parameters are in params.yaml, not in ../other.yaml"),
    ],
)
def test_a_bad_override_is_named_with_its_path(project, override, said):
    with experiments.work_tree("bad") as tree, pytest.raises(ConfigurationError, match=said):
        experiments.set_parameters(tree, ["group.max_size=3", override, "group.max_size=4"])


def test_what_dvc_add_tracks_is_in_the_tree_too(project):
    photos = project / "raw/photos"
    photos.mkdir(parents=True)
    (photos / "a.jpg").write_bytes(b"photograph")
    repository.dvc("add", "raw/photos")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["add", "raw"], ["commit", "--quiet", "--message", "photographs"]):
        subprocess.run([*git, *command], check=True)
    with experiments.work_tree("data") as tree:
        assert (tree / "raw/photos/a.jpg").read_bytes() == b"photograph"
    assert status(project) == ""


@pytest.mark.parametrize("name", ["", "../x", "a b", "-x", "x" * 81])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(ConfigurationError, match="use letters"):
        experiments.check_name(name)


def test_what_a_killed_run_left_goes_with_the_next_one(project):
    code = (
        "import os; from flows.versioning import experiments\n"
        "with experiments.work_tree('killed') as tree: os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    left = project / experiments.TREES / "killed"
    assert left.exists()
    os.utime(left, (0, 0))
    with experiments.work_tree("next"):
        assert not left.exists()
    listed = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == 1


def test_outside_git_the_reason_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SageError, match="not a git repository"), experiments.work_tree("one"):
        pass


@pytest.mark.slow
def test_a_saved_tree_is_an_experiment_of_the_checkout(project):
    with experiments.work_tree("kept") as tree:
        experiments.set_parameters(tree, ["group.max_size=2"])
        repository.reproduce(lambda text: None, folder=tree)
        experiments.save(tree, "kept")
    assert repository.dvc("exp", "list", "--name-only").split() == ["kept"]
    assert status(project) == ""
