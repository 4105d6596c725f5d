"""Prefixes on disk: a file for each, bounded in bytes; the least recently used go first, damaged ones are dropped.

Files are safetensors with the key as JSON and a SHA-256 over both. Their names are hashes of the key, so a file is
found without an index, also by another process that uses the same folder. The prompts are in the files: keep the folder
as private as them (its files are readable by their owner only).
"""

import contextlib
import hashlib
import json
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flows.serving.metrics import log
from sage.files import new_file
from sage.sampling.continuous import Prefix

Key = tuple[Any, tuple[str, ...], int]  # kind, prompts of the block, step

_SUFFIX = ".safetensors"
_UNWRITTEN = 64  # prefixes that wait to be written; above it, they are not kept on disk
_FULL = 0.9  # of the limit remain after a deletion, so that not every write needs one
_ABANDONED = 60.0  # seconds after which a temporary file belongs to a killed writer


class PrefixFiles:
    """Prefixes of one model in a folder, which may hold those of others, too; written by a thread of its own."""

    def __init__(self, folder: Path, limit: int, identity: str, device: Any = "cpu") -> None:
        """Take over what the folder holds.

        folder    created if it does not exist
        limit     bytes of all files together, as this process writes them
        identity  of what the prefixes depend on besides their key: weights, scheduler, precision
        device    where prefixes are loaded to
        """
        self.folder, self.limit, self.identity, self._device = folder, limit, identity, device
        self.damaged = self.failed = self.files = self.bytes = 0
        self.on_written: Callable[[], None] = lambda: None  # called by the writing thread after each prefix
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in folder.glob(".*.tmp-*"):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)
        self._trim()
        self._unwritten: queue.Queue[tuple[Key, Prefix, np.ndarray | None]] = queue.Queue(_UNWRITTEN)
        threading.Thread(target=self._write_all, daemon=True).start()

    def put(self, key: Key, prefix: Prefix, embedding: np.ndarray | None) -> None:
        """Write a prefix soon, unless too many are waiting; `embedding` is that of its block."""
        try:
            self._unwritten.put_nowait((key, prefix, embedding))
        except queue.Full:
            self.failed += 1

    def flush(self) -> None:
        """Wait until everything is written."""
        self._unwritten.join()

    def get(self, key: Key) -> tuple[Prefix, np.ndarray | None] | None:
        """Return a prefix and its embedding, or None if there is none; a damaged file is deleted."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                facts, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if facts.get("sha256") != _digest(facts.get("facts", ""), tensors):
                raise ValueError("the content does not match its hash")
            read, found = _key(facts), json.loads(facts["facts"])
            if read != key or found["identity"] != self.identity:
                raise ValueError("the file is named as another prefix")
            path.touch()
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            self._drop(path, error)
            return None
        tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        embedding = tensors["embedding"].cpu().numpy() if "embedding" in tensors else None
        state = {name: _unpacked(value, tensors) for name, value in found["state"].items()}
        return Prefix(key[2], tensors["latents"], tensors["clean"], state), embedding

    def entries(self, most: int) -> Iterator[tuple[Key, np.ndarray | None]]:
        """Yield keys and embeddings of the `most` newest prefixes of this model, the oldest of them first.

        Reads only their headers and embeddings: `get` checks the whole file.
        """
        for path in [path for _, _, path in self._listed()][-most:]:
            try:
                with safe_open(path, "np") as file:
                    facts = file.metadata() or {}
                    if json.loads(facts["facts"])["identity"] == self.identity:
                        yield _key(facts), file.get_tensor("embedding") if "embedding" in file.keys() else None  # noqa: SIM118
            except FileNotFoundError:
                continue
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                self._drop(path, error)

    def _path(self, key: Key) -> Path:
        named = hashlib.sha256(json.dumps([self.identity, key]).encode()).hexdigest()
        return self.folder / f"{named}{_SUFFIX}"

    def _write_all(self) -> None:
        while True:
            key, prefix, embedding = self._unwritten.get()
            try:
                self._write(key, prefix, embedding)
            except OSError:
                # A full or missing disk costs the cache, never the images.
                self.failed += 1
                traceback.print_exc()
            finally:
                self._unwritten.task_done()
            self.on_written()

    def _write(self, key: Key, prefix: Prefix, embedding: np.ndarray | None) -> None:
        tensors = {"latents": prefix.latents, "clean": prefix.clean}
        state = {name: _packed(value, name, tensors) for name, value in prefix.state.items()}
        if embedding is not None:
            tensors["embedding"] = torch.from_numpy(np.asarray(embedding, np.float32))
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        facts = json.dumps({"identity": self.identity, "key": key, "state": state})
        path, content = self._path(key), save(tensors, {"facts": facts, "sha256": _digest(facts, tensors)})
        replaced = path.stat().st_size if path.exists() else None
        with new_file(path) as temporary:
            temporary.touch(0o600)
            temporary.write_bytes(content)
        self.files += replaced is None
        self.bytes += len(content) - (replaced or 0)
        if self.bytes > self.limit:
            self._trim(_FULL)

    def _trim(self, share: float = 1.0) -> None:
        """Count the files, and delete the least recently used ones above a share of the limit."""
        listed = self._listed()
        self.files, self.bytes = len(listed), sum(size for _, size, _ in listed)
        if self.bytes <= self.limit:
            return
        for _, size, path in listed:
            if self.bytes <= share * self.limit:
                break
            path.unlink(missing_ok=True)
            self.files, self.bytes = self.files - 1, self.bytes - size

    def _listed(self) -> list[tuple[float, int, Path]]:
        """Return time of last use, size and path of all prefixes, in order of last use."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(_SUFFIX):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue  # another process has just deleted it
                found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return sorted(found)

    def _drop(self, path: Path, error: Exception) -> None:
        self.damaged += 1
        log(event="prefix dropped", file=path.name, reason=f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):  # what cannot be read can often not be deleted either
            path.unlink()


def _digest(facts: str, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(facts.encode() + save(tensors)).hexdigest()


def _key(facts: dict[str, str]) -> Key:
    def hashable(value: Any) -> Any:
        return tuple(map(hashable, value)) if isinstance(value, list) else value

    kind, prompts, step = hashable(json.loads(facts["facts"])["key"])
    return kind, prompts, step


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON, in which names stand for the tensors that are added to `tensors`."""
    if torch.is_tensor(value):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list):
        return [_packed(item, f"{name}.{place}", tensors) for place, item in enumerate(value)]
    return value


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value["tensor"]]
    return [_unpacked(item, tensors) for item in value] if isinstance(value, list) else value
