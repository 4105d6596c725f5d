"""`sage up`: Prefect's server, a worker, MLflow's server and the deployments of prefect.yaml on this machine.

The servers listen on loopback only, and all processes end together. State and logs are in work/up, except that MLflow
uses the project's mlflow.db, so that it shows the runs that `sage run` recorded.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import typer

from flows import leash
from flows.tracking import place
from sage.errors import ConfigurationError, SageError

STATE = Path("work/up")
HOST = "127.0.0.1"
_PATIENCE = 300  # seconds that a server may take to start on a busy machine
_SMALL = "sage-pipeline/data"  # the deployment that --check runs, up to its first stage
_FIRST = '{"until": "prepare"}'


def up(port: int, tracking_port: int, check: bool) -> None:
    """Start all, print the addresses, and wait until interrupted; with `check`, run one deployment instead of waiting.

    Raises ConfigurationError if a port is taken or this is no project, SageError if a part does not start, or
    ends.
    """
    if not Path("prefect.yaml").exists():
        raise ConfigurationError("prefect.yaml does not exist. Run from the project's top folder.")
    for number, option in ((port, "--port"), (tracking_port, "--tracking-port")):
        _refuse_taken(number, option)
    STATE.mkdir(parents=True, exist_ok=True)
    prefect, mlflow = f"http://{HOST}:{port}", f"http://{HOST}:{tracking_port}"
    environment = _environment(prefect, mlflow)
    with ExitStack() as stack:
        parts = {
            "prefect": stack.enter_context(
                _part("prefect", [sys.executable, "-m", "flows.orchestration.local", str(port)], environment)
            ),
            "mlflow": stack.enter_context(_part("mlflow", _mlflow(tracking_port), environment)),
        }
        _await(f"{prefect}/api/health", "prefect", parts)
        _await(f"{mlflow}/health", "mlflow", parts)
        _do(_prefect("--no-prompt", "work-pool", "create", "--overwrite", "--type", "process", "sage"), environment)
        _do(_prefect("--no-prompt", "deploy", "--all"), environment)
        _do([sys.executable, "-m", "flows.orchestration"], environment)
        parts["worker"] = stack.enter_context(
            _part("worker", _prefect("worker", "start", "--pool", "sage"), environment)
        )
        if check:
            _do(_prefect("deployment", "run", _SMALL, "--param", f"run={_FIRST}", "--watch"), environment)
            typer.echo(f"a run of {_SMALL} completed on a worker")
            return
        typer.echo(f"runs and deployments   {prefect}/deployments")
        typer.echo(f"results and models     {mlflow}")
        typer.echo(f"logs                   {STATE}/*.log")
        typer.echo("Ctrl-C stops all of them.")
        try:
            _wait(parts)
        except KeyboardInterrupt:
            typer.echo("stopping")


def _environment(prefect: str, mlflow: str) -> dict[str, str]:
    return os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        # prefect.yaml sets the working directory of runs to $PWD, which is current only in a shell.
        "PWD": str(Path.cwd()),
        "PREFECT_API_URL": f"{prefect}/api",
        "PREFECT_HOME": str((STATE / "prefect").resolve()),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Refuse requests that a page of another site makes from the browser.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{prefect},{prefect.replace(HOST, 'localhost')}",
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "DO_NOT_TRACK": "1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "SAGE_TRACKING_URI": mlflow,
    }


def _prefect(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefect", *arguments]


def _mlflow(port: int) -> list[str]:
    store, artifacts = place.database(), Path("mlartifacts").resolve().as_uri()
    place.follow(store)
    listen = ["--host", HOST, "--port", str(port), "--workers", "1"]
    # Clients read and write artifact files directly, as they do without a server.
    return [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        *listen,
        "--backend-store-uri",
        store,
        "--no-serve-artifacts",
        "--default-artifact-root",
        artifacts,
    ]


def _refuse_taken(port: int, option: str) -> None:
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((HOST, port))
        except OSError as error:
            raise ConfigurationError(f"port {port} is taken; choose another with {option}") from error


@contextmanager
def _part(name: str, command: list[str], environment: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """Run one process, with its output in a log file, until the block ends."""
    with (STATE / f"{name}.log").open("wb") as log:
        process = leash.start(command, log, environment)
        try:
            yield process
        finally:
            leash.end(process)


def _do(command: list[str], environment: Mapping[str, str]) -> None:
    lines: list[bytes] = []
    if leash.run(command, lines.append, environment=environment):
        raise SageError(f"{' '.join(command[2:])} failed:\n{b''.join(lines).decode(errors='replace').strip()}")


def _await(address: str, name: str, parts: Mapping[str, "subprocess.Popen[bytes]"]) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        _check(parts)
        try:
            with urllib.request.urlopen(address, timeout=5):  # noqa: S310  # loopback
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > end:
                raise SageError(f"{name} did not answer within {_PATIENCE} s; see {STATE}/{name}.log") from error
        time.sleep(0.5)


def _wait(parts: Mapping[str, "subprocess.Popen[bytes]"]) -> None:
    while True:
        _check(parts)
        time.sleep(0.5)


def _check(parts: Mapping[str, "subprocess.Popen[bytes]"]) -> None:
    for name, process in parts.items():
        if process.poll() is not None:
            tail = "\n".join((STATE / f"{name}.log").read_text(errors="replace").splitlines()[-5:])
            raise SageError(
                f"{name} ended with code {process.returncode}; everything is stopped. Its last output:\n{tail}"
            )
