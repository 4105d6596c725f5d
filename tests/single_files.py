"""A tiny Stable Diffusion as one file, with the names of weights that web UIs use."""

import re
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file

_UNET = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]
_VAE = DIFFUSERS_TO_LDM_MAPPING["vae"]
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write(pipe: Any, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the networks of a Stable Diffusion pipeline with two blocks of one layer each, as `tiny` makes it."""
    weights = {f"model.diffusion_model.{_unet(name)}": value for name, value in pipe.unet.state_dict().items()}
    weights |= {f"first_stage_model.{_vae(name)}": value for name, value in pipe.vae.state_dict().items()}
    for name, value in pipe.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({name: value.to(dtype).contiguous() for name, value in weights.items()}, file)


def configuration(pipe: Any, folder: Path) -> Path:
    """Write a pipeline without its weights and return the folder."""
    pipe.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def _unet(name: str) -> str:
    if name in _UNET:
        return str(_UNET[name])
    kinds = {"resnets": _RESNET, "attentions": {}}
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, number, rest = found[1], int(found[2]), found[3]
        return f"middle_block.{2 * number + (kind == 'attentions')}.{_renamed(rest, kinds[kind])}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    assert found, name
    way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    side, place = ("input", 1 + 2 * block) if way == "down" else ("output", 2 * block)
    if kind == "downsamplers":
        return f"input_blocks.{place + 1}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{place + 1}.2.{rest}"
    return f"{side}_blocks.{place + layer}.{int(kind == 'attentions')}.{_renamed(rest, kinds[kind])}"


def _vae(name: str) -> str:
    if name in _VAE:
        return str(_VAE[name])
    name = name.replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        start, rest = name.split("mid_block.attentions.0.")
        return f"{start}mid.attn_1.{_renamed(rest, _ATTENTION)}"
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{1 - int(found[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{1 - int(found[1])}.upsample", name)


def _renamed(name: str, names: dict[str, str]) -> str:
    """Return a name whose first part is replaced."""
    for old, new in names.items():
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name
