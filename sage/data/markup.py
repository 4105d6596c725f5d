"""Markup of web UIs in prompts: weights, LoRA tags and the like, which diffusers would read as words.

Text encoders read every character, so "(a teapot:1.3)" in a stock pipeline is a teapot with a price on it. Ordinary
parentheses, times, ratios and DreamBooth tokens such as [V] are text.
"""

import re
from typing import NamedTuple


class Markup(NamedTuple):
    """One piece of markup in a prompt: as written, what it means in web UIs, and what to do instead."""

    written: str
    meaning: str
    remedy: str


_WEIGHTS = "remove the weight, or give the pipeline prompt_embeds made by a library for weighted prompts"
_NUMBER = r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))"
_WEIGHT = re.compile(rf"(?<!\\)\((?P<text>[^()]*[^()\s])\s*:(?P<space>\s*){_NUMBER}\s*\)")
_PATTERNS = (
    (
        re.compile(r"<(?:lora|lyco|hypernet):[^<>]+>", re.I),
        "loads an adapter",
        "load it with pipe.load_lora_weights and remove the tag",
    ),
    (re.compile(r"(?<!\\)\(\s*\([^()]*\)\s*\)"), "raises a weight", _WEIGHTS),
    (re.compile(r"\)(?:\d*\.\d+|\+\+|--)(?=[\s,.;]|$)"), "is a weight", _WEIGHTS),
    (re.compile(r"\\\([^()]*\\\)"), "are escaped parentheses", "write them without the backslash"),
)
_BRACKETS = re.compile(r'(?<!\\)\[([^\[\]"]*)(?<!\\)\]')  # no quotes: a list in JSON
_LETTERS = re.compile(r"[^\W\d_]{2}")
_KEYWORDS = {
    "BREAK": ("begins another chunk of the prompt", "remove it, or write a comma"),
    "AND": ("combines the predictions of two prompts", "write `and`, or two prompts"),
}


def markup(prompt: str) -> Markup | None:
    """Return the first markup that is found in a prompt, or None."""
    for match in _WEIGHT.finditer(prompt):
        if _is_weight(match):
            return Markup(match[0], "is a weight", _WEIGHTS)
    for pattern, meaning, remedy in _PATTERNS:
        if found := pattern.search(prompt):
            return Markup(found[0], meaning, remedy)
    for match in _BRACKETS.finditer(prompt):
        if _LETTERS.search(match[1]):
            return Markup(match[0], "lowers a weight or edits the prompt", _WEIGHTS)
    words = prompt.split()
    for number, word in enumerate(words):
        # Among words in capitals, as on a sign that says SALT AND PEPPER, it is a word like them.
        beside = (*words[max(0, number - 1) : number], *words[number + 1 : number + 2])
        if (keyword := word.strip(",.;")) in _KEYWORDS and not any(map(_in_capitals, beside)):
            return Markup(keyword, *_KEYWORDS[keyword])
    return None


def _is_weight(match: "re.Match[str]") -> bool:
    """Return whether "(text:number)" is a weight: not a ratio, time or verse (16:9), nor a remark (note: 3)."""
    number = match["number"]
    if match["text"][-1].isdigit():
        return "." in number and abs(float(number)) < 10
    return "." in number or not match["space"]


def _in_capitals(word: str) -> bool:
    letters = [character for character in word if character.isalpha()]
    return bool(letters) and word.strip(",.;") not in _KEYWORDS and all(letter.isupper() for letter in letters)
