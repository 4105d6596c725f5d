"""LoRA (Hu et al., 2022) by peft: small matrices beside the frozen weights, in the form that stock diffusers loads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from sage.errors import UnsupportedError
from sage.randomness import generator

FILE = "pytorch_lora_weights.safetensors"
# Attention, also to text that is transformed along with the picture (SD 3), and what follows it in each block.
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
_TARGETS += ["ff.net.0.proj", "ff.net.2"]


def add(network: Any, rank: int, seed: int) -> None:
    """Freeze a diffusers network and give it an adapter, drawn from the seed, that as yet changes nothing.

    Raises UnsupportedError for a network whose stock class loads no adapters.
    """
    if not hasattr(network, "add_adapter"):
        raise UnsupportedError(
            f"{type(network).__name__} takes no adapter in diffusers; fine-tune all weights (finetune.adapter: null)."
        )
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(generator(seed, "adapter").initial_seed())
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=_TARGETS))
    cast_training_params(network)


def present(network: nn.Module) -> bool:
    """Return whether a network has an adapter."""
    return bool(getattr(network, "_hf_peft_config_loaded", False))


@contextmanager
def off(network: Any) -> Iterator[None]:
    """Make a network what it was without its adapter."""
    network.disable_lora()
    try:
        yield
    finally:
        network.enable_lora()


def layers(network: Any) -> dict[str, Tensor]:
    """Return the adapter's weights under diffusers' names, which for U-Nets are older than peft."""
    layers = get_peft_model_state_dict(network)
    return dict(convert_state_dict_to_diffusers(layers) if isinstance(network, UNet2DConditionModel) else layers)


def save(pipeline: Any, layers: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter of the pipeline's network into a folder, as `load_lora_weights` of its stock class reads it."""
    kind = "unet" if hasattr(pipeline, "unet") else "transformer"
    pipeline.save_lora_weights(folder, **{f"{kind}_lora_layers": layers}, weight_name=FILE)


def merge(network: Any) -> None:
    """Add the adapter to the weights and remove it."""
    network.fuse_lora()
    network.unload_lora()
