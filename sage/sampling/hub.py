"""Models on a hub, named `OWNER/NAME@REVISION`, and their pins: small files that stand for them.

DVC depends on files, and a commit never changes, so a pin is all that it has to watch: `hub/OWNER/NAME@COMMIT`, as
`sage base` writes it. Wherever a model is named, its pin can be given.
"""

import re
from pathlib import Path
from typing import NamedTuple

from sage.files import write_json

FOLDER = "hub"
COMMIT = re.compile("[0-9a-f]{40}")
_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


class Model(NamedTuple):
    """A model on a hub; `revision` is a commit, tag or branch, None for the newest commit."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        """Return the form in which people write it."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def named(model: str | Path) -> Model | None:
    """Return the model on a hub that a text or a pin names; None for a file or folder that is there."""
    found = _NAME.fullmatch(str(model))
    if found is None or Path(model).exists():
        return pinned(model)
    return Model(found["name"], found["revision"])


def pinned(path: str | Path) -> Model | None:
    """Return the model of a pin, whose path says it all; None for any other path. The pin need not exist."""
    path = Path(path)
    found = _NAME.fullmatch("/".join(path.parts[-2:]))
    if path.parts[-3:-2] != (FOLDER,) or found is None or path.is_dir():
        return None
    if not COMMIT.fullmatch(found["revision"] or ""):
        return None
    return Model(found["name"], found["revision"])


def pin(model: Model, project: Path = Path()) -> Path:
    """Write the pin of a model at a commit and return its path, relative to the project."""
    path = Path(FOLDER, str(model))
    write_json(project / path, model._asdict())
    return path
