"""Reader and writer of manifest.jsonl of stage `generate`, which has one line for every generated image.

    {"arm": "sage", "seed": 0, "id": "p3", "group": 7, "sha256": "..."}

`id` is the id of the prompt. `group` is the number of its group in the grouping that the images were generated with, or
null if nothing was shared. `image_path` gives the path of the image, in the folder of the manifest.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sage.errors import MetricError
from sage.files import sha256, write_json

MANIFEST = "manifest.jsonl"
UNREAD = "unread_tokens.json"


@dataclass(frozen=True)
class Line:
    """One generated image: its arm, seed and prompt id, the number of its group, and the SHA-256 of its file."""

    arm: str
    seed: int
    id: str
    group: int | None
    sha256: str


def image_path(folder: Path, arm: str, seed: int, id: str) -> Path:
    """Return the path of an image; `folder` is the folder of the manifest, `id` the id of the prompt."""
    return folder / arm / f"seed-{seed}" / f"{id}.png"


def write_manifest(
    folder: Path, arms: Iterable[str], ids: Sequence[str], groups: Sequence[Sequence[int]], seeds: Sequence[int]
) -> None:
    """Write the manifest of a folder that already holds all images; `groups` are lists of indices into `ids`."""
    group_of = {member: number for number, group in enumerate(groups) for member in group}
    lines = [
        Line(arm, seed, id, group_of[place], sha256(image_path(folder, arm, seed, id)))
        for arm in arms
        for seed in seeds
        for place, id in enumerate(ids)
    ]
    write_lines(folder / MANIFEST, lines)


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """Write a manifest of lines that are known."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(line)) + "\n" for line in lines)


def read_manifest(folder: Path) -> list[Line]:
    """Return the lines of a folder's manifest; raise MetricError if it is missing or damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise MetricError(f"{path} is missing. Run `dvc repro generate`.")
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(Line(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise MetricError(f"{path}, line {number} is damaged. Run `dvc repro --force generate`.") from error
    return found


def write_unread(folder: Path, unread: Mapping[str, int]) -> None:
    """Write how many tokens of a prompt the text encoder leaves out, by prompt id; no file if it reads them all."""
    if unread:
        write_json(folder / UNREAD, dict(unread))


def read_unread(folder: Path) -> dict[str, int]:
    """Return what `write_unread` wrote; raise MetricError if it is damaged."""
    path = folder / UNREAD
    if not path.exists():
        return {}
    try:
        return {str(id): int(tokens) for id, tokens in json.loads(path.read_text(encoding="utf-8")).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise MetricError(f"{path} is damaged. Run `dvc repro --force generate`.") from error
