"""Whole pipelines in one .safetensors file, the form that web UIs use; it holds weights and no configuration."""

from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from sage.errors import DataError

# What describes a pipeline but for its weights.
_CONFIGURATION = ["*.json", "*/*.json", "*.txt", "*/*.txt", "*/*.model"]


def found(path: Path) -> Path | None:
    """Return the file if a path is one, or is a folder of a file and the configuration of its parts; else None.

    Raises DataError for a file that may be pickled.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise DataError(f"{path} is no safetensors file, and other files may be pickled; convert it to safetensors")
        return path
    if not (path / "model_index.json").exists() or any(path.glob("*/*.safetensors*")):
        return None
    files = sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def configuration(file: Path) -> Path:
    """Return the folder with the configuration of a single file; raise DataError if this machine has none.

    It is the file's own folder, or else what the hub cache holds of the published model of the same family.
    """
    if (file.parent / "model_index.json").exists():
        return file.parent
    name = fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=_CONFIGURATION))
    except LocalEntryNotFoundError as error:
        raise DataError(
            f"{file} is a single file without configuration: give the folder that holds it, with model_index.json and "
            f"the .json and .txt files of {name} in their folders, or get these where there is a network: hf download "
            f"{name} --include {' '.join(map(repr, _CONFIGURATION))}"
        ) from error


def load(file: Path, stock: Any, **kwargs: Any) -> Any:
    """Return the pipeline of a single file as a stock class; raise DataError if diffusers cannot read it so."""
    if not hasattr(stock, "from_single_file"):
        name = getattr(stock, "__name__", "its class")
        raise DataError(f"{file} is a single file, from which diffusers cannot load {name}; save it as a folder")
    return stock.from_single_file(str(file), config=str(configuration(file)), local_files_only=True, **kwargs)
