"""What multiplies: sharing early steps, caching in late ones, and both, in counted evaluations of attention layers.

    python -m benchmarks.caches

Six prompts in two groups of three, 20 steps, share ratio 0.4. The networks are tiny and have random weights: the counts
depend on the plan and on what the cache is told, not on the weights. (FirstBlockCache looks at features and is left
out.) An evaluation is one of one attention layer for one row of a batch; a cache saves some of them within a network
evaluation.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers.hooks import (
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_pyramid_attention_broadcast,
)
from torch import Tensor, nn

from benchmarks.sampling import tiny_flux, tiny_stable_diffusion
from flows.terminal import quiet
from sage.files import write_json
from sage.sampling.pipeline import SharedSamplingPipeline

STEPS, RATIO, GROUPS = 20, 0.4, [[0, 1, 2], [3, 4, 5]]
# Timesteps: what is cached in the late 12 steps, which no group shares, and in the early 8, which all share.
LATE, EARLY = (-1, 600), (600, 1001)


class Queries(nn.Linear):
    """The projection to the queries of an attention layer, which counts the rows that it is evaluated for."""

    rows = 0

    def forward(self, states: Tensor) -> Tensor:
        """Count, then project."""
        Queries.rows += len(states)
        return super().forward(states)


def broadcast(pipe: Any, network: nn.Module, timesteps: tuple[int, int]) -> None:
    """Evaluate attention every second step within these timesteps."""
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=timesteps,
        spatial_attention_block_identifiers=("transformer_blocks",),
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=timesteps,
        cross_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    apply_pyramid_attention_broadcast(network, config)


def magnitude(pipe: Any, network: Any, timesteps: tuple[int, int]) -> None:
    """Evaluate the blocks every second step: 1 is their magnitude's ratio where they may be skipped, 9 elsewhere."""
    late = timesteps == LATE
    ratios = [1.0 if (step >= STEPS * RATIO) == late else 9.0 for step in range(STEPS)]
    network.enable_cache(
        MagCacheConfig(num_inference_steps=STEPS, mag_ratios=ratios, max_skip_steps=1, retention_ratio=0.0)
    )


def taylor(pipe: Any, network: Any, timesteps: tuple[int, int]) -> None:
    """Evaluate attention every second step from the beginning of each phase; it counts steps, not timesteps."""
    network.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1))


ARMS: list[tuple[str, str, Callable[[], tuple[Any, dict[str, Any]]], Callable[..., None], tuple[str, ...]]] = [
    ("Stable Diffusion", "PyramidAttentionBroadcast", tiny_stable_diffusion, broadcast, ("late", "early")),
    ("FLUX.1", "PyramidAttentionBroadcast", tiny_flux, broadcast, ("late", "early")),
    ("FLUX.1", "MagCache", tiny_flux, magnitude, ("late", "early")),
    ("FLUX.1", "TaylorSeer", tiny_flux, taylor, ("all",)),
]


@contextmanager
def counting(network: nn.Module) -> Iterator[None]:
    """Within, the attention layers of a network count their evaluations."""
    layers = [module for name, module in network.named_modules() if name.endswith("to_q")]
    for layer in layers:
        layer.__class__ = Queries
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


def evaluations(
    make: Callable[[], tuple[Any, dict[str, Any]]], ratio: float, cache: Callable[[Any, nn.Module], None] | None
) -> tuple[int, int]:
    """Return the counted evaluations of attention layers, and of the network."""
    stock, call = make()
    pipe: Any = SharedSamplingPipeline.from_pipe(stock)
    network = pipe._network
    if cache is not None:
        cache(pipe, network)
    Queries.rows = 0
    with counting(network):
        out = pipe(**call, groups=GROUPS, share_ratio=ratio, num_inference_steps=STEPS, seed=0, output_type="latent")
    return Queries.rows, out.cost.network_evaluations


def measure() -> list[dict[str, Any]]:
    """Return a row for each network and cache: fractions of the independent evaluations that are saved."""
    found = []
    for family, name, make, cache, whens in ARMS:
        whole, networks = evaluations(make, 0.0, None)
        shared, shared_networks = evaluations(make, RATIO, None)
        for when in whens:

            def cached(pipe: Any, network: nn.Module, when: str = when, cache: Any = cache) -> None:
                cache(pipe, network, EARLY if when == "early" else LATE)

            alone, both = (evaluations(make, ratio, cached)[0] for ratio in (0.0, RATIO))
            found.append(
                {
                    "family": family,
                    "cache": name,
                    "cached_steps": when,
                    "attention_evaluations": whole,
                    "network_evaluations": networks,
                    "network_evaluations_shared": shared_networks,
                    "sharing": 1 - shared / whole,
                    "caching": 1 - alone / whole,
                    "both": 1 - both / whole,
                }
            )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table of markdown."""
    lines = [
        "| network | cache | cached steps | evaluations | sharing saves | caching saves | their sum | both save |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        saved = [row["sharing"], row["caching"], row["sharing"] + row["caching"], row["both"]]
        cells = [row["family"], row["cache"], row["cached_steps"], f"{row['attention_evaluations']:,}"]
        lines.append("| " + " | ".join([*cells, *(f"{value:.1%}" for value in saved)]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    rows = measure()
    print(table(rows))
    if options.out:
        write_json(options.out, rows)


if __name__ == "__main__":
    main()
