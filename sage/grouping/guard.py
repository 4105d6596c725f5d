"""Splits groups whose prompts contradict each other in ways that sentence encoders miss.

| kind | prompts that differ in it |
|---|---|
| negation | one says no, not, without, isn't, ... more often |
| number | different counts: two, 2, 2girls, pair, pack; one is as none; numbers of lenses or versions do not count |
| colour | each has a colour that the other lacks |
| name | each has a capitalised word that the other lacks, unless whole prompts are capitalised |
| order | the same words in another relation (swapped attributes or roles); moved clauses and "a and b" do not count |
| opposite | left and right, day and night, young and old, ... |
| style | each has a medium (photo, oil painting, ...) or a LoRA tag that the other lacks |

A word that only one prompt has is an addition and no contradiction. All lists are English: other languages, names in
lower case, names that begin a prompt, and words outside the lists are not checked. docs/grouping.md measures both
kinds of error.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sage.errors import ConfigurationError

Kind = Literal["negation", "number", "colour", "name", "order", "opposite", "style"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def _words(text: str) -> list[str]:
    return text.split()


_NEGATIONS = frozenset(_words("no not without never none nobody nothing neither nor cannot"))
_SMALL = _words(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen"""
)
_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
# Without "a" and "an": an article is not a count.
_NUMBERS = (
    {word: str(number) for number, word in enumerate(_SMALL)}
    | {word: str(10 * number) for number, word in enumerate(_TENS, start=2)}
    | {"single": "1", "lone": "1", "pair": "2", "couple": "2", "trio": "3", "dozen": "12", "hundred": "100"}
    | dict.fromkeys(_words("many several numerous pack herd flock swarm crowd group"), "many")
)
_COLOURS = frozenset(
    _words(
        """red orange yellow green blue purple violet pink brown black white gray gold silver turquoise teal cyan
    magenta crimson scarlet maroon beige ivory indigo navy lavender bronze copper blonde brunette"""
    )
)
_SPELLINGS = {"grey": "gray", "golden": "gold", "blond": "blonde", "colour": "color", "photograph": "photo"}
_OPPOSITES = [
    [frozenset(_words(pole)) for pole in line.split("|")]
    for line in """left | right
        above over atop top upper | below under beneath underneath bottom lower
        inside indoor indoors | outside outdoor outdoors
        front | back behind rear
        north northern | south southern
        east eastern | west western
        day daytime daylight morning noon | night nighttime midnight evening
        dawn sunrise | dusk sunset
        spring | summer | autumn | winter
        sunny clear | rainy cloudy stormy snowy foggy
        calm | stormy
        young | old elderly
        modern futuristic | ancient medieval
        happy smiling laughing | sad crying angry
        open | closed shut
        full | empty
        wet | dry
        hot | cold
        clean | dirty
        alive | dead
        asleep sleeping | awake
        tiny small little | huge large big giant
        tall | short
        fat | thin
        man men boy boys male | woman women girl girls female
        king prince | queen princess""".splitlines()
]
_STYLES = frozenset(
    _words(
        """photo photography photorealistic painting watercolor sketch drawing pencil ink charcoal pastel render cgi
    anime manga cartoon comic pixel voxel engraving woodcut etching sculpture mosaic origami lego claymation icon logo
    sticker fresco collage embroidery silhouette
    oilpainting"""
    )
)
_ARTICLES = frozenset(_words("a an the"))
_AUXILIARIES = frozenset(_words("is are was were being"))
_PREPOSITIONS = frozenset(_words("of in on at to with by for from"))
_JOINS = frozenset(_words("and or"))
_FUNCTION_WORDS = _ARTICLES | _AUXILIARIES | _PREPOSITIONS | _JOINS
_SEPARATORS = frozenset(_words(", ; . |"))

_TOKEN = re.compile(r"\d+(?=[^\W\d_])|[^\W_]+(?:'[^\W_]+)*|[,;.|]")
_LORA = re.compile(r"<(?:lora|lyco|hypernet):([^<:>]*+)[^<>]*+>", re.IGNORECASE)
_OUTSIDE = _AUXILIARIES | _STYLES  # no part of the scene
_OIL = re.compile(r"\boil[- ]painting\b", re.IGNORECASE)
# Numbers that count nothing: weights, aspect ratios, decimals, apertures, sizes, versions.
_TECHNICAL = re.compile(
    r"""(?<=[^\W_]):\s*+-?(?:\d++(?:\.\d++)?|\.\d++)(?=\s*[)\]]) | \b\d+:\d+\b | \bf/?\d+(?:\.\d+)? | \b\d+\.\d+\b
    | \b[23]d\b | \b\d+\s*(?:k|mm|cm|p|px|fps|dpi|bit|mp|megapixels?)\b
    | (?:(?<=\biso)|(?<=\bengine)|(?<=\bversion)|(?<=\bv))\s*\d+""",
    re.IGNORECASE | re.VERBOSE,
)
# If at least so many words begin with a capital and no other word but function words, the prompt is written as a title.
_TITLE = 5


@dataclass(frozen=True)
class _Reading:
    """What the guard reads in a prompt; `relations` is comparable only between prompts with equal `content`."""

    negations: int
    numbers: list[str]
    colours: frozenset[str]
    names: frozenset[str]
    words: frozenset[str]
    poles: list[frozenset[int]]
    styles: frozenset[str]
    content: Counter[str]
    bindings: frozenset[tuple[str, str]]
    phrases: list["_Phrase"]
    clauses: bool


# Whether a preposition precedes it, and its parts joined by "and", in any order.
_Phrase = tuple[bool, tuple[tuple[str, ...], ...]]


def differences(first: str, second: str) -> set[Kind]:
    """Return the kinds of contradiction between two prompts."""
    return _differences(_read(first), _read(second))


def guard(prompts: Sequence[str], groups: Sequence[Sequence[int]], kinds: Sequence[Kind] = KINDS) -> list[list[int]]:
    """Return the groups, split so that no two prompts of a group differ in any of `kinds`; still a partition.

    Splitting is greedy: each prompt joins the first part of its group from whose members it does not differ. Raises
    ConfigurationError if a kind is unknown.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ConfigurationError(f"the guard knows no kind {unknown[0]!r}; the kinds are {', '.join(KINDS)}")
    result = []
    for members in groups:
        readings = {member: _read(prompts[member]) for member in members} if len(members) > 1 else {}
        parts: list[list[int]] = []
        for member in members:
            for part in parts:
                if not any(_differences(readings[member], readings[other]).intersection(kinds) for other in part):
                    part.append(member)
                    break
            else:
                parts.append([member])
        result += parts
    return sorted(result)


def _differences(first: _Reading, second: _Reading) -> set[Kind]:
    found: set[Kind] = set()
    if first.negations != second.negations:
        found.add("negation")
    if first.numbers != second.numbers:
        found.add("number")
    if _contradict(first.colours, second.colours):
        found.add("colour")
    if first.names - second.words and second.names - first.words:
        found.add("name")
    if any(_contradict(a, b) for a, b in zip(first.poles, second.poles, strict=True)):
        found.add("opposite")
    if _contradict(first.styles, second.styles):
        found.add("style")
    if _swapped(first, second):
        found.add("order")
    return found


def _contradict(first: frozenset[str] | frozenset[int], second: frozenset[str] | frozenset[int]) -> bool:
    """Return whether each says something that the other does not."""
    return bool(first - second) and bool(second - first)


def _swapped(first: _Reading, second: _Reading) -> bool:
    if first.bindings != second.bindings and all(
        {pair[side] for pair in first.bindings} == {pair[side] for pair in second.bindings} for side in (0, 1)
    ):
        return True
    if first.content != second.content:
        return False
    if first.clauses or second.clauses:  # commas say that parts may move
        return Counter(first.phrases) != Counter(second.phrases)
    return first.phrases != second.phrases


def _read(prompt: str) -> _Reading:
    tags = {f"lora {name.lower()}" for name in _LORA.findall(prompt)}
    text = _TECHNICAL.sub("", _LORA.sub(" ", prompt.replace("\u2019", "'")))
    text = _OIL.sub("oilpainting painting", text)
    written = _TOKEN.findall(text)
    tokens = [_SPELLINGS.get(word.lower(), word.lower()) for word in written]
    words = frozenset(tokens) - _SEPARATORS
    numbers = [_NUMBERS.get(word, word.lstrip("0") or "0") for word in tokens if word in _NUMBERS or word.isdecimal()]
    phrases = _phrases(tokens)
    bindings = {
        (parts[k], parts[k + 1])
        for _, joined in phrases
        for parts in joined
        for k in range(len(parts) - 1)
        if parts[k] in _COLOURS
    }
    return _Reading(
        negations=sum(word in _NEGATIONS or word.endswith("n't") for word in tokens),
        numbers=sorted(number for number in numbers if number != "1"),
        colours=words & _COLOURS,
        names=_names(written),
        words=words,
        poles=[frozenset(k for k, pole in enumerate(poles) if pole & words) for poles in _OPPOSITES],
        styles=(words & _STYLES) | tags,
        content=Counter(word for _, joined in phrases for parts in joined for word in parts),
        bindings=frozenset(bindings),
        phrases=phrases,
        clauses=bool(_SEPARATORS.intersection(tokens[:-1])),
    )


def _names(written: Sequence[str]) -> frozenset[str]:
    """Return the capitalised words after the first word in lower case; none if the prompt is written as a title."""
    capital = [word for word in written if word[0].isupper()]
    others = [word for word in written if word[0].islower() and word not in _FUNCTION_WORDS]
    if len(capital) >= _TITLE and not others:
        return frozenset()
    return frozenset(word.lower() for word in written[1:] if word[0].isupper())


def _phrases(tokens: Sequence[str]) -> list[_Phrase]:
    """Return the phrases between articles, prepositions and commas; a passive ("b chased by a") as the active."""
    phrases: list[tuple[bool, list[tuple[str, ...]]]] = []
    words: list[str] = []
    preposition = join = passive = False

    def end() -> None:
        nonlocal preposition, join, passive
        if not words:
            return
        phrase = tuple(_stem(word) for word in words)
        if passive:
            led, joined = phrases.pop()
            *patient, verb = joined[-1]
            phrases.extend([(led, [*joined[:-1], (*phrase, verb)]), (False, [tuple(patient)])])
        elif join and phrases:
            phrases[-1][1].append(phrase)
        else:
            phrases.append((preposition, [phrase]))
        words.clear()
        preposition = join = passive = False

    for word in tokens:
        if word in _ARTICLES or word in _SEPARATORS:
            end()
        elif word in _PREPOSITIONS:
            if word == "of" and (not words or words[-1] in _NUMBERS.values()):
                continue  # photo of a cat: a cat, a photo; a pair of cats: two cats
            by = word == "by" and len(words) > 1 and words[-1].endswith("ed")
            end()
            preposition, passive = not by, by
        elif word in _JOINS:
            end()
            join = True
        elif word not in _OUTSIDE:
            words.append(_NUMBERS.get(word, word))
    end()
    return [(led, tuple(sorted(joined))) for led, joined in phrases]


def _stem(word: str) -> str:
    """Return a word without the endings of verbs and plurals: chasing, chased and chases are one."""
    if word in _COLOURS:
        return word
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word
