"""A dozen small photographs as people have them, and a hub cache with tiny stand-ins for the models of a hub."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# Short and of letters only, which is all that the tiny text encoders read.
CAPTIONS = [f"{kind} {what}" for what in ("boat", "ship", "raft") for kind in ("red", "blue", "old", "big")]
COMMIT = "0123456789abcdef" * 2 + "01234567"
# Suffix, mode, and width and height.
_FILES = [
    ("jpg", "RGB", (40, 30)),
    ("jpg", "L", (30, 40)),
    ("jpeg", "RGB", (64, 36)),
    ("png", "RGBA", (32, 32)),
    ("png", "P", (48, 20)),
    ("webp", "RGB", (24, 36)),
    ("bmp", "RGB", (33, 17)),
    ("tif", "RGB", (20, 60)),
    ("gif", "P", (16, 16)),
]
_ORIENTATION = 0x0112  # tag of EXIF


def write(folder: Path) -> None:
    """Write a photograph for each caption, with a text file beside it, and one without a caption."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number, caption in enumerate([*CAPTIONS, None]):
        suffix, mode, size = _FILES[number % len(_FILES)]
        few = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        image = few.resize(size, Image.Resampling.BICUBIC)
        exif = image.getexif()
        exif[_ORIENTATION] = 6 if suffix == "jpeg" else 1
        image.convert(mode).save(folder / f"photo {number}.{suffix}", **({"exif": exif} if "jp" in suffix else {}))
        if caption is not None:
            (folder / f"photo {number}.txt").write_text(f"{caption}\n")


def cached(cache: Path, name: str, save: Callable[[Path], object]) -> None:
    """Let a function save a model into a hub cache, under a name of the hub, as its newest commit."""
    entry = cache / f"models--{name.replace('/', '--')}"
    save(entry / "snapshots" / COMMIT)
    (entry / "refs").mkdir()
    (entry / "refs/main").write_text(COMMIT)
