"""How fast a training step is, and what it needs: against diffusers' stock text-to-image trainer.

    python -m benchmarks.training                 this project's base model, 64 pictures a step
    python -m benchmarks.training --quick         two steps an arm, to see that it runs

The stock trainer is a script and no part of the package (examples/text_to_image/train_text_to_image.py); `Stock` is
its step with its own calls of diffusers and accelerate: picture and text encoded in every step, noise, prediction,
loss, clipping, AdamW, EMA. Arms are interleaved: each repetition runs every arm for a few steps, in another order;
figures are medians over all steps. Peak memory is that of a process of its own for each arm. The target: per network
evaluation no slower than the stock trainer.
"""

import argparse
import ctypes
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from sage.data.dataset import load_pixels, read_split
from sage.files import write_json
from sage.grouping.embedding import embed
from sage.grouping.groups import group
from sage.sampling import base
from sage.training.batches import Batches
from sage.training.denoiser import Denoiser
from sage.training.finetuning import TrainingSet, finetuning_loss, sampling_cost
from sage.training.loop import Schedule, fit

PICTURES = 1024
BATCH = 64
TERMS = {"diffusion": 1.0, "shared": 1.0, "branch": 1.0, "consistency": 0.1}
RATIOS, SAMPLER_STEPS = (0.1, 0.5), 6
SETTINGS = {"share_ratios": RATIOS, "soft_target": "posterior", "sampler_steps": SAMPLER_STEPS}
SETTINGS |= {"drop_text": 0.1, "seed": 0}
# What a step of this project is: the weights of its terms, whether what is encoded is cached, where branches start.
OURS = {
    "sage: plain diffusion, nothing cached": (dict.fromkeys(TERMS, 0.0) | {"diffusion": 1.0}, False, "mixture"),
    "sage: plain diffusion": (dict.fromkeys(TERMS, 0.0) | {"diffusion": 1.0}, True, "mixture"),
    "sage: all terms but consistency, mixture": (TERMS | {"consistency": 0.0}, True, "mixture"),
    "sage: diffusion and branch, sampled (shipped)": (TERMS | {"shared": 0.0, "consistency": 0.0}, True, "sampled"),
    "sage: all terms, mixture": (TERMS, True, "mixture"),
}
STOCK = {"stock": False, "stock, latents and text states cached": True}


class Data:
    """Pictures and captions of the training split, in memory."""

    def __init__(self, folder: Path) -> None:
        """Read pictures and captions."""
        examples = read_split(folder, "train")[:PICTURES]
        self.images = torch.from_numpy(load_pixels(examples))
        self.texts = [example.text for example in examples]
        self._encoded: TrainingSet | None = None

    def encoded(self, denoiser: Denoiser) -> TrainingSet:
        """Return everything encoded, once for all arms."""
        if self._encoded is None:
            groups = tuple(map(tuple, group(embed(self.texts), 0.72, 6, 0.999)))
            latents = denoiser.encode_images(self.images)
            captions = torch.arange(len(self.texts))[:, None]
            self._encoded = TrainingSet(latents, denoiser.encode_texts([*self.texts, ""], (64, 64)), captions, groups)
        return self._encoded


class Stock:
    """The stock trainer's step on this project's base model."""

    def __init__(self, model: Path, data: Data, precision: str, cached: bool) -> None:
        """Prepare everything as the script does."""
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=_name(precision))
        self.pipe, self.data, self.cached = base.load(model), data, cached
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for frozen in (self.pipe.vae, self.pipe.text_encoder):
            frozen.requires_grad_(False).to(self.accelerator.device, dtype)
        self.dtype = dtype
        tokenizer = self.pipe.tokenizer
        self.tokens = tokenizer(data.texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        unet = self.pipe.unet.train()
        self.ema = EMAModel(unet.parameters(), decay=0.9999)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        rate = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10_000)
        self.unet, self.optimizer, self.rate = self.accelerator.prepare(unet, optimizer, rate)
        if cached:
            with torch.no_grad():
                parts = torch.split(torch.arange(len(data.texts)), BATCH)
                self.latents = torch.cat([self._latents(part) for part in parts])
                self.states = torch.cat([self._states(part) for part in parts])

    def _latents(self, rows: torch.Tensor) -> torch.Tensor:
        images = self.data.images[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        images = images.to(self.accelerator.device, self.dtype)
        latents: torch.Tensor = self.pipe.vae.encode(images).latent_dist.sample()
        factor: float = self.pipe.vae.config.scaling_factor
        return latents * factor

    def _states(self, rows: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens[rows].to(self.accelerator.device)
        states: torch.Tensor = self.pipe.text_encoder(tokens, return_dict=False)[0]
        return states

    def step(self) -> None:
        """Do one step."""
        # As there: what adds noise is DDPM's, whatever the pipeline draws with.
        scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        accelerator = self.accelerator
        rows = torch.randint(len(self.data.texts), (BATCH,))
        with accelerator.accumulate(self.unet):
            latents = self.latents[rows] if self.cached else self._latents(rows)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (BATCH,), device=latents.device).long()
            noisy = scheduler.add_noise(latents, noise, timesteps)
            states = self.states[rows] if self.cached else self._states(rows)
            target = scheduler.get_velocity(latents, noise, timesteps)
            prediction = self.unet(noisy, timesteps, states, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), target.float(), reduction="mean")
            accelerator.gather(loss.repeat(BATCH)).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.rate.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.ema.step(self.unet.parameters())

    def run(self, steps: int) -> list[float]:
        """Return the seconds of each of so many steps."""
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            self.step()
            _wait()
            seconds.append(time.perf_counter() - begin)
        return seconds


class Ours:
    """The step of this project: the loop of `sage.training.loop.fit` with the loss of `sage.training.finetuning`."""

    def __init__(
        self, model: Path, data: Data, precision: str, weights: dict[str, float], cached: bool, start: str
    ) -> None:
        """Take a pipeline of its own; text and pictures are encoded before training."""
        pipe = base.load(model).to("cuda" if torch.cuda.is_available() else "cpu")
        self.denoiser, self.data, self.cached = Denoiser(pipe, precision), data, cached  # type: ignore[arg-type]
        encoded = data.encoded(self.denoiser)
        self.batches = Batches(encoded.groups, weights, BATCH, 0)
        self.sampled = start == "sampled"
        settings: dict[str, Any] = SETTINGS | {"branch_start": start}
        self.loss = finetuning_loss(self.denoiser, pipe.scheduler, encoded, self.batches, **settings)

    def evaluations(self, steps: int) -> float:
        """Return the network evaluations of a step, those without gradient counted, in the mean of the steps timed."""
        counted = range(1, steps)
        sampling = [sampling_cost(self.batches, RATIOS, SAMPLER_STEPS, step) for step in counted if self.sampled]
        return sum(self.batches.cost(0)) + sum(sampling) / len(counted)

    def run(self, steps: int) -> list[float]:
        """Return the seconds of each of so many steps."""
        times: list[float] = []

        def loss(step: int) -> Any:
            times.append(time.perf_counter())
            if not self.cached:
                rows = torch.cat(list(self.batches.rows(step).values()))
                self.denoiser.encode_images(self.data.images[rows])
                self.denoiser.encode_texts([self.data.texts[row] for row in rows], (64, 64))
            return self.loss(step)

        def on_step(step: int, values: dict[str, float]) -> None:
            _wait()
            times[-1] = time.perf_counter() - times[-1]

        with tempfile.TemporaryDirectory() as work:
            schedule = Schedule(steps, 1e-5, ema=0.9999, weight_decay=1e-2)
            fit(self.denoiser, loss, schedule, work=Path(work), identity={}, on_step=on_step)
        return times


def _name(precision: str) -> str:
    return "bf16" if precision == "bf16" else "no"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def arm_of(name: str, model: Path, data: Data, precision: str) -> Stock | Ours:
    """Return an arm, ready to run."""
    if name in STOCK:
        return Stock(model, data, precision, STOCK[name])
    return Ours(model, data, precision, *OURS[name])


def peak(arguments: argparse.Namespace, name: str) -> float:
    """Return the most memory, in MB, that a process of its own held during two steps of an arm."""
    command = [sys.executable, "-m", "benchmarks.training", "--arm", name, "--precision", arguments.precision]
    command += ["--model", str(arguments.model), "--data", str(arguments.data)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(printed.split()[-1])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/base"))
    parser.add_argument("--data", type=Path, default=Path("data/prepared"))
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of each arm in a repetition, the first not counted")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--arm", choices=[*STOCK, *OURS], help="run two steps of this one and print its peak memory")
    parser.add_argument("--out", type=Path, default=Path("work/benchmarks/training.json"))
    arguments = parser.parse_args()
    data = Data(arguments.data)
    if arguments.arm:
        arm = arm_of(arguments.arm, arguments.model, data, arguments.precision)
        # Of the steps, not of what was done before; ru_maxrss even begins at the size of the process that started this.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        arm.run(2)
        most = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert most
        print((torch.cuda.max_memory_allocated() if torch.cuda.is_available() else int(most[1]) * 1024) / 1e6)
        return
    repetitions, steps = (1, 2) if arguments.quick else (arguments.repetitions, arguments.steps)
    arms: dict[str, Stock | Ours] = {
        name: arm_of(name, arguments.model, data, arguments.precision) for name in [*STOCK, *OURS]
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repetition in range(repetitions):
        for name in random.Random(repetition).sample(list(arms), len(arms)):
            seconds[name] += arms[name].run(steps)[1:]
    result: dict[str, Any] = {"precision": arguments.precision, "threads": torch.get_num_threads(), "batch": BATCH}
    result["arms"] = {}
    for name, arm in arms.items():
        median = statistics.median(seconds[name])
        evaluations = arm.evaluations(steps) if isinstance(arm, Ours) else BATCH
        result["arms"][name] = {
            "seconds": round(median, 4),
            "pictures_per_second": round(BATCH / median, 1),
            "evaluations": round(evaluations, 1),
            "ms_per_evaluation": round(1000 * median / evaluations, 2),
            "peak_mb": round(peak(arguments, name)),
            "fastest": round(min(seconds[name]), 4),
            "slowest": round(max(seconds[name]), 4),
        }
        print(name, json.dumps(result["arms"][name]), flush=True)
    write_json(arguments.out, result)


if __name__ == "__main__":
    main()
