"""LoRA adapters (Hu et al., 2022) with peft, saved in the format that stock diffusers loads."""

from collections.abc import Iterator, Mapping
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
from torch import Tensor, nn

from sage.errors import ConfigurationError, UnsupportedError
from sage.randomness import generator

FILE = "pytorch_lora_weights.safetensors"
# The name of the adapter that is trained; adapters of other names are the ones that a pipeline came with.
_NAME = "trained"
# The attention layers, including those of SD 3's text stream (add_*), and the feed-forward layers after them.
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
_TARGETS += ["ff.net.0.proj", "ff.net.2"]


def add(network: Any, rank: int, seed: int) -> None:
    """Freeze a diffusers network and add an adapter, initialised from the seed so that the output does not change.

    Raises UnsupportedError for a network whose diffusers class takes no adapters, and ConfigurationError for one that
    has an adapter already.
    """
    if not hasattr(network, "add_adapter"):
        raise UnsupportedError(
            f"{type(network).__name__} takes no adapter in diffusers; fine-tune all weights (finetune.adapter: null)."
        )
    if found := sorted(getattr(network, "peft_config", {})):
        raise ConfigurationError(
            f"{type(network).__name__} has the adapter {', '.join(found)} already; fuse it first (lora.fuse)."
        )
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(generator(seed, "adapter").initial_seed())
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=_TARGETS)
        network.add_adapter(config, adapter_name=_NAME)
    cast_training_params(network)


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


def save(pipeline: Any, layers: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter of the pipeline's network into a folder, for `load_lora_weights` of the stock class."""
    kind = "unet" if hasattr(pipeline, "unet") else "transformer"
    pipeline.save_lora_weights(folder, **{f"{kind}_lora_layers": layers}, weight_name=FILE)


def merge(network: Any) -> None:
    """Merge the adapter into the network's weights and remove it."""
    network.fuse_lora()
    network.unload_lora()
