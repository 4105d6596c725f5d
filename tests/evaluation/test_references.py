"""References of composed figures show what a prompt asks for, and no more than chance of the rest."""

import random
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from sage.data.dataset import Example
from sage.data.figures import figure_with, figures, load_style
from sage.errors import DataError, MetricError
from sage.evaluation.references import references

STYLES = ("planets", "moods")


@pytest.fixture
def examples(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (24, 24)).save(path)
    made = list(figures(STYLES, "test", 6, 0, 0.1))
    asked = [{name: one.figure.attributes[name] for name in one.asked} for one in made]
    return [
        Example(one.id, path, one.texts[0], one.figure.style, (), words) for one, words in zip(made, asked, strict=True)
    ]


def test_each_shows_what_is_asked_for_and_differs_in_the_rest(examples):
    found = references(examples, 5, 0)
    for example, row in zip(examples, found, strict=True):
        shown = [one.figure.attributes for one in row]
        assert len(row) == 5
        assert all(words[name] == value for words in shown for name, value in example.asked.items())
        assert len({tuple(words.items()) for words in shown}) > 1
        assert Image.open(BytesIO(row[0].read())).size == (24, 24)


def test_they_depend_on_the_seed_alone(examples):
    images = [
        [np.asarray(Image.open(BytesIO(row[0].read()))) for row in references(chosen, 2, seed)]
        for chosen, seed in ((examples, 0), (examples[::-1], 0), (examples, 1))
    ]
    assert all((a == b).all() for a, b in zip(images[0], images[1][::-1], strict=True))
    assert any((a != b).any() for a, b in zip(images[0], images[2], strict=True))


def test_without_a_number_the_held_out_image_is_the_only_one(examples):
    assert references(examples, None, 0) == [[example.image] for example in examples]


def test_prompts_of_which_nothing_is_known_are_named(examples):
    plain = Example("p7", examples[0].image, "a cat", "cats")
    with pytest.raises(MetricError, match=r"evaluate.references is 4, but 1 prompts, first p7, have no known"):
        references([*examples, plain], 4, 0)


def test_words_that_no_figure_shows_are_named():
    draws = random.Random(0)
    with pytest.raises(DataError, match=r"no figure of style 'planets' shows .*nothing"):
        figure_with(load_style("planets"), {"moons": "nothing of the kind"}, draws, "0")
