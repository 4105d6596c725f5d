"""Pictures for a list of prompts, the same bytes wherever they are asked for: the shell, Python, or a server."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.machine import device
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Plan
from sage.sampling.stream import Result


def open_pipeline(model: str | Path, on: str | None = None) -> Any:
    """Return a saved pipeline for shared sampling, on a device (by default this machine's), without progress bars."""
    pipe: Any = SharedSamplingPipeline.from_pretrained(model)
    pipe.to(on or device())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: Any,
    texts: Sequence[str],
    seeds: Sequence[int],
    groups: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    wanted: Callable[[int], bool] = lambda number: True,
) -> Iterator[tuple[int, Result, int]]:
    """Yield for each wanted prompt its number, its picture and how many of its tokens the text encoder did not read.

    `settings`: steps, share_ratio, branch_noise, guidance_scale, negative_prompt and batch_size. A batch of which any
    picture is wanted is made whole, and batches do not depend on what is wanted: what is evaluated together has a part
    in the arithmetic.
    """
    pipe.scheduler.set_timesteps(settings["steps"])
    steps = len(pipe.scheduler.timesteps)
    for batch in batches(groups, 4 * settings["batch_size"]):
        members = [member for group in batch for member in group]
        if not any(map(wanted, members)):
            continue
        place = {member: i for i, member in enumerate(members)}
        stream = pipe.stream(
            [texts[member] for member in members],
            plan=Plan.shared([[place[m] for m in group] for group in batch], steps, settings["share_ratio"]),
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            # Versions that were registered before this was a setting were judged without it.
            branch_noise=settings.get("branch_noise", 0.0),
            negative_prompt=settings["negative_prompt"] or None,
            seed=[seeds[member] for member in members],
            batch_size=settings["batch_size"],
        )
        for result in stream:
            if wanted(members[result.index]):
                yield members[result.index], result, stream.truncated_tokens[result.index]


def batches(groups: Sequence[Sequence[int]], size: int) -> Iterator[list[Sequence[int]]]:
    """Yield runs of whole groups of about `size` prompts, the same whatever is done already."""
    batch: list[Sequence[int]] = []
    for members in groups:
        batch.append(members)
        if sum(map(len, batch)) >= size:
            yield batch
            batch = []
    if batch:
        yield batch
