"""What a registered version holds: weights, how to sample and group with them, code, and a hash over all of it.

No pickle is in it. The hash of its files stands in the registry, not beside them: who can overwrite the files cannot
make them fit. It is compared before anything of them is parsed.
"""

import logging
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import yaml

from sage.config import Group, Params
from sage.errors import RegistryError
from sage.files import digest, sha256

FILES_HASH = "sage.files_sha256"  # the tag of a version
# Loading a version writes these beside its files, even into the store itself if that is local: MLflow what was
# loaded, Python the bytecode of served.py.
_LOADED_AS, _BYTECODE = "registered_model_meta", "__pycache__"
_WEIGHTS = "artifacts/model"
ADAPTER = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Version:
    """The verified files of a version, and what it says of itself."""

    folder: Path
    config: Mapping[str, Any]

    @property
    def weights(self) -> Path:
        """The folder of the pipeline."""
        return self.folder / _WEIGHTS

    def settings(self) -> tuple[str, dict[str, Any], Group]:
        """Return the hash of the weights, how to sample with them, and how to group prompts for them."""
        return self.config["model_sha256"], dict(self.config["sampling"]), Group(**self.config["group"])


def describe(params: Params, threshold: float, model_sha256: str) -> dict[str, Any]:
    """Return what a version says of itself: the judged pictures were made so, and its own shall be."""
    sampling = params.generate.sampling()
    # The threshold that was used, also if the parameters ask for a budget.
    grouping = {"threshold": threshold, **params.group.model_dump(include={"max_size", "near_duplicate", "guard"})}
    return {
        "model_sha256": model_sha256,
        "sampling": sampling,
        "group": grouping,
        # What one request may ask of a server; steps count once for each prompt.
        "limits": {"prompts": 64, "characters": 2000, "steps": 64 * max(50, params.generate.steps)},
    }


def save(folder: Path, model: Path, config: Mapping[str, Any]) -> None:
    """Write the content of a version, with the parameters that a request may give and their defaults."""
    from mlflow.models import Model
    from mlflow.types import DataType, ParamSchema, ParamSpec

    pyfunc().save_model(
        str(folder),
        python_model=str(Path(__file__).with_name("served.py")),
        artifacts={"model": str(model)},
        model_config=dict(config),
        pip_requirements=[line for line in requires("sage-diffusion") or [] if "extra ==" not in line],
    )
    # MLflow infers the list of prompts from the code, but parameters only by running it.
    saved, sampling = Model.load(str(folder)), config["sampling"]
    saved.signature.params = ParamSchema(
        [
            ParamSpec("seed", DataType.long, 0),
            ParamSpec("seeds", DataType.long, [], shape=(-1,)),
            ParamSpec("steps", DataType.long, sampling["steps"]),
            ParamSpec("share_ratio", DataType.double, sampling["share_ratio"]),
            ParamSpec("guidance_scale", DataType.double, sampling["guidance_scale"]),
            ParamSpec("negative_prompt", DataType.string, ""),
        ]
    )
    saved.save(str(folder / "MLmodel"))


def save_adapter(folder: Path, adapter: Path, model_sha256: str) -> None:
    """Write a LoRA in MLflow's own form for diffusers, which holds the adapter and the name of its base model.

    The version has it merged into its weights; this is for whoever wants it apart. MLflow can put it on a base that is
    a whole diffusers pipeline, by `load_pipeline(base_model=...)`; the embedded base, which has no text encoder in its
    folder, loads by `sage.sampling.base.load` and then takes it by `load_lora_weights`.
    """
    import sage.torchvision_ops  # noqa: F401

    import mlflow.diffusers

    # "./": a name without it would be looked up on a hub.
    mlflow.diffusers.save_model(
        str(adapter), str(folder), base_model="./models/base", metadata={"model_sha256": model_sha256}
    )


def pyfunc() -> Any:
    """Return MLflow's module of generic models, without what it says of its own type hints while it is imported."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        import mlflow.pyfunc
    # It warns that values of several kinds, as an answer has, are not checked.
    logging.getLogger("mlflow.types.type_hints").setLevel(logging.ERROR)
    return mlflow.pyfunc


def files_hash(folder: Path) -> str:
    """Return one SHA-256 for all files of a version, whether or not MLflow has loaded it from there."""
    written = {folder / _LOADED_AS, folder / _BYTECODE}
    found = (path for path in folder.rglob("*") if path.is_file() and not written & {path, path.parent})
    return digest({path.relative_to(folder).as_posix(): sha256(path) for path in found})


def download(tracker: Any, version: Any, folder: Path) -> Version:
    """Download a version's files and return them, if their hash is the one that the registry keeps."""
    from mlflow.artifacts import download_artifacts

    # What was copied from another registered model names that one; the registry knows where the files are.
    source = tracker.get_model_version_download_uri(version.name, version.version)
    uri = tracker.tracking_uri
    files = Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=uri, registry_uri=uri))
    # Python would run it in the place of served.py, whose hash is compared.
    shutil.rmtree(files / _BYTECODE, ignore_errors=True)
    _compare(files, version)
    model = yaml.safe_load((files / "MLmodel").read_text(encoding="utf-8"))
    return Version(files, model["flavors"]["python_function"]["config"])


def check_loaded(folder: Path) -> None:
    """Refuse files that MLflow loads as a version whose hash, in the registry, is another."""
    from mlflow import MlflowClient

    loaded_as = folder / _LOADED_AS
    if not loaded_as.exists():
        return  # from a folder, verified by whoever put it there
    named = yaml.safe_load(loaded_as.read_text(encoding="utf-8"))
    _compare(folder, MlflowClient().get_model_version(named["model_name"], named["model_version"]))


def draws(version: Version) -> bool:
    """Return whether a version answers a prompt with a picture."""
    (answer,) = pyfunc().load_model(str(version.folder)).predict(["red heart"])
    return "png" in answer


def _compare(files: Path, version: Any) -> None:
    found, wanted = files_hash(files), str(version.tags.get(FILES_HASH))
    if found != wanted:
        raise RegistryError(
            f"version {version.version} of {version.name} is damaged: its files have SHA-256 {found[:12]}, not "
            f"{wanted[:12]} as the registry keeps."
        )
