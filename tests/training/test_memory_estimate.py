import sage.torchvision_ops  # noqa: F401

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage.sampling.pipeline import SharedSamplingPipeline
from sage.training.memory import estimate

SIZE = (16, 16)
SETTINGS = {"items": 3, "images": 5, "captions": 4, "rank": None, "consistency": False, "checkpointing": False}


@pytest.fixture(params=tiny.FAMILIES)
def pipe(request, tmp_path, monkeypatch):
    found = SharedSamplingPipeline.from_pipe(tiny.pipeline(request.param, tmp_path))
    if request.param in tiny.OPTIONS:
        monkeypatch.setattr(type(found), "_options", {**found._options, **tiny.OPTIONS[request.param]})
    return found


def test_activations_are_those_that_a_real_pass_keeps(pipe):
    found = estimate(pipe, SIZE, **SETTINGS)
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    options = {**pipe._options, "size": SIZE}
    condition = {name: rows[:, 0] for name, rows in pipe._encode(["red cat"] * 3, None, False, {}, options).items()}
    condition = {name: rows.detach() for name, rows in condition.items()}
    x = torch.randn(3, *pipe._latents_shape(options))
    pipe._network.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        pipe._predict(x, torch.full((3,), 500.0), condition, 1.0, options)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert 0.9 * real < found.activations < 1.1 * real


def test_weights_and_states_are_counted(tmp_path):
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", tmp_path))
    network = sum(weight.numel() for weight in pipe.unet.parameters())
    whole = network + sum(w.numel() for part in (pipe.vae, pipe.text_encoder) for w in part.parameters())
    found = estimate(pipe, SIZE, **SETTINGS)
    assert found.weights == 4 * whole and found.training == 4 * 4 * network
    assert found.data == 4 * (5 * 4 * 8 * 8 + 4 * 16 * 16)
    assert estimate(pipe, SIZE, **SETTINGS | {"consistency": True}).weights == 4 * (whole + network)
    adapted = estimate(pipe, SIZE, **SETTINGS | {"rank": 2, "consistency": True})
    assert adapted.weights == 4 * whole and 0 < adapted.training < found.training / 4
    assert estimate(pipe, SIZE, **SETTINGS | {"checkpointing": True}).activations < found.activations / 2
