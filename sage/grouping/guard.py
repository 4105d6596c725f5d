"""Splits groups whose prompts differ in ways that sentence encoders miss: negation, number, colour, name, word order.

It compares English word lists; words outside them are not checked. docs/grouping.md measures what it finds and costs.
"""

import re
from collections.abc import Sequence
from typing import Literal, get_args

from sage.errors import ConfigurationError

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
# Without "a" and "an": an article is not a count.
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
_FUNCTION_WORDS = frozenset(
    ["a", "an", "the", "of", "in", "on", "at", "to", "with", "and", "or", "is", "are", "by", "for", "from"]
)


def differences(first: str, second: str) -> set[Kind]:
    """Return the kinds of difference between two prompts; "order": the same content words in another order."""
    found: set[Kind] = set()
    words_1, words_2 = _WORD.findall(first), _WORD.findall(second)
    lower_1, lower_2 = [word.lower() for word in words_1], [word.lower() for word in words_2]
    if sum(word in _NEGATIONS for word in lower_1) != sum(word in _NEGATIONS for word in lower_2):
        found.add("negation")
    if _numbers(lower_1) != _numbers(lower_2):
        found.add("number")
    if {word for word in lower_1 if word in _COLOURS} != {word for word in lower_2 if word in _COLOURS}:
        found.add("colour")
    if _names(words_1) != _names(words_2):
        found.add("name")
    content_1, content_2 = ([word for word in words if word not in _FUNCTION_WORDS] for words in (lower_1, lower_2))
    if sorted(content_1) == sorted(content_2) and content_1 != content_2:
        found.add("order")
    return found


def guard(prompts: Sequence[str], groups: Sequence[Sequence[int]], kinds: Sequence[Kind] = KINDS) -> list[list[int]]:
    """Return the groups, split so that no two prompts of a group differ in any of `kinds`; still a partition.

    Splitting is greedy: each prompt joins the first part of its group from whose members it does not differ. Raises
    ConfigurationError if a kind is unknown.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ConfigurationError(f"the guard knows no kind {unknown[0]!r}; the kinds are {', '.join(KINDS)}")
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
    """Return the capitalised words after the first word of the prompt."""
    return {word for word in words[1:] if word[0].isupper()}
