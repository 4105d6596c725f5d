"""Time and memory of prepared data as the number of images grows.

    python -m benchmarks.data                       2,000 and 20,000 images
    python -m benchmarks.data 2000 20000 200000     far longer, and more disk

Every step runs in a process of its own, so that its peak memory is its own. `imports` is a process that does nothing.
"""

import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from benchmarks.captions import captions
from flows.terminal import run
from sage.data.dataset import check_sums, read_split
from sage.data.preparation import prepare
from sage.data.rows import Row
from sage.data.shards import rgb

SIZE = 64


def main(
    counts: Annotated[list[int] | None, typer.Argument(help="Numbers of images, rising.")] = None,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = SIZE,
) -> None:
    """Print time and peak memory of every step for each number of images, and the slope of the memory."""
    counts = counts or [2000, 20000]
    peaks: dict[str, list[float]] = {}
    typer.echo(f"{'images':>8} {'step':<9} {'seconds':>8} {'peak MB':>8}")
    for count in counts:
        folder = Path(tempfile.mkdtemp(prefix="sage-data-"))
        try:
            for name, step in STEPS.items():
                seconds, peak = _measured(partial(step, folder / "prepared", count, size))
                peaks.setdefault(name, []).append(peak)
                typer.echo(f"{count:>8} {name:<9} {seconds:>8.1f} {peak:>8.0f}")
            files = [path for path in (folder / "prepared").rglob("*") if path.is_file()]
            megabytes = sum(path.stat().st_size for path in files) / 1e6
            typer.echo(f"{count:>8} {len(files)} files, {megabytes:.0f} MB")
        finally:
            shutil.rmtree(folder)
    if len(counts) > 1:
        for name, found in peaks.items():
            slope = 1000 * (found[-1] - found[0]) / (counts[-1] - counts[0])
            typer.echo(f"{name}: {slope:.2f} MB more for each 1,000 images more")


def _measured(step: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds of a step and the peak memory, in MB, of the process that does it."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(step, send))
    process.start()
    send.close()
    found: tuple[float, float] = receive.recv()  # EOFError if the process failed, after its own traceback
    process.join()
    return found


def _child(step: Callable[[], None], send: Connection) -> None:
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    send.send((seconds, peak / 1e6))


def _drawn(number: int, size: int) -> bytes:
    """Return the PNG of a distinct image: blocks of random colours, which compress about as drawings do."""
    blocks = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _nothing(folder: Path, count: int, size: int) -> None:
    pass


def _prepare(folder: Path, count: int, size: int) -> None:
    rows = [
        Row(f"image-{number:06}", Path(), text, draw=partial(_drawn, number, size))
        for number, text in enumerate(captions(count))
    ]
    prepare(rows, folder, size=size, validation=0.1, test=0.1, seed=0)


def _captions(folder: Path, count: int, size: int) -> None:
    read_split(folder, "train")


def _pixels(folder: Path, count: int, size: int) -> None:
    for example in read_split(folder, "train"):
        rgb(example.image)


def _hashes(folder: Path, count: int, size: int) -> None:
    check_sums(folder)


STEPS = {"imports": _nothing, "prepare": _prepare, "captions": _captions, "pixels": _pixels, "hashes": _hashes}

if __name__ == "__main__":
    run(main)
