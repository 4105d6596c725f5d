"""Composed figures: captions are true, what is held out is never drawn in training, and words that differ look it."""

import random
from collections import defaultdict

import numpy as np
import pytest

from sage.data import figures as source
from sage.data.figures import GRID, Captioned, Combinations, Figure, figures, load_style, sentence
from sage.data.preparation import prepare
from sage.data.shards import read_rows, rgb
from sage.errors import DataError

STYLES = tuple(source._glossary())


def made(split: str, number: int = 300, seed: int = 0, held_out: float = 0.1) -> list[Captioned]:
    return list(figures(STYLES, split, number, seed, held_out))


def pixels(figure: Figure, size: int = 64) -> np.ndarray:
    return np.asarray(figure.image(size)).astype(int)


@pytest.mark.parametrize("name", STYLES)
def test_every_variant_has_words_and_the_style_is_free(name):
    style = load_style(name)
    assert style.definition["meta"]["license"]["name"] == source.LICENCE
    for attribute in style.attributes.values():
        assert (all(attribute.words.values()) and len(attribute.values()) > 1) or attribute.absent
    assert {name for pair in style.held_out for name in pair} <= style.attributes.keys()


def changed(monkeypatch, name, **changes):
    glossary = dict(source._glossary())
    entry = glossary.get(name) or {"nouns": ["head"], "held_out": [], "parts": {}, "colors": {}}
    monkeypatch.setattr(source, "_glossary", lambda: glossary | {name: entry | changes})
    load_style.cache_clear()


def test_a_style_that_cannot_be_drawn_is_named(monkeypatch):
    with pytest.raises(DataError, match=r"style 'octopus' has no words .* choose from critters"):
        load_style("octopus")
    changed(monkeypatch, "adventurer")
    with pytest.raises(DataError, match=r"'adventurer' is licensed under 'CC BY 4.0'; only styles under 'CC0 1.0'"):
        load_style("adventurer")
    parts = source._glossary()["moods"]["parts"]
    words = {key: value for key, value in parts["mouth"]["words"].items() if key != "gasp"}
    changed(monkeypatch, "moods", parts=parts | {"mouth": parts["mouth"] | {"words": words}})
    with pytest.raises(DataError, match="style 'moods': mouth 'gasp' has no words"):
        load_style("moods")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_caption_names_what_is_asked_for_and_nothing_else(split):
    for captioned in made(split, 200):
        figure, text = captioned.figure, captioned.texts[0]
        assert all(said(figure, name) in text for name in captioned.asked)
        style = load_style(figure.style)
        hiding = {name for components in style.hidden.values() for name in components}
        for name, attribute in style.attributes.items():
            if name in hiding:
                continue
            others = [Figure(figure.style, {**figure.choices, name: choice}, "") for choice in attribute.words]
            told = {sentence(other, captioned.asked, random.Random(0)) for other in others}
            assert len(told) == (len(attribute.values()) if name in captioned.asked else 1)


def said(figure: Figure, name: str) -> str:
    """The words of an attribute as a sentence has them: "with" stands once before all that it belongs to."""
    return figure.attributes[name].removeprefix("with ")


def test_sentences_read_like_prompts():
    words = {"style": "moods", "seed": "0"}
    choices = {"face": "circle", "cheeks": "", "eyes": "wink", "mouth": "frown"}
    figure = Figure(choices=choices | {"face color": "#fdba74", "background color": "#fdba74"}, **words)
    found = {sentence(figure, ("cheeks", "mouth", "face color"), random.Random(k)) for k in range(400)}
    assert {"orange face frowning", "an orange face, frowning", "drawing of an orange emoji face frowning"} <= found
    assert not [text for text in found if "  " in text or " ," in text or "blushing" in text or text != text.strip()]


def held_out_combinations(style: str, found: list[Captioned]) -> dict[tuple[str, str], set[tuple[str, str]]]:
    combinations = defaultdict(set)
    for captioned in found:
        words = captioned.figure.attributes
        for a, b in load_style(style).held_out:
            if captioned.figure.style == style and words[a] and words[b]:
                combinations[a, b].add((words[a], words[b]))
    return combinations


@pytest.mark.parametrize("style", STYLES)
def test_what_is_held_out_is_never_drawn_in_training(style):
    seen = {
        split: held_out_combinations(style, list(figures([style], split, 2000, 0, 0.1)))
        for split in ("train", "validation", "test")
    }
    combinations = Combinations(load_style(style), 0, 0.1)
    for pair, splits in combinations._splits.items():
        for split in ("validation", "test"):
            only = {combination for combination, owner in splits.items() if owner == split}
            assert only and not only & seen["train"][pair]
            assert only & seen[split][pair] and not only & seen["test" if split == "validation" else "validation"][pair]
        # Each word by itself is seen in training.
        trained = {
            (side, word)
            for combination, owner in splits.items()
            if owner == "train"
            for side, word in enumerate(combination)
        }
        assert trained == {(side, word) for combination in splits for side, word in enumerate(combination)}


def test_every_held_out_prompt_asks_for_what_is_held_out():
    for split in ("validation", "test"):
        for captioned in made(split):
            combinations = Combinations(load_style(captioned.figure.style), 0, 0.1)
            held_out = [
                pair for pair, c in combinations._of(captioned.figure) if combinations._splits[pair][c] == split
            ]
            assert any(set(pair) <= set(captioned.asked) for pair in held_out)


def test_more_than_exists_cannot_be_held_out():
    with pytest.raises(DataError, match=r"'critters' has 120 combinations of body color and top; 120 cannot"):
        list(figures(["critters"], "train", 1, 0, 0.5))


def test_figures_of_a_grid_differ_in_one_attribute_and_in_its_words():
    grids = defaultdict(list)
    for captioned in made("test"):
        if captioned.id.count("-") == 2:
            grids[captioned.id.rsplit("-", 1)[0]].append(captioned)
    sizes = [len(grid) for grid in grids.values()]
    assert len(grids) > 20 and max(sizes) == GRID and min(sizes[:-1]) >= 1
    for grid in grids.values():
        words = [captioned.figure.attributes for captioned in grid]
        differ = [name for name in words[0] if len({own[name] for own in words}) > 1]
        assert len(differ) <= 1 and len({captioned.texts for captioned in grid}) == len(grid)


def test_figures_are_the_same_again_and_a_longer_split_begins_alike():
    assert made("train", 50) == made("train", 80)[:50]
    assert made("train", 50) != made("train", 50, seed=1)
    figure = made("train", 1)[0].figure
    assert figure.image(64).size == (64, 64)
    assert np.array_equal(pixels(figure), pixels(figure))


@pytest.mark.slow
@pytest.mark.parametrize("name", STYLES)
def test_words_that_differ_look_different(name):
    """The same figure with two words of an attribute exchanged is another image, also at the size of training."""
    style = load_style(name)
    draws = random.Random(0)
    for attribute in style.attributes.values():
        base = source._drawn(Combinations(style, 0, 0.1), "train", draws, "0")
        while attribute.name in style.hidden and not base.attributes[attribute.name]:
            base = source._drawn(Combinations(style, 0, 0.1), "train", draws, "0")
        drawn = {}
        for choice, words in attribute.words.items():
            drawn.setdefault(words, pixels(Figure(name, {**base.choices, attribute.name: choice}, base.seed)))
        images = list(drawn.values())
        for place, image in enumerate(images):
            assert all(np.abs(image - other).max() > 10 for other in images[:place]), (attribute.name, list(drawn))


def test_prepared_figures_keep_their_split_their_attributes_and_what_was_asked(tmp_path):
    numbers = {"train": 12, "validation": 5, "test": 7}
    rows = source.rows(["critters", "moods"], numbers, size=32, seed=0, held_out=0.1)
    found = prepare(rows, tmp_path / "out", size=32, resize="pad", validation=0.1, test=0.2, seed=0)
    assert found["splits"] == numbers and not found["rejected"] and not found["duplicates"]
    for split, number in numbers.items():
        drawn = list(figures(["critters", "moods"], split, number, 0, 0.1))
        for (image, line), captioned in zip(read_rows(tmp_path / "out" / split), drawn, strict=True):
            assert [line["text"], *line["other_texts"]] == list(captioned.texts) if split == "train" else True
            assert {own["name"]: own["words"] for own in line["attributes"]} == captioned.figure.attributes
            assert {own["name"] for own in line["attributes"] if own["asked"]} == set(captioned.asked)
            assert np.array_equal(np.asarray(rgb(image)).astype(int), pixels(captioned.figure, 32))
