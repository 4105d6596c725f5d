"""What belongs to a machine and not to a run: environment, never a parameter."""

import os
from pathlib import Path


def device() -> str:
    """Return where networks run: SAGE_DEVICE, by default the first accelerator, else the CPU."""
    import torch

    return os.environ.get("SAGE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def embedding_cache() -> Path:
    """Return the file that keeps prompt embeddings on this machine: in the folder SAGE_CACHE, by default work/cache."""
    return Path(os.environ.get("SAGE_CACHE", "work/cache")) / "embeddings.sqlite"
