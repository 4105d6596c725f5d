"""Servers for tests: real processes on a port of their own, and one without a model that answers at once."""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from waiting import PATIENCE, wait_for

ROOT = Path(__file__).parents[1]
PATH = "/v1/images/generations"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Served:
    """A running server and a client for it."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def ready(self) -> dict[str, Any]:
        try:
            return self.client.get("/readyz").json()
        except httpx.HTTPError:
            return {"ready": False}

    def wait(self, seconds: float = PATIENCE) -> float:
        return wait_for(lambda: self.ready()["ready"], seconds, self.process, self.log)

    def ask(self, prompt: Any, **fields: Any) -> httpx.Response:
        return self.client.post(PATH, json={"prompt": prompt, **fields})

    def metric(self, line: str) -> float:
        """Return the value of a line of /metrics, 0 if there is none."""
        lines = self.client.get("/metrics").text.splitlines()
        return next((float(one.split()[-1]) for one in lines if one.rpartition(" ")[0] == line), 0.0)

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of log that are JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextmanager
def served(command: list[str], folder: Path, name: str = "log"):
    """Run a command with `--port PORT` added and yield its server; it is killed at the end."""
    port, log = free_port(), folder / name
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ}
        )
    try:
        server = Served(process, port, log)
        with server.client:
            yield server
    finally:
        process.kill()
        process.wait()


def without_model(folder: Path, *arguments: str):
    """Run a server whose model process (`tests/quick.py`) needs no model."""
    return served([sys.executable, str(Path(__file__).with_name("quick.py")), *arguments], folder)


def sage(model: Path | str, folder: Path, *arguments: str):
    """Run `sage serve`."""
    return served([sys.executable, "-c", "from flows.cli import main; main()", "serve", str(model), *arguments], folder)
