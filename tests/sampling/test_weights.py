"""Weights in less than float32: what is stored, what is computed with, and what a LoRA beside them keeps."""

import copy

import sage.torchvision_ops  # noqa: F401

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from torch import nn

from flows.drawing import open_pipeline
from sage.sampling.weights import StoredLinear, store

FAMILIES = ["stable_diffusion", "stable_diffusion_3", "flux"]


def network_of(family, tmp_path):
    pipe = tiny.pipeline(family, tmp_path).to(torch.bfloat16)
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_of_the_blocks_are_stored_in_8_bits(family, tmp_path):
    network = network_of(family, tmp_path)
    before = copy.deepcopy(network)
    store(network)
    for (name, module), (_, was) in zip(network.named_modules(), before.named_modules(), strict=True):
        inside = "block" in name and isinstance(was, nn.Linear)
        assert isinstance(module, StoredLinear) is inside
        if inside:
            assert module.weight.nbytes == was.weight.numel() and not module.weight.requires_grad
            # e4m3 has 4 significant bits; below 2^-6 its steps are 2^-9.
            torch.testing.assert_close(module.weight.to(torch.bfloat16), was.weight, rtol=2**-4, atol=2**-10)
    assert network.dtype == torch.bfloat16
    stored = [values.numel() for name, values in network.named_parameters() if values.dtype == torch.float8_e4m3fn]
    assert len(stored) > 5


def test_a_stored_layer_computes_in_the_precision_of_its_input():
    layer = nn.Linear(6, 4)
    reference = copy.deepcopy(layer)
    reference.weight.data = layer.weight.data.to(torch.float8_e4m3fn).float()
    blocks = nn.ModuleDict({"blocks": nn.ModuleList([layer])})
    store(blocks)
    store(blocks)  # a second time changes nothing
    x = torch.randn(3, 6, requires_grad=True)
    found = layer(x)
    torch.testing.assert_close(found, reference(x))
    found.sum().backward()
    torch.testing.assert_close(x.grad, reference.weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_keeps_its_own_precision(family, tmp_path):
    """Its small numbers would be lost in 8 bits."""
    network = network_of(family, tmp_path)
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q"]))
    before = {name: values.clone() for name, values in network.named_parameters() if "lora_" in name}
    store(network)
    for name, values in network.named_parameters():
        if name in before:
            assert torch.equal(values, before[name])


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.03), ("fp8", 0.3)])
def test_a_saved_pipeline_is_opened_in_a_precision(precision, bound, tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    tiny.pipeline("stable_diffusion", tmp_path).save_pretrained(tmp_path / "saved")

    def drawn(pipe):
        return pipe(tiny.PROMPTS[:2], num_inference_steps=3, seed=0, guidance_scale=1.0, output_type="np").images

    exact = drawn(open_pipeline(tmp_path / "saved"))
    pipe = open_pipeline(tmp_path / "saved", precision=precision)
    assert pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16
    assert any(isinstance(module, StoredLinear) for module in pipe.unet.modules()) is (precision == "fp8")
    assert 0 < np.abs(drawn(pipe) - exact).mean() < bound
