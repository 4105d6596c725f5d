"""Hooks on the network: shared sampling refuses those that may carry one call's features into the next.

Consecutive network calls are for different prompts and different steps here, so a cache that is not emptied in between
would put the features of one image into another. The step caches of `sage.sampling.caches` are.
"""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import sage.torchvision_ops  # noqa: F401

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from sage.errors import UnsupportedError
from sage.sampling.caches import CACHES

# Modules whose hooks move, cast or reparametrise weights, and keep nothing of a call.
_KNOWN = ("accelerate.hooks", "diffusers.hooks.group_offloading", "diffusers.hooks.layerwise_casting", "torch.")
# The module that puts a chain of diffusers' hooks in place of a forward method; the hooks are looked at one by one.
_CHAIN = "diffusers.hooks.hooks"


def check_hooks(network: nn.Module) -> None:
    """Raise UnsupportedError, naming it, for a hook inside the network or a replaced forward method.

    Hooks that offload or cast weights and those of supported step caches are allowed, and so are PyTorch's own hooks on
    the network as a whole, which count its calls; what these return is not checked.
    """
    for path, module in unwrap_module(network).named_modules():
        for what in (*_hooks(module, inside=path != ""), *_forwards(module)):
            raise UnsupportedError(
                f"{what} at {path or type(network).__name__} may carry one network call's features into the next, "
                "which is for other prompts in shared sampling; remove it, or disable the cache that added it "
                "(a cache of diffusers: disable_cache() of the U-Net or transformer)"
            )


def _hooks(module: nn.Module, inside: bool) -> Iterator[str]:
    """Yield the names of a module's hooks that are not known to be right."""
    hooks: list[Any] = []
    if (registry := getattr(module, "_diffusers_hook", None)) is not None:
        hooks += registry.hooks.values()
    if (hook := getattr(module, "_hf_hook", None)) is not None:
        hooks += getattr(hook, "hooks", [hook])  # accelerate's SequentialHook holds several
    if inside:
        hooks += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    for hook in hooks:
        if type(hook) not in CACHES and not _origin(hook).startswith(_KNOWN):
            yield f"the hook {getattr(hook, '__qualname__', type(hook).__name__)}"


def _forwards(module: nn.Module) -> Iterator[str]:
    """Yield the names of functions that replace a module's forward method, on the module or on its class."""
    owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
    own = vars(owner)["forward"]
    replaced = [] if _origin(own) == owner.__module__ else [own]
    registry = getattr(module, "_diffusers_hook", None)
    under = [ref.original_forward or ref.forward for ref in getattr(registry, "_fn_refs", [])[:1]]
    for forward in (vars(module).get("forward"), vars(module).get("_old_forward"), *under):
        forward = getattr(forward, "_torchdynamo_orig_callable", forward)
        known = _origin(forward).startswith((*_KNOWN, _CHAIN))
        if forward is not None and getattr(forward, "__func__", None) is not own and not known:
            replaced.append(forward)
    for forward in replaced:
        yield f"the replaced forward method {getattr(forward, '__qualname__', type(forward).__name__)}"


def _origin(hook: Any) -> str:
    """Return the name of the module that defines a function, a partial function's function, or an object's class."""
    hook = hook.func if isinstance(hook, functools.partial) else hook
    return str((hook if inspect.isroutine(hook) else type(hook)).__module__)
