"""Saved pipelines as people have them: full or half precision, with or without a variant, parts left out."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from sage.errors import DataError
from sage.sampling import base

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
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
        if missing := _missing(folder, kwargs):
            raise DataError(
                f"{path} cannot be loaded: it lacks {', '.join(missing)}, which model_index.json names; restore it, "
                "or leave it out "
                f"({missing[0]}=None), which needs prompt_embeds if it is the text encoder"
            )
        known = {"use_safetensors": True, "dtype": torch.float32, "variant": _variant(folder), **_left_out(folder)}
        if "torch_dtype" in kwargs:
            del known["dtype"]
        pipeline = DiffusionPipeline.from_pretrained(str(path), **known | kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        where = "" if folder.exists() else "there is no such folder; as a name on the hub: "
        raise DataError(
            f"{path} cannot be loaded ({where}{reason}); give a folder or hub name of diffusers' form, with weights as "
            "safetensors"
        ) from error
    _check_complete(path, pipeline)
    return pipeline


def index(path: str | Path, **kwargs: Any) -> dict[str, Any]:
    """Return the `model_index.json` of a folder or hub name; {} if there is none, as loading says what is wrong."""
    file = Path(path) / "model_index.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers 0.42 passes huggingface_hub an argument that it deprecates
        try:
            if Path(path).is_dir():
                return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
            return dict(DiffusionPipeline.load_config(path, **{name: kwargs[name] for name in _HUB if name in kwargs}))
        except (OSError, ValueError):
            return {}


def stock_class(path: str | Path, **kwargs: Any) -> Any:
    """Return the class of diffusers that a folder or hub name is saved as; None if it is none or cannot be read."""
    return getattr(diffusers, str(index(path, **kwargs).get("_class_name")), None)


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
    parts = index(folder) if folder.is_dir() else {}
    return {name: None for name, value in parts.items() if value == [None, None]}


def _missing(folder: Path, given: Mapping[str, Any]) -> list[str]:
    """Return the parts that a folder's index names, that have no folder, and that are not given instead."""
    parts = index(folder) if folder.is_dir() else {}
    named = [name for name, part in parts.items() if isinstance(part, list) and part and isinstance(part[0], str)]
    return [name for name in named if name not in given and name[0] != "_" and not (folder / name).exists()]


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
