"""Which hooks on the network shared sampling takes, and which it refuses because they keep features between calls."""

import types

import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import TextKVCacheConfig, apply_layerwise_casting, apply_text_kv_cache
from peft import LoraConfig, inject_adapter_in_model

from sage.errors import UnsupportedError
from sage.sampling.hooks import check_hooks
from sage.sampling.pipeline import SharedSamplingPipeline


def kept_texts(network):
    apply_text_kv_cache(network, TextKVCacheConfig())


def hooked(network):
    network.get_submodule("transformer_blocks.1").register_forward_hook(lambda module, args, output: output)


def hooked_before(network):
    network.get_submodule("transformer_blocks.1").register_forward_pre_hook(lambda module, args: args)


def patched(network):
    network.transformer_blocks[1].forward = lambda hidden_states, **kwargs: hidden_states


def patched_as_a_method(network):
    network.forward = types.MethodType(lambda self, x, **kwargs: (x,), network)


def patched_below_offloading(network):
    patched_as_a_method(network)
    add_hook_to_module(network, AlignDevicesHook(execution_device="cpu"))


@pytest.mark.parametrize(
    ("add", "name"),
    [
        (kept_texts, "TextKVCacheTransformerHook"),
        (hooked, r"hooked.<locals>.<lambda> at transformer_blocks.1"),
        (hooked_before, "hooked_before"),
        (patched, "replaced forward method patched"),
        (patched_as_a_method, "replaced forward method patched_as_a_method"),
        (patched_below_offloading, "replaced forward method patched_as_a_method"),
    ],
)
def test_what_may_keep_features_of_a_call_is_refused_by_name(add, name, tmp_path):
    stock = tiny.pipeline("pixart_alpha", tmp_path)
    add(stock.transformer)
    shared = SharedSamplingPipeline.from_pipe(stock)
    with pytest.raises(UnsupportedError, match=rf"{name}.* may carry one network call's features into the next"):
        shared("red cat", **tiny.OPTIONS["pixart_alpha"])


def test_a_forward_method_replaced_on_the_class_is_refused(tmp_path, monkeypatch):
    network = tiny.pipeline("stable_diffusion_3", tmp_path).transformer
    check_hooks(network)
    monkeypatch.setattr(type(network), "forward", lambda self, **kwargs: (kwargs["hidden_states"],))
    with pytest.raises(UnsupportedError, match=r"the replaced forward method .*lambda.* at SD3Transformer2DModel"):
        check_hooks(network)


# Importing PyTorch's compiler warns about its own code.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_offloading_casting_adapters_and_counters_are_allowed(family, tmp_path):
    network = SharedSamplingPipeline.from_pipe(tiny.pipeline(family, tmp_path))._network
    network.register_forward_hook(lambda module, args, output: None)
    network.register_forward_pre_hook(lambda module, args: None)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), network)
    check_hooks(network)
    apply_layerwise_casting(network, torch.float16, torch.float32)
    network.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    check_hooks(network)
    for module in (network, *network.children()):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"), append=True)
    check_hooks(network)
    remove_hook_from_module(network)
    check_hooks(network)
    network.compile()
    check_hooks(torch.compile(network))
