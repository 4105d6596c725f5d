"""The objects of the graph, re-hashed in DVC's cache and remote. The only file that imports dvc.

Run as a process of its own (`python -m flows.versioning.objects [REMOTE]`), like every use of DVC. Prints one JSON
object: `outs`, path to object; `members`, object of a folder to a list of path in it and object, from any intact copy
of its listing; `states`, for cache and remote, object to ok, corrupt or missing; `files`, object to its cache file.
DVC itself compares an object with its name only if the file's mode is not read-only.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from dvc.repo import Repo

_THREADS = 16  # for a remote, because each small object is a request


def main() -> None:
    """Print the state of the cache and, if an argument names one, of a remote; an empty name is the default remote."""
    with Repo() as repo:
        stores = {"cache": repo.cache.local}
        if len(sys.argv) > 1:
            stores["remote"] = repo.cloud.get_remote_odb(sys.argv[1] or None)
        outs = {out.fs_path: out.hash_info.value for out in repo.index.outs if out.use_cache and out.hash_info}
        folders = sorted({name for name in outs.values() if name.endswith(".dir")})
        states: dict[str, dict[str, str]] = {}
        members: dict[str, list[list[str]]] = {}
        for place, store in stores.items():
            listings = _each(folders, partial(_read, store))
            states[place] = {
                name: "missing" if content is None else _state(name, _md5(content).hexdigest())
                for name, content in listings.items()
            }
            intact = {name: json.loads(listings[name]) for name in folders if states[place][name] == "ok"}
            members |= {name: [[e["relpath"], e["md5"]] for e in entries] for name, entries in intact.items()}
        files = {name for name in outs.values() if not name.endswith(".dir")}
        files |= {name for entries in members.values() for _, name in entries}
        for place, store in stores.items():
            states[place] |= _each(sorted(files), partial(_check, store))
        paths = {name: repo.cache.local.oid_to_path(name) for name in states["cache"]}
        print(json.dumps({"outs": outs, "members": members, "states": states, "files": paths}))


def _each(names: Iterable[str], work: Any) -> dict[str, Any]:
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(work, names), strict=True))


def _check(store: Any, name: str) -> str:
    try:
        with store.fs.open(store.oid_to_path(name), "rb") as file:
            return _state(name, hashlib.file_digest(file, _md5).hexdigest())
    except FileNotFoundError:
        return "missing"


def _read(store: Any, name: str) -> bytes | None:
    """Return the listing of a folder, which is small; None if there is none."""
    try:
        content: bytes = store.fs.cat_file(store.oid_to_path(name))
    except FileNotFoundError:
        return None
    return content


def _state(name: str, found: str) -> str:
    return "ok" if found == name.removesuffix(".dir") else "corrupt"


def _md5(content: bytes = b"") -> Any:
    return hashlib.md5(content, usedforsecurity=False)


if __name__ == "__main__":
    main()
