"""A real Prefect server and a project whose stages do nothing much, for tests of how runs are operated."""

import json
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import small
from requests.adapters import HTTPAdapter
from urllib3 import Retry
from waiting import wait_for

from flows import leash

ROOT = Path(__file__).parents[1]
PREFECT = str(Path(sys.executable).parent / "prefect")
# Two of the shipped stages by name; what they do is said by the environment.
_GRAPH = """
stages:
  prepare:
    cmd: python step.py input made/prepare
    deps: [input, step.py]
    params: [prepare]
    outs: [made/prepare]
  group:
    cmd: python step.py made/prepare made/group
    deps: [made/prepare, step.py]
    params: [group]
    outs: [made/group]
"""
_STEP = """
import os, sys, time
from pathlib import Path

source, target = map(Path, sys.argv[1:])
tries = Path(os.environ.get("TRIES", "tries"))
if os.environ.get("DIE") == target.name and not tries.exists():
    tries.write_text("one")
    os.kill(os.getpid(), 9)
if os.environ.get("WAIT") == target.name:
    Path(os.environ["PID"]).write_text(str(os.getpid()))
    time.sleep(3600)  # longer than any test waits
target.parent.mkdir(exist_ok=True)
print("drawing: 1/2 (50%, 1.0/s, 1s left)", flush=True)
target.write_text(source.read_text() + target.name + Path("params.yaml").read_text())
"""


def project(folder: Path) -> Path:
    """Make the project, committed, and return its folder."""
    folder.mkdir()
    (folder / "dvc.yaml").write_text(_GRAPH)
    (folder / "step.py").write_text(_STEP)
    (folder / "input").write_text("in ")
    (folder / ".gitignore").write_text("/work/\n/tries\n__pycache__\n/mlflow.db\n")
    for name in ("params.yaml", "prefect.yaml"):
        shutil.copy(ROOT / name, folder)
    small.commit_all(folder)
    return folder


def free_port() -> int:
    """Return the number of a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def listens(port: int) -> bool:
    """Return whether somebody listens at a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def server(home: Path, port: int | None = None) -> Iterator[str]:
    """Yield the address of the interface of a Prefect server on loopback, whose database is in a folder."""
    port = port or free_port()
    command = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "log").open("wb") as log:
        process = leash.start(command, log, os.environ | {"PREFECT_HOME": str(home)})
    try:
        address = f"http://127.0.0.1:{port}/api"
        wait_for(lambda: answers(address))
        yield address
    finally:
        leash.end(process)


def answers(address: str) -> bool:
    """Return whether a server is up."""
    try:
        return ask(address, "health") is True
    except requests.RequestException:
        return False


def ask(address: str, path: str, body: object = None) -> Any:
    """Return what the server's interface answers."""
    # A busy server says 503 or drops a connection, and every client of its own asks again.
    again = Retry(connect=0, read=3, status=6, backoff_factor=0.5, status_forcelist=[503], allowed_methods=None)
    with requests.Session() as session:
        session.mount(address, HTTPAdapter(max_retries=again))
        answer = session.request("GET" if body is None else "POST", f"{address}/{path}", json=body, timeout=30)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def start(address: str, deployment: str, **parameters: object) -> str:
    """Ask for a run of a deployment and return its id."""
    found = ask(address, f"deployments/name/{deployment}")
    # With a key, for asking again must not start another.
    wanted = {"parameters": parameters, "idempotency_key": uuid.uuid4().hex}
    return ask(address, f"deployments/{found['id']}/create_flow_run", wanted)["id"]


def state(address: str, run: str) -> str:
    """Return the state of a run."""
    return ask(address, f"flow_runs/{run}")["state"]["name"]


def artifacts(address: str, run: str) -> dict[str, Any]:
    """Return the latest content of each artifact of a run by its key."""
    found = ask(address, "artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}, "sort": "CREATED_DESC"})
    return {a["key"]: json.loads(a["data"]) if a["type"] == "table" else a["data"] for a in reversed(found)}
