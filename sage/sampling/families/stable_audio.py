"""The text of Stable Audio, whose `encode_prompt` returns projected states that its call takes from nobody."""

from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch


def encode(pipe: Any, prompts: list[str], negatives: list[str] | None) -> dict[str, Any]:
    """Return the text encoder's states and masks by the arguments of the stock call, which projects them.

    As in `StableAudioPipeline.encode_prompt`, the states of a negative prompt are 0 outside its mask.
    """
    found: dict[str, Any] = {}
    found["prompt_embeds"], found["attention_mask"] = _states(pipe, prompts)
    if negatives is not None:
        states, mask = _states(pipe, negatives)
        found["negative_prompt_embeds"] = torch.where(mask.to(torch.bool).unsqueeze(2), states, 0.0)
        found["negative_attention_mask"] = mask
    return found


def _states(pipe: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    length = pipe.tokenizer.model_max_length
    tokens = pipe.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    mask = tokens.attention_mask.to(pipe._execution_device)
    return pipe.text_encoder(tokens.input_ids.to(mask.device), attention_mask=mask)[0], mask
