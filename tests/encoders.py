"""A distilled encoder that was not trained: its rows follow the text in some way, which is all that groups need."""

import sage.torchvision_ops  # noqa: F401

import numpy as np
import torch

from sage.grouping.distilled import CoefficientNetwork, Distilled


def random_encoder(made_for: tuple[str, float, float]) -> Distilled:
    """Return an encoder of five components for models of 64 latents."""
    torch.manual_seed(0)
    network = CoefficientNetwork(384, 5, width=16, queries=2, hidden=24)
    network.scale.mul_(4)
    mean = np.array([0.5, -1, 2, 0.1, 0, 3], np.float32)
    return Distilled(network.eval().requires_grad_(False), mean, 64, made_for, {"distilled.threshold": 0.97})
