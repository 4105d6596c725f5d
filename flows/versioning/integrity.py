"""`sage push`, `sage pull`, `sage verify`: data and models in a DVC remote, and the integrity of every copy.

Copies in the cache, the work tree and the remote are compared with the hashes in dvc.lock and the .dvc files. DVC
itself trusts a protected (mode 444) object in its cache, and restores and uploads a damaged one without a word.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.versioning import repository
from sage.errors import DataError
from sage.files import new_file

_PROTECTED = 0o444  # the mode of objects in DVC's cache


@dataclass(frozen=True)
class Finding:
    """A copy that differs from what the graph expects: its place, its path, and its state."""

    place: str
    path: str
    state: str


def verify(remote: str | None = None) -> tuple[int, list[Finding]]:
    """Re-hash cache, work tree and, if given, `remote` ("": the default one); return the number checked and findings.

    What is missing from the cache or the work tree can be pulled; what is missing everywhere must be reproduced.
    """
    kept = repository.objects() if remote is None else repository.objects(remote)
    outs, members = kept["outs"], kept["members"]
    findings, checked = [], 0
    for place, states in kept["states"].items():
        checked += len(states)
        named = _named(outs, members)
        findings += [Finding(place, path, states[name]) for path, name in named if states[name] != "ok"]
    for out, name in outs.items():
        found, wanted = _files(Path(out)), _wanted(out, name, members)
        if wanted is None:
            findings.append(Finding("work tree", _shown(out), "unknown: no intact copy says what it should hold"))
            continue
        checked += len(found)
        for path in sorted({*found, *wanted}):
            if found.get(path) != wanted.get(path):
                state = "missing" if path not in found else "extra" if path not in wanted else "corrupt"
                findings.append(Finding("work tree", _shown(path), state))
    return checked, findings


def repair() -> list[Finding]:
    """Delete every corrupt copy in the cache and the work tree; return what was deleted or replaced.

    If the file of a corrupt object is intact in the work tree, the object is replaced by it. What is missing afterwards
    comes back with `pull`, or by reproducing.
    """
    done = _repair_cache()
    if any(finding.state == "replaced" for finding in done):
        done += _repair_cache()  # only a folder's listing, if it was replaced, names the folder's files
    for finding in verify()[1]:
        if finding.place == "work tree" and finding.state == "corrupt":
            Path(finding.path).unlink()
            done.append(Finding("work tree", finding.path, "deleted"))
    return done


def check_output(path: Path, lock: Path = Path("dvc.lock")) -> None:
    """Raise DataError if a file or folder is an output of the graph whose MD5 is not that in dvc.lock."""
    place = Path(os.path.relpath(path)).as_posix()
    recorded = _recorded(lock) if lock.exists() else {}
    if place not in recorded or (content := _content(path)) is None:
        return
    found, wanted = _md5(content), recorded[place].removesuffix(".dir")
    if found != wanted:
        raise DataError(
            f"{place} has MD5 {found[:12]}, not {wanted[:12]} as in {lock}: it is damaged, or another's work. "
            "Make it again: `sage verify --repair`, which deletes the damaged copies, then `sage run`."
        )


def push(remote: str | None = None) -> str:
    """Upload what the remote lacks; return DVC's output. No local file changes.

    Raises DataError if the content of an object does not match its name: DVC would upload it under that name.
    """
    kept = repository.objects()
    states = kept["states"]["cache"]
    bad = [path for path, name in _named(kept["outs"], kept["members"]) if states[name] == "corrupt"]
    if bad:
        raise DataError(
            f"the cache is damaged, so nothing was pushed: {', '.join(bad)}. `sage verify` lists all damage, and "
            "`sage verify --repair` removes it."
        )
    return repository.dvc("push", *_to(remote))


def pull(remote: str | None = None) -> str:
    """Download what is missing here and check it; return what DVC prints. Raises DataError if a copy is damaged."""
    said = repository.dvc("pull", *_to(remote))
    bad = [finding.path for finding in verify()[1] if finding.state == "corrupt"]
    if bad:
        raise DataError(f"what was pulled is damaged: {', '.join(bad)}. Verify the remote: `sage verify --remote`.")
    return said


def _repair_cache() -> list[Finding]:
    """Delete the corrupt objects of the cache, or replace them from the work tree."""
    kept = repository.objects()
    paths: dict[str, list[str]] = {}
    for path, name in _named(kept["outs"], kept["members"]):
        if kept["states"]["cache"][name] == "corrupt":
            paths.setdefault(name, []).append(path)
    done = []
    for name, copies in paths.items():
        file, content = Path(kept["files"][name]), _intact(copies, name)
        file.unlink()
        if content is not None:
            with new_file(file) as temporary:
                temporary.write_bytes(content)
                temporary.chmod(_PROTECTED)
        done += [Finding("cache", path, "deleted" if content is None else "replaced") for path in copies]
    return done


def _to(remote: str | None) -> list[str]:
    return ["--remote", remote] if remote else []


def _named(outs: Mapping[str, str], members: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (path, object) of every tracked file and folder."""
    named = []
    for out, name in outs.items():
        named.append((_shown(out), name))
        named += [(f"{_shown(out)}/{path}", member) for path, member in members.get(name, [])]
    return named


def _wanted(out: str, name: str, members: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the MD5 of each file of an output; None if no intact copy of the folder's listing is left."""
    if not name.endswith(".dir"):
        return {out: name}
    return {f"{out}/{path}": member for path, member in members[name]} if name in members else None


def _files(out: Path) -> dict[str, str]:
    """Return the actual MD5 of each file of an output in the work tree."""
    found = sorted(path for path in out.rglob("*") if path.is_file()) if out.is_dir() else [out] * out.is_file()
    return {str(path): _md5(path.read_bytes()) for path in found}


def _recorded(lock: Path) -> dict[str, str]:
    """Return the MD5 of each output in dvc.lock; raise DataError if the file is damaged."""
    try:
        stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
        return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise DataError(f"{lock} is damaged. Restore it with `git checkout {lock}`, then `sage run`.") from error


def _intact(copies: Sequence[str], name: str) -> bytes | None:
    """Return the content of an object from its first intact copy in the work tree; None if there is none."""
    contents = (_content(Path(copy)) for copy in copies)
    return next((found for found in contents if found is not None and _md5(found) == name.removesuffix(".dir")), None)


def _content(path: Path) -> bytes | None:
    """Return the content of the object of a file or folder, None if that is missing; a folder's is its listing."""
    if path.is_dir():
        files = {Path(file).relative_to(path).as_posix(): md5 for file, md5 in _files(path).items()}
        return json.dumps([{"md5": files[name], "relpath": name} for name in sorted(files)]).encode()
    return path.read_bytes() if path.is_file() else None


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _shown(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
