"""Settings of the machine: environment variables, because they are no parameters of a run."""

import os
from pathlib import Path


def device() -> str:
    """Return the torch device: SAGE_DEVICE, or by default the first CUDA device if there is one, else the CPU."""
    import torch

    return os.environ.get("SAGE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def embedding_cache() -> Path:
    """Return the file that caches prompt embeddings, in the folder SAGE_CACHE (default: work/cache)."""
    return Path(os.environ.get("SAGE_CACHE", "work/cache")) / "embeddings.sqlite"
