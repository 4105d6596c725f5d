"""Images for a list of prompts, the same bytes from the command line, from Python and from a served model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch

from flows.machine import device
from sage.errors import DivergedError, UnsupportedError
from sage.sampling import adapters, proof, saved
from sage.sampling.families import derived
from sage.sampling.first_prediction import FirstPredictions
from sage.sampling.partition import equal
from sage.sampling.pipeline import SharedSamplingPipeline, is_known
from sage.sampling.plan import Plan
from sage.sampling.schedulers import exchanged
from sage.sampling.stream import Result, Stream
from sage.sampling.weights import Precision, dtype_of, store


def open_pipeline(
    model: str | Path,
    on: Any = None,
    scheduler: str | None = None,
    precision: Precision = "fp32",
    lora: Path | None = None,
) -> Any:
    """Return a saved pipeline for shared sampling, without progress bars.

    A pipeline of a class that is not known has to pass `sage.sampling.proof` here, on its device. Raises
    UnsupportedError if it does not, and for one that makes no images.

    model      folder or hub name
    on         device; default: `device()`
    scheduler  class name of the scheduler to sample with; None: the one that was saved
    precision  of its weights; in less than fp32 its parts are on a CUDA device in turns
    lora       a LoRA to load, a file or a folder
    """
    on = on or device()  # before the model is read: a missing device fails at once
    stock = saved.stock_class(model)
    unknown = stock is not None and not is_known(stock)
    if unknown:
        derived.candidates(stock)  # before the weights are read
    how = {} if precision == "fp32" else {"dtype": dtype_of(precision)}
    pipe: Any = saved.load(model, **how) if unknown else SharedSamplingPipeline.from_pretrained(model, **how)
    pipe.scheduler = exchanged(pipe.scheduler, scheduler)
    if lora is not None:
        adapters.load(pipe, {"lora": lora})
    if precision == "fp8":
        store(pipe._network)
    if precision != "fp32" and torch.device(on).type == "cuda":
        pipe.enable_model_cpu_offload(device=on)
    else:
        pipe.to(on)
    pipe.set_progress_bar_config(disable=True)
    pipe = proof.proved(pipe) if unknown else pipe
    if pipe.makes != "images":
        raise UnsupportedError(f"{model} makes {pipe.makes}, and files are written of images only; use it from Python")
    return pipe


def first_predictions(
    pipe: Any, texts: Sequence[str], settings: Mapping[str, Any], size: Mapping[str, int] | None = None
) -> FirstPredictions:
    """Return the pipeline's first predictions of prompts.

    `settings` are those of `draw`; `size` is the height and width of the images in pixels, if not the model's own.
    """
    found: FirstPredictions = pipe.first_predictions(
        list(texts),
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        negative_prompt=settings.get("negative_prompt") or None,
        batch_size=settings["batch_size"],
        **(size or {}),
    )
    return found


def image_steps(pipe: Any, settings: Mapping[str, Any]) -> int:
    """Return the number of first steps that the images of one prompt share; `settings` are those of `draw`."""
    # Versions registered before this setting existed were evaluated with 0; None: the pipeline's rule.
    asked = settings.get("image_steps", 0)
    if asked is not None or not settings["share_ratio"]:
        return int(asked or 0)
    return int(pipe.safe_image_steps(settings["steps"], settings["branch_noise"]))


def planned(
    groups: Sequence[Sequence[int]], texts: Sequence[str], steps: int, share_ratio: float, image_steps: int
) -> Plan:
    """Return the plan of groups of images; if `image_steps` is above 0, equal texts of a group are one prompt."""
    if not image_steps:
        return Plan.shared(groups, steps, share_ratio)
    images: list[list[int]] = []
    prompts = []
    for members in groups:
        found = equal([texts[member] for member in members])
        prompts.append(range(len(images), len(images) + len(found)))
        images += [[members[place] for place in places] for places in found]
    return Plan.shared(prompts, steps, share_ratio).for_images(images, image_steps)


def draw(
    pipe: Any,
    texts: Sequence[str],
    seeds: Sequence[int],
    groups: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    wanted: Callable[[int], bool] = lambda number: True,
    predictions: FirstPredictions | None = None,
) -> Iterator[tuple[int, Result | str, int]]:
    """Yield the index of each wanted prompt, its result, and how many of its tokens the text encoder cut off.

    An image that is not finite has an error, a text, instead of its result; the others are drawn.

    Batch composition changes floating-point rounding, so batches never depend on which images are wanted: a batch with
    at least one wanted image is sampled whole.

    pipe      pipeline for shared sampling
    texts     prompts
    seeds     seed of each image
    groups    indices of prompts, each prompt in one group
    settings  steps, share_ratio, branch_noise, image_steps, guidance_scale, negative_prompt, batch_size
    wanted    whether the image of a prompt is yielded, by index; default: all
    predictions  first predictions of the texts, to take first steps from, or None
    """
    steps, shared = pipe.evaluations(settings["steps"]), image_steps(pipe, settings)
    for batch in batches(groups, 4 * settings["batch_size"]):
        members = [member for group in batch for member in group]
        if not any(map(wanted, members)):
            continue
        place = {member: i for i, member in enumerate(members)}
        drawn = [texts[member] for member in members]
        blocks = [[place[m] for m in group] for group in batch]
        stream = pipe.stream(
            drawn,
            plan=planned(blocks, drawn, steps, settings["share_ratio"], shared),
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            # Versions registered before this setting existed were evaluated without branch noise.
            branch_noise=settings.get("branch_noise", 0.0),
            negative_prompt=settings["negative_prompt"] or None,
            predictions=None if predictions is None else predictions.of(members),
            seed=[seeds[member] for member in members],
            batch_size=settings["batch_size"],
        )
        for number, result in _results(stream):
            if wanted(members[number]):
                yield members[number], result, stream.truncated_tokens[number]


def _results(stream: Stream) -> Iterator[tuple[int, Result | str]]:
    """Yield the results of a stream by index, then the errors of the images that are not finite."""
    try:
        for result in stream:
            yield result.index, result
    except DivergedError as error:
        for number, reason in error.images.items():
            yield number, f"not_finite: {reason}"


def batches(groups: Sequence[Sequence[int]], size: int) -> Iterator[list[Sequence[int]]]:
    """Yield consecutive whole groups in batches of at least `size` prompts; the last batch may be smaller."""
    batch: list[Sequence[int]] = []
    for members in groups:
        batch.append(members)
        if sum(map(len, batch)) >= size:
            yield batch
            batch = []
    if batch:
        yield batch
