"""Judges with tiny random weights in the saved form of the real ones: CLIP, DINOv2, clean-fid's Inception."""

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import sage.torchvision_ops  # noqa: F401

import torch
from tiny import clip_config, clip_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig, Dinov2Config, Dinov2Model


class _Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 2048, 32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


class _Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def inception(file: Path) -> Path:
    """Write a network with the interface of clean-fid's Inception, as TorchScript."""
    torch.manual_seed(0)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(_Network()).save(file)
    return file


def clip(folder: Path) -> Path:
    """Write a CLIP whose text part reads the letters of `tiny.clip_tokenizer`."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = CLIPConfig(text_config=clip_config().to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    _processor(16).save_pretrained(folder)
    clip_tokenizer(folder).save_pretrained(folder)
    return folder


@cache
def own() -> dict[str, object]:
    """Return the settings of section evaluate for images of unknown attributes: a CLIP in a folder of this process."""
    folder, owner = Path(tempfile.mkdtemp(prefix="sage-judge-")), os.getpid()
    # A forked process ends before the tests do.
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder))
    return {"alignment": str(clip(folder)), "references": None}


def dinov2(folder: Path) -> Path:
    """Write a DINOv2."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    _processor(28).save_pretrained(folder)
    return folder


def _processor(size: int) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
