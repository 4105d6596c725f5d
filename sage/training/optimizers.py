"""The optimizers of fine-tuning, by name."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

Name = Literal["adamw", "adafactor"]


def optimizer(
    name: Name, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return an optimizer of these parameters whose state is tensors alone, so that a checkpoint can hold it.

    "adamw": AdamW (Loshchilov and Hutter, 2019), two moments for each weight. "adafactor": Adafactor (Shazeer and
    Stern, 2018) as torch implements it: no first moment, and of a matrix's second moment the mean of each row and of
    each column. Its learning rate is relative: a step is at most that fraction of a tensor's root mean square (or of
    0.001 if that is more).
    """
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, learning_rate, weight_decay=weight_decay)
    # fused: one kernel for all parameters, on a CPU several times faster than a loop over them.
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay, fused=True)
