"""What belongs to a machine and not to a run: environment, never a parameter."""

import os


def device() -> str:
    """Return where networks run: SAGE_DEVICE, by default the first accelerator, else the CPU."""
    import torch

    return os.environ.get("SAGE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
