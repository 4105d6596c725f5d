"""Contact sheets: the only code that pastes images into a grid."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw

T = TypeVar("T")
_TEXT = 12  # pixels, the height of a line of text


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    size: tuple[int, int] | None = None,
    gap: int = 0,
    headings: Sequence[str] = (),
    names: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Return one image that shows a grid of images on white.

    rows      images, row by row; rows may differ in length
    size      width and height of every cell in pixels; by default the size of the first image
    gap       pixels between cells
    headings  a text above each column
    names     a text below each image, in the shape of `rows`
    """
    width, height = size or rows[0][0].size
    head = _TEXT + 6 if headings else 0
    step = width + gap, height + gap + (_TEXT if names else 0)
    canvas = Image.new("RGB", (max(map(len, rows)) * step[0] + gap, head + len(rows) * step[1] + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for column, text in enumerate(headings):
        pen.text((gap + column * step[0], 4), text, fill="black")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            place = gap + x * step[0], head + gap + y * step[1]
            # Enlarge small images without smoothing, so that their pixels stay visible.
            way = Image.Resampling.NEAREST if image.width < width else Image.Resampling.BICUBIC
            canvas.paste(image.convert("RGB").resize((width, height), way), place)
            if names:
                pen.text((place[0] + 2, place[1] + height), names[y][x], fill="black")
    return canvas


def in_rows(items: Sequence[T], columns: int) -> list[Sequence[T]]:
    """Split items into rows of `columns` items; the last row may be shorter."""
    return [items[start : start + columns] for start in range(0, len(items), columns)]


def opened(path: Path) -> Image.Image:
    """Return the RGB image of a file, completely read, so that the file is closed."""
    with Image.open(path) as image:
        return image.convert("RGB")
