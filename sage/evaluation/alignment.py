"""Image-text alignment, measured by a small dual encoder that is trained on real images only, not on generated ones.

Two linear maps project image features and sentence embeddings into one space; alignment is the cosine in that space.
They are trained with a contrastive loss, as in CLIP (Radford et al., 2021): each image must pick its own caption among
the captions of its batch, and each caption its own image.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sage.data.dataset import Example
from sage.errors import CheckpointError
from sage.evaluation.extractors import EfficientNetLite0, read_images
from sage.files import new_folder, sha256, write_json
from sage.grouping.embedding import embed

TEXTS = "all-MiniLM-L6-v2"


class DualEncoder(nn.Module):
    """Two linear maps that project image features and sentence embeddings to unit vectors of one space."""

    def __init__(self, image_width: int, text_width: int, width: int) -> None:
        """Create the maps, untrained; each argument is a number of features, `width` the one of the shared space."""
        super().__init__()
        self.image = nn.Linear(image_width, width)
        self.text = nn.Linear(text_width, width)

    @torch.no_grad()
    def images(self, features: np.ndarray) -> np.ndarray:
        """Return unit vectors of shape (..., width) for image features of shape (..., image width)."""
        return F.normalize(self.image(torch.from_numpy(features)), dim=-1).numpy()

    @torch.no_grad()
    def texts(self, embeddings: np.ndarray) -> np.ndarray:
        """Return unit vectors of shape (n, width) for sentence embeddings of shape (n, text width)."""
        return F.normalize(self.text(torch.from_numpy(embeddings)), dim=-1).numpy()


def text_image_cosines(model: DualEncoder, features: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """Return the alignment of each image with its prompt, of shape (prompts, seeds).

    `features` has shape (prompts, seeds, image width), `embeddings` (prompts, text width).
    """
    return np.asarray((model.images(features) * model.texts(embeddings)[:, None]).sum(-1))


def train(
    features: np.ndarray,
    embeddings: np.ndarray,
    seed: int,
    *,
    width: int = 128,
    steps: int = 500,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    dropout: float = 0.2,
    temperature: float = 0.07,
) -> DualEncoder:
    """Return a dual encoder trained on n pairs of an image and a caption.

    Pairs with equal features or equal embeddings are not used as negatives of each other, because each caption fits
    both images. With the same PyTorch build and thread count, the same `seed` gives the same weights.

    features       float32 image features, (n, image width)
    embeddings     float32 sentence embeddings of the captions, unit vectors, (n, text width)
    seed           of the initial weights, the batches and dropout
    width          dimensions of the shared space
    steps          optimizer steps; the learning rate follows a one-cycle schedule over them
    batch_size     pairs per step
    learning_rate  highest learning rate of the schedule
    weight_decay   weight decay of AdamW
    dropout        probability that an input feature is set to zero
    temperature    divisor of the cosines in the contrastive loss
    """
    random = torch.Generator().manual_seed(seed)
    raw, e = torch.from_numpy(features), torch.from_numpy(embeddings)
    mean, deviation = raw.mean(0), raw.std(0) + 1e-3
    x = (raw - mean) / deviation
    e = e * math.sqrt(e.shape[1])  # unit vectors, scaled to about unit variance per dimension
    model = DualEncoder(x.shape[1], e.shape[1], width)
    for parameter in model.parameters():
        bound = 1 / math.sqrt(parameter.shape[-1])
        nn.init.uniform_(parameter, -bound, bound, generator=random)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=random)[:batch_size]
        images = F.normalize(model.image(_drop(x[rows], dropout, random)), dim=-1)
        texts = F.normalize(model.text(_drop(e[rows], dropout, random)), dim=-1)
        logits, own = images @ texts.T / temperature, torch.arange(len(rows))
        alike = _alike(raw[rows]) | _alike(e[rows])
        logits = logits.masked_fill(alike.fill_diagonal_(False), -torch.inf)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    # Fold the input scaling into the linear maps, so that the saved model takes unscaled inputs.
    with torch.no_grad():
        model.image.weight /= deviation
        model.image.bias.copy_(model.image.bias - model.image.weight @ mean)
        model.text.weight *= math.sqrt(e.shape[1])
    return model.requires_grad_(False)


def _alike(x: Tensor) -> Tensor:
    """Return a boolean matrix of shape (n, n): whether rows i and j of x are equal."""
    kind = np.unique(x.numpy(), axis=0, return_inverse=True)[1]
    return torch.from_numpy(kind[:, None] == kind)


def _drop(x: Tensor, share: float, random: torch.Generator) -> Tensor:
    """Return x after dropout with probability `share`; torch's own dropout takes no random generator."""
    return x * (torch.rand(x.shape, generator=random) >= share) / (1 - share)


def train_alignment(
    examples: Sequence[Example], seed: int, on_batch: Callable[[int], None] = lambda n: None
) -> DualEncoder:
    """Return a dual encoder trained on real images and all their captions.

    `on_batch(k)` is called after each batch of k images whose features were computed.
    """
    extract = EfficientNetLite0()
    features = extract(read_images(example.image for example in examples), on_batch)
    own = np.repeat(np.arange(len(examples)), [len(example.texts) for example in examples])
    # Embed each distinct text once: in another batch its last digits would differ, and equal captions must be equal.
    texts, places = np.unique([text for example in examples for text in example.texts], return_inverse=True)
    return train(features[own], embed(texts.tolist())[places], seed)


def retrieval(model: DualEncoder, features: np.ndarray, embeddings: np.ndarray, k: int) -> tuple[float, float]:
    """Return recall at k in both directions: image to caption, and caption to image.

    `features` has shape (n, image width), `embeddings` (n, text width); row i of both belong together.
    """
    similarity = model.images(features) @ model.texts(embeddings).T
    own = np.diag(similarity)
    better_captions = (similarity > own[:, None]).sum(1)
    better_images = (similarity > own[None, :]).sum(0)
    return float((better_captions < k).mean()), float((better_images < k).mean())


def save(model: DualEncoder, folder: Path, trained_on: str) -> None:
    """Write the weights and a config.json with their hash, feature extractors and training data in words, atomically.

    A model card (README.md) that is already in the folder is kept.
    """
    card = folder / "README.md"
    with new_folder(folder) as temporary:
        weights = temporary / "model.safetensors"
        save_file(model.state_dict(), weights)
        weights.chmod(0o644)  # safetensors makes files that only their owner can read
        if card.exists():
            shutil.copyfile(card, temporary / card.name)
        config = {
            "image_features": EfficientNetLite0.name,
            "sentence_embeddings": TEXTS,
            "image_width": model.image.in_features,
            "text_width": model.text.in_features,
            "width": model.image.out_features,
            "trained_on": trained_on,
            "sha256": sha256(weights),
        }
        write_json(temporary / "config.json", config)


def load_alignment(folder: Path) -> DualEncoder:
    """Return a saved dual encoder.

    Raises CheckpointError if it is missing, damaged, or was trained on the features of other extractors.
    """
    weights, config = folder / "model.safetensors", folder / "config.json"
    missing = [path.name for path in (weights, config) if not path.is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}. Run `sage pretrain alignment` or restore models/.")
    facts = json.loads(config.read_text(encoding="utf-8"))
    # Hash and parse the same bytes, so that the file cannot change in between.
    content = weights.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != facts["sha256"]:
        raise CheckpointError(f"{weights} has SHA-256 {found}, but {config} says {facts['sha256']}: it is damaged.")
    if (facts["image_features"], facts["sentence_embeddings"]) != (EfficientNetLite0.name, TEXTS):
        raise CheckpointError(
            f"{folder} was trained on {facts['image_features']} and {facts['sentence_embeddings']}, but pictures are "
            f"judged by {EfficientNetLite0.name} and {TEXTS}. Run `sage pretrain alignment`."
        )
    model = DualEncoder(facts["image_width"], facts["text_width"], facts["width"])
    model.load_state_dict(load(content))
    return model.requires_grad_(False)
