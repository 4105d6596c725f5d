"""Resumable training state on disk: one safetensors file per checkpoint, with its hash in the name.

`step-00000123.<SHA-256>.safetensors` holds named tensors and, in the header's metadata, a JSON manifest. Files are
written atomically, and the hash is checked before anything is parsed. A damaged checkpoint is skipped for the one
before it.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from sage.errors import CheckpointError
from sage.files import new_file

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-[0-9]{8}\.[0-9a-f]{64}\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Training state after `step` steps, with its hash verified: named tensors and a JSON object."""

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
    """Write a checkpoint and return its path; then remove all others except the `keep` - 1 before it.

    folder    where the checkpoints are
    step      number of finished steps
    tensors   named tensors
    state     further state, a JSON object
    identity  the configuration that the state belongs to, a JSON object; loading requires the same one
    keep      number of checkpoints to keep

    Raises ValueError if `state` or `identity` is not JSON and OSError if the file cannot be written; older checkpoints
    then remain.
    """
    manifest = json.dumps({"step": step, "state": dict(state), "identity": dict(identity)}, allow_nan=False)
    data = safetensors.torch.save(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, {"manifest": manifest}
    )
    path = folder / f"step-{step:08d}.{hashlib.sha256(data).hexdigest()}.safetensors"
    with new_file(path) as temporary:
        temporary.write_bytes(data)
    # A checkpoint of a later step is removed, too: it is damaged, or training would have resumed from it.
    older = [other for other in complete(folder) if _step(other) < step]
    for other in complete(folder):
        if other not in [path, *older[: keep - 1]]:
            other.unlink()
    for left in folder.glob(".step-*"):  # temporary files of a killed process
        left.unlink()
    return path


def latest(folder: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """Return the newest checkpoint with the right hash, or None if there is none.

    Raises CheckpointError if it belongs to another configuration, naming the differences, or has another format.
    """
    for path in complete(folder):
        data = path.read_bytes()
        found, named = hashlib.sha256(data).hexdigest(), path.name.split(".")[1]
        if found == named:
            return _parse(path, data, identity)
        log.warning("checkpoint %s is damaged (its SHA-256 is %s); trying the one before it", path, found)
    return None


def complete(folder: Path) -> list[Path]:
    """Return the paths of all checkpoints, newest first, without temporary files; their hashes are not checked."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), reverse=True)


def _step(path: Path) -> int:
    return int(path.name[5:13])


def _parse(path: Path, data: bytes, identity: Mapping[str, Any]) -> Checkpoint:
    # Safetensors format: the length of the JSON header (8 bytes, little endian), the header, the tensors.
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        manifest = json.loads(header["__metadata__"]["manifest"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of this project, but its hash is right. Remove it.") from error
    _check_identity(path, manifest["identity"], json.loads(json.dumps(dict(identity))))
    return Checkpoint(path, manifest["step"], safetensors.torch.load(data), manifest["state"])


def _check_identity(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
    if different:
        changes = "; ".join(f"{key}: saved {saved.get(key)!r}, now {wanted.get(key)!r}" for key in different)
        raise CheckpointError(
            f"{path} belongs to another configuration ({changes}). Remove it or restore the old values."
        )
