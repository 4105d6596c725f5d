"""How much memory fine-tuning takes, read from the shapes of its tensors; nothing is computed."""

import copy
from dataclasses import dataclass
from math import prod
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage.sampling.weights import Precision, dtype_of, store
from sage.training import lora

_BYTES = 4  # what is trained, the optimizer, latents and activations are float32


@dataclass(frozen=True)
class Memory:
    """Bytes: the pipeline's weights and a frozen copy; gradients, AdamW and average; what backward needs.

    And `data`, the bytes of latents and text states, which lie on the disk (`sage.training.stored`). With a frozen base
    in less than float32, `weights` are those that are on the device at once, and `merged` is what the merged float32
    model takes in the machine's memory at the end.
    """

    weights: int
    training: int
    data: int
    activations: int
    merged: int = 0

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
    precision: Precision = "fp32",
    texts: bool = False,
) -> Memory:
    """Return the memory that fine-tuning a shared-sampling pipeline takes beside the libraries, and its data.

    size           height and width of the images in pixels
    items          items of one network call
    images         images of the training split
    captions       different captions of the training split
    rank           rank of the adapter; None: all weights are trained
    consistency    whether a frozen base is needed, a copy unless there is an adapter
    checkpointing  whether activations are recomputed
    precision      of the forward pass; with an adapter the base is frozen in it
    texts          whether text encoders get an adapter, too

    Activations are counted in float32 and with plain attention; bf16 and fused attention take less. Raises
    UnsupportedError for a network that takes no adapter.
    """
    options = pipe._options | {"size": size}
    with torch.no_grad():
        rows = pipe.for_reading(size)._encode(["a"], None, False, {}, options)
    condition = {name: values[:, 0] for name, values in rows.items()}
    network = pipe._network
    kept = "fp32" if rank is None else precision
    with torch.device("meta"):
        twin = type(network).from_config(network.config).to(dtype_of(kept)).train()
    if rank is not None:
        lora.add(twin, rank, 0)
    if kept == "fp8":
        store(twin)
    if checkpointing:
        twin.enable_gradient_checkpointing()
    trained = sum(weight.numel() for weight in twin.parameters() if weight.requires_grad)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    size_of = {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}
    weights, merged = _BYTES * sum(size_of.values()), 0
    if kept != "fp32":
        merged = weights
        encoders, autoencoder = (
            dtype_of(kept).itemsize * sum(size_of.get(name, 0) for name in names) for names in (lora.ENCODERS, ["vae"])
        )
        frozen = sum(weight.nbytes for weight in twin.parameters() if not weight.requires_grad)
        # They are on the device in turns, but encoders with an adapter stay there.
        weights = max(frozen + encoders if texts else frozen, encoders, autoencoder)
    if consistency and rank is None:
        weights += _BYTES * trained
    if texts and rank is not None:
        trained += sum(lora.size(part, rank) for part in lora.trainable_encoders(pipe).values())
    shape = (pipe.vae.config["latent_channels"], *(side // pipe.vae_scale_factor for side in size))
    text = sum(prod(values.shape[1:]) * values.itemsize for values in condition.values())
    return Memory(
        weights,
        _BYTES * (4 if rank is None else 5) * trained,
        _BYTES * images * prod(shape) + captions * text,
        _saved(pipe, twin, torch.empty(items, *shape, device="meta"), condition, size, kept),
        merged,
    )


def _saved(
    pipe: Any, twin: Any, x: Tensor, condition: dict[str, Tensor], size: tuple[int, int], kept: Precision
) -> int:
    """Return the bytes that a forward pass of a network on the device "meta" keeps for the backward pass."""
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage gets its number
        return tensor

    example = copy.copy(pipe)
    # Without its text encoders, whose precision the stock call gives the embeddings.
    vars(example).update(dict.fromkeys(name for name in lora.ENCODERS if hasattr(pipe, name)))
    vars(example).update({"unet" if hasattr(pipe, "unet") else "transformer": twin, "_device": torch.device("meta")})
    rows = {name: values[:1].to("meta").expand(len(x), *values.shape[1:]) for name, values in condition.items()}
    call = example.for_training(2, size, rows, 1.0)
    time = torch.zeros(len(x), device="meta")
    latents, dtype = call.packed(x).to(dtype_of(kept)), dtype_of(kept)
    rows = {name: values.to(dtype) if values.is_floating_point() else values for name, values in rows.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        call._predict(latents, time, rows, 1.0 if pipe.embeds_guidance else 0.0, pipe._options | {"size": size})
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
