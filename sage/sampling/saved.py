"""Saved pipelines as people have them: folders, single files, names on a hub; any precision, with parts left out."""

import json
import logging
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn

from sage.errors import DataError
from sage.sampling import base, hub, single_file

log = logging.getLogger(__name__)

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# diffusion_pytorch_model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, ...
_WEIGHTS = re.compile(r"[^.]+?(-\d+-of-\d+)?(\.(?P<variant>[^.]+?))?(-\d+-of-\d+)?\.safetensors")
# Parts that a pipeline reads texts without, if their folders are absent: SD 3 is often kept without its T5.
_SPARED = {"StableDiffusion3Pipeline": {"text_encoder_3", "tokenizer_3"}}


def load(path: str | Path, **kwargs: Any) -> Any:
    """Return the stock pipeline of a folder, a single file or a model on a hub, or of a folder of the project's base.

    Weights are read from safetensors only, all in single precision unless `kwargs` say otherwise. The variant of a
    folder that has only one, for example fp16, need not be given. A hub is asked only for a name on it
    (`sage.sampling.hub`), not for the configuration of a single file.
    Raises DataError, of one line, if it cannot be loaded.
    """
    model = hub.named(path)
    try:
        if model is None and not Path(path).exists():
            raise FileNotFoundError("there is no such folder or file")
        folder = Path(path) if model is None else cached(model, **kwargs) or fetch(model, **kwargs)
        if base.is_own(folder):
            named = {"torch_dtype": kwargs.pop("dtype")} if "dtype" in kwargs else {}
            return base.load(folder, **named, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in _HUB}
        if (file := single_file.found(folder)) is not None:
            known = _precision(kwargs) | _left_out(single_file.configuration(file))
            pipeline = single_file.load(file, stock_class(file), **known | kwargs)
        else:
            pipeline = _from_folder(path, folder, kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{path} cannot be loaded ({reason}); give a folder or hub name of diffusers' form, with weights as "
            "safetensors"
        ) from error
    _check_complete(path, pipeline)
    return pipeline


def _from_folder(path: str | Path, folder: Path, kwargs: dict[str, Any]) -> Any:
    """Return the pipeline of a folder of diffusers; `path` is what people call it."""
    missing = _missing(folder, kwargs)
    spared = _SPARED.get(str(index(folder).get("_class_name")), set()) if missing else set()
    if missing and spared.issuperset(missing):
        log.warning("%s is loaded without %s, which it lacks", path, " and ".join(missing))
        kwargs = dict.fromkeys(spared) | kwargs
    elif missing:
        raise DataError(
            f"{path} cannot be loaded: it lacks {', '.join(missing)}, which model_index.json names; restore it, "
            "or leave it out "
            f"({missing[0]}=None), which needs prompt_embeds if it is the text encoder"
        )
    known = {"use_safetensors": True, "variant": _variant(folder), **_precision(kwargs), **_left_out(folder)}
    return DiffusionPipeline.from_pretrained(str(folder), **known | kwargs)


def _precision(kwargs: Mapping[str, Any]) -> dict[str, torch.dtype]:
    return {} if "torch_dtype" in kwargs else {"dtype": torch.float32}


def fetch(model: hub.Model, **kwargs: Any) -> Path:
    """Return the folder, in the hub cache, of a model on a hub; what this machine lacks of it is downloaded.

    Raises DataError, of one line, if it cannot be had.
    """
    # The parts that are left out are not downloaded.
    asked = {name: value for name, value in kwargs.items() if value is None or name in (*_HUB, "variant")}
    asked |= {} if model.revision is None else {"revision": model.revision}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `index`
        try:
            return Path(DiffusionPipeline.download(model.name, use_safetensors=True, **asked))
        except (OSError, ValueError) as error:
            reason = str(error.__cause__ or error).strip().split("\n")[0]
            raise DataError(
                f"{model} cannot be loaded: there is no such folder, this machine's hub cache lacks it, and the hub "
                f"gave: {reason}. Where there is a network, `sage base {model}` gets it; HF_HOME says where it is kept"
            ) from error


def cached(model: hub.Model, **kwargs: Any) -> Path | None:
    """Return the folder of a model at a commit if the hub cache has all its parts, so that no hub need be asked."""
    if not hub.COMMIT.fullmatch(model.revision or "") or kwargs.keys() & {"variant", "force_download"}:
        return None
    with suppress(LocalEntryNotFoundError):
        directory = snapshot_download(
            model.name, revision=model.revision, cache_dir=kwargs.get("cache_dir"), local_files_only=True
        )
        if not _missing(Path(directory), kwargs):
            return Path(directory)
    return None


def index(path: str | Path, **kwargs: Any) -> dict[str, Any]:
    """Return the `model_index.json` of a folder, file or hub name; {} if it has none, as loading says what is wrong."""
    model = hub.named(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers 0.42 passes huggingface_hub an argument that it deprecates
        try:
            if model is None:
                file = single_file.found(Path(path))
                folder = Path(path) if file is None else single_file.configuration(file)
                text = (folder / "model_index.json").read_text(encoding="utf-8")
                return dict(json.loads(text))
            asked = {name: kwargs[name] for name in _HUB if name in kwargs}
            if model.revision is not None:
                asked["revision"] = model.revision
            return dict(DiffusionPipeline.load_config(model.name, **asked))
        except (OSError, ValueError, SafetensorError, DataError):
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
    return {name: None for name, value in index(folder).items() if value == [None, None]}


def _missing(folder: Path, given: Mapping[str, Any]) -> list[str]:
    """Return the parts that a folder's index names, that have no folder, and that are not given instead."""
    named = [
        name for name, part in index(folder).items() if isinstance(part, list) and part and isinstance(part[0], str)
    ]
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
