"""`sage push`, `sage pull`, `sage verify`: data and models in a DVC remote, and the integrity of every copy.

Copies in the cache, the work tree and the remote are compared with the hashes in dvc.lock and the .dvc files.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.versioning import repository
from sage.errors import DataError


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


def push(remote: str | None = None) -> str:
    """Upload what the remote lacks; return DVC's output. No local file changes.

    Raises DataError if the content of an object does not match its name: DVC would upload it under that name.
    """
    kept = repository.objects()
    states = kept["states"]["cache"]
    bad = [path for path, name in _named(kept["outs"], kept["members"]) if states[name] == "corrupt"]
    if bad:
        raise DataError(
            f"the cache is damaged, so nothing was pushed: {', '.join(bad)}. `sage verify` lists all damage."
        )
    return repository.dvc("push", *_to(remote))


def pull(remote: str | None = None) -> str:
    """Download what is missing here and check it; return what DVC prints. Raises DataError if a copy is damaged."""
    said = repository.dvc("pull", *_to(remote))
    bad = [finding.path for finding in verify()[1] if finding.state == "corrupt"]
    if bad:
        raise DataError(f"what was pulled is damaged: {', '.join(bad)}. Verify the remote: `sage verify --remote`.")
    return said


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
    return {str(path): hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() for path in found}


def _shown(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
