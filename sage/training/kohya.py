"""The names that kohya's sd-scripts give to a LoRA's tensors, which web UIs read: for Stable Diffusion and SDXL.

`lora_unet_MODULE.lora_down.weight`, `.lora_up.weight` and `.alpha`, with "_" for the "." of the module. SDXL's modules
have the names of its first release: `input_blocks_4_1` is the attention `down_blocks.1.attentions.0` of diffusers. Text
encoders have `lora_te_MODULE`, of SDXL `lora_te1_` and `lora_te2_`.
"""

import re
from collections.abc import Mapping
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

FILE = "kohya_lora_weights.safetensors"
# A tensor of `sage.training.lora.layers`: the module, then the part under diffusers' names or peft's.
_PART = re.compile(r"(.+)\.(?:lora(?:_linear_layer)?\.(?P<way>down|up)|lora_(?P<letter>A|B))\.weight")
_ATTENTION = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)")


def renamed(network: Any, parts: Mapping[str, Mapping[str, Tensor]], alpha: float) -> dict[str, Tensor] | None:
    """Return an adapter's tensors under kohya's names; None if the network is no U-Net, for which there are none.

    parts  the adapter's tensors under diffusers' names, by part of the pipeline
    alpha  the adapter's alpha, the same in all modules
    """
    if not isinstance(network, UNet2DConditionModel):
        return None
    sdxl = network.config["addition_embed_type"] == "text_time"
    prefixes = {"unet": "unet", "text_encoder": "te1" if sdxl else "te", "text_encoder_2": "te2"}
    found = {}
    for kind, layers in parts.items():
        for name, values in layers.items():
            match = _PART.fullmatch(name)
            assert match, f"{name} is no LoRA tensor"
            module, part = match[1], match["way"] or {"A": "down", "B": "up"}[match["letter"]]
            if kind == "unet" and sdxl:
                module = _first_release(module, network.config["layers_per_block"])
            place = f"lora_{prefixes[kind]}_{module.replace('.', '_')}"
            found[f"{place}.lora_{part}.weight"] = values
            found[f"{place}.alpha"] = torch.tensor(float(alpha))
    return found


def _first_release(module: str, layers_per_block: int) -> str:
    """Return the name of an attention module in the first release of SDXL, which numbers all blocks in a row."""
    if module.startswith("mid_block.attentions.0."):
        return module.replace("mid_block.attentions.0", "middle_block.1")
    match = _ATTENTION.fullmatch(module)
    assert match, f"{module} is no attention layer"
    way, block, layer, rest = match.groups()
    place = int(block) * (layers_per_block + 1) + int(layer)
    # Before the first block on the way down is the convolution of the input.
    return f"input_blocks.{place + 1}.1.{rest}" if way == "down" else f"output_blocks.{place}.1.{rest}"
