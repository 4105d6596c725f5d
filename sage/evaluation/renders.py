"""Rendered figures whose attributes are known, to train the attribute judge and to measure it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sage.data.figures import Figure, any_figure, load_style
from sage.evaluation.attributes import PIXELS, STYLE, AttributeClassifier, predict, to_pixels
from sage.precision import autocast
from sage.randomness import generator

_NONE = -100  # target of a head that does not apply to an image, as in torch's cross entropy


def labels_of(styles: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return the words of each attribute of each style; "" if the attribute may be invisible."""
    found = {}
    for name in styles:
        style = load_style(name)
        found[name] = {
            attribute.name: attribute.values() + [""] * bool(attribute.absent or attribute.name in style.hidden)
            for attribute in style.attributes.values()
        }
    return found


@dataclass(frozen=True)
class Renders:
    """Rendered figures: uint8 images (n, PIXELS, PIXELS, 3), and for each head of a classifier a label, (n, heads)."""

    images: Tensor
    targets: Tensor


def render(
    classifier: AttributeClassifier, number: int, seed: str, on_figure: Callable[[int], None] = lambda n: None
) -> Renders:
    """Return `number` random figures, the styles in turn, whatever split their combinations belong to.

    Another `seed` gives other figures. `on_figure(1)` is called after each.
    """
    styles = [load_style(name) for name in classifier.labels]
    images = np.empty((number, PIXELS, PIXELS, 3), np.uint8)
    targets = torch.full((number, len(classifier.heads)), _NONE)
    for row in range(number):
        figure = any_figure(styles[row % len(styles)], random.Random(f"{seed}/{row}"), f"{seed}/{row}")
        images[row] = np.asarray(figure.image(PIXELS))
        targets[row] = _targets(classifier, figure)
        on_figure(1)
    return Renders(torch.from_numpy(images), targets)


def _targets(classifier: AttributeClassifier, figure: Figure) -> Tensor:
    known = {(figure.style, name): words for name, words in figure.attributes.items()} | {(STYLE, STYLE): figure.style}
    return torch.tensor(
        [words.index(known[head]) if head in known else _NONE for head, words in classifier.heads.items()]
    )


def loss(
    classifier: AttributeClassifier, renders: Renders, *, batch_size: int, seed: int
) -> Callable[[int], dict[str, Tensor]]:
    """Return the loss of step k: the cross entropy of every head, over figures drawn at random and disturbed.

    They are shifted, blurred and noisy, because generated images are not as crisp as renders.
    """

    def step_loss(step: int) -> dict[str, Tensor]:
        draws = generator(seed, step)
        rows = torch.randint(len(renders.images), (batch_size,), generator=draws)
        with autocast():
            logits = classifier(disturb(to_pixels(renders.images[rows]), draws))
        targets = renders.targets[rows]
        heads = [
            F.cross_entropy(output.float(), targets[:, head], reduction="sum", ignore_index=_NONE)
            for head, output in enumerate(logits)
        ]
        return {"loss": torch.stack(heads).sum() / (targets != _NONE).sum()}

    return step_loss


def disturb(x: Tensor, draws: torch.Generator, shift: int = 2, noise: float = 0.06) -> Tensor:
    """Return images in [-1, 1], each moved by up to `shift` pixels, partly blurred, and with a little noise."""
    n, _, height, width = x.shape
    padded = F.pad(x, [shift] * 4, mode="replicate")
    down, right = torch.randint(2 * shift + 1, (2, n), generator=draws).tolist()
    x = torch.stack([padded[k, :, down[k] : down[k] + height, right[k] : right[k] + width] for k in range(n)])
    blurred = F.avg_pool2d(F.pad(x, [1] * 4, mode="replicate"), 3, 1)
    blur, strength = torch.rand(2, n, 1, 1, 1, generator=draws)
    disturbed: Tensor = x.lerp(blurred, blur) + noise * strength * torch.randn(x.shape, generator=draws)
    return disturbed


def accuracy(classifier: AttributeClassifier, renders: Renders) -> dict[str, dict[str, float]]:
    """Return the share of figures whose attribute is read right, by style and attribute; the style's own is "style"."""
    found = predict(classifier, renders.images.numpy())
    shares: dict[str, dict[str, float]] = {}
    for head, (style, name) in enumerate(classifier.heads):
        targets = renders.targets[:, head].numpy()
        applies = targets != _NONE
        shares.setdefault(style, {})[name] = float((found[applies, head] == targets[applies]).mean())
    return shares
