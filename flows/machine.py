"""Settings of the machine: environment variables, because they are no parameters of a run."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sage.errors import ConfigurationError

if TYPE_CHECKING:
    from accelerate import Accelerator


log = logging.getLogger(__name__)


def device() -> str:
    """Return the torch device: SAGE_DEVICE, or by default the first CUDA device if there is one, else the CPU.

    Raises ConfigurationError if torch cannot compute on it here.
    """
    import torch

    cards = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    wanted = os.environ.get("SAGE_DEVICE") or ("cuda" if cards else "cpu")
    try:
        torch.ones(1, device=wanted).sum().item()
    except (RuntimeError, AssertionError, ImportError) as error:
        there = ["cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else [])]
        raise ConfigurationError(
            f"torch cannot compute on the device {wanted} here ({str(error).splitlines()[0].rstrip('.')}); "
            f"set SAGE_DEVICE to one of {', '.join(there)}, or repair the driver"
        ) from error
    return wanted


def memory(device: str) -> tuple[int, int]:
    """Return the free and the whole memory of a device in bytes; of mps, which shares it, the machine's."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)
    import psutil

    found = psutil.virtual_memory()
    return found.available, found.total


def check_cpu(command: str) -> None:
    """Raise ConfigurationError if SAGE_DEVICE names a device other than the CPU, the only one that a command uses."""
    named = os.environ.get("SAGE_DEVICE", "cpu")
    if named.partition(":")[0] not in ("", "cpu"):
        raise ConfigurationError(f"{command} runs on the CPU only, not on {named}; set SAGE_DEVICE=cpu")


def accelerator() -> "Accelerator":
    """Return accelerate's view of this process, on `device()`; of several processes each takes a card of its own.

    Raises ConfigurationError if it is not there, or is one card for several processes.
    """
    from accelerate import Accelerator
    from accelerate.utils import patch_environment

    wanted = device()
    several = "LOCAL_RANK" in os.environ  # accelerate launch and torchrun set it
    if several and wanted not in ("cpu", "cuda"):
        raise ConfigurationError(
            f"SAGE_DEVICE={wanted} is one device for several processes; set SAGE_DEVICE=cuda for a card each "
            "(CUDA_VISIBLE_DEVICES chooses which) or SAGE_DEVICE=cpu"
        )
    # By itself accelerate takes the first accelerator that it finds.
    own = {"accelerate_torch_device": wanted} if not several else {}
    cpu = wanted.startswith("cpu")
    with patch_environment(accelerate_use_cpu=cpu, **own):
        return Accelerator(cpu=cpu, mixed_precision="no")


def encoded_cache() -> Path:
    """Return the folder of the latents and text states that training reads, in SAGE_CACHE (default: work/cache)."""
    return Path(os.environ.get("SAGE_CACHE", "work/cache")) / "encoded"


def embedding_cache() -> Path | None:
    """Return the file that caches prompt embeddings, in the folder SAGE_CACHE (default: work/cache).

    None, with a warning, if it cannot be written: a project that is only read keeps no cache.
    """
    path = Path(os.environ.get("SAGE_CACHE", "work/cache")) / "embeddings.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        log.warning("embeddings are not cached, because %s cannot be written: %s", path, error.strerror)
        return None
    return path
