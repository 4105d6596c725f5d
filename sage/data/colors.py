"""Names of colours: the nearest of a few in OKLab, a space in which distance is what people see.

Source: Björn Ottosson, "A perceptual color space for image processing", 2020.
"""

from functools import cache

import numpy as np

# Each name has a few prototypes, from dark to pale.
NAMES = {
    "black": ("#111111", "#1e293b", "#2c222b"),
    "grey": ("#5a5f66", "#8b9096", "#b0b5ba"),
    "white": ("#ffffff", "#e9ecef", "#f5f1e8"),
    "brown": ("#3b2716", "#5c531c", "#6b4a35", "#8a5a3a", "#b08a66"),
    "red": ("#8f2020", "#d63a3a", "#d6565a", "#e07b74"),
    "orange": ("#c2410c", "#f07b2c", "#e39050", "#fdba74", "#ffe4c8"),
    "yellow": ("#b8951f", "#f5c518", "#ffee22", "#fcd34d", "#fdea8b", "#dcc690", "#fff3bf"),
    "green": ("#14532d", "#445423", "#2f9e5a", "#74b160", "#a8b060", "#8fd694", "#bef264"),
    "teal": ("#0f5c5c", "#0f9488", "#39b7a9", "#5eead4", "#9ddada"),
    "blue": ("#1e3a8a", "#30506f", "#2b6cd4", "#47a7e7", "#7a9bef", "#7dd3fc", "#c8e6fa"),
    "purple": ("#4c1d95", "#800080", "#614a86", "#7c4fe0", "#a18ee8", "#c084d8", "#c4b5fd", "#e4dcfa"),
    "pink": ("#a3215f", "#ec4899", "#d67cb2", "#f9a8c8", "#fca5a5", "#ffd9de"),
}
LIGHTNESS = 0.5  # weight of lightness: a name says more of hue


def color_name(color: str) -> str:
    """Return the name of a colour given as "#rrggbb"."""
    names, points = _prototypes()
    return names[int(np.argmin(np.linalg.norm((points - oklab(color)) * (LIGHTNESS, 1, 1), axis=1)))]


def oklab(color: str) -> np.ndarray:
    """Return lightness and the two opponent axes of a colour given as "#rrggbb", shape (3,)."""
    encoded = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(_CONES @ linear)
    lab: np.ndarray = _OPPONENTS @ cones
    return lab


@cache
def _prototypes() -> tuple[list[str], np.ndarray]:
    pairs = [(name, oklab(color)) for name, colors in NAMES.items() for color in colors]
    return [name for name, _ in pairs], np.stack([point for _, point in pairs])


_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OPPONENTS = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
