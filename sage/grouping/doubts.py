"""Doubts about groups: why the encoder may take prompts of a set for alike that have little in common."""

import unicodedata
from collections.abc import Sequence

import numpy as np

from sage.grouping.boilerplate import boilerplate, mean_cosine
from sage.grouping.groups import usable
from sage.grouping.policy import By

_SHOWN = 8
# Mean cosine from which a set is suspicious: 0.2 for unrelated prompts, 0.3 for those of figures.
_ALIKE = 0.4


def doubts(prompts: Sequence[str], embeddings: np.ndarray, threshold: float, by: By | None = None) -> list[str]:
    """Return sentences for a user whose prompts are grouped by their embeddings, shape (n, d), at a threshold.

    `by` is the space of the embeddings: first predictions are of whole prompts, and know nothing of scripts; a
    distilled encoder reads whole prompts through the sentence encoder.
    """
    found = []
    if by == "prediction":
        alone = int((~usable(embeddings)).sum())
        return [f"{alone} prompts have no finite first prediction, so each is a group of its own"] if alone else []
    if by == "distilled":
        return _strange(prompts)
    if cut := boilerplate(prompts):
        shown = ", ".join(phrase[:50] for phrase in cut[:_SHOWN]) + (", ..." if len(cut) > _SHOWN else "")
        found.append(f"prompts are compared without {len(cut)} phrases that more than a quarter of them have: {shown}")
    if alone := int((~usable(embeddings)).sum()):
        found.append(f"{alone} prompts have no usable embedding, so each is a group of its own")
    # Two prompts may well be alike; of three or more that are so on average, what they share may be boilerplate.
    if len(prompts) > 2 and (mean := mean_cosine(embeddings)) >= max(threshold, _ALIKE):
        found.append(
            f"these prompts are all alike to the encoder: their mean cosine is {mean:.2f}, of unrelated prompts about "
            "0.1 to 0.2; if what they have in common is not their subject, raise the threshold or share nothing"
        )
    return found + _strange(prompts)


def _strange(prompts: Sequence[str]) -> list[str]:
    strange = sum(map(other_script, prompts))
    return (
        [
            f"{strange} prompts are in a script other than Latin: the encoder was trained on English and rates "
            "unrelated prompts in other scripts as similar (docs/grouping.md); check the least similar groups, or "
            "raise the threshold"
        ]
        if strange
        else []
    )


def other_script(text: str) -> bool:
    """Return whether more than half of a prompt's letters are not Latin."""
    letters = [character for character in text[:1000] if character.isalpha()]
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    return 2 * latin < len(letters)
