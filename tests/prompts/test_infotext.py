import json
import re
from pathlib import Path

import pytest
from PIL import Image

from flows.prompts import generate, infotext, metadata

FACTS = {
    "prompt": "a red cat",
    "negative_prompt": "blurred, dark",
    "seed": 2**63 - 1,
    "plan": {"steps": 20, "share_ratio": 0.3},
    "guidance_scale": 4.0,
    "scheduler": "DPMSolverMultistepScheduler",
    "model": "0123456789abcdef" * 4,
}


def read(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings as AUTOMATIC1111's `parse_generation_parameters` takes them apart."""
    *lines, last = text.split("\n")
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    return prompt, negative, {key: json.loads(value) if value[0] == '"' else value for key, value in found}


@pytest.mark.parametrize("prompt", ["a red cat", "一隻紅貓, (été:1.2)\nÜber 20, Steps: 3\nعربي", ""])
def test_what_web_uis_read_is_what_was_drawn(prompt: str, tmp_path: Path) -> None:
    facts = FACTS | {"prompt": prompt}
    generate.save(Image.new("RGB", (64, 48)), facts, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        texts = image.text
    assert json.loads(texts[metadata.KEY]) == facts
    settings = {"Steps": "20", "Sampler": "DPM++ 2M", "CFG scale": "4.0", "Seed": str(2**63 - 1), "Size": "64x48"}
    assert read(texts["parameters"]) == (prompt, "blurred, dark", settings | {"Model hash": "0123456789"})


def test_a_name_is_no_hash_and_no_negative_prompt_is_no_line() -> None:
    text = infotext.infotext(FACTS | {"negative_prompt": "", "model": "a, b", "scheduler": "DDPMScheduler"}, (8, 8))
    prompt, negative, settings = read(text)
    assert (prompt, negative, settings["Model"], settings["Sampler"]) == ("a red cat", "", "a, b", "DDPMScheduler")
    assert "Negative prompt" not in text
