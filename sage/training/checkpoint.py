"""Resumable training state on disk: one file a checkpoint, named by its hash, and never a pickle.

`step-00000123.<SHA-256>.safetensors` holds named tensors and, in the header's metadata, a JSON manifest. The file
appears under its name whole or not at all, and its bytes are hashed before any of them is parsed. A damaged one is
passed over for the one before it.
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
    """Write a checkpoint, then remove all but it and the `keep` - 1 before it; return its path.

    `identity` is the configuration that the state belongs to; only the same one can load it. Raises ValueError where
    `state` or `identity` is not JSON, OSError with the path where it cannot be written; the older ones then stand.
    """
    manifest = json.dumps({"step": step, "state": dict(state), "identity": dict(identity)}, allow_nan=False)
    data = safetensors.torch.save(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, {"manifest": manifest}
    )
    path = folder / f"step-{step:08d}.{hashlib.sha256(data).hexdigest()}.safetensors"
    with new_file(path) as temporary:
        temporary.write_bytes(data)
    # One of a later step was passed over as damaged, or this one would not have been made.
    older = [other for other in complete(folder) if _step(other) < step]
    for other in complete(folder):
        if other not in [path, *older[: keep - 1]]:
            other.unlink()
    for left in folder.glob(".step-*"):  # by a writer that was killed
        left.unlink()
    return path


def latest(folder: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """Return the newest checkpoint whose hash fits, or None where there is none.

    Raises CheckpointError where it belongs to another configuration, naming the differences, or is none of this format.
    """
    for path in complete(folder):
        data = path.read_bytes()
        found, named = hashlib.sha256(data).hexdigest(), path.name.split(".")[1]
        if found == named:
            return _parse(path, data, identity)
        log.warning("checkpoint %s is damaged (SHA-256 %s); trying the one before it", path, found)
    return None


def complete(folder: Path) -> list[Path]:
    """Return the checkpoints that were written whole, newest first; their hashes are not yet checked."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), reverse=True)


def _step(path: Path) -> int:
    return int(path.name[5:13])


def _parse(path: Path, data: bytes, identity: Mapping[str, Any]) -> Checkpoint:
    # The format: eight bytes of length, little endian, then so many bytes of JSON, then the tensors.
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        manifest = json.loads(header["__metadata__"]["manifest"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of this project, though its hash fits. Remove it.") from error
    _check_identity(path, manifest["identity"], json.loads(json.dumps(dict(identity))))
    return Checkpoint(path, manifest["step"], safetensors.torch.load(data), manifest["state"])


def _check_identity(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
    if different:
        changes = "; ".join(f"{key}: saved {saved.get(key)!r}, now {wanted.get(key)!r}" for key in different)
        raise CheckpointError(
            f"{path} belongs to another configuration ({changes}). Remove it or restore the old values."
        )
