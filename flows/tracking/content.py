"""Files of a registered model version: weights, settings for sampling and grouping, and code; and their hash.

The code is the two packages of this project, so that a version loads on a machine with only its requirements. A version
contains no pickle. The hash of its files is a tag in the registry, so a person who can overwrite only the files cannot
make them match. The hash is compared before any file is parsed.
"""

import base64
import logging
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import requires
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

import flows
import sage
from sage.config import Group, Params
from sage.data.images import is_blank
from sage.errors import RegistryError
from sage.files import digest, sha256
from sage.sampling import hub

FILES_HASH = "sage.files_sha256"  # name of the tag of a version
# Loading a version adds these to its files, even in the artifact store itself if the store is local: MLflow writes the
# name of the loaded version, Python the folders of bytecode beside the code.
_LOADED_AS, _BYTECODE = "registered_model_meta", "__pycache__"
_WEIGHTS = "artifacts/model"
ADAPTER = "pytorch_lora_weights.safetensors"
_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}


@dataclass(frozen=True)
class Version:
    """The verified files of a version, and its settings, as returned by `describe`."""

    folder: Path
    config: Mapping[str, Any]

    @property
    def weights(self) -> Path:
        """The folder of the diffusers pipeline."""
        return self.folder / _WEIGHTS

    def settings(self) -> tuple[str, dict[str, Any], Group]:
        """Return the hash of the weights, the sampling settings and the grouping settings."""
        return self.config["model_sha256"], dict(self.config["sampling"]), Group(**self.config["group"])


def describe(params: Params, threshold: float, model_sha256: str) -> dict[str, Any]:
    """Return the settings stored in a version: how the evaluated images were generated, and request limits.

    `threshold` is the similarity threshold of the evaluated groups, `model_sha256` the hash of the weights.
    """
    sampling = params.generate.sampling()
    # Store the threshold that was used, even if the parameters give a budget instead of a threshold.
    grouping = {
        "threshold": threshold,
        **params.group.model_dump(include={"max_size", "near_duplicate", "guard", "by"}),
    }
    return {
        "model_sha256": model_sha256,
        "base": params.base,
        "sampling": sampling,
        "group": grouping,
        # Limits of one request to a server; `steps` limits prompts x steps.
        "limits": {"prompts": 64, "characters": 2000, "steps": 64 * max(50, params.generate.steps)},
    }


def save(folder: Path, model: Path, config: Mapping[str, Any]) -> None:
    """Write the files of a version; its signature has the parameters of a request and their defaults.

    If the version groups by the model's distilled encoder, that is one of the files. Raises RegistryError if the model
    holds a pickle.
    """
    _refuse_pickles(model, "the model")
    artifacts = {"model": str(model)}
    if config["group"].get("by") == "distilled":
        from sage.grouping.distilled import kept_at  # late: it needs torch

        artifacts["distilled"] = str(kept_at(model))
    from mlflow.models import Model
    from mlflow.types import DataType, ParamSchema, ParamSpec

    pyfunc().save_model(
        str(folder),
        python_model=str(Path(__file__).with_name("served.py")),
        artifacts=artifacts,
        code_paths=[package.__path__[0] for package in (sage, flows)],
        model_config=dict(config),
        pip_requirements=[line for line in requires("sage-diffusion") or [] if "extra ==" not in line],
    )
    # MLflow infers the input type from the code, but could infer parameters only by running it.
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


def save_adapter(folder: Path, adapter: Path, base: str, model_sha256: str) -> None:
    """Write a LoRA adapter in MLflow's diffusers flavor, which stores the adapter and the name of its base model.

    The registered version has the adapter merged into its weights; this is a separate copy of the adapter. If the base
    model is a complete diffusers pipeline, MLflow loads both with `load_pipeline(base_model=...)`. The base model of
    this project has no text encoder in its folder: load it with `sage.sampling.base.load`, then call
    `load_lora_weights`.
    """
    import sage.torchvision_ops  # noqa: F401

    import mlflow.diffusers

    model = hub.pinned(base)
    # Without "./" the name of a folder would be looked up on a model hub.
    name = model.name if model is not None else base if Path(base).is_absolute() else f"./{base}"
    mlflow.diffusers.save_model(str(adapter), str(folder), base_model=name, metadata={"model_sha256": model_sha256})


def pyfunc() -> Any:
    """Return the module mlflow.pyfunc, with its warnings about type hints turned off."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        import mlflow.pyfunc
    # It warns that union types, which the answers have, are not validated.
    logging.getLogger("mlflow.types.type_hints").setLevel(logging.ERROR)
    return mlflow.pyfunc


def files_hash(folder: Path) -> str:
    """Return one SHA-256 over all files of a version; files that loading adds do not change it."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return digest(
        {
            name.as_posix(): sha256(path)
            for name, path in found.items()
            if str(name) != _LOADED_AS and _BYTECODE not in name.parts
        }
    )


def download(tracker: Any, version: Any, folder: Path) -> Version:
    """Download the files of a version; raise RegistryError if their hash differs from the one in the registry."""
    from mlflow.artifacts import download_artifacts

    # The source of a version copied from another model is a models:/ URI; ask the registry for the real location.
    source = tracker.get_model_version_download_uri(version.name, version.version)
    uri = tracker.tracking_uri
    files = Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=uri, registry_uri=uri))
    # Python would run this bytecode instead of the code, and the hash does not cover it.
    for bytecode in list(files.rglob(_BYTECODE)):
        shutil.rmtree(bytecode)
    _compare(files, version)
    model = yaml.safe_load((files / "MLmodel").read_text(encoding="utf-8"))
    return Version(files, model["flavors"]["python_function"]["config"])


def check_loaded(folder: Path) -> None:
    """Raise RegistryError if MLflow loaded these files as a version that has another hash in the registry."""
    from mlflow import MlflowClient

    loaded_as = folder / _LOADED_AS
    if not loaded_as.exists():
        return  # loaded from a plain folder, which `download` or its owner has verified
    named = yaml.safe_load(loaded_as.read_text(encoding="utf-8"))
    _compare(folder, MlflowClient().get_model_version(named["model_name"], named["model_version"]))


def draws(version: Version) -> bool:
    """Return whether a version generates an image for a test prompt, and not one of a single colour."""
    (answer,) = pyfunc().load_model(str(version.folder)).predict(["red heart"])
    # A version keeps the code that it was registered with, which may not look for blank images itself.
    return "png" in answer and not is_blank(Image.open(BytesIO(base64.b64decode(answer["png"]))))


def _refuse_pickles(folder: Path, what: str) -> None:
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in _PICKLES)
    if found:
        raise RegistryError(f"{what} holds pickles, which could run code: {', '.join(found)}; save it as safetensors.")


def _compare(files: Path, version: Any) -> None:
    """Raise RegistryError if files have another hash than their version in the registry, or are pickles."""
    found, wanted = files_hash(files), str(version.tags.get(FILES_HASH))
    if found != wanted:
        raise RegistryError(
            f"version {version.version} of {version.name} is damaged: its files have SHA-256 {found[:12]}, not "
            f"{wanted[:12]} as the registry keeps."
        )
    _refuse_pickles(files, f"version {version.version} of {version.name}")
