"""Precisions in which a pipeline holds its weights."""

from typing import Any, Literal

import sage.torchvision_ops  # noqa: F401

import torch
from torch import Tensor, nn

Precision = Literal["bf16", "fp8", "fp32"]
_STORED = torch.float8_e4m3fn


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the precision in which a pipeline is loaded and computes."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


class StoredLinear(nn.Linear):
    """A linear layer whose weights are stored in 8-bit floats (e4m3), and computed with in the input's precision."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the output in the input's precision."""
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)


def store(network: Any) -> None:
    """Store the weights of a network's linear layers in 8-bit floats, in its blocks alone, which have nearly all.

    What is stored is not trained. LoRAs are left as they are, and what lies outside the blocks, too: embeddings and the
    last layer. Layers that are stored already stay so.
    """
    for name, module in network.named_modules():
        if type(module) is nn.Linear and "block" in name and "lora_" not in name:
            module.requires_grad_(False)
            module.weight.data = module.weight.data.to(_STORED)
            module.__class__ = StoredLinear
