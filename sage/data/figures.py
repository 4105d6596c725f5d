"""Composed figures: an image, and sentences about it, from random attributes of known words.

Drawings: styles of `dicebear-styles` under CC0, drawn by `dicebear-core` and rendered by `resvg_py`. Each figure is a
deterministic function of the seed, the split and its number. Combinations of attributes are held out whole: those of a
test figure were never drawn in training, although each attribute by itself was.
"""

import io
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from sage.data.colors import color_name
from sage.data.rows import Row
from sage.errors import DataError

LICENCE = "CC0 1.0"
CAPTIONS = 4  # of a training image
_TRIES = 1000  # figures drawn at most to find one that shows what is asked for
GRID, LEAST_GRID = 6, 3  # figures of a grid, which differ in one attribute
# A style that leaves its background transparent gets one of these.
_BACKGROUNDS = ("#7dd3fc", "#c4b5fd", "#fda4af", "#fdba74", "#fcd34d", "#bef264", "#5eead4", "#e2e8f0", "#1e293b")
_OPENINGS = ("", "", "", "drawing of ", "cartoon of ", "picture of ")


@dataclass(frozen=True)
class Attribute:
    """What a component or a colour of a style can look like.

    name     "top", or "body color" for a colour
    stands   where its words stand in a sentence: noun, before, with, state or color
    phrase   the words around those of a value, "{}"
    words    words of each variant, or name of each colour
    absent   probability that the component is not drawn
    """

    name: str
    stands: str
    phrase: str
    words: Mapping[str, str]
    absent: float

    def values(self) -> list[str]:
        """Return the distinct words, in order."""
        return list(dict.fromkeys(self.words.values()))


@dataclass(frozen=True)
class Style:
    """A style of dicebear and the words for it.

    held_out  pairs of attributes that the splits divide
    hidden    attributes that cannot be seen beside some variants of a component
    never     components that are not drawn
    """

    name: str
    definition: Mapping[str, Any]
    nouns: tuple[str, ...]
    attributes: Mapping[str, Attribute]
    held_out: tuple[tuple[str, str], ...]
    hidden: Mapping[str, Mapping[str, Sequence[str]]]
    never: tuple[str, ...]

    @cached_property
    def dicebear(self) -> Any:
        """The style as dicebear draws it; checking its definition takes half a second."""
        import dicebear

        return dicebear.Style(self.definition)


@dataclass(frozen=True)
class Figure:
    """One figure: a style, the variant or colour of each attribute ("" for a component not drawn), and a seed.

    The seed decides what has no words: positions, small parts, stars.
    """

    style: str
    choices: Mapping[str, str]
    seed: str

    @property
    def attributes(self) -> dict[str, str]:
        """The words of each attribute; "" for what is not drawn or cannot be seen."""
        style, found = load_style(self.style), dict(self.choices)
        for name, components in style.hidden.items():
            if any(self.choices[component] in variants for component, variants in components.items()):
                found[name] = ""
        return {name: style.attributes[name].words.get(choice, "") for name, choice in found.items()}

    def image(self, size: int) -> Image.Image:
        """Return the figure as an RGB image of size x size pixels."""
        return Image.open(io.BytesIO(self.png(size))).convert("RGB")

    def png(self, size: int) -> bytes:
        """Return the figure as a PNG of size x size pixels."""
        import dicebear
        import resvg_py

        style = load_style(self.style)
        options: dict[str, Any] = {"seed": self.seed, "size": size}
        if "animation" in style.definition["components"]:
            options["animationVariant"] = "none"
        options |= {f"{component}Probability": 0 for component in style.never}
        for name, choice in self.choices.items():
            if name.endswith(" color"):
                options[f"{name.removesuffix(' color')}Color"] = [choice]
            else:
                options[f"{name}Probability"] = 100 if choice else 0
                if choice:
                    options[f"{name}Variant"] = choice
        drawing = dicebear.Avatar(style.dicebear, options).to_string()
        return bytes(resvg_py.svg_to_bytes(svg_string=drawing, width=size, height=size))


@dataclass(frozen=True)
class Captioned:
    """A figure with its sentences: the first is its prompt, and `asked` are the attributes that the prompt names."""

    id: str
    figure: Figure
    texts: tuple[str, ...]
    asked: tuple[str, ...]


@cache
def load_style(name: str) -> Style:
    """Return a style by name; raise DataError if it is unknown, not CC0, or has a variant without words."""
    glossary = _glossary()
    if name not in glossary:
        raise DataError(f"style {name!r} has no words in sage/data/figures.yaml; choose from {', '.join(glossary)}.")
    definition = json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8"))
    licence = definition["meta"]["license"]["name"]
    if licence != LICENCE:
        raise DataError(f"style {name!r} is licensed under {licence!r}; only styles under {LICENCE!r} are drawn.")
    entry = glossary[name]
    parts = [_part(name, part, definition, known) for part, known in entry["parts"].items()]
    colors = [_color(color, definition, phrase) for color, phrase in entry["colors"].items()]
    attributes = {attribute.name: attribute for attribute in (*parts, *colors)}
    pairs = tuple((a, b) for a, b in entry["held_out"])
    never = tuple(entry.get("never", ()))
    return Style(name, definition, tuple(entry["nouns"]), attributes, pairs, entry.get("hidden", {}), never)


def figures(styles: Sequence[str], split: str, number: int, seed: int, held_out: float) -> Iterator[Captioned]:
    """Yield `number` figures of a split, the styles in turn.

    styles    names of styles
    split     train: free figures, several sentences each; validation or test: grids, free figures and short prompts,
              each with a combination that no other split has
    seed      seed of everything random
    held_out  fraction of the combinations of each pair of attributes that validation has; test has as many

    Raises DataError if a style is unknown, or if a held-out share leaves an attribute without training figures.
    """
    divided = {name: Combinations(load_style(name), seed, held_out) for name in styles}
    made = 0
    for turn in itertools.count():
        combinations = divided[styles[turn % len(styles)]]
        draws = random.Random(f"{seed}/{split}/{turn}")
        for captioned in _some(combinations, split, draws, f"{split}-{turn:06}"):
            if made == number:
                return
            yield captioned
            made += 1


def rows(styles: Sequence[str], numbers: Mapping[str, int], *, size: int, seed: int, held_out: float) -> list[Row]:
    """Return the figures of all splits as input rows; an image is drawn when it is read.

    styles    names of styles
    numbers   number of figures of each split
    size      side of the images in pixels
    seed      seed of everything random
    held_out  as in `figures`

    Raises DataError as `figures` does.
    """
    return [
        Row(
            id=captioned.id,
            path=Path(f"{captioned.id}.png"),
            text=captioned.texts[0],
            family=captioned.figure.style,
            file=f"{captioned.id}.png",
            other_texts=captioned.texts[1:],
            split=split,
            draw=partial(captioned.figure.png, size),
            attributes=captioned.figure.attributes,
            asked=captioned.asked,
        )
        for split, number in numbers.items()
        for captioned in figures(styles, split, number, seed, held_out)
    ]


class Combinations:
    """The combinations of words of a style's pairs of attributes, divided among the splits."""

    def __init__(self, style: Style, seed: int, held_out: float) -> None:
        """Divide them; raise DataError if so many cannot be held out while each word stays in training."""
        self.style = style
        self._splits = {pair: self._divided(pair, seed, held_out) for pair in style.held_out}

    def split(self, figure: Figure) -> str | None:
        """Return the split of a figure: train if no combination is held out, None if two splits hold one each."""
        found = {self._splits[pair][combination] for pair, combination in self._of(figure)} - {"train"}
        return None if len(found) > 1 else found.pop() if found else "train"

    def held_out_pair(self, figure: Figure) -> tuple[str, str]:
        """Return the first pair of attributes whose combination is held out."""
        return next(pair for pair, combination in self._of(figure) if self._splits[pair][combination] != "train")

    def _of(self, figure: Figure) -> list[tuple[tuple[str, str], tuple[str, str]]]:
        """Return each pair of attributes that a figure has, with its words."""
        words = figure.attributes
        pairs = [((a, b), (words[a], words[b])) for a, b in self.style.held_out]
        return [(pair, combination) for pair, combination in pairs if all(combination)]

    def _divided(self, pair: tuple[str, str], seed: int, held_out: float) -> dict[tuple[str, str], str]:
        """Return the split of each combination: in random order, held out unless a word would leave training."""
        values = [self.style.attributes[name].values() for name in pair]
        combinations = [(a, b) for a in values[0] for b in values[1]]
        random.Random(f"{seed}/{self.style.name}/{pair}").shuffle(combinations)
        trained = Counter(word for combination in combinations for word in enumerate(combination))
        wanted = math.ceil(held_out * len(combinations))
        remaining = ["validation"] * wanted + ["test"] * wanted
        splits = dict.fromkeys(combinations, "train")
        for combination in combinations:
            if remaining and all(trained[word] > 1 for word in enumerate(combination)):
                trained.subtract(enumerate(combination))
                splits[combination] = remaining.pop()
        if remaining:
            raise DataError(
                f"style {self.style.name!r} has {len(combinations)} combinations of {' and '.join(pair)}; {2 * wanted} "
                "cannot be held out while each word stays in training. Lower prepare.held_out."
            )
        return splits


def _some(combinations: Combinations, split: str, draws: random.Random, id: str) -> list[Captioned]:
    """Return a figure, or the figures of a grid, of a split."""
    figure = _drawn(combinations, split, draws, id)
    words = figure.attributes
    if split == "train":
        named = [_asked(words, (), draws) for _ in range(CAPTIONS)]
        texts = tuple(dict.fromkeys(sentence(figure, names, draws) for names in named))
        return [Captioned(id, figure, texts, named[0])]
    pair = combinations.held_out_pair(figure)
    kind = draws.choice(("grid", "free", "short"))
    if kind != "grid":
        names = pair if kind == "short" else _asked(words, pair, draws)
        return [Captioned(id, figure, (sentence(figure, names, draws),), names)]
    known = combinations.style.attributes
    varied = draws.choice([name for name in words if name not in pair and len(known[name].values()) >= LEAST_GRID])
    names = tuple(dict.fromkeys((*_asked(words, pair, draws), varied)))
    state = draws.getstate()
    grid = []
    for number, value in enumerate(_varied(combinations, figure, varied, split, draws)):
        draws.setstate(state)  # the same sentence, but for the attribute that varies
        asked = tuple(name for name in names if value.attributes[name])
        grid.append(Captioned(f"{id}-{number}", value, (sentence(value, names, draws),), asked))
    return grid


def _drawn(combinations: Combinations, split: str, draws: random.Random, seed: str) -> Figure:
    """Return a random figure that belongs to a split."""
    while True:
        figure = any_figure(combinations.style, draws, seed)
        if combinations.split(figure) == split:
            return figure


def any_figure(style: Style, draws: random.Random, seed: str) -> Figure:
    """Return a random figure of a style, of whatever split."""
    return Figure(style.name, {name: _choice(attribute, draws) for name, attribute in style.attributes.items()}, seed)


def figure_with(style: Style, asked: Mapping[str, str], draws: random.Random, seed: str) -> Figure:
    """Return a random figure of a style that shows these words, by attribute; what is not asked for is left to chance.

    Raises DataError for words that no figure of the style shows.
    """
    wanted = {
        name: [choice for choice, words in attribute.words.items() if words == asked[name]]
        for name, attribute in style.attributes.items()
        if name in asked
    }
    if not all(wanted.get(name) for name in asked):
        raise DataError(f"no figure of style {style.name!r} shows {dict(asked)}: its glossary has other words")
    for _ in range(_TRIES):
        figure = any_figure(style, draws, seed)
        chosen = {name: draws.choice(choices) for name, choices in wanted.items()}
        figure = replace(figure, choices={**figure.choices, **chosen})
        if {name: figure.attributes[name] for name in asked} == dict(asked):
            return figure
    raise DataError(f"in {_TRIES} tries no figure of style {style.name!r} showed {dict(asked)} at once")


def _choice(attribute: Attribute, draws: random.Random) -> str:
    return "" if draws.random() < attribute.absent else draws.choice(list(attribute.words))


def _varied(
    combinations: Combinations, figure: Figure, name: str, split: str, draws: random.Random
) -> Iterator[Figure]:
    """Yield up to GRID figures that differ from `figure` in the words of one attribute alone."""
    attribute = combinations.style.attributes[name]
    values = attribute.values()
    draws.shuffle(values)
    found = 0
    for value in values:
        choice = next(choice for choice, words in attribute.words.items() if words == value)
        other = replace(figure, choices={**figure.choices, name: choice})
        if combinations.split(other) == split and found < GRID:
            found += 1
            yield other


def _asked(words: Mapping[str, str], always: Sequence[str], draws: random.Random) -> tuple[str, ...]:
    """Return the names of some of a figure's attributes, in random order, with those that must be among them."""
    others = [name for name, value in words.items() if value and name not in always]
    draws.shuffle(others)
    return (*always, *others[: draws.randint(0 if always else 1, len(others))])


def sentence(figure: Figure, asked: Sequence[str], draws: random.Random) -> str:
    """Return a sentence that names a figure and the attributes asked for; a component not drawn is not mentioned."""
    style, words = load_style(figure.style), figure.attributes
    noun, before, after = draws.choice(style.nouns), [], []
    opening = draws.choice(_OPENINGS)
    article = bool(opening) or draws.random() < 0.7
    together: list[str] = []
    for name in asked:
        attribute = style.attributes[name]
        if not (value := words[name]):
            continue
        if attribute.stands == "noun":
            noun = value
        elif attribute.stands == "before":
            before.append(value)
        elif attribute.stands == "with":
            together.append(value)
        elif (phrase := attribute.phrase.format(value)).startswith("with "):
            together.append(phrase.removeprefix("with "))
        else:
            after.append(phrase)
    if together:
        after.append("with " + _listed(together))
    draws.shuffle(after)
    start = " ".join((*["a"] * article, *before, noun))
    return re.sub(r"\ban?(?= [aeiou])", "an", opening + start + _joined(after, draws))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _joined(phrases: Sequence[str], draws: random.Random) -> str:
    """Return phrases after a noun; the first may follow it without a comma."""
    plain = draws.random() < 0.6
    return "".join((" " if place == 0 and plain else ", ") + phrase for place, phrase in enumerate(phrases))


@cache
def _glossary() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(files("sage.data").joinpath("figures.yaml").read_text("utf-8"))
    return found


def _part(style: str, part: str, definition: Mapping[str, Any], known: Mapping[str, Any]) -> Attribute:
    component = definition["components"][part]
    if missing := [variant for variant in component["variants"] if variant not in known["words"]]:
        raise DataError(f"style {style!r}: {part} {missing[0]!r} has no words; add them to sage/data/figures.yaml.")
    return Attribute(part, known["stands"], "{}", dict(known["words"]), 1 - component.get("probability", 100) / 100)


def _color(color: str, definition: Mapping[str, Any], phrase: str) -> Attribute:
    values = definition["colors"].get(color, {"values": _BACKGROUNDS})["values"]
    return Attribute(
        f"{color} color",
        "before" if phrase == "{}" else "color",
        phrase,
        {value: color_name(value) for value in values},
        0.0,
    )
