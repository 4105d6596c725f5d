"""LoRA adapters (Hu et al., 2022) with peft, saved in the format that stock diffusers loads."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers import CLIPTextModelWithProjection as _Projected

from sage.errors import ConfigurationError, UnsupportedError
from sage.randomness import generator
from sage.sampling import adapters
from sage.training import kohya

# The name of the adapter that is trained; adapters of other names are the ones that a pipeline came with.
_NAME = "trained"
# The attention layers, including those of SD 3's text stream (add_*), and the feed-forward layers after them.
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
_TARGETS += ["ff.net.0.proj", "ff.net.2"]
# A pipeline's text encoders, and the layers of a CLIP that get an adapter: as kohya's sd-scripts, attention and MLP.
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_CLIP_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def add(network: Any, rank: int, seed: int, *, alpha: int | None = None, targets: Sequence[str] | None = None) -> None:
    """Freeze a diffusers network and add an adapter, initialised from the seed so that the output does not change.

    alpha    the adapter's output is multiplied by alpha / rank; None: alpha is the rank
    targets  names, or ends of names after a ".", of the linear layers that get an adapter, of a U-Net those in its
             attention blocks; None: the attention layers and the feed-forward layers after them

    Raises UnsupportedError for a network whose diffusers class takes no adapters, and ConfigurationError for one that
    has an adapter already and for a target that is no such layer.
    """
    if not hasattr(network, "add_adapter"):
        raise UnsupportedError(
            f"{type(network).__name__} takes no adapter in diffusers; fine-tune all weights (finetune.adapter: null)."
        )
    if found := sorted(getattr(network, "peft_config", {})):
        raise ConfigurationError(
            f"{type(network).__name__} has the adapter {', '.join(found)} already; fuse it first (lora.fuse)."
        )
    for target in targets or ():
        _check_target(network, target)
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(generator(seed, "adapter").initial_seed())
        network.add_adapter(_config(rank, alpha, targets or _TARGETS), adapter_name=_NAME)
    cast_training_params(network)


def trainable_encoders(pipeline: Any) -> dict[str, Any]:
    """Return the text encoders of a pipeline that can get an adapter, by name: CLIPs, not T5, as in diffusers.

    Raises UnsupportedError if there is none.
    """
    loadable = getattr(pipeline, "_lora_loadable_modules", [])
    found = {name: getattr(pipeline, name, None) for name in ENCODERS if name in loadable}
    encoders = {name: part for name, part in found.items() if isinstance(part, (CLIPTextModel, _Projected))}
    if not encoders:
        there = ", ".join(type(part).__name__ for name in ENCODERS if (part := getattr(pipeline, name, None)))
        raise UnsupportedError(
            "finetune.adapter.text_encoders needs a CLIP that diffusers loads adapters into, but the text encoders "
            f"are {there or 'missing'}; leave text_encoders out"
        )
    return encoders


def add_to_texts(encoders: Mapping[str, Any], rank: int, seed: int, *, alpha: int | None = None) -> None:
    """Freeze text encoders, see `trainable_encoders`, and add an adapter to each, which begins as `add` has it."""
    for name, encoder in encoders.items():
        encoder.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(generator(seed, "adapter", name).initial_seed())
            encoder.add_adapter(_config(rank, alpha, _CLIP_TARGETS), adapter_name=_NAME)
        cast_training_params(encoder)


def size(encoder: nn.Module, rank: int) -> int:
    """Return the number of weights of an adapter of a text encoder."""
    adapted = (part for name, part in encoder.named_modules() if name.rpartition(".")[2] in _CLIP_TARGETS)
    return sum(rank * (part.in_features + part.out_features) for part in adapted if isinstance(part, nn.Linear))


def _config(rank: int, alpha: int | None, targets: Sequence[str]) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=list(targets))


def _check_target(network: nn.Module, target: str) -> None:
    named = {name: part for name, part in network.named_modules() if f".{name}".endswith(f".{target}")}
    inside = _inside(network)
    odd = [name for name, part in named.items() if not isinstance(part, nn.Linear) or inside not in name]
    if odd or not named:
        found = f"{odd[0]} is {type(named[odd[0]]).__name__}" if odd else "it has no layer of this name"
        raise ConfigurationError(
            f"the LoRA target {target!r} is no linear {inside and 'attention '}layer of {type(network).__name__}: "
            f"{found}. Name layers as diffusers does, for example {', '.join(_TARGETS[:3])}."
        )


def _inside(network: nn.Module) -> str:
    """Return what the names of adapted layers contain: in a U-Net, `kohya` has names for attention blocks alone."""
    return "attentions." if isinstance(network, UNet2DConditionModel) else ""


def resume(pipeline: Any, path: Path, rank: int, alpha: int | None = None, texts: bool = False) -> str:
    """Load an earlier adapter of the pipeline to train it on, and freeze the rest; return the file's SHA-256.

    path         a safetensors file or a folder with one, under diffusers' or kohya's names
    rank, alpha  what is expected; alpha None: the rank
    texts        whether the adapters of text encoders are trained, too

    Raises UnsupportedError and DataError as `sage.sampling.adapters.load` does, and ConfigurationError if the adapter
    has another rank or alpha than expected, or adapts other parts than are trained, or a U-Net outside its attention
    blocks.
    """
    found = adapters.load(pipeline, {_NAME: path})[_NAME]
    parts = {name for name, names in pipeline.get_list_adapters().items() if _NAME in names}
    kind = "unet" if hasattr(pipeline, "unet") else "transformer"
    wanted = {kind, *(trainable_encoders(pipeline) if texts else ())}
    if parts != wanted:
        raise ConfigurationError(
            f"{path} adapts {', '.join(sorted(parts))}, but {', '.join(sorted(wanted))} is to be trained; set "
            "finetune.adapter.text_encoders as in the file, or fuse it into the base instead"
        )
    shapes = set()
    for name in sorted(parts):
        module = getattr(pipeline, name)
        adapted = {name: part for name, part in module.named_modules() if _NAME in getattr(part, "scaling", {})}
        if odd := sorted(name for name in adapted if _inside(module) not in name):
            raise ConfigurationError(f"{path} adapts {odd[0]}, but of a U-Net only attention blocks are trained")
        shapes |= {(part.r[_NAME], part.r[_NAME] * part.scaling[_NAME]) for part in adapted.values()}
    if shapes != {(rank, alpha or rank)}:
        said = ", ".join(f"rank {r} with alpha {a:g}" for r, a in sorted(shapes))
        raise ConfigurationError(
            f"{path} has {said}, but rank {rank} with alpha {alpha or rank} is to be trained; set both as in the file"
        )
    for name in parts:
        module = getattr(pipeline, name)
        module.requires_grad_(False)
        for weight, values in module.named_parameters():
            values.requires_grad_("lora_" in weight)
        cast_training_params(module)
    return found


def present(network: nn.Module) -> bool:
    """Return whether a network has an adapter to train."""
    return _NAME in getattr(network, "peft_config", {})


def fuse(pipeline: Any, trained: bool = False) -> None:
    """Fuse the LoRAs of a pipeline into its weights and remove them: it draws the same, and training continues there.

    A LoRA that is switched off is removed. An adapter to train stays as it is, unless it has been `trained`.
    """
    modules: list[Any] = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    for module in modules:
        if present(module) and not trained:
            continue
        if _fuse(module):
            module.requires_grad_(True)  # adapters had frozen the weights below them


def _fuse(module: Any) -> bool:
    """Fuse the adapters of a module that are on into its weights, and remove all; return whether there were any."""
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        if layer.merged:
            layer.unmerge()
        if not layer.disable_adapters:
            layer.merge()
    if layers:
        recurse_remove_peft_layers(module)
        del module.peft_config
        module._hf_peft_config_loaded = False
    return bool(layers)


@contextmanager
def off(network: Any) -> Iterator[None]:
    """Switch the adapter of a network off within the context."""
    network.disable_lora()
    try:
        yield
    finally:
        network.enable_lora()


def layers(module: Any) -> dict[str, Tensor]:
    """Return the adapter's weights under the names diffusers uses, which for transformers alone are peft's."""
    found = get_peft_model_state_dict(module, adapter_name=_NAME)
    if isinstance(module, UNet2DConditionModel):
        return dict(convert_state_dict_to_diffusers(found))
    if isinstance(module, CLIPTextModel):
        # Files have the names of transformers below version 5, which newer ones read as well.
        found = {f"text_model.{name}": values for name, values in found.items()}
    return dict(convert_state_dict_to_diffusers(found) if isinstance(module, (CLIPTextModel, _Projected)) else found)


def trained(pipeline: Any) -> dict[str, dict[str, Tensor]]:
    """Return the weights of the adapter to train by part of the pipeline, see `layers`; {} without an adapter."""
    parts = {name: getattr(pipeline, name, None) for name in ("unet", "transformer", *ENCODERS)}
    return {name: layers(part) for name, part in parts.items() if part is not None and present(part)}


def alpha_of(network: Any) -> float:
    """Return the alpha of the adapter to train."""
    adapted = next(part for part in network.modules() if _NAME in getattr(part, "scaling", {}))
    return float(adapted.r[_NAME] * adapted.scaling[_NAME])


def save(pipeline: Any, parts: Mapping[str, Mapping[str, Tensor]], folder: Path, alpha: float | None = None) -> None:
    """Write an adapter into a folder: for stock diffusers, and for web UIs if these read it.

    pipeline  the pipeline, of whose parts the adapter may have been merged since
    parts     its tensors by part, see `trained`
    alpha     of the adapter; None: its rank
    """
    first = next(iter(parts.values()))
    ends = (".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight")
    rank = next(len(values) for name, values in first.items() if name.endswith(ends))
    arguments: dict[str, Any] = {f"{part}_lora_layers": layers for part, layers in parts.items()}
    if alpha not in (None, rank):
        for part, layers in parts.items():
            # Without this, diffusers takes the rank for alpha.
            modules = sorted({name.partition(".lora")[0].removeprefix("text_model.") for name in layers})
            arguments[f"{part}_lora_adapter_metadata"] = {"r": rank, "lora_alpha": alpha, "target_modules": modules}
    pipeline.save_lora_weights(folder, **arguments, weight_name=adapters.FILE)
    kind = "unet" if hasattr(pipeline, "unet") else "transformer"
    named = kohya.renamed(getattr(pipeline, kind), parts, alpha or rank)
    if named is not None:
        save_file(named, folder / kohya.FILE)
