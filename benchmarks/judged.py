"""What stage evaluate sees in pictures of composed figures, for benchmarks that keep it: features, attributes right."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from flows.machine import device
from sage.data.dataset import Example
from sage.evaluation.attributes import load_judge
from sage.evaluation.extractors import EfficientNetLite0, read_images
from sage.evaluation.figures import ImageFeatures

JUDGE = Path("models/attributes")


class Seen:
    """EfficientNet-Lite0 and the judge of attributes."""

    def __init__(self) -> None:
        """Load both."""
        self._extract, self._judge = EfficientNetLite0(device()), load_judge(JUDGE)

    def __call__(self, examples: Sequence[Example], images: Iterable[np.ndarray]) -> np.ndarray:
        """Return a row for each image, (n, width + 1): its features, and the share of what is asked that it shows."""
        found = list(images)
        verdicts = self._judge.right(found, [one.family for one in examples], [one.asked for one in examples])
        shares = [np.mean(list(verdict.values())) for verdict in verdicts]
        return np.column_stack([self._extract(found), shares]).astype(np.float32)

    def real(self, examples: Sequence[Example]) -> np.ndarray:
        """Return the rows of the held-out images themselves."""
        return self(examples, read_images(example.image for example in examples))


def as_features(rows: np.ndarray) -> ImageFeatures:
    """Return rows of shape (prompts, seeds, width + 1) in the form that statistics take."""
    return ImageFeatures(rows[..., :-1], rows[..., -1])
