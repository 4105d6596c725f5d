"""What a PNG says of its image: as JSON under the key `sage`, and under `parameters` as web UIs write it."""

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL.PngImagePlugin import PngInfo, putchunk

from flows.prompts import infotext

KEY = "sage"  # text chunk of a PNG
_HEADER = 33  # bytes of a PNG's signature and IHDR, which are followed by the other chunks


def facts(
    id: str,
    prompt: str,
    seed: int,
    group: int | str,
    mates: Mapping[str, str],
    steps: int,
    settings: Mapping[str, Any],
    scheduler: str,
    model: str,
    truncated: int,
) -> dict[str, Any]:
    """Return the metadata of an image.

    id, prompt  name of the image, and its prompt
    seed        its seed
    group       name or number of its group
    mates       the prompts of the images that it shared steps with, by name
    steps       number of sampler steps
    settings    sampling settings, as for `flows.drawing.draw`
    scheduler   class name of the scheduler
    model       hash or name of the weights
    truncated   number of the prompt's tokens that the text encoder cut off
    """
    plan = {"steps": steps, "share_ratio": settings["share_ratio"] if {*mates.values()} - {prompt} else 0.0}
    if settings.get("image_steps"):
        plan["image_steps"] = settings["image_steps"]
    return {
        "id": id,
        "prompt": prompt,
        "negative_prompt": settings["negative_prompt"],
        "seed": seed,
        "group": group,
        "shared_with": list(mates),
        "plan": plan,
        "guidance_scale": settings["guidance_scale"],
        "scheduler": scheduler,
        "model": model,
        "truncated_tokens": truncated,
    }


def pnginfo(facts: Mapping[str, Any], size: tuple[int, int]) -> PngInfo:
    """Return the text chunks for the facts of an image and its size (width, height) in pixels."""
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(facts, ensure_ascii=False))
    info.add_text(infotext.KEY, infotext.infotext(facts, size))
    return info


def added(png: bytes, facts: Mapping[str, Any]) -> bytes:
    """Return a PNG with its facts in it; the pixels are not encoded again."""
    chunks = io.BytesIO()
    for name, content, *_ in pnginfo(facts, _size(png)).chunks:
        putchunk(chunks, name, content)
    return png[:_HEADER] + chunks.getvalue() + png[_HEADER:]


def _size(png: bytes) -> tuple[int, int]:
    return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
