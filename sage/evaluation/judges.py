"""Judges of alignment: how well an image shows what its prompt says. The config.json of a judge's folder tells which.

| judge | score of an image | for |
|---|---|---|
| attributes | share of the attributes asked for that it shows (`sage.evaluation.attributes`) | composed figures |
| CLIP score | 100 max(cosine, 0) of CLIP (Hessel et al., 2021, with the 100 that papers write) | photographs and art |
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import sage.torchvision_ops  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F

from sage.data.dataset import Example
from sage.data.shards import ImageFile
from sage.errors import CheckpointError, MetricError
from sage.evaluation import attributes
from sage.evaluation.extractors import read_images
from sage.evaluation.saved_networks import check_image_processor, config, find, weights_digest

log = logging.getLogger(__name__)
# What evaluate.alignment may say instead of a folder or hub name.
_NAMED = {"attributes": "models/attributes", "clip": "openai/clip-vit-large-patch14"}
_BATCH = 16


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

    @property
    def description(self) -> str:
        """Folder or hub name, and a hash of its files."""

    def __call__(self, examples: Sequence[Example], images: Sequence[Sequence[ImageFile]]) -> Scores:
        """Return the scores of the images of each example and seed; `images` are files as [prompt][seed]."""


@dataclass(frozen=True)
class AttributesJudge:
    """The share of the attributes that a prompt asks for and an image shows; the style is one of them."""

    judge: attributes.AttributeJudge
    description: str
    name: str = "attributes right"

    def __call__(self, examples: Sequence[Example], images: Sequence[Sequence[ImageFile]]) -> Scores:
        """Return the shares; raise MetricError for an example without known attributes."""
        _check_asked(examples)
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


class ClipJudge:
    """The CLIP score, 100 max(cosine, 0), of a CLIPModel that transformers saved."""

    name = "CLIP score"

    def __init__(self, folder: Path, description: str, device: str | torch.device = "cpu") -> None:
        """Load a saved CLIPModel with its image processor and tokenizer."""
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel  # late: other judges do not need it

        self.description = description
        self._network: Any = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        self._network.eval().to(device)
        self._process = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self._tokenize = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._device = device
        self._encoded: dict[str, torch.Tensor] = {}  # the arms of an evaluation have the same prompts

    def __call__(self, examples: Sequence[Example], images: Sequence[Sequence[ImageFile]]) -> Scores:
        """Return the CLIP scores."""
        return Scores(self.scores([example.text for example in examples], images))

    @torch.no_grad()
    def scores(self, texts: Sequence[str], images: Sequence[Sequence[ImageFile]]) -> np.ndarray:
        """Return the CLIP scores of the images of each text, (texts, seeds).

        A warning counts the texts that are longer than CLIP reads.
        """
        self._encode([text for text in dict.fromkeys(texts) if text not in self._encoded])
        values = np.zeros((len(images), len(images[0]) if images else 0))
        places = [(row, seed) for row in range(values.shape[0]) for seed in range(values.shape[1])]
        for start in range(0, len(places), _BATCH):
            batch = places[start : start + _BATCH]
            files = [file.copy() for file in read_images(images[row][seed] for row, seed in batch)]
            pixels = self._process(images=files, return_tensors="pt")["pixel_values"].to(self._device)
            seen = F.normalize(self._network.get_image_features(pixel_values=pixels).pooler_output)
            said = torch.stack([self._encoded[texts[row]] for row, _ in batch])
            values[tuple(zip(*batch, strict=True))] = 100 * (seen * said).sum(-1).clamp(min=0).cpu().numpy()
        return values

    def _encode(self, texts: Sequence[str]) -> None:
        """Remember the normalized features of texts."""
        length = self._network.config.text_config.max_position_embeddings
        if long := sum(len(self._tokenize(text)["input_ids"]) > length for text in texts):
            log.warning("CLIP reads only the first %d tokens; %d of %d prompts are longer", length, long, len(texts))
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            tokens = self._tokenize(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
            found = F.normalize(self._network.get_text_features(**tokens.to(self._device)).pooler_output)
            self._encoded |= dict(zip(batch, found, strict=True))


def find_judge(choice: str, examples: Sequence[Example]) -> Path:
    """Return the folder of the judge that evaluate.alignment names.

    Raises CheckpointError if it cannot be had, MetricError if it cannot judge these examples.
    """
    name = _NAMED.get(choice, choice)
    if choice == "attributes" and not Path(name).is_dir():
        raise CheckpointError(
            f"there is no folder {name}, the judge of attributes. Run `sage pretrain attributes`, or restore models/."
        )
    folder = find(name)
    found = config(folder)
    kind = found.get("model_type")
    if kind == "clip":
        check_image_processor(name, folder)
    elif kind is not None:
        raise CheckpointError(
            f"{name} is a model of type {kind!r}, which judges no alignment; give a CLIP, or a folder of "
            "`sage pretrain attributes`."
        )
    elif "labels" in found:
        _check_asked(examples)
    else:
        raise CheckpointError(
            f"{folder / 'config.json'} has neither the model_type of a CLIP nor the labels of `sage pretrain "
            "attributes`, so it judges no alignment."
        )
    return folder


def find_clip(choice: str) -> Path:
    """Return the folder of a CLIP, which judges any prompts; raise CheckpointError if it cannot be had or is none."""
    folder = find_judge(choice, [])
    if "labels" in config(folder):
        raise CheckpointError(
            f"{choice} judges figures by their known attributes, and a list of prompts has none; give a CLIP: clip, a "
            "folder or a hub name."
        )
    return folder


def open_judge(choice: str, examples: Sequence[Example], device: str | torch.device = "cpu") -> Judge:
    """Return the judge that evaluate.alignment names; errors are those of `find_judge`."""
    folder = find_judge(choice, examples)
    description = f"{_NAMED.get(choice, choice)}, SHA-256 {weights_digest(folder)[:12]}"
    if "labels" in config(folder):
        return AttributesJudge(attributes.load_judge(folder), description)
    return ClipJudge(folder, description, device)


def with_other_captions(examples: Sequence[Example]) -> tuple[list[Example], np.ndarray]:
    """Return for each example that of half the set further on, and whether its text differs."""
    shift = len(examples) // 2
    others = [*examples[shift:], *examples[:shift]]
    return others, np.array([a.text != b.text for a, b in zip(examples, others, strict=True)], bool)


def _check_asked(examples: Sequence[Example]) -> None:
    if missing := [example.id for example in examples if not example.asked]:
        raise MetricError(
            f"{len(missing)} prompts, first {missing[0]}, have no known attributes, so the attribute judge cannot "
            "judge them. Give stage evaluate another judge (evaluate.alignment in params.yaml), or set prepare.source "
            "to figures."
        )
