"""The images of one arm on disk, pack by pack: what a killed run had finished is verified, kept and not drawn again.

A pack is what the denoising loop starts together (`sage.sampling.loop.first_packs`), and is always drawn alone, so its
bytes do not depend on where a run was killed. Its folder holds seed-SEED/ID.png and, written last, `pack.json`.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL.Image import Image

from sage.files import sha256, write_json

PACK = "pack.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """A finished pack.

    sha256   hash of each image, by its path in the folder
    seconds  how long the drawing took
    unread   for each prompt that the text encoder does not read to its end, by id, the number of tokens left out
    """

    sha256: dict[str, str]
    seconds: float
    unread: dict[str, int]


def kept(folder: Path) -> Drawn | None:
    """Return the finished pack in a folder; None if there is none, or one of its files is missing or altered."""
    record = folder / PACK
    if not record.is_file():
        return None
    try:
        found = Drawn(**json.loads(record.read_text(encoding="utf-8")))
        wrong = [name for name, wanted in found.sha256.items() if not _intact(folder / name, wanted)]
    except (AttributeError, TypeError, ValueError):
        wrong = [PACK]
    if wrong:
        log.warning("%s of a killed run is damaged (%s), so it is drawn again", folder, ", ".join(wrong[:3]))
        return None
    return found


def images(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield relative and full path of each image of a finished pack."""
    for path in sorted(folder.glob("*/*.png")):
        yield path.relative_to(folder).as_posix(), path


def begin(folder: Path) -> None:
    """Make the folder of a pack that is to be drawn; what an unfinished one left is removed."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def add(folder: Path, seed: int, id: str, image: Image) -> None:
    """Write one image of a pack."""
    path = folder / f"seed-{seed}" / f"{id}.png"
    path.parent.mkdir(exist_ok=True)
    image.save(path)


def end(folder: Path, seconds: float, unread: dict[str, int]) -> Drawn:
    """Record that a pack is finished; `seconds` and `unread` are those of `Drawn`."""
    found = Drawn({name: sha256(path) for name, path in images(folder)}, seconds, unread)
    write_json(folder / PACK, asdict(found))
    return found


def _intact(path: Path, wanted: str) -> bool:
    return path.is_file() and sha256(path) == wanted
