"""The real images that an arm's images are compared with."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sage.data.dataset import Example
from sage.data.figures import Figure, figure_with, load_style
from sage.data.shards import ImageFile, rgb
from sage.errors import MetricError


@dataclass(frozen=True)
class Render:
    """A composed figure that is drawn, size x size pixels, when it is read."""

    figure: Figure
    size: int

    def read(self) -> bytes:
        """Return the image as a PNG."""
        return self.figure.png(self.size)


def references(examples: Sequence[Example], number: int | None, seed: int) -> list[list[ImageFile]]:
    """Return the references of each example: its own held-out image, or `number` figures drawn for what it asks.

    What a prompt leaves open differs between its figures, so they show all that a model may draw. The same seed gives
    the same figures. Errors are those of `check_references`.
    """
    check_references(examples, number)
    if number is None:
        return [[example.image] for example in examples]
    return [[_render(example, f"{seed}/reference/{example.id}/{k}") for k in range(number)] for example in examples]


def check_references(examples: Sequence[Example], number: int | None) -> None:
    """Raise MetricError if figures are to be drawn for prompts whose attributes are not known."""
    missing = [example.id for example in examples if not example.asked]
    if number is not None and missing:
        raise MetricError(
            f"evaluate.references is {number}, but {len(missing)} prompts, first {missing[0]}, have no known "
            "attributes, so no images can be drawn for them. Set it to null, or prepare.source to figures."
        )


def _render(example: Example, seed: str) -> Render:
    figure = figure_with(load_style(example.family), example.asked, random.Random(seed), seed)
    return Render(figure, rgb(example.image).width)
