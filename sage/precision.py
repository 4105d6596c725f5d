"""Half precision in training, where it is faster."""

import torch


def autocast(device: str | torch.device = "cpu", enabled: bool = True) -> torch.autocast:
    """Return the context of a forward pass in bfloat16, or in float32 if not `enabled`.

    A processor that has no bfloat16 arithmetic emulates it many times slower than it computes in float32, so there the
    context stays float32.
    """
    kind = torch.device(device).type
    fast = kind != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=enabled and fast)
