"""Judges of alignment: how well an image shows what its prompt says. A judge is a folder; its config.json tells which.

| judge | score of an image | for |
|---|---|---|
| attributes | share of the attributes asked for that it shows (`sage.evaluation.attributes`) | composed figures |
| dual encoder | cosine with its prompt (`sage.evaluation.alignment`) | the data that the encoder was trained on |
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from sage.data.dataset import Example
from sage.data.shards import ImageFile
from sage.errors import MetricError
from sage.evaluation import alignment, attributes
from sage.evaluation.extractors import read_images
from sage.grouping.embedding import embed


@dataclass(frozen=True)
class Scores:
    """What a judge says of images.

    values: score of each image, (prompts, seeds).
    parts: for each attribute, whether an image shows it, as 1 or 0, (prompts, seeds); NaN if its prompt does not ask.
    """

    values: np.ndarray
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)


class Judge(Protocol):
    """A judge of alignment; `name` is recorded beside the figures, which are comparable within one judge only."""

    @property
    def name(self) -> str:
        """What the score is called."""

    def __call__(
        self, examples: Sequence[Example], features: np.ndarray, images: Sequence[Sequence[ImageFile]]
    ) -> Scores:
        """Return the scores of the images of each example and seed.

        `features` are the image features (prompts, seeds, width), `images` the image files as [prompt][seed].
        """


@dataclass(frozen=True)
class DualEncoderJudge:
    """The cosine of image and prompt in a dual encoder."""

    encoder: alignment.DualEncoder
    name: str = "dual encoder"

    def __call__(
        self, examples: Sequence[Example], features: np.ndarray, images: Sequence[Sequence[ImageFile]]
    ) -> Scores:
        """Return the cosines."""
        texts = _embedded(tuple(example.text for example in examples))
        return Scores(alignment.text_image_cosines(self.encoder, features, texts))


@lru_cache(maxsize=1)  # the arms of an evaluation have the same prompts
def _embedded(texts: tuple[str, ...]) -> np.ndarray:
    return embed(list(texts))


@dataclass(frozen=True)
class AttributesJudge:
    """The share of the attributes that a prompt asks for and an image shows; the style is one of them."""

    judge: attributes.AttributeJudge
    name: str = "attributes right"

    def __call__(
        self, examples: Sequence[Example], features: np.ndarray, images: Sequence[Sequence[ImageFile]]
    ) -> Scores:
        """Return the shares; raise MetricError for an example without known attributes."""
        if missing := [example.id for example in examples if not example.asked]:
            raise MetricError(
                f"{len(missing)} prompts, first {missing[0]}, have no known attributes, so the attribute judge cannot "
                "judge them. Give stage evaluate another judge (--alignment in dvc.yaml), or set prepare.source to "
                "figures."
            )
        seeds = len(images[0]) if images else 0
        each = [example for example in examples for _ in range(seeds)]
        files = read_images(path for row in images for path in row)
        found = self.judge.right(files, [one.family for one in each], [one.asked for one in each])
        names = sorted({name for verdict in found for name in verdict})
        shown = {
            name: np.array([verdict.get(name, np.nan) for verdict in found], float).reshape(len(images), seeds)
            for name in names
        }
        values = np.array([np.mean(list(verdict.values())) for verdict in found]).reshape(len(images), seeds)
        return Scores(values, shown)


def open_judge(folder: Path) -> Judge:
    """Return the judge of a folder; raise CheckpointError if it is missing or damaged."""
    config = folder / "config.json"
    if config.is_file() and "labels" in json.loads(config.read_text(encoding="utf-8")):
        return AttributesJudge(attributes.load_judge(folder))
    return DualEncoderJudge(alignment.load_alignment(folder))
