"""Resumable training state on disk: complete, hashed, and never a pickle.

Each checkpoint is a folder `step-00000123` with `state.safetensors` and `manifest.json`, renamed into place when both
are synced. A checkpoint whose hash does not fit is passed over for the one before it.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

from sage.errors import CheckpointError
from sage.files import new_folder, sha256, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Verified state after `step` steps: named tensors and a JSON value."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`; return its folder.

    `identity` is the configuration that the state belongs to; only the same one can load it.
    """
    path = folder / f"step-{step:08d}"
    with new_folder(path) as temporary:
        weights = temporary / "state.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, weights)
        manifest = {"step": step, "sha256": sha256(weights), "state": dict(state), "identity": dict(identity)}
        write_json(temporary / "manifest.json", manifest)
    for old in _complete(folder)[keep:]:
        shutil.rmtree(old)
    return path


def latest(folder: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """Return the newest checkpoint whose hash fits, or None where there is none.

    Raises CheckpointError where it belongs to another configuration, naming the differences.
    """
    for path in _complete(folder):
        try:
            return _load(path, identity)
        except _Damaged as damage:
            log.warning("checkpoint %s is damaged (%s); trying the one before it", path, damage)
    return None


class _Damaged(Exception):
    pass


def _complete(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    return sorted(folder.glob("step-????????"), reverse=True)


def _load(path: Path, identity: Mapping[str, Any]) -> Checkpoint:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        # Hash and parse the same bytes: a file read twice could change between.
        data = (path / "state.safetensors").read_bytes()
    except (OSError, ValueError) as error:
        raise _Damaged(str(error)) from error
    _check_hash(data, manifest)
    _check_identity(path, manifest["identity"], dict(identity))
    return Checkpoint(path, manifest["step"], load(data), manifest["state"])


def _check_hash(data: bytes, manifest: Any) -> None:
    if not isinstance(manifest, dict) or not {"step", "sha256", "state", "identity"} <= manifest.keys():
        raise _Damaged("its manifest lacks keys")
    found = hashlib.sha256(data).hexdigest()
    if found != manifest["sha256"]:
        raise _Damaged(f"SHA-256 {found[:12]}, expected {str(manifest['sha256'])[:12]}")


def _check_identity(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    saved, wanted = (json.loads(json.dumps(value)) for value in (saved, wanted))
    different = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
    if different:
        changes = "; ".join(f"{key}: saved {saved.get(key)!r}, now {wanted.get(key)!r}" for key in different)
        raise CheckpointError(
            f"{path} belongs to another configuration ({changes}). Remove it or restore the old values."
        )
