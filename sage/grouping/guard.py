"""A second view of prompts that a sentence encoder takes for the same: number, colour, negation, name, order.

English words only: what a list does not know is not guarded. What it catches and costs stands in docs/grouping.md.
"""

import re
from collections.abc import Sequence
from typing import Literal, get_args

Kind = Literal["negation", "number", "colour", "name", "order"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_NEGATIONS = frozenset(
    [
        "no",
        "not",
        "without",
        "never",
        "none",
        "nobody",
        "nothing",
        "neither",
        "nor",
        "cannot",
        "isn't",
        "aren't",
        "doesn't",
        "don't",
    ]
)
_COUNTING = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
# No article: "a" says one thing without counting it.
_NUMBERS = {word: str(number) for number, word in enumerate(_COUNTING)} | {
    "single": "1", "pair": "2", "couple": "2", "trio": "3", "dozen": "12",
}  # fmt: skip
_COLOURS = frozenset(
    [
        "red",
        "orange",
        "yellow",
        "green",
        "blue",
        "purple",
        "violet",
        "pink",
        "brown",
        "black",
        "white",
        "grey",
        "gray",
        "golden",
        "silver",
        "turquoise",
    ]
)
_SMALL = frozenset(
    ["a", "an", "the", "of", "in", "on", "at", "to", "with", "and", "or", "is", "are", "by", "for", "from"]
)


def differences(first: str, second: str) -> set[Kind]:
    """Return in which ways two prompts say different things although their words are much alike."""
    found: set[Kind] = set()
    one, other = _WORD.findall(first), _WORD.findall(second)
    low, high = [word.lower() for word in one], [word.lower() for word in other]
    if sum(word in _NEGATIONS for word in low) != sum(word in _NEGATIONS for word in high):
        found.add("negation")
    if _numbers(low) != _numbers(high):
        found.add("number")
    if {word for word in low if word in _COLOURS} != {word for word in high if word in _COLOURS}:
        found.add("colour")
    if _names(one) != _names(other):
        found.add("name")
    content, reverse = ([word for word in words if word not in _SMALL] for words in (low, high))
    if sorted(content) == sorted(reverse) and content != reverse:
        found.add("order")
    return found


def guard(prompts: Sequence[str], groups: Sequence[Sequence[int]], kinds: Sequence[Kind] = KINDS) -> list[list[int]]:
    """Return the groups, each split until no two of its prompts differ in these ways; still a partition.

    A prompt stays with the first part of its group that it fits.
    """
    result = []
    for members in groups:
        parts: list[list[int]] = []
        for member in members:
            for part in parts:
                if not any(differences(prompts[member], prompts[other]).intersection(kinds) for other in part):
                    part.append(member)
                    break
            else:
                parts.append([member])
        result += parts
    return sorted(result)


def _numbers(words: Sequence[str]) -> list[str]:
    return sorted(_NUMBERS.get(word, word) for word in words if word in _NUMBERS or word.isdecimal())


def _names(words: Sequence[str]) -> set[str]:
    """Return the capitalised words that do not begin the prompt."""
    return {word for word in words[1:] if word[0].isupper()}
