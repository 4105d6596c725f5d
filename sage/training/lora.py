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

from sage.errors import ConfigurationError, UnsupportedError
from sage.randomness import generator
from sage.sampling import adapters
from sage.training import kohya

FILE = "pytorch_lora_weights.safetensors"
# The name of the adapter that is trained; adapters of other names are the ones that a pipeline came with.
_NAME = "trained"
# The attention layers, including those of SD 3's text stream (add_*), and the feed-forward layers after them.
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
_TARGETS += ["ff.net.0.proj", "ff.net.2"]


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
        config = LoraConfig(
            r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=list(targets or _TARGETS)
        )
        network.add_adapter(config, adapter_name=_NAME)
    cast_training_params(network)


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


def resume(pipeline: Any, path: Path, rank: int, alpha: int | None = None) -> str:
    """Load an earlier adapter of the pipeline's network to train it on, and freeze the rest; return the file's SHA-256.

    path         a safetensors file or a folder with one, under diffusers' or kohya's names
    rank, alpha  what is expected; alpha None: the rank

    Raises UnsupportedError and DataError as `sage.sampling.adapters.load` does, and ConfigurationError if the adapter
    has another rank or alpha than expected, or adapts what is not trained: text encoders, a U-Net outside its attention
    blocks.
    """
    found = adapters.load(pipeline, {_NAME: path})[_NAME]
    parts = sorted(name for name, names in pipeline.get_list_adapters().items() if _NAME in names)
    if parts not in (["unet"], ["transformer"]):
        raise ConfigurationError(
            f"{path} adapts {', '.join(parts)}, but only the denoiser is trained; fuse it into the base instead"
        )
    network = getattr(pipeline, parts[0])
    adapted = {name: part for name, part in network.named_modules() if _NAME in getattr(part, "scaling", {})}
    if odd := sorted(name for name in adapted if _inside(network) not in name):
        raise ConfigurationError(f"{path} adapts {odd[0]}, but of a U-Net only attention blocks are trained")
    shapes = {(part.r[_NAME], part.r[_NAME] * part.scaling[_NAME]) for part in adapted.values()}
    if shapes != {(rank, alpha or rank)}:
        said = ", ".join(f"rank {r} with alpha {a:g}" for r, a in sorted(shapes))
        raise ConfigurationError(
            f"{path} has {said}, but rank {rank} with alpha {alpha or rank} is to be trained; set both as in the file"
        )
    network.requires_grad_(False)
    for name, values in network.named_parameters():
        values.requires_grad_("lora_" in name)
    cast_training_params(network)
    return found


def present(network: nn.Module) -> bool:
    """Return whether a network has an adapter to train."""
    return _NAME in getattr(network, "peft_config", {})


def fuse(pipeline: Any) -> None:
    """Fuse the LoRAs that a pipeline came with into its weights: it draws the same, and training continues from there.

    A LoRA that is switched off is removed. An adapter to train stays as it is.
    """
    modules: list[Any] = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    for module in modules:
        if present(module):
            continue
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
            module.requires_grad_(True)  # adapters had frozen the weights below them


@contextmanager
def off(network: Any) -> Iterator[None]:
    """Switch the adapter of a network off within the context."""
    network.disable_lora()
    try:
        yield
    finally:
        network.enable_lora()


def layers(network: Any) -> dict[str, Tensor]:
    """Return the adapter's weights under the names diffusers uses, which for U-Nets differ from peft's."""
    layers = get_peft_model_state_dict(network, adapter_name=_NAME)
    return dict(convert_state_dict_to_diffusers(layers) if isinstance(network, UNet2DConditionModel) else layers)


def alpha_of(network: Any) -> float:
    """Return the alpha of the adapter to train."""
    adapted = next(part for part in network.modules() if _NAME in getattr(part, "scaling", {}))
    return float(adapted.r[_NAME] * adapted.scaling[_NAME])


def save(pipeline: Any, layers: Mapping[str, Tensor], folder: Path, alpha: float | None = None) -> None:
    """Write an adapter of the pipeline's network into a folder: for stock diffusers, and for web UIs if these read it.

    pipeline  the pipeline, of whose network the adapter may have been merged since
    layers    its tensors, see `layers`
    alpha     of the adapter; None: its rank
    """
    kind = "unet" if hasattr(pipeline, "unet") else "transformer"
    rank = next(
        len(values) for name, values in layers.items() if name.endswith((".lora_A.weight", ".lora.down.weight"))
    )
    metadata = {}
    if alpha not in (None, rank):
        modules = sorted({name.partition(".lora")[0] for name in layers})
        # Without this, diffusers takes the rank for alpha.
        metadata[f"{kind}_lora_adapter_metadata"] = {"r": rank, "lora_alpha": alpha, "target_modules": modules}
    pipeline.save_lora_weights(folder, **{f"{kind}_lora_layers": layers}, **metadata, weight_name=FILE)
    named = kohya.renamed(getattr(pipeline, kind), layers, alpha or rank)
    if named is not None:
        save_file(named, folder / kohya.FILE)


def merge(network: Any) -> None:
    """Merge the adapter into the network's weights and remove it."""
    network.fuse_lora()
    network.unload_lora()
