import sage.torchvision_ops  # noqa: F401

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage.sampling.pipeline import SharedSamplingPipeline
from sage.training import lora
from sage.training.denoiser import Denoiser
from sage.training.memory import estimate

SIZE = (16, 16)
SETTINGS = {"items": 3, "images": 5, "captions": 4, "rank": None, "consistency": False, "checkpointing": False}


@pytest.fixture(params=tiny.TRAINED)
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

    denoiser = Denoiser(pipe)
    condition = denoiser.encode_texts(["red cat"] * 3, SIZE)
    x = torch.randn(3, 4, 8, 8)
    denoiser.train()
    with torch.no_grad():
        denoiser(x, torch.full((3,), 500.0), condition)  # what is prepared once
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        denoiser(x, torch.full((3,), 500.0), condition)
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


def test_a_frozen_base_takes_what_its_precision_takes(tmp_path):
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", tmp_path))
    parts = pipe.unet, pipe.vae, pipe.text_encoder
    network, autoencoder, encoder = (sum(weight.numel() for weight in part.parameters()) for part in parts)
    found = {
        name: estimate(pipe, SIZE, **SETTINGS | {"rank": 2, "precision": name}) for name in ("fp32", "bf16", "fp8")
    }
    assert (
        found["fp32"].weights == 4 * (network + autoencoder + encoder) == found["bf16"].merged
        and not found["fp32"].merged
    )
    # The parts are on the device in turns.
    assert found["bf16"].weights == 2 * max(network, autoencoder, encoder)
    assert found["fp8"].weights < found["bf16"].weights
    assert found["bf16"].training == found["fp32"].training and found["bf16"].activations < found["fp32"].activations
    texts = estimate(pipe, SIZE, **SETTINGS | {"rank": 2, "precision": "bf16", "texts": True})
    assert texts.weights == 2 * (network + encoder)
    encoders = lora.trainable_encoders(pipe)
    lora.add_to_texts(encoders, 2, 0)
    added = sum(w.numel() for w in encoders["text_encoder"].parameters() if w.requires_grad)
    assert texts.training - found["bf16"].training == 5 * 4 * added
