"""Aspect-ratio buckets: the sizes of training images, of nearly equal area, so that pictures keep their shape.

A picture goes to the bucket whose aspect ratio is nearest, and is then scaled and cropped (or padded) to its size.
"""

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(side: int, step: int, max_aspect: float) -> list[Size]:
    """Return the sizes whose sides are multiples of `step` and whose area is at most that of a square of this side.

    For each short side it is the longest that fits, upright and lying, up to `max_aspect` times the short one. If
    `step` divides `side`, the square is one of them.
    """
    found = set()
    for short in range(step, side + 1, step):
        long = side * side // short // step * step
        if long <= max_aspect * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest_bucket(sizes: Sequence[Size], size: Size) -> Size:
    """Return the one of these sizes whose aspect ratio is nearest, as a factor, to that of `size`."""
    return min(sizes, key=lambda one: (abs(math.log(one[0] * size[1] / (one[1] * size[0]))), one))


def cut_off(size: Size, target: Size) -> float:
    """Return the fraction of a picture's pixels that cropping it to the shape of `target` leaves out."""
    across, along = size[0] * target[1], size[1] * target[0]
    return 1 - min(across, along) / max(across, along)


def named(size: Size) -> str:
    """Return a size as people write it, width x height."""
    return f"{size[1]}x{size[0]}"
