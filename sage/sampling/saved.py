"""Saved pipelines as people have them: full or half precision, with or without a variant, parts left out."""

import json
import re
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from sage.errors import DataError
from sage.sampling import base

# diffusion_pytorch_model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, ...
_WEIGHTS = re.compile(r"[^.]+?(-\d+-of-\d+)?(\.(?P<variant>[^.]+?))?(-\d+-of-\d+)?\.safetensors")


def load(path: str | Path, **kwargs: Any) -> Any:
    """Return the stock pipeline of a folder or hub name as in diffusers, or of a folder of the project's base.

    Weights are read from safetensors only, all in single precision unless `kwargs` say otherwise. The variant of a
    folder that has only one, for example fp16, need not be given.
    Raises DataError, of one line, if it cannot be loaded.
    """
    folder = Path(path)
    if folder.is_file():
        raise DataError(
            f"{path} is a single file, and a folder of diffusers is needed: use from_single_file and save_pretrained "
            "of the model's pipeline class to make one"
        )
    try:
        if base.is_own(folder):
            return base.load(folder, **kwargs)
        known = {"use_safetensors": True, "dtype": torch.float32, "variant": _variant(folder), **_left_out(folder)}
        if "torch_dtype" in kwargs:
            del known["dtype"]
        pipeline = DiffusionPipeline.from_pretrained(str(path), **known | kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        where = path if folder.exists() else f"{path} is no folder and"
        raise DataError(f"{where} cannot be loaded: {reason}") from error
    _check_complete(path, pipeline)
    return pipeline


def _variant(folder: Path) -> str | None:
    """Return the variant that a folder has to be loaded as; None if all parts have plain weights or it is no folder.

    Raises ValueError if parts without plain weights have several.
    """
    needed: set[str] = set()
    for part in folder.glob("*/"):
        names = [match["variant"] for path in part.iterdir() if (match := _WEIGHTS.fullmatch(path.name))]
        if None not in names:
            needed |= set(names)
    if len(needed) > 1:
        raise ValueError(f"its weights are variants {', '.join(sorted(needed))}; give one of them as `variant`")
    return needed.pop() if needed else None


def _left_out(folder: Path) -> dict[str, None]:
    """Return the parts that a folder was saved without: diffusers asks for some of them although its index says so."""
    index = folder / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    return {name: None for name, value in parts.items() if value == [None, None]}


def _check_complete(path: str | Path, pipeline: Any) -> None:
    """Raise DataError if a part has weights without values."""
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        empty = [weight for weight, values in part.named_parameters() if values.is_meta]
        if empty:
            raise DataError(
                f"{path} cannot be loaded: {name} lacks {len(empty)} weights, for example {empty[0]}; a pipeline that "
                "wears a LoRA is saved after fuse_lora() and unload_lora_weights()"
            )
