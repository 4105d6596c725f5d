"""Pictures for docs/operating.md: a Prefect run, two runs compared in MLflow, and the report, as a browser shows them.

    sage up                               in one terminal, in a project with two pipeline runs
    python -m benchmarks.screenshots      in another, there

Chromium, without a window, does it: the program that SAGE_CHROMIUM names, or one of the usual names on PATH.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any
from urllib.parse import quote

import typer
from PIL import Image

from sage.files import new_file

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = [
    "--headless",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
_COLOURS = 128  # of a picture, to keep it small


def main(
    prefect: Annotated[str, typer.Option(help="Prefect's address.")] = "http://127.0.0.1:4200",
    tracking: Annotated[str, typer.Option(help="MLflow's address.")] = "http://127.0.0.1:5000",
    report: Annotated[Path, typer.Option(help="The report's page.")] = Path("report/index.html"),
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("docs"),
) -> None:
    """Take the three pictures."""
    browser = find_browser()
    pages = {
        "prefect_run": prefect_run(prefect),
        "mlflow_comparison": mlflow_comparison(tracking),
        "report": report.resolve(strict=True).as_uri(),
    }
    for name, address in pages.items():
        path = out / f"{name}.png"
        shoot(browser, address, path)
        print(f"{path}  {path.stat().st_size // 1000} kB  {address}")


def find_browser() -> str:
    """Return Chromium's program; end with a message where there is none."""
    names = [os.environ["SAGE_CHROMIUM"]] if "SAGE_CHROMIUM" in os.environ else _NAMES
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        sys.exit(
            f"error: there is no {' or '.join(names)} on PATH. Install Chromium (Debian: apt-get install chromium), "
            "or set SAGE_CHROMIUM to its program."
        )
    return found


def prefect_run(address: str) -> str:
    """Return the page of the newest finished run of the pipeline."""
    wanted = {"flows": {"name": {"any_": ["sage-pipeline"]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    # `sage up` has the server ask for a token with every change, and it takes a filter for one.
    with urllib.request.urlopen(f"{address}/api/csrf-token?client=screenshots", timeout=30) as answer:
        token = json.load(answer)["token"]
    headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "screenshots"}
    found = ask(f"{address}/api/flow_runs/filter", wanted | {"sort": "START_TIME_DESC", "limit": 1}, headers)
    if not found:
        sys.exit(f"error: {address} has no finished run of sage-pipeline: prefect deployment run sage-pipeline/all")
    return f"{address}/runs/flow-run/{found[0]['id']}"


def mlflow_comparison(address: str) -> str:
    """Return the page that compares the two newest pipeline runs."""
    api = f"{address}/api/2.0/mlflow"
    with urllib.request.urlopen(f"{api}/experiments/get-by-name?experiment_name=sage", timeout=30) as answer:
        experiment = json.load(answer)["experiment"]["experiment_id"]
    wanted = {"experiment_ids": [experiment], "filter": "attributes.run_name = 'pipeline'", "max_results": 2}
    runs = [run["info"]["run_id"] for run in ask(f"{api}/runs/search", wanted).get("runs", [])]
    if len(runs) < 2:
        sys.exit(f"error: {address} has {len(runs)} pipeline runs, and two are compared")
    return f"{address}/#/compare-runs?runs={quote(json.dumps(runs))}&experiments={quote(json.dumps([experiment]))}"


def ask(address: str, body: object, headers: Mapping[str, str] = MappingProxyType({})) -> Any:
    """Return what a server answers to JSON."""
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode(), kind | dict(headers))
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def shoot(browser: str, address: str, path: Path) -> None:
    """Write a picture of a page once it has had ten seconds of its own time to load."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        taken = Path(folder) / "page.png"
        command = [browser, *_QUIET, f"--user-data-dir={folder}/user"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium's own sandbox refuses root
        command += ["--window-size=1280,900", "--virtual-time-budget=10000", f"--screenshot={taken}", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode or not taken.exists():
            sys.exit(f"error: {browser} took no picture of {address}:\n{done.stderr[-2000:]}")
        with Image.open(taken) as image, new_file(path) as file:
            image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)


if __name__ == "__main__":
    typer.run(main)
