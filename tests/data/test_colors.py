import colorsys

import numpy as np
import pytest

from sage.data.colors import NAMES, color_name, oklab

# What people call these.
CALLED = {
    "#000000": "black", "#808080": "grey", "#ffffff": "white", "#654321": "brown", "#ff0000": "red",
    "#ffa500": "orange", "#ffff00": "yellow", "#008000": "green", "#40e0d0": "teal", "#0000ff": "blue",
    "#800080": "purple", "#ff69b4": "pink", "#87ceeb": "blue", "#90ee90": "green",
    "#dda0dd": "purple", "#ffc0cb": "pink", "#000080": "blue", "#8b0000": "red", "#ffdab9": "orange",
}  # fmt: skip


@pytest.mark.parametrize(("color", "name"), CALLED.items())
def test_a_colour_has_the_name_that_people_give_it(color, name):
    assert color_name(color) == name


def test_a_prototype_has_its_own_name_and_no_other():
    assert all(color_name(color) == name for name, colors in NAMES.items() for color in colors)


@pytest.mark.parametrize(
    ("color", "expected"),
    # Ottosson's own values for the primaries of sRGB.
    [
        ("#ff0000", (0.62796, 0.22486, 0.12585)),
        ("#00ff00", (0.86644, -0.23389, 0.17950)),
        ("#0000ff", (0.45201, -0.03246, -0.31153)),
        ("#ffffff", (1, 0, 0)),
    ],
)
def test_oklab_of_the_primaries(color, expected):
    assert np.allclose(oklab(color), expected, atol=1e-4)


def test_every_hue_has_a_name():
    """Around the circle of hues the names follow each other in one round, each in one piece."""
    hues = [colorsys.hsv_to_rgb(hue / 360, 0.8, 0.95) for hue in range(360)]
    names = [color_name("#" + "".join(f"{round(255 * part):02x}" for part in rgb)) for rgb in hues]
    turns = [name for name, before in zip(names, names[-1:] + names[:-1], strict=True) if name != before]
    assert len(turns) == len(set(turns)) == 8, turns
