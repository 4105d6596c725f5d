"""Boilerplate: tags and phrases that much of a set of prompts has, cut before the prompts are compared.

"masterpiece, best quality, a dragon, 8k" and "masterpiece, best quality, a teapot, 8k" are alike to a sentence encoder,
but what a whole set has in common is no reason to group two of its prompts. docs/grouping.md compares this with
corrections of the embeddings.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

# A phrase is boilerplate if more than this fraction of the prompts has it, and more than LEAST prompts: so few may all
# be meant to share.
SHARE, LEAST = 0.25, 6
# Consecutive words that make a phrase inside a tag; "a red fox in" is shorter.
WORDS = 5
# What separates tags: commas, lines, the brackets and weights of emphasis and LoRA, the marks of JSON, and options.
_SEPARATOR = re.compile(r'[,;:|(){}\[\]<>"\n]+|\s(?=--)|\bBREAK\b')
_WORD = re.compile(r"\w")


def boilerplate(prompts: Sequence[str]) -> list[str]:
    """Return the tags, and the phrases of WORDS words, that much of this set of prompts has, most frequent first."""
    counts = Counter(phrase for prompt in prompts for phrase in dict.fromkeys(_phrases(prompt)))
    least = max(LEAST, SHARE * len(prompts))
    return [phrase for phrase, count in counts.most_common() if count > least]


def distinct(prompts: Sequence[str], phrases: Sequence[str] | None = None) -> list[str]:
    """Return the prompts without the boilerplate; a prompt that has none, or nothing else, stays as it is.

    `phrases` is what to cut, by default `boilerplate(prompts)`.
    """
    cut = frozenset(boilerplate(prompts) if phrases is None else phrases)
    return [_without(prompt, cut) for prompt in prompts] if cut else list(prompts)


def mean_cosine(embeddings: np.ndarray) -> float:
    """Return the mean cosine of all pairs of rows, which have length 1, shape (n, d); 0 for fewer than two rows."""
    rows = embeddings[np.isfinite(embeddings).all(axis=1)]
    n = len(rows)
    return float((np.square(rows.sum(axis=0, dtype=np.float64)).sum() - n) / (n * (n - 1))) if n > 1 else 0.0


def _tags(prompt: str) -> list[str]:
    return [tag for part in _SEPARATOR.split(prompt) if _WORD.search(tag := " ".join(part.split()))]


def _runs(tag: str) -> list[str]:
    words = tag.lower().split()
    return [" ".join(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)]


def _phrases(prompt: str) -> list[str]:
    return [phrase for tag in _tags(prompt) for phrase in (tag.lower(), *_runs(tag))]


def _without(prompt: str, cut: frozenset[str]) -> str:
    kept = []
    found = False
    for tag in _tags(prompt):
        gone = {start + k for start, run in enumerate(_runs(tag)) if run in cut for k in range(WORDS)}
        found = found or bool(gone) or tag.lower() in cut
        if tag.lower() not in cut:
            kept.append(" ".join(word for place, word in enumerate(tag.split()) if place not in gone))
    rest = ", ".join(tag for tag in kept if tag)
    return rest if found and rest else prompt
