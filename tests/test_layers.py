"""Who may import whom, read from the sources: also inside functions, also under TYPE_CHECKING."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from flows.versioning import repository

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("sage/**/*.py"), *ROOT.glob("flows/**/*.py")])
# Each outside tool, and the only place that imports it.
ONLY_IN = {
    "prefect": ("flows/orchestration/",),
    "mlflow": ("flows/tracking/",),
    "dvc": ("flows/versioning/objects.py",),
    "fastapi": ("flows/serving/",),
    "starlette": ("flows/serving/", "flows/orchestration/local.py"),
    "uvicorn": ("flows/serving/", "flows/orchestration/local.py"),
    "prometheus_client": ("flows/serving/",),
}
STAGES = repository.stages(ROOT / "dvc.yaml")
# The five rooms of the library, one for each stage, and the rooms that each may import besides the files of `sage/`.
ROOMS = {
    "data": set(),
    "grouping": set(),
    "sampling": {"grouping"},
    "training": {"sampling"},
    "evaluation": {"data", "grouping"},
}


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, `from a import b` as "a.b"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def top(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_an_outside_tool_is_imported_in_one_place(path):
    for module in imports(path):
        if top(module) in ONLY_IN:
            assert name(path).startswith(ONLY_IN[top(module)] or ("nowhere",)), f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", [path for path in SOURCES if name(path).startswith("sage/")], ids=name)
def test_the_library_knows_no_shell(path):
    assert not {top(module) for module in imports(path)} & {"flows", "prefect", "mlflow", "dvc", "typer", "rich"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    for path in (ROOT / "sage" / room).rglob("*.py"):
        used = {module.split(".")[1] for module in imports(path) if top(module) == "sage"} & set(ROOMS)
        assert used <= {room} | ROOMS[room], name(path)


def test_every_module_of_the_library_is_in_a_room_or_shared_by_them():
    found = {path.relative_to(ROOT / "sage").parts[0] for path in (ROOT / "sage").rglob("*.py")}
    shared = {
        "__init__.py",
        "config.py",
        "diffusion.py",
        "errors.py",
        "files.py",
        "numbers.py",
        "packaged.py",
        "precision.py",
        "randomness.py",
    }
    assert found == set(ROOMS) | shared | {"torchvision_ops.py"}


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=name)
def test_a_package_face_is_empty(path):
    """Only `sage` has names of its own, the public ones: whoever reads an import knows the module."""
    body = ast.parse(path.read_text()).body
    assert name(path) == "sage/__init__.py" or [type(node) for node in body] == [ast.Expr]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_file_imports_a_stage(path):
    assert not any(module.startswith("flows.stages.") for module in imports(path)), name(path)


@pytest.mark.parametrize("room", ROOMS)
def test_mathematics_takes_plain_arguments(room):
    for path in (ROOT / "sage" / room).rglob("*.py"):
        assert not any(module.startswith("sage.config") for module in imports(path)), name(path)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_the_library_and_what_records_and_shows(stage):
    shell = {module for module in imports(ROOT / f"flows/stages/{stage}.py") if top(module) == "flows"}
    assert {".".join(module.split(".")[:2]) for module in shell} <= {
        "flows.drawing",
        "flows.machine",
        "flows.packs",
        "flows.preflight",
        "flows.report",
        "flows.terminal",
        "flows.tracking",
    }


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("flows.orchestration.graph", {"torch", "mlflow", "diffusers"}),
        ("flows.cli", {"torch", "mlflow", "prefect", "dvc", "diffusers", "transformers", "pydantic", "numpy"}),
        ("flows.tracking.registry", {"torch", "mlflow", "prefect"}),
        ("flows.serving.server", {"torch", "mlflow", "prefect", "diffusers", "transformers"}),
        ("sage", {"torch", "diffusers"}),
    ],
)
def test_an_import_stays_light(module, never):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not never & set(loaded.stdout.split())
