"""Stage prepare: turn images and captions into checked shards, a folder for each split."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.console import Console
from rich.table import Column, Table

from flows.report.sheet import in_rows, sheet
from flows.terminal import progress, run
from flows.tracking.runs import stage_run
from sage.config import Prepare, load_params
from sage.data import figures
from sage.data.buckets import bucket_sizes
from sage.data.dataset import read_split
from sage.data.imagefolder import read_address, read_folder, read_kohya
from sage.data.images import compose
from sage.data.preparation import disk_needed, prepare
from sage.data.rows import Row
from sage.data.shards import rgb
from sage.errors import DataError
from sage.files import write_json

_SHEET_COLUMNS = 8


def main(
    raw: Annotated[Path, typer.Option(help="Your own pictures; read if prepare.source is `folder` or `kohya`.")],
    out: Annotated[Path, typer.Option(help="Folder to write: shards of each split, and the accounting.")],
    metrics: Annotated[Path, typer.Option(help="File to write: what became of the rows.")],
) -> None:
    """Check every image and caption, assign the splits, and count kept, rejected and duplicate rows."""
    params = load_params().prepare
    rows = _rows(params, raw)
    form: dict[str, Any] = {"size": params.image_size, "resize": params.resize}
    if params.buckets is not None:
        form["buckets"] = bucket_sizes(params.image_size, params.buckets.step, params.buckets.max_aspect)
    _check_disk(rows, out, form)
    with stage_run("prepare", params.model_dump()) as record:
        with progress(len(rows), "prepare") as advance:
            found = prepare(
                rows,
                out,
                **form,
                validation=params.validation,
                test=params.test,
                seed=params.seed,
                near_duplicate=params.near_duplicate,
                advance=advance,
            )
        licence = {"licence": figures.LICENCE} if params.source == "figures" else {}
        write_json(metrics, {"source": params.source} | licence | found)
        record.result(metrics)
        record.metrics(_figures(found))
        record.dataset("prepared", found["digest"], params.source)
        record.image(_sheet(out, params.image_size), "training_samples")
    Console().print(_table(found))


def _rows(params: Prepare, raw: Path) -> list[Row]:
    """Return the input rows of the source that is set."""
    if params.source == "folder":
        return read_folder(raw)
    if params.source == "kohya":
        return read_kohya(raw)
    if params.source != "figures":
        return read_address(params.source)
    drawn = params.figures
    numbers = {"train": drawn.train, "validation": drawn.validation, "test": drawn.test}
    return figures.rows(drawn.styles, numbers, size=params.image_size, seed=params.seed, held_out=drawn.held_out)


def _check_disk(rows: Sequence[Row], out: Path, form: dict[str, Any]) -> None:
    """Raise DataError, before the images are read, if the disk does not hold them."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    needed, free = disk_needed(rows, **form), shutil.disk_usage(there).free
    if needed > free:
        raise DataError(
            f"preparing {len(rows)} images takes about {needed / 1e9:.3g} GB, but {there} has {free / 1e9:.3g} GB "
            f"free; make room, lower prepare.image_size ({form['size']}), or give fewer images"
        )


def _figures(found: dict[str, Any]) -> dict[str, float]:
    """Return the counts as metrics for MLflow, with dotted names."""
    counts = {key: value for key, value in found.items() if isinstance(value, (int, float))}
    inside = ("splits", "reasons", "buckets")
    return counts | {f"{key}.{name}": n for key in inside for name, n in found.get(key, {}).items()}


def _sheet(out: Path, size: int) -> Image.Image:
    """Return a sheet of up to 64 training images, evenly spread over the split, as squares of this size."""
    examples = read_split(out, "train")
    chosen = examples[:: max(1, len(examples) // _SHEET_COLUMNS**2)][: _SHEET_COLUMNS**2]
    return sheet(in_rows([compose(rgb(one.image), (size, size), "pad") for one in chosen], _SHEET_COLUMNS))


def _table(found: dict[str, Any]) -> Table:
    table = Table("rows", Column("count", justify="right"), title="prepare")
    lines = {f"kept for {split}": count for split, count in found["splits"].items()}
    lines |= {f"rejected: {reason}": count for reason, count in found["reasons"].items()}
    lines |= {"duplicate": found["duplicates"], "input rows": found["rows"]}
    lines |= {f"bucket {bucket}": count for bucket, count in found.get("buckets", {}).items()}
    for name, count in lines.items():
        table.add_row(name, str(count), end_section=name in ("duplicate", "input rows"))
    if "cut_off" in found:
        table.add_row("of the pixels, cut off", f"{found['cut_off']:.1%}")
    return table


if __name__ == "__main__":
    run(main)
