"""What DVC keeps, as it is: each object of the graph re-hashed in a cache or a remote. The only file that imports dvc.

Run as a process of its own (`python -m flows.objects [REMOTE]`), as all of DVC is. Prints one JSON object: `outs`, path
to object; `members`, object of a folder to a list of path in it and object; `states`, object to ok, corrupt or missing.
DVC itself compares an object with its name only where the file's mode does not say that it is protected.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dvc.repo import Repo

_THREADS = 16  # for a remote, where each small object is a request


def main() -> None:
    """Print what there is of the cache, or of the remote that is named; an empty name is the default remote."""
    with Repo() as repo:
        names = sys.argv[1:]
        store = repo.cloud.get_remote_odb(names[0] or None) if names else repo.cache.local
        outs = {out.fs_path: out.hash_info.value for out in repo.index.outs if out.use_cache and out.hash_info}
        folders = sorted({value for value in outs.values() if value.endswith(".dir")})
        read = dict(_each(folders, lambda name: _read(store, name)))
        members = {
            name: [[entry["relpath"], entry["md5"]] for entry in json.loads(content)]
            for name, content in read.items()
            if _state(name, content) == "ok"
        }
        files = {value for value in outs.values() if not value.endswith(".dir")}
        files |= {value for entries in members.values() for _, value in entries}
        states = {name: _state(name, content) for name, content in read.items()}
        states |= _each(sorted(files), lambda name: _state(name, _read(store, name)))
        print(json.dumps({"outs": outs, "members": members, "states": states}))


def _each(names: Iterable[str], work: Any) -> dict[str, Any]:
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(work, names), strict=True))


def _read(store: Any, name: str) -> bytes | None:
    try:
        content: bytes = store.fs.cat_file(store.oid_to_path(name))
    except FileNotFoundError:
        return None
    return content


def _state(name: str, content: bytes | None) -> str:
    if content is None:
        return "missing"
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return "ok" if found == name.removesuffix(".dir") else "corrupt"


if __name__ == "__main__":
    main()
