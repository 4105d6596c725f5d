"""The `deps` of dvc.yaml are what each stage reaches, or DVC would call a stage with a changed loss "up to date".

What a stage reaches is read from the imports of its file, theirs, and so on, also inside functions; module names in
text ("sage.sampling.families.table") and files beside a module ("report.html.j2") count as well.

Some files cannot change a result, so that a change in them must not cost a training; they are listed nowhere:
flows/machine.py names the device, flows/preflight.py refuses and warns, flows/terminal.py and flows/report/sheet.py
show, flows/tracking/ and flows/versioning/ record, sage/errors.py names what is raised, sage/config.py has neither
defaults nor conversions (tests/test_config.py), and a package's `__init__.py` is empty. sage/grouping/auto.py groups
prompts that come without groups, which no stage does: the tests of stages `finetune` and `generate` run with that
module missing. The last test keeps them so.
"""

import ast
from pathlib import Path, PurePosixPath

import pytest
import yaml

from flows.stages.finetune import WITHOUT_EFFECT as WITHOUT_EFFECT_ON_WEIGHTS
from flows.versioning import repository
from sage.config import Finetune, Params

ROOT = Path(__file__).parents[1]
GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
WITHOUT_EFFECT = (
    "flows/machine.py",
    "flows/preflight.py",
    "flows/report/sheet.py",
    "flows/terminal.py",
    "flows/tracking/",
    "flows/versioning/repository.py",
    "sage/errors.py",
    "sage/config.py",
    "sage/grouping/auto.py",
)


def source(module: str) -> Path | None:
    """Return the file of a module of this project, or None."""
    place = ROOT / module.replace(".", "/")
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None


def mentions(path: Path) -> set[Path]:
    """Return the project's files that a file names: modules that it imports, names in text, files beside it."""
    found: set[Path | None] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {source(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            names = [source(f"{node.module}.{alias.name}") for alias in node.names]
            found |= {source(node.module), *names}
            # `from sage import Plan` reaches the module that Plan comes from.
            if node.module == "sage":
                import sage

                lazy = [alias.name for alias, name in zip(node.names, names, strict=True) if name is None]
                found |= {source(getattr(sage, name).__module__) for name in lazy}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) < 100:
            if node.value.startswith(("sage.", "flows.")):
                found.add(source(node.value))
            elif "\n" not in node.value and (path.parent / node.value).is_file():
                found.add(path.parent / node.value)
    return {file for file in found if file is not None}


def effective(path: Path) -> bool:
    name = path.relative_to(ROOT).as_posix()
    return path.name != "__init__.py" and not name.startswith(WITHOUT_EFFECT)


def reached(stage: str) -> set[str]:
    """Return all files, with an effect, that a stage reaches."""
    seen: set[Path] = set()
    waiting = [ROOT / f"flows/stages/{stage}.py"]
    while waiting:
        path = waiting.pop()
        if path not in seen and effective(path):
            seen.add(path)
            waiting += mentions(path) if path.suffix == ".py" else []
    return {path.relative_to(ROOT).as_posix() for path in seen}


def code(stage: str) -> set[str]:
    """Return the deps of a stage that are code."""
    return {str(path) for path in repository.paths(GRAPH[stage], "deps") if path.parts[0] in ("sage", "flows")}


@pytest.mark.parametrize("stage", GRAPH)
def test_deps_are_what_the_stage_reaches(stage):
    missing, needless = reached(stage) - code(stage), code(stage) - reached(stage)
    listed = "\n".join(f"      - {name}" for name in sorted(reached(stage)))
    assert not missing | needless, f"missing {missing}, needless {needless}; the code of {stage} is\n{listed}"


@pytest.mark.parametrize("stage", GRAPH)
def test_a_stage_has_one_name_everywhere(stage):
    assert (ROOT / f"flows/stages/{stage}.py").is_file()
    assert GRAPH[stage]["cmd"].startswith(f"python -m flows.stages.{stage} ")
    assert any(name.split(".")[0] == stage for name in GRAPH[stage]["params"])
    assert PurePosixPath(f"metrics/{stage}.json") in repository.paths(GRAPH[stage], "outs")


def test_the_only_metrics_are_the_headline():
    named = {path for stage in GRAPH.values() for path in repository.paths(stage, "metrics")}
    assert named == {PurePosixPath("metrics/headline.json")}


def parameters(path: Path) -> set[str]:
    """Return which parameters a stage reads: `load_params().a.b`, or `params.a.b` after `params = load_params()`."""
    sections, found = set(Params.model_fields), set()
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        for start in ("load_params().", "params."):
            if text.startswith(start) and text.removeprefix(start).split(".")[0] in sections:
                found.add(text.removeprefix(start))
    return found


@pytest.mark.parametrize("stage", GRAPH)
def test_params_are_what_the_stage_reads(stage):
    read, watched = parameters(ROOT / f"flows/stages/{stage}.py"), set(GRAPH[stage]["params"])
    assert read
    for name in read:
        parents = {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 2)}
        below = {other for other in read | watched if other.startswith(f"{name}.")}
        assert parents & watched or below, f"{stage} reads {name}, which dvc.yaml does not name"


def test_training_depends_on_every_setting_that_changes_its_result():
    listed = {name.removeprefix("finetune.") for name in GRAPH["finetune"]["params"] if name.startswith("finetune.")}
    assert listed == Finetune.model_fields.keys() - WITHOUT_EFFECT_ON_WEIGHTS


@pytest.mark.parametrize("stage", GRAPH)
def test_a_path_in_a_command_is_something_that_dvc_watches(stage):
    """A path that is neither dep nor out would change, or be changed, behind DVC's back."""
    arguments = [word for word in GRAPH[stage]["cmd"].split() if "/" in word or word == "report"]
    watched = {str(path) for key in ("deps", "outs", "metrics") for path in repository.paths(GRAPH[stage], key)}
    assert set(arguments) <= watched


def test_what_is_left_out_computes_nothing():
    for path in (ROOT / "sage").rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            allowed = ast.Import | ast.ImportFrom | ast.Expr | ast.Assign | ast.AnnAssign | ast.If
            is_lookup = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
            assert isinstance(node, allowed) or is_lookup, f"{path}:{node.lineno} computes"
    for node in ast.parse((ROOT / "sage/errors.py").read_text()).body:
        assert isinstance(node, ast.ClassDef | ast.Expr | ast.Import | ast.ImportFrom)


def test_reaching_follows_imports_in_functions_and_names_in_text():
    found = reached("generate")
    assert {
        "sage/sampling/families/table.py",
        "sage/sampling/loop.py",
        "sage/sampling/plan.py",
        "sage/sampling/base.py",
    } <= found
    assert "flows/report/report.html.j2" in reached("evaluate")
