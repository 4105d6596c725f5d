"""How fast the pipeline is: against the stock pipeline at its best batch size, and against what its plan promises.

    python -m benchmarks.sampling                 this project's base model, 256 held-out prompts, then as with --free
    python -m benchmarks.sampling --sd15          a U-Net of Stable Diffusion 1.5's size, random weights (accelerator)
    python -m benchmarks.sampling --flux          a transformer of FLUX.1's size, random weights (accelerator, 40 GB)
    python -m benchmarks.sampling --quick         a few prompts and steps, to see that it runs
    python -m benchmarks.sampling --free          networks that cost nothing: what is spent outside them, in CPU time

Arms are interleaved: every repetition runs each once, in another order; ratios are taken within a repetition, and
figures are medians over repetitions, so that work beside it blurs them little. Each limit of `LIMITS` is printed with
what was found, and whether it holds.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import psutil
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from flows.terminal import progress, quiet
from sage.data.dataset import read_split
from sage.files import write_json
from sage.sampling import base
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Plan

# What is held, and its limit: at most, or for the speed-up at least.
LIMITS = {
    "share ratio 0, of the stock pipeline's time at its best batch size": 1.02,
    "speed-up, of what the evaluations promise": 0.95,
    "time outside the networks": 0.03,
    "CPU time a prompt of the longest stream, of the shortest's": 1.15,
    "memory of the longest stream, MiB a thousand prompts": 2.0,
}


@dataclass(frozen=True)
class Size:
    """What is sampled with a model: images, steps, batch sizes that stock is tried at, and arguments of the call."""

    name: str
    images: int
    steps: int
    batches: list[int]
    call: dict[str, Any]


BASE = Size("base", 256, 8, [16, 32, 64, 128], {"guidance_scale": 3.0})
SD15 = Size("sd15", 256, 30, [8, 16, 32], {"guidance_scale": 3.0})
FLUX = Size("flux", 16, 10, [1, 2, 4, 8], {"guidance_scale": 3.5, "height": 512, "width": 512})


class Clock:
    """Seconds that a module's forward passes take, synchronising around each where there is an accelerator."""

    def __init__(self, module: torch.nn.Module) -> None:
        """Start listening to a module."""
        self.seconds, self._start = 0.0, 0.0
        self._handles = [
            module.register_forward_pre_hook(lambda *_: self._begin()),
            module.register_forward_hook(lambda *_: self._end()),
        ]

    def _begin(self) -> None:
        synchronise()
        self._start = time.perf_counter()

    def _end(self) -> None:
        synchronise()
        self.seconds += time.perf_counter() - self._start

    def remove(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()


def synchronise() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stable_diffusion_15(device: str) -> StableDiffusionPipeline:
    """Return Stable Diffusion 1.5's networks with random weights, in half precision; text comes as embeddings."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=2,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)),
        tokenizer=None,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe.to(device, torch.float16)


def flux_1(device: str) -> FluxPipeline:
    """Return the transformer of FLUX.1 dev, 12 billion random weights, in bfloat16; text comes as embeddings."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # in single precision the weights would not fit beside their copies
    try:
        with torch.device(device):
            transformer = FluxTransformer2DModel(guidance_embeds=True)
    finally:
        torch.set_default_dtype(before)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(**parts, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def tiny_stable_diffusion(prompts: int = 6) -> tuple[Any, dict[str, Any]]:
    """Return Stable Diffusion with a tiny random U-Net and nothing else, and the embeddings of some prompts."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(**parts, unet=unet, scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    rows = torch.randn(2, prompts, 8, 16)
    return pipe, {"prompt_embeds": rows[0], "negative_prompt_embeds": rows[1], "guidance_scale": 3.0}


def tiny_flux(prompts: int = 6) -> tuple[Any, dict[str, Any]]:
    """Return FLUX.1 with a tiny random transformer and nothing else, and the embeddings of some prompts."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(**parts, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    embeddings = {"prompt_embeds": torch.randn(prompts, 8, 32), "pooled_prompt_embeds": torch.randn(prompts, 32)}
    return pipe, embeddings | {"height": 64, "width": 64, "guidance_scale": 3.0}


class FreeUNet(UNet2DConditionModel):  # type: ignore[misc]
    """A U-Net that costs nothing."""

    def forward(self, sample: Any, *args: Any, **kwargs: Any) -> tuple[Any]:
        """Return the latents."""
        return (sample,)


class FreeTransformer(FluxTransformer2DModel):  # type: ignore[misc]
    """A transformer that costs nothing."""

    def forward(self, hidden_states: Any, **kwargs: Any) -> tuple[Any]:
        """Return the latents."""
        return (hidden_states,)


def free(prompts: int, family: str) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline whose network costs nothing, and the embeddings of some prompts."""
    if family == "Stable Diffusion":
        pipe, call = tiny_stable_diffusion(prompts)
        pipe.unet.__class__ = FreeUNet
    else:
        pipe, call = tiny_flux(prompts)
        pipe.transformer.__class__ = FreeTransformer
    return pipe, call | {"num_inference_steps": 10, "output_type": "latent"}


def overhead(family: str, count: int = 64, repetitions: int = 7) -> dict[str, float]:
    """Return CPU milliseconds a network call of stock and of share ratio 0 (medians), and the median of their ratio."""
    stock, call = free(count, family)
    pipe = SharedSamplingPipeline.from_pipe(stock)
    given = {name: call.pop(name) for name in list(call) if torch.is_tensor(call[name])}
    calls = call["num_inference_steps"] * (count // 8)
    arms: dict[str, Callable[[], Any]] = {
        "stock": lambda: run_stock(stock, None, given, count, 8, call),
        "share_ratio_0": lambda: pipe(**given, **call, seed=list(range(count)), share_ratio=0, batch_size=8),
    }
    seen: dict[str, list[float]] = {name: [] for name in arms}
    for repetition in range(repetitions + 1):
        for name, arm in arms.items():
            begin = time.process_time()
            arm()
            if repetition:
                seen[name].append((time.process_time() - begin) / calls * 1000)
    ratio = statistics.median(a / b for a, b in zip(seen["share_ratio_0"], seen["stock"], strict=True))
    return {name: statistics.median(values) for name, values in seen.items()} | {"ratio": ratio}


def scale(family: str, counts: Sequence[int]) -> list[dict[str, float]]:
    """Return CPU seconds and the growth of the memory, MiB, of streams of so many prompts in groups of three."""
    found = []
    for count in counts:
        stock, call = free(count, family)
        pipe = SharedSamplingPipeline.from_pipe(stock)
        process = psutil.Process()
        begin, before, peak = time.process_time(), process.memory_info().rss, 0
        for number, _ in enumerate(pipe.stream(**call, seed=0, groups=groups_of(count, 3), share_ratio=0.4)):
            if number % 50 == 0:
                peak = max(peak, process.memory_info().rss)
        seconds = time.process_time() - begin
        found.append({"prompts": count, "cpu_seconds": seconds, "ms_a_prompt": seconds / count * 1000})
        found[-1]["memory_mib"] = (peak - before) / 2**20
    return found


def conditions(stock: Any, count: int, data: Path) -> tuple[list[str] | None, dict[str, torch.Tensor]]:
    """Return held-out prompts, or embeddings where there is no tokenizer."""
    if stock.tokenizer is not None:
        texts = [example.text for example in read_split(data, "test")]
        return (texts * (count // len(texts) + 1))[:count], {}
    random = torch.Generator().manual_seed(0)
    network = networks(stock)[0]
    if isinstance(stock, FluxPipeline):
        states, pooled = torch.randn(count, 512, 4096, generator=random), torch.randn(count, 768, generator=random)
        given = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
    else:
        rows = torch.randn(2, count, 77, 768, generator=random)
        given = {"prompt_embeds": rows[0], "negative_prompt_embeds": rows[1]}
    return None, {name: values.to(network.device, network.dtype) for name, values in given.items()}


def networks(stock: Any) -> list[Any]:
    """Return the network that is evaluated in each step, and the text encoder, if there is one."""
    found = (getattr(stock, name, None) for name in ("unet", "transformer", "text_encoder"))
    return [network for network in found if network is not None]


def groups_of(count: int, size: int) -> list[list[int]]:
    """Return ragged groups of this mean size: of 1, of the double less 1, and of the size itself."""
    sizes, place = [size, 2 * size - 1, 1], 0
    groups: list[list[int]] = []
    while place < count:
        groups.append(list(range(place, min(count, place + sizes[len(groups) % 3]))))
        place = groups[-1][-1] + 1
    return groups


def run_stock(
    stock: Any, prompts: Any, given: dict[str, torch.Tensor], count: int, batch: int, call: dict[str, Any]
) -> None:
    """Do what a diffusers user does: one call for each batch."""
    for start in range(0, count, batch):
        rows = slice(start, min(count, start + batch))
        generators = [torch.Generator().manual_seed(seed) for seed in range(rows.start, rows.stop)]
        stock(
            prompts[rows] if prompts else None,
            generator=generators,
            **{name: values[rows] for name, values in given.items()},
            **call,
        )


def measure(
    stock: Any, prompts: Any, given: dict[str, torch.Tensor], count: int, batches: list[int], ratios: list[float],
    size: int, repetitions: int, call: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return medians of seconds an image for stock at each batch size, then the pipeline at the best for each ratio."""
    shared: Any = SharedSamplingPipeline.from_pipe(stock)
    groups = groups_of(count, size)
    stock_times = interleaved(
        {str(b): partial(run_stock, stock, prompts, given, count, b, call) for b in batches}, stock, 2
    )
    best = min(batches, key=lambda b: min(seconds for seconds, _ in stock_times[str(b)]))
    plans = {str(ratio): Plan.shared(groups, call["num_inference_steps"], ratio) for ratio in ratios}
    options = {"seed": list(range(count)), "batch_size": best, **given, **call}
    arms: dict[str, Callable[[], Any]] = {"stock": lambda: run_stock(stock, prompts, given, count, best, call)}
    arms |= {name: partial(shared, prompts, plan=plan, **options) for name, plan in plans.items()}
    times = interleaved(arms, stock, repetitions)
    return {
        "images": count,
        "steps": call["num_inference_steps"],
        "mean_group_size": count / len(groups),
        "stock_batch": best,
        "stock_by_batch": {batch: seconds(rows) / count for batch, rows in stock_times.items()},
        "stock_seconds_per_image": seconds(times["stock"]) / count,
        "stock_outside_networks": outside(times["stock"]),
        "ratio_0_over_stock": over(times["0.0"], times["stock"]),
        "ratios": {
            name: {
                "seconds_per_image": seconds(times[name]) / count,
                "saving": plan.saving,
                "speed_up": over(times["0.0"], times[name]),
                "share_of_promise": over(times["0.0"], times[name]) * (1 - plan.saving),
                "outside_networks": outside(times[name]),
            }
            for name, plan in plans.items()
        },
    }


Runs = list[tuple[float, float]]
"""One run a repetition: its seconds, and the share of them outside the networks."""


def interleaved(arms: dict[str, Callable[[], Any]], stock: Any, repetitions: int) -> dict[str, Runs]:
    """Return each arm's runs, after one to warm up."""
    seen: dict[str, Runs] = {name: [] for name in arms}
    with progress(len(arms) * (repetitions + 1), f"timing {len(arms)} arms") as advance:
        for repetition in range(repetitions + 1):
            for name in random.Random(repetition).sample(list(arms), len(arms)):
                run = timed(arms[name], stock)
                if repetition:
                    seen[name].append(run)
                advance(1)
    return seen


def timed(arm: Callable[[], Any], stock: Any) -> tuple[float, float]:
    """Run an arm once; return its seconds and the share of them outside the networks."""
    clocks = [Clock(network) for network in networks(stock)]
    synchronise()
    start = time.perf_counter()
    arm()
    synchronise()
    elapsed = time.perf_counter() - start
    for clock in clocks:
        clock.remove()
    return elapsed, 1 - sum(clock.seconds for clock in clocks) / elapsed


def seconds(runs: Runs) -> float:
    """Return the median of the seconds."""
    return statistics.median(elapsed for elapsed, _ in runs)


def outside(runs: Runs) -> float:
    """Return the median of the shares outside the networks."""
    return statistics.median(share for _, share in runs)


def over(runs: Runs, others: Runs) -> float:
    """Return the median over repetitions of the seconds' ratio."""
    return statistics.median(a / b for (a, _), (b, _) in zip(runs, others, strict=True))


def verdicts(figures: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """Return each limit with what was found, the worst of its cases, and whether that keeps to it."""
    found: list[float | None] = [None] * len(LIMITS)
    if "ratios" in figures:
        shared = [row for row in figures["ratios"].values() if row["saving"]]
        outside_networks = [row["outside_networks"] for row in figures["ratios"].values()]
        promise = min(row["share_of_promise"] for row in shared)
        found[:3] = [figures["ratio_0_over_stock"], promise, max(outside_networks)]
    if "free" in figures:
        streams = [family["streams"] for family in figures["free"].values()]
        found[3] = max(rows[-1]["ms_a_prompt"] / rows[0]["ms_a_prompt"] for rows in streams)
        found[4] = max(rows[-1]["memory_mib"] / rows[-1]["prompts"] * 1000 for rows in streams)
    return [
        (what, value, value >= limit if what.startswith("speed-up") else value <= limit)
        for (what, limit), value in zip(LIMITS.items(), found, strict=True)
        if value is not None
    ]


def free_figures(counts: Sequence[int]) -> dict[str, Any]:
    """Return what is spent outside networks that cost nothing, by family."""
    return {
        family: {"milliseconds_a_network_call": overhead(family), "streams": scale(family, counts)}
        for family in ("Stable Diffusion", "FLUX.1")
    }


def report(figures: dict[str, Any], out: Path | None) -> None:
    """Print the figures and a line for each limit, and write the figures."""
    print(json.dumps(figures, indent=2))
    for what, value, kept in verdicts(figures):
        print(f"{'yes' if kept else 'NO':<4} {what}: {value:.3f} (limit {LIMITS[what]})")
    if out:
        write_json(out, figures)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    for name in ("--sd15", "--flux", "--free"):
        model.add_argument(name, action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path, default=Path("models/base"))
    parser.add_argument("--data", type=Path, default=Path("data/prepared"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    counts = [30, 60] if options.quick else [2_500, 5_000, 10_000]
    if options.free:
        report({"free": free_figures(counts)}, options.out)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and (options.sd15 or options.flux):
        parser.error(f"{'--flux' if options.flux else '--sd15'} needs an accelerator (CUDA), and there is none here")
    size = FLUX if options.flux else SD15 if options.sd15 else BASE
    stock: Any = flux_1(device) if options.flux else stable_diffusion_15(device) if options.sd15 else None
    stock = stock or base.load(options.model).to(device)
    stock.set_progress_bar_config(disable=True)
    count = 8 if options.quick else size.images
    prompts, given = conditions(stock, count, options.data)
    batches = [4, 8] if options.quick else size.batches
    # Latents out: the decoder is the same work in every arm and is no part of the question.
    call = size.call | {"num_inference_steps": 2 if options.quick else size.steps, "output_type": "latent"}
    ratios = [0.0, 0.5] if options.quick else [0.0, 0.25, 0.4, 0.6]
    figures = measure(stock, prompts, given, count, batches, ratios, 3, 1 if options.quick else 5, call)
    figures |= {"model": size.name, "device": device, "threads": torch.get_num_threads()}
    if size is BASE:
        figures["free"] = free_figures(counts)
    report(figures, options.out)


if __name__ == "__main__":
    main()
