"""LoRAs that a pipeline has loaded under names: read from files, and worn by its modules for one network call."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sage.errors import ConfigurationError, DataError, UnsupportedError
from sage.files import sha256, sha256_tree

# The file of a LoRA that diffusers writes, and stage finetune.
FILE = "pytorch_lora_weights.safetensors"
# Names and weights of the LoRAs of an image, in order of their names; without any, the pipeline's own weights.
Worn = tuple[tuple[str, float], ...]


def load(pipe: Any, loras: Mapping[str, Path]) -> dict[str, str]:
    """Load LoRAs under names, each from a safetensors file or a folder with one; return the SHA-256 of each.

    Raises UnsupportedError if the pipeline's class takes none, DataError for one that is missing or does not fit.
    """
    found = {}
    for name, path in loras.items():
        if not hasattr(pipe, "set_adapters"):
            raise UnsupportedError(f"{type(pipe).__name__} takes no LoRA in diffusers; leave {name} out")
        if not path.exists():
            raise DataError(f"the LoRA {name} cannot be loaded: there is no {path}")
        place = {"weight_name": path.name} if path.is_file() else {}
        with warnings.catch_warnings():
            # Several adapters are what is wanted here.
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            pipe.load_lora_weights(path.parent if path.is_file() else path, adapter_name=name, **place)
        if not any(name in names for names in pipe.get_list_adapters().values()):
            raise DataError(f"the LoRA {name} ({path}) fits nothing in {type(pipe).__name__}; it is for another model")
        found[name] = digest(path)
    return found


def digest(path: Path) -> str:
    """Return the SHA-256 of a LoRA, a file or a folder; raise DataError if there is none."""
    if not path.exists():
        raise DataError(f"there is no LoRA {path}")
    return sha256(path) if path.is_file() else sha256_tree(path)


class Wearer:
    """A pipeline with LoRAs; it remembers what its modules wear, because a change touches every layer."""

    def __init__(self, pipe: Any) -> None:
        """Take the pipeline."""
        self._pipe, self._worn = pipe, None

    _worn: Worn | None

    def wear(self, loras: Worn | None) -> None:
        """Make the modules use these LoRAs; None leaves them as they are.

        Raises ConfigurationError for a name that is not loaded.
        """
        if loras is None or loras == self._worn:
            return
        known = {name for names in self._pipe.get_list_adapters().values() for name in names}
        if missing := sorted({name for name, _ in loras} - known):
            raise ConfigurationError(f"there is no LoRA {', '.join(missing)}; loaded are {', '.join(sorted(known))}")
        self._worn = None  # in case of an error on the way
        if loras:
            self._pipe.enable_lora()
            self._pipe.set_adapters([name for name, _ in loras], [weight for _, weight in loras])
        else:
            self._pipe.disable_lora()
        self._worn = loras
