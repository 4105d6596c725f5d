"""Pictures for a large list of prompts on many machines, the same bytes as `sage generate` makes on one.

    python -m flows.shards plan prompts.txt --out s3://pictures/run     groups and cost, once
    python -m flows.shards draw --out s3://pictures/run --shard 3/8     on any machine, in any order, again after a kill
    python -m flows.shards finish --out s3://pictures/run               manifest and contact sheet, once

A shard is whole batches of whole groups, so what is evaluated together is the same whoever evaluates it. Addresses are
fsspec's: a folder, s3://, memory://. A picture appears there whole or not at all; a shard makes only what is missing.
"""

import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import sage.torchvision_ops  # noqa: F401

import fsspec
import typer

from flows import drawing, prompts
from flows.machine import device
from flows.prompts import Item
from flows.terminal import guard
from sage.errors import ConfigurationError, DataError
from sage.files import new_file, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
PLAN, RUN = "plan.json", "run.json"
Out = Annotated[str, typer.Option(help="Where the pictures go: a folder, s3://..., or another fsspec address.")]


@app.command()
def plan(
    source: Annotated[str, typer.Argument(metavar="PROMPTS", help="A .txt, .jsonl or .csv file, by fsspec address.")],
    out: Out,
    model: Annotated[str, typer.Option(help="A folder, a hub name, or a version: models:/sage@champion.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    share_ratio: Annotated[float | None, typer.Option()] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Group the prompts and write down what is to be drawn; going on with the same run changes nothing."""
    given = {"steps": steps, "share_ratio": share_ratio, "guidance_scale": guidance_scale, "batch_size": batch_size}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        local = folder / Path(source).name
        _get(source, local)
        job = prompts.prepare(str(local), model, given, "", seed)
        typer.echo(prompts.cost_line(job.plan, len(job.groups), job.settings["guidance_scale"] > 1))
        known = folder / "out"
        known.mkdir()
        for name in _names(out):
            # What stands there decides whether this is the same run; its contents need not be here.
            _get(f"{out}/{name}", known / name) if name == RUN else (known / name).touch()
        prompts.begin(known, job.identity)
        values = {
            "address": model,
            "model": job.model,
            "items": [asdict(item) for item in job.items],
            "groups": [list(map(int, group)) for group in job.groups],
            "steps": job.plan.steps,
            "settings": job.settings,
        }
        write_json(folder / PLAN, values)
        _put(known / RUN, f"{out}/{RUN}")
        _put(folder / PLAN, f"{out}/{PLAN}")


@app.command()
def draw(
    out: Out,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Which shard, from 1, of how many.")] = "1/1",
) -> None:
    """Make the pictures of one shard that are missing."""
    found = _read_plan(out)
    settings, groups = found["settings"], found["groups"]
    items = [item for item in found["items"] if item.error is None]
    mine = members(groups, settings["batch_size"], *_number(shard))
    there = set(_names(out))
    wanted = {place for place in mine if f"{items[place].id}.png" not in there}
    typer.echo(f"shard {shard}: {len(mine)} prompts, {len(wanted)} to draw")
    if not wanted:
        return
    pipe, name, _, _ = prompts.open_model(found["address"])
    if name != found["model"]:
        raise DataError(f"{found['address']} is model {name[:12]} now, but the run began with {found['model'][:12]}.")
    pipe.to(device())
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as temporary:
        # Each as it is finished, so that a kill costs the batch at hand.
        for picture in prompts.drawn(pipe, items, groups, found["steps"], settings, name, Path(temporary), wanted):
            _put(picture, f"{out}/{picture.name}")
            picture.unlink()


@app.command()
def finish(out: Out) -> None:
    """Write the manifest and the contact sheet; raise DataError where a picture is missing."""
    found = _read_plan(out)
    items = [item for item in found["items"] if item.error is None]
    there = set(_names(out))
    if missing := [item.id for item in items if f"{item.id}.png" not in there]:
        raise DataError(
            f"{len(missing)} of {len(items)} pictures are missing, first {missing[0]}; draw their shards again"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for item in items:
            _get(f"{out}/{item.id}.png", folder / f"{item.id}.png")
        prompts.manifest(folder, found["items"])
        prompts.contact_sheet(folder, [item.id for item in items], found["groups"])
        for name in ("contact.png", "manifest.jsonl"):
            _put(folder / name, f"{out}/{name}")
    typer.echo(f"{len(items)} pictures in {out}")


def members(groups: list[list[int]], batch_size: int, number: int, count: int) -> list[int]:
    """Return the prompts of one shard, from 1, of `count`: every count-th batch; shards are a partition."""
    batches = list(drawing.batches(groups, 4 * batch_size))[number - 1 :: count]
    return [member for batch in batches for group in batch for member in group]


def _number(shard: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigurationError(f"shard {shard!r}: write I/N, with I from 1 to N")
    return int(match[1]), int(match[2])


def _read_plan(out: str) -> dict[str, Any]:
    if PLAN not in _names(out):
        raise DataError(f"{out} has no {PLAN}; run `python -m flows.shards plan` first")
    with fsspec.open(f"{out}/{PLAN}", "rb") as file:
        found: dict[str, Any] = json.load(file)
    return found | {"items": [Item(**item) for item in found["items"]]}


def _names(address: str) -> list[str]:
    """Return the names of the files at an address; none where there is nothing yet."""
    store, path = fsspec.core.url_to_fs(address.rstrip("/"))
    store.invalidate_cache()
    return [Path(found).name for found in store.ls(path, detail=False)] if store.exists(path) else []


def _get(address: str, path: Path) -> None:
    store, remote = fsspec.core.url_to_fs(address)
    if not store.exists(remote):
        raise DataError(f"{address} does not exist")
    store.get_file(remote, str(path))


def _put(path: Path, address: str) -> None:
    """Copy a file to an address, whole or not at all: a store writes an object at once, a folder needs a rename."""
    store, remote = fsspec.core.url_to_fs(address)
    if "file" not in store.protocol:
        store.put_file(str(path), remote)
        return
    with new_file(Path(remote)) as temporary:
        temporary.write_bytes(path.read_bytes())


if __name__ == "__main__":
    guard(app)
