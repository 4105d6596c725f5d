"""The groups of a split's prompts as a file: written by stage group, read by every stage after it.

    {"encoder": "minilm",     the sentence encoder that compared the prompts
     "threshold": 0.5,        the cosine that every pair of a group reaches
     "max_size": 6,           prompts a group at most
     "groups": [{"ids": ["p3", "p7"], "similarity": 0.71}, ...]}

`similarity` is the cosine of a group's worst pair; 1 for a single prompt. Every prompt of the split is in one group.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sage.data.dataset import Example
from sage.errors import DataError
from sage.files import write_json


def write_groups(
    path: Path,
    groups: Sequence[Sequence[int]],
    similarity: Sequence[float],
    examples: Sequence[Example],
    *,
    encoder: str,
    threshold: float,
    max_size: int,
) -> None:
    """Write groups, given as places in `examples`, with the similarity of each group's worst pair."""
    # Rounded: the encoder's last bits depend on which prompts it met together.
    rows = [
        {"ids": [examples[member].id for member in members], "similarity": round(float(worst), 4)}
        for members, worst in zip(groups, similarity, strict=True)
    ]
    write_json(path, {"encoder": encoder, "threshold": float(threshold), "max_size": int(max_size), "groups": rows})


def read_groups(path: Path, examples: Sequence[Example]) -> tuple[list[list[int]], list[float]]:
    """Return a split's groups as places in `examples`, and the similarity of each group's worst pair.

    Raises DataError if they are no partition of these examples.
    """
    try:
        rows = list(_read(path)["groups"])
        groups = [list(map(str, row["ids"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path) from error
    place = {example.id: number for number, example in enumerate(examples)}
    found = Counter(id for ids in groups for id in ids)
    if found != Counter(list(place)):
        odd = {
            "missing": sorted(place.keys() - found.keys()),
            "foreign": sorted(found.keys() - place.keys()),
            "double": sorted(id for id, times in found.items() if times > 1),
        }
        said = ", ".join(f"{len(ids)} {what} ({', '.join(ids[:3])})" for what, ids in odd.items() if ids)
        raise DataError(f"{path} is no partition of the split's {len(place)} prompts: {said}. Run `dvc repro group`.")
    try:
        return [[place[id] for id in ids] for ids in groups], [float(row["similarity"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path) from error


def read_threshold(path: Path) -> float:
    """Return the threshold that the groups were formed with, also if the parameters ask for a budget instead."""
    try:
        return float(_read(path)["threshold"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path) from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path} does not exist. Run `dvc repro group`.")
    return json.loads(path.read_text(encoding="utf-8"))


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is damaged: it holds no groups of prompts. Run `dvc repro --force group`.")
