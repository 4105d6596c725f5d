"""Time and memory of prepared data, and of training on them, as the number of images grows.

    python -m benchmarks.data                                   2,000 and 20,000 images of 64 pixels
    python -m benchmarks.data 2000 20000 200000 --size 16       longer, and more disk

Every step runs in a process of its own, so that its peak memory is its own. `imports` is a process that does nothing,
and `base` one that makes the model. That is a tiny random one, so that the data decide: `encode` computes latents and
text states as stage finetune does, and `train` makes 20 steps of 64 images with them.
"""

import multiprocessing
import os
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
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from PIL import Image

from benchmarks.captions import captions
from flows.terminal import run
from sage.config import load_params
from sage.data.dataset import check_sums, read_split
from sage.data.preparation import prepare
from sage.data.rows import Row
from sage.data.shards import rgb

if TYPE_CHECKING:
    from sage.training.denoiser import Denoiser
    from sage.training.finetuning import TrainingSet

SIZE = 64
BATCH, TRAINED = 64, 20


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


def _measured(step: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of a step and the peak memory, in MB, of the process that does it."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(step, send))
    process.start()
    send.close()
    found: tuple[float, float] = receive.recv()  # EOFError if the process failed, after its own traceback
    process.join()
    return found


def _child(step: Callable[[], Any], send: Connection) -> None:
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
    prepare(rows, folder, size=size, resize="crop", validation=0.1, test=0.1, seed=0)


def _captions(folder: Path, count: int, size: int) -> None:
    read_split(folder, "train")


def _pixels(folder: Path, count: int, size: int) -> None:
    for example in read_split(folder, "train"):
        rgb(example.image)


def _hashes(folder: Path, count: int, size: int) -> None:
    check_sums(folder)


def _base(folder: Path, count: int, size: int) -> "Denoiser":
    """Return a tiny random model, with the project's tokenizer."""
    import sage.torchvision_ops  # noqa: F401

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import BertConfig, BertModel

    from sage.sampling import base
    from sage.training.denoiser import Denoiser

    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4)
    unet = UNet2DConditionModel(
        sample_size=size // 2,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    pipe = base.assemble(vae.eval(), unet)
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    encoder = BertModel(BertConfig(vocab_size=pipe.text_encoder.config.vocab_size, **narrow)).eval()
    encoder.config.use_attention_mask = True
    pipe.register_modules(text_encoder=encoder.requires_grad_(False))
    return Denoiser(pipe)


def _encode(folder: Path, count: int, size: int) -> None:
    _training_set(folder, _base(folder, count, size))


def _training_set(folder: Path, denoiser: "Denoiser") -> "TrainingSet":
    """Return the training set, in groups of five images, in files beside the prepared folder."""
    from flows.stages.finetune import training_set

    os.environ["SAGE_CACHE"] = str(folder.parent)
    examples = read_split(folder, "train")
    groups = [tuple(range(start, min(start + 5, len(examples)))) for start in range(0, len(examples), 5)]
    sources = {"base_sha256": "", "data_digest": ""}
    return training_set(denoiser, examples, groups, sources, load_params().finetune)


def _train(folder: Path, count: int, size: int) -> None:
    from sage.training.batches import Batches
    from sage.training.finetuning import finetuning_loss
    from sage.training.loop import Schedule, fit

    denoiser = _base(folder, count, size)
    data = _training_set(folder, denoiser)
    weights = {"diffusion": 1.0, "shared": 0.0, "branch": 1.0, "consistency": 0.0}
    loss = finetuning_loss(
        denoiser,
        denoiser._pipe.scheduler,
        data,
        Batches(data.groups, weights, BATCH, 0),
        share_ratios=(0.1, 0.5),
        soft_target="posterior",
        branch_start="sampled",
        sampler_steps=6,
        drop_text=0.1,
        seed=0,
    )
    fit(denoiser, loss, Schedule(TRAINED, 1e-4), work=folder.parent / "work", identity={"count": count})


STEPS = {
    "imports": _nothing,
    "prepare": _prepare,
    "captions": _captions,
    "pixels": _pixels,
    "hashes": _hashes,
    "base": _base,
    "encode": _encode,
    "train": _train,
}

if __name__ == "__main__":
    run(main)
