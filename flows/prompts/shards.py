"""Images for a large list of prompts on several machines, the same bytes as `sage generate` makes on one.

    python -m flows.prompts.shards plan prompts.txt --out s3://pictures/run     once: groups and cost
    python -m flows.prompts.shards draw --out s3://pictures/run --shard 3/8     each shard: any machine, any order
    python -m flows.prompts.shards finish --out s3://pictures/run               once: manifest and contact sheet

With --judge clip, `draw` also measures its pictures, and `finish` puts the measures together in evaluation.json.
A shard holds whole batches of whole groups, so batch composition, and with it rounding, does not depend on the number
of machines. Addresses are fsspec's: a folder, s3://, memory://. An image appears there whole or not at all; a shard
makes only the missing ones.
"""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import sage.torchvision_ops  # noqa: F401

import fsspec
import typer

from flows import drawing
from flows.machine import device
from flows.prompts import generate as prompts
from flows.prompts.files import Expand, Item, Literal, Wildcards, read_prompts, syntax
from flows.report.sheet import opened
from flows.terminal import exit_on_error, finite
from sage.config import load_params
from sage.data.images import is_blank
from sage.errors import ConfigurationError, DataError
from sage.evaluation.extractors import EfficientNetLite0, read_images
from sage.evaluation.judges import ClipJudge, find_clip
from sage.evaluation.shards import MEASURES, Sums, figures, sums
from sage.files import new_file, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
PLAN, RUN, EVALUATION = "plan.json", "run.json", "evaluation.json"
Out = Annotated[str, typer.Option(help="Output address: a folder, s3://..., or another fsspec address.")]


@app.command()
def plan(
    source: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="File of prompts (.txt, .jsonl, .csv): path or fsspec address.")
    ],
    out: Out,
    model: Annotated[str, typer.Option(help="Pipeline folder, hub name or registered model (models:/sage@champion).")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    share_ratio: Annotated[float | None, typer.Option(min=0, max=1, callback=finite)] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, callback=finite)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    expand: Expand = None,
    wildcards: Wildcards = None,
    literal: Literal = False,
) -> None:
    """Group the prompts and write the plan of the run; repeating it for the same run changes nothing."""
    given = {"steps": steps, "share_ratio": share_ratio, "guidance_scale": guidance_scale, "batch_size": batch_size}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        local = folder / Path(source).name
        _get(source, local)
        items = read_prompts(str(local), syntax(expand, wildcards, literal, seed))
        job = prompts.prepare(items, model, given, "", seed)
        if job.first is not None:
            raise ConfigurationError(
                "shards draw on machines that do not have all prompts' first predictions; set group.by to "
                "distilled or text"
            )
        typer.echo(job.cost)
        known = folder / "out"
        known.mkdir()
        for name in _names(out):
            # `begin` reads run.json, and of the other files only whether they exist.
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
    shard: Annotated[str, typer.Option(metavar="I/N", help="Shard I of N, counted from 1.")] = "1/1",
    judge: Annotated[
        str | None,
        typer.Option(help="Also measure alignment by this CLIP (clip, a folder, a hub name), and diversity in groups."),
    ] = None,
) -> None:
    """Generate the missing images of one shard."""
    if judge is not None:
        find_clip(judge)  # before anything is drawn
    found = _read_plan(out)
    number, count = _number(shard)
    batches = part(found["groups"], found["settings"]["batch_size"], number, count)
    there = set(_names(out))
    mine = [member for batch in batches for _, group in batch for member in group]
    items = _drawable(found)
    wanted = {place for place in mine if not prompts.made(items[place].id, there)}
    typer.echo(f"shard {shard}: {len(mine)} prompts, {len(wanted)} to draw")
    if wanted:
        _draw(out, found, wanted)
    if judge is not None and _judged(number, count) not in there:
        _judge(out, items, batches, _judged(number, count), judge)


def _draw(out: str, found: dict[str, Any], wanted: set[int]) -> None:
    items, groups, settings = _drawable(found), found["groups"], found["settings"]
    pipe, name, *_ = prompts.open_model(found["address"], groups=False)
    if name != found["model"]:
        raise DataError(
            f"{found['address']} is now model {name[:12]}, the run began with {found['model'][:12]}; start a new run."
        )
    with tempfile.TemporaryDirectory() as temporary:
        # Upload each image when it is finished, so that a killed process loses one batch at most.
        for image in prompts.drawn(pipe, items, groups, found["steps"], settings, name, Path(temporary), wanted):
            _put(image, f"{out}/{image.name}")
            image.unlink()


def _judge(out: str, items: Sequence[Item], batches: list[list[tuple[int, list[int]]]], name: str, judge: str) -> None:
    """Write the sums of a shard's groups, without images that are blank or not finite.

    Batch by batch as generated: batch composition changes rounding.
    """
    extract, clip = EfficientNetLite0(device()), ClipJudge(find_clip(judge), judge, device())
    rows: list[Sums] = []
    there = set(_names(out))
    for batch in batches:
        mine = [member for _, group in batch for member in group if f"{items[member].id}.png" in there]
        with tempfile.TemporaryDirectory() as temporary:
            paths = {member: Path(temporary) / f"{items[member].id}.png" for member in mine}
            for path in paths.values():
                _get(f"{out}/{path.name}", path)
            mine = [member for member in mine if not is_blank(opened(paths[member]))]
            if not mine:
                rows += [Sums(number, 0, 0.0, 0.0, 0) for number, _ in batch]
                continue
            features = extract(read_images(paths[member] for member in mine))
            fit = clip.scores([items[member].prompt for member in mine], [[paths[member]] for member in mine])[:, 0]
        place = {member: i for i, member in enumerate(mine)}
        groups = [[place[member] for member in group if member in place] for _, group in batch]
        rows += sums([number for number, _ in batch], groups, features, fit)
    with tempfile.TemporaryDirectory() as temporary:
        write_json(Path(temporary) / name, [asdict(row) for row in rows])
        _put(Path(temporary) / name, f"{out}/{name}")


@app.command()
def finish(
    out: Out,
    judged: Annotated[int, typer.Option(min=0, help="Number of shards drawn with --judge; 0: not judged.")] = 0,
) -> None:
    """Write the manifest and the contact sheet; raise DataError if a picture or a measure is missing."""
    found = _read_plan(out)
    items = _drawable(found)
    there = set(_names(out))
    if missing := [item.id for item in items if not prompts.made(item.id, there)]:
        raise DataError(
            f"{len(missing)} of {len(items)} pictures are missing, first {missing[0]}; draw their shards again"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for item in items:
            name = f"{item.id}.png" if f"{item.id}.png" in there else f"{item.id}{prompts.ERROR}"
            _get(f"{out}/{name}", folder / name)
        concluded = prompts.conclude(folder, found["items"], found["groups"])
        for name in (prompts.CONTACT, "manifest.jsonl"):
            if (folder / name).exists():
                _put(folder / name, f"{out}/{name}")
        if judged:
            values = _evaluation(out, found | {"items": concluded}, judged)
            write_json(folder / EVALUATION, values)
            _put(folder / EVALUATION, f"{out}/{EVALUATION}")
            typer.echo(", ".join(f"{name} {_written(values[name]['value'])}" for name in MEASURES))
    prompts.say_count(out, concluded)


def _written(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _evaluation(out: str, found: dict[str, Any], shards: int) -> dict[str, Any]:
    """Return the measurements of all images, with intervals, and their cost."""
    names = [_judged(number, shards) for number in range(1, shards + 1)]
    there = set(_names(out))
    if missing := [name for name in names if name not in there]:
        raise DataError(
            f"{len(missing)} of {shards} shards are not judged, first {missing[0]}; run `draw --judge` on them"
        )
    rows = [Sums(**row) for name in names for row in _read(out, name)]
    settings, groups, params = found["settings"], found["groups"], load_params().evaluate
    texts = [item.prompt for item in _drawable(found)]
    image_steps = settings.get("image_steps", 0)
    plan = drawing.planned(groups, texts, found["steps"], settings["share_ratio"], image_steps)
    measured = figures(rows, len(groups), draws=params.resamples, confidence=params.confidence, seed=params.seed)
    cost = {"nfe_per_image": plan.nfe(settings["guidance_scale"] > 1) / plan.prompts, "saving": plan.saving}
    errors = sum(item.error is not None for item in found["items"])
    blank = len(found["items"]) - errors - sum(row.prompts for row in rows)
    return (
        {"model": found["model"], "prompts": plan.prompts, "errors": errors, "blank": blank, "groups": len(groups)}
        | cost
        | {name: figure.model_dump() for name, figure in measured.items()}
    )


def part(groups: list[list[int]], batch_size: int, number: int, count: int) -> list[list[tuple[int, list[int]]]]:
    """Return every count-th batch, starting at batch `number` (from 1): lists of (index of a group, its members)."""
    batches = []
    first = 0
    for batch in drawing.batches(groups, 4 * batch_size):
        batches.append([(first + i, list(group)) for i, group in enumerate(batch)])
        first += len(batch)
    return batches[number - 1 :: count]


def _judged(number: int, count: int) -> str:
    return f"judged-{number}-of-{count}.json"


def _drawable(found: dict[str, Any]) -> list[Item]:
    return [item for item in found["items"] if item.error is None]


def _number(shard: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigurationError(f"shard {shard!r}: write I/N, with I from 1 to N")
    return int(match[1]), int(match[2])


def _read_plan(out: str) -> dict[str, Any]:
    if PLAN not in _names(out):
        raise DataError(f"{out} has no {PLAN}; run `python -m flows.prompts.shards plan` first")
    found: dict[str, Any] = _read(out, PLAN)
    return found | {"items": [Item(**item) for item in found["items"]]}


def _read(out: str, name: str) -> Any:
    with fsspec.open(f"{out}/{name}", "rb") as file:
        return json.load(file)


def _names(address: str) -> list[str]:
    """Return the names of the files at an address; none if nothing exists yet."""
    store, path = fsspec.core.url_to_fs(address.rstrip("/"))
    store.invalidate_cache()
    return [Path(found).name for found in store.ls(path, detail=False)] if store.exists(path) else []


def _get(address: str, path: Path) -> None:
    store, remote = fsspec.core.url_to_fs(address)
    if not store.exists(remote):
        raise DataError(f"{address} does not exist")
    store.get_file(remote, str(path))


def _put(path: Path, address: str) -> None:
    """Copy a file to an address atomically: object stores write atomically, a local folder needs a rename."""
    store, remote = fsspec.core.url_to_fs(address)
    if "file" not in store.protocol:
        store.put_file(str(path), remote)
        return
    with new_file(Path(remote)) as temporary:
        temporary.write_bytes(path.read_bytes())


if __name__ == "__main__":
    exit_on_error(app)
