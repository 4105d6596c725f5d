"""Networks that others saved, found before work starts by folder or hub name, and read from safetensors only."""

import json
import logging
from pathlib import Path
from typing import Any

from sage.errors import CheckpointError
from sage.files import digest, sha256

log = logging.getLogger(__name__)

WEIGHTS = "*.safetensors"
_CONFIG = "config.json"
_FILES = ["*.json", WEIGHTS, "*.txt", "*.model"]


def find(name: str) -> Path:
    """Return the folder of a saved network; a hub name that is not in the hub's cache yet is downloaded.

    A hub name may end in @ and a revision. Raises CheckpointError if the network cannot be had, is pickled, or has no
    configuration.
    """
    folder = Path(name)
    if not folder.is_dir():
        # "models/judge" has the form of a hub name, but says where this machine keeps models.
        if folder.is_absolute() or (folder.parent != Path() and folder.parent.is_dir()):
            raise CheckpointError(f"there is no folder {name}.")
        folder = _downloaded(name)
    if not list(folder.glob(WEIGHTS)):
        pickled = sorted(path.name for path in folder.glob("*") if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        held = f"only pickled weights ({', '.join(pickled)}), which are not read" if pickled else "no weights"
        raise CheckpointError(f"{name} holds {held}; save the network as safetensors with save_pretrained.")
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"{name} lacks {_CONFIG}; save the network with save_pretrained.")
    return folder


def config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a saved network; raise CheckpointError if it is damaged."""
    try:
        return dict(json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / _CONFIG} is damaged: {error}") from error


def check_image_processor(name: str, folder: Path) -> None:
    """Raise CheckpointError if a saved network says nowhere how images are resized and scaled for it."""
    files = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / file).is_file() for file in files):
        raise CheckpointError(
            f"{name} has neither {files[0]} nor {files[1]}; save its image processor with save_pretrained."
        )


def weights_digest(folder: Path) -> str:
    """Return one hash of the configuration, preprocessing and weights of a saved network."""
    files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".txt", ".model"})
    return digest({path.name: sha256(path) for path in files})


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download, try_to_load_from_cache  # late: only hub names need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = name.partition("@")
    try:
        known = try_to_load_from_cache(repository, _CONFIG, revision=revision or None)
        if not isinstance(known, str) or not any(Path(known).parent.glob(WEIGHTS)):
            log.warning("the hub cache lacks %s, which is downloaded once", name)
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_FILES))
    # OSError: no connection, and huggingface_hub's own errors for a network that is not in its cache.
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"there is no folder {name}, and as a name on the hub it cannot be had: {reason} "
            "Give a folder, or download the network first."
        ) from error
