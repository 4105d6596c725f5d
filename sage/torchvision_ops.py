"""Declare torchvision's operators if they cannot be loaded, so that diffusers can be imported.

With the CPU build of torch 2.13 the torchvision wheel cannot load its compiled operators, and importing it fails with
`operator torchvision::nms does not exist`; diffusers, transformers and clean-fid all import it. Nothing here calls the
operators, so their schemas are enough. Import this module before any of those three.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # without torchvision nothing needs its operators
    for library in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")


# Keep a reference: torch drops the declarations when the Library is garbage-collected.
_library: torch.library.Library | None = None
if not _operators_load():
    _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for _name in ("nms", "qnms"):
        _library.define(_name + _SCHEMA)  # type: ignore[no-untyped-call]
