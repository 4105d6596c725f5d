"""`sage configure`: change params.yaml by a short file of settings, for example one of configs/."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from flows.versioning.experiments import set_parameters
from sage.errors import ConfigurationError
from sage.files import write_text

PARAMS = Path("params.yaml")


def overrides(file: Path) -> list[str]:
    """Return the settings of a YAML file in the form of `dvc exp run -S`; raise ConfigurationError if it has none."""
    try:
        found: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ConfigurationError(f"{file} has no settings; write sections and keys as in {PARAMS}")
    return [
        f"{path}={_value(value)}"
        for section, values in found.items()
        for path, value in (
            [(f"{section}.{key}", value) for key, value in values.items()]
            if isinstance(values, dict)
            else [(section, values)]
        )
    ]


def apply(file: Path, further: Sequence[str] = ()) -> list[str]:
    """Change params.yaml by the settings of a file and by further ones; its comments stay. Return all of them.

    Raises ConfigurationError, and changes nothing, if the result is no valid configuration.
    """
    changes = [*overrides(file), *further]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, PARAMS)
        shutil.copy(PARAMS, copy)
        set_parameters(copy.parent, changes)
        write_text(PARAMS, copy.read_text(encoding="utf-8"))
    return changes


def _value(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("\n").removesuffix("\n...")
