"""How much memory fine-tuning takes, read from the shapes of its tensors; nothing is computed."""

from dataclasses import dataclass
from math import prod
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage.training import lora

_BYTES = 4  # weights, optimizer, latents and conditions are float32


@dataclass(frozen=True)
class Memory:
    """Bytes: the pipeline's weights and a frozen copy; gradients, AdamW and average; what backward needs.

    And `data`, the bytes of latents and text states, which lie on the disk (`sage.training.stored`).
    """

    weights: int
    training: int
    data: int
    activations: int

    @property
    def certain(self) -> int:
        """All but the activations, which depend on the kernels that the device has."""
        return self.weights + self.training

    @property
    def total(self) -> int:
        """All of it."""
        return self.certain + self.activations


def estimate(
    pipe: Any,
    size: tuple[int, int],
    *,
    items: int,
    images: int,
    captions: int,
    rank: int | None,
    consistency: bool,
    checkpointing: bool,
) -> Memory:
    """Return the memory that fine-tuning a shared-sampling pipeline takes beside the libraries, and its data.

    size           height and width of the images in pixels
    items          items of one network call
    images         images of the training split
    captions       different captions of the training split
    rank           rank of the adapter; None: all weights are trained
    consistency    whether a frozen base is needed, a copy unless there is an adapter
    checkpointing  whether activations are recomputed

    Activations are counted in float32 and with plain attention; bf16 and fused attention take less. Raises
    UnsupportedError for a network that takes no adapter.
    """
    options = pipe._options | {"size": size}
    with torch.no_grad():
        condition = {name: rows[:, 0] for name, rows in pipe._encode(["a"], None, False, {}, options).items()}
    network = pipe._network
    with torch.device("meta"):
        twin = type(network).from_config(network.config).train()
    if rank is not None:
        lora.add(twin, rank, 0)
    if checkpointing:
        twin.enable_gradient_checkpointing()
    trained = sum(weight.numel() for weight in twin.parameters() if weight.requires_grad)
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    weights = sum(weight.numel() for part in parts for weight in part.parameters())
    if consistency and rank is None:
        weights += trained
    shape = pipe._latents_shape(options)
    text = sum(prod(rows.shape[1:]) for rows in condition.values())
    return Memory(
        _BYTES * weights,
        _BYTES * 4 * trained,
        _BYTES * (images * prod(shape) + captions * text),
        _saved(pipe, twin, torch.empty(items, *shape, device="meta"), condition, options),
    )


def _saved(pipe: Any, twin: Any, x: Tensor, condition: dict[str, Tensor], options: dict[str, Any]) -> int:
    """Return the bytes that a forward pass of a network on the device "meta" keeps for the backward pass."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage gets its number
        return tensor

    call = pipe._begin_call()
    vars(call)["unet" if hasattr(pipe, "unet") else "transformer"] = twin
    rows = {name: values[:1].to("meta").expand(len(x), *values.shape[1:]) for name, values in condition.items()}
    time = torch.zeros(len(x), device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        call._predict(x, time, rows, 1.0, options)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
