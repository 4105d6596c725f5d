"""The settings of an image as AUTOMATIC1111's web UI writes and reads them, in the text chunk `parameters` of a PNG.

red cat
Negative prompt: blurred
Steps: 20, Sampler: DPM++ 2M, CFG scale: 4.0, Seed: 1, Size: 64x64, Model hash: 0123456789
"""

import json
from collections.abc import Mapping
from typing import Any

KEY = "parameters"
# The web UI's names for schedulers of diffusers; another has its own name.
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}


def infotext(facts: Mapping[str, Any], size: tuple[int, int]) -> str:
    """Return the text for the facts of an image that `sage generate` keeps, and its size (width, height) in pixels."""
    model, scheduler = facts["model"], facts["scheduler"]
    settings = {
        "Steps": facts["plan"]["steps"],
        "Sampler": _SAMPLERS.get(scheduler, scheduler),
        "CFG scale": facts["guidance_scale"],
        "Seed": facts["seed"],
        "Size": f"{size[0]}x{size[1]}",
        # A folder of weights has a hash, a model of the hub a name.
        **({"Model hash": model[:10]} if _is_hash(model) else {"Model": model}),
    }
    negative = [f"Negative prompt: {facts['negative_prompt']}"] if facts["negative_prompt"] else []
    loras = "".join(f" <lora:{name}:{weight:g}>" for name, weight in facts.get("loras", {}).items())
    return "\n".join(
        [facts["prompt"] + loras, *negative, ", ".join(f"{key}: {_quoted(v)}" for key, v in settings.items())]
    )


def _is_hash(model: str) -> bool:
    return len(model) == 64 and all(digit in "0123456789abcdef" for digit in model)


def _quoted(value: Any) -> str:
    """Return a value as text, in quotes if it holds what separates settings."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
