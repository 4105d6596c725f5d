"""Attributes right: the share of the attributes that a prompt asks for and an image of it shows.

The prompts of composed figures (`sage.data.figures`) say exactly what is asked for. A small network, trained on
rendered figures only (`sage.evaluation.renders`), reads each attribute from an image. An attribute that it cannot read
from renders that it has not seen is left out of judging.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sage.errors import CheckpointError
from sage.files import new_folder, sha256, write_json

PIXELS = 64
STYLE = "style"  # the head that tells the styles apart
LEAST_ACCURACY = 0.98  # of an attribute on unseen renders; below it the attribute is not judged

Labels = Mapping[str, Mapping[str, Sequence[str]]]
Asked = Mapping[str, str]


class AttributeClassifier(nn.Module):
    """A convolutional network with a head for the style and one for each attribute of each style."""

    def __init__(self, labels: Labels, width: int = 48) -> None:
        """Create the network, untrained; `labels` are the words by style and attribute, `width` the first channels."""
        super().__init__()
        self.labels = {style: {name: list(words) for name, words in known.items()} for style, known in labels.items()}
        self.heads = {(STYLE, STYLE): list(self.labels)} | {
            (style, name): words for style, known in self.labels.items() for name, words in known.items()
        }
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 4, 2, 1)
        self.blocks = nn.Sequential(*(_Block(a, b) for a, b in pairwise(widths)))
        self.outputs = nn.Linear(4 * widths[-1], sum(map(len, self.heads.values())))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of each head for images in [-1, 1] of shape (n, 3, PIXELS, PIXELS)."""
        features = F.adaptive_avg_pool2d(self.blocks(self.stem(pixels)), 2).flatten(1)
        return self.outputs(features).split([len(words) for words in self.heads.values()], dim=1)  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Two convolutions, the first of stride 2, around a shortcut."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, width), nn.GroupNorm(8, out)])
        self.convs = nn.ModuleList([nn.Conv2d(width, out, 3, 2, 1), nn.Conv2d(out, out, 3, padding=1)])
        self.shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.silu(norm(y)))
        return y + self.shortcut(F.avg_pool2d(x, 2))  # type: ignore[no-any-return]


def to_pixels(images: Tensor) -> Tensor:
    """Return uint8 images (n, height, width, 3) as floats in [-1, 1] of shape (n, 3, PIXELS, PIXELS)."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    if x.shape[-2:] == (PIXELS, PIXELS):
        return x
    return F.interpolate(x, (PIXELS, PIXELS), mode="bilinear", antialias=True)


@torch.no_grad()
def predict(classifier: AttributeClassifier, images: Iterable[np.ndarray], batch_size: int = 64) -> np.ndarray:
    """Return the number of the word that each head reads, (n, heads), for uint8 images (height, width, 3)."""
    found = [np.zeros((0, len(classifier.heads)), np.int64)]
    remaining = iter(images)
    while part := list(islice(remaining, batch_size)):
        # One at a time: their sizes may differ.
        x = torch.cat([to_pixels(torch.tensor(image)[None]) for image in part])
        found.append(torch.stack([logits.argmax(1) for logits in classifier(x)], 1).numpy())
    return np.concatenate(found)


@dataclass(frozen=True)
class AttributeJudge:
    """A trained classifier and what it reads reliably.

    classifier: the network.
    accuracy: its accuracy on unseen renders, by style and attribute.
    """

    classifier: AttributeClassifier
    accuracy: Mapping[str, Mapping[str, float]]

    @property
    def judged(self) -> set[tuple[str, str]]:
        """The heads, (style, attribute), that reach LEAST_ACCURACY."""
        return {
            (style, name)
            for style, known in self.accuracy.items()
            for name, share in known.items()
            if share >= LEAST_ACCURACY
        }

    def right(
        self, images: Iterable[np.ndarray], styles: Sequence[str], asked: Sequence[Asked]
    ) -> list[dict[str, bool]]:
        """Return for each image which of the attributes that were asked for it shows, the style among them.

        images  uint8 images (height, width, 3)
        styles  the style asked for, one for each image
        asked   the words asked for, by attribute, one mapping for each image; what cannot be judged is left out

        Raises CheckpointError for a style, an attribute or words that the classifier does not know.
        """
        columns = {head: column for column, head in enumerate(self.classifier.heads)}
        found = []
        for row, style, wanted in zip(predict(self.classifier, images), styles, asked, strict=True):
            known = {(STYLE, STYLE): style} | {(style, name): words for name, words in wanted.items()}
            for head, words in known.items():
                self._check(head, words)
            found.append(
                {
                    head[1]: bool(row[columns[head]] == self.classifier.heads[head].index(words))
                    for head, words in known.items()
                    if head in self.judged
                }
            )
        return found

    def _check(self, head: tuple[str, str], words: str) -> None:
        if words not in self.classifier.heads.get(head, ()):
            raise CheckpointError(
                f"the attribute judge does not know {words!r} as {head[1]} of {head[0]!r}. Run "
                "`sage pretrain attributes` with the styles of params.yaml."
            )


def save(judge: AttributeJudge, folder: Path, trained_on: str) -> None:
    """Write the weights, and a config.json with labels, accuracies and what it was trained on, atomically."""
    card = folder / "README.md"
    text = card.read_bytes() if card.exists() else None
    with new_folder(folder) as temporary:
        weights = temporary / "model.safetensors"
        save_file({name: value.half() for name, value in judge.classifier.state_dict().items()}, weights)
        weights.chmod(0o644)  # safetensors makes files that only their owner can read
        if text is not None:
            (temporary / card.name).write_bytes(text)
        config = {
            "labels": judge.classifier.labels,
            "width": judge.classifier.stem.out_channels,
            "accuracy": judge.accuracy,
            "trained_on": trained_on,
            "sha256": sha256(weights),
        }
        write_json(temporary / "config.json", config)


def load_judge(folder: Path) -> AttributeJudge:
    """Return a saved judge; raise CheckpointError if it is missing or damaged."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    missing = [path.name for path in (weights, config) if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}. Run `sage pretrain attributes` or restore models/."
        )
    facts = json.loads(config.read_text(encoding="utf-8"))
    # Hash and parse the same bytes, so that the file cannot change in between.
    content = weights.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != facts["sha256"]:
        raise CheckpointError(f"{weights} has SHA-256 {found}, but {config} says {facts['sha256']}: it is damaged.")
    classifier = AttributeClassifier(facts["labels"], facts["width"])
    classifier.load_state_dict({name: value.float() for name, value in load(content).items()})
    return AttributeJudge(classifier.requires_grad_(False).eval(), facts["accuracy"])
