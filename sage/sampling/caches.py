"""Step caches of diffusers under shared sampling: what a cache keeps belongs to one phase of one call.

A step cache (`enable_cache` of a transformer, or one of diffusers' `apply_..._cache`) keeps features of a network call
for the next ones, for the rows of its batch. The rows of a pack stay the same until it branches, so every pack begins
with a clean cache: from there on it is the stock pipeline with that cache. Between network calls, what a call of the
pipeline has in its caches is taken out of the network, so that no other call finds it.

    PyramidAttentionBroadcast, FasterCache   know the step's timestep, not which of a step's network calls they are in
    FirstBlockCache, TaylorSeer              keep apart the network calls of a step that the stock pipeline names
    MagCache                                 the same, and one state where the stock pipeline names none; counts steps
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import sage.torchvision_ops  # noqa: F401

from diffusers.hooks.faster_cache import FasterCacheBlockHook, FasterCacheDenoiserHook
from diffusers.hooks.first_block_cache import FBCBlockHook, FBCHeadBlockHook
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.mag_cache import MagCacheBlockHook, MagCacheHeadHook, MagCacheState
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheHook
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from sage.errors import UnsupportedError
from sage.sampling.plan import Block, Plan

_TIMED = (PyramidAttentionBroadcastHook, FasterCacheDenoiserHook, FasterCacheBlockHook)
_COUNTING = (MagCacheHeadHook, MagCacheBlockHook)
# The hooks of the supported caches, by cache. SeaCache needs the number of the step, TextKVCache knows a prompt by its
# address in memory.
CACHES: dict[type, str] = {
    PyramidAttentionBroadcastHook: "PyramidAttentionBroadcast",
    FasterCacheDenoiserHook: "FasterCache",
    FasterCacheBlockHook: "FasterCache",
    FBCHeadBlockHook: "FirstBlockCache",
    FBCBlockHook: "FirstBlockCache",
    TaylorSeerCacheHook: "TaylorSeer",
    MagCacheHeadHook: "MagCache",
    MagCacheBlockHook: "MagCache",
}


class StepCaches:
    """The step caches of a call's networks, with what they keep for this call; false if there are none."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        """Find the hooks of the supported caches in these networks."""
        self._hooks = {network: list(_cache_hooks(network)) for network in networks}
        self._slots = list(_slots(hook for hooks in self._hooks.values() for hook in hooks))
        self._kept: list[Any] = []
        self._step, self._rows = 0, (0, 0)

    def __bool__(self) -> bool:
        """Return whether there are step caches."""
        return bool(self._slots)

    def check(self, plan: Plan, guided: bool) -> None:
        """Raise UnsupportedError, naming it, for a cache that cannot be right for this plan or without guidance."""
        self._check_guidance(guided)
        for hook in (hook for hooks in self._hooks.values() for hook in hooks):
            after = getattr(hook, "disable_cache_after_step", None)
            if after is not None and any(isinstance(node, Block) for node in plan.roots):
                raise UnsupportedError(
                    f"disable_cache_after_step={after} of TaylorSeer counts the steps of a whole call, but its cache "
                    "begins anew where a group branches; leave it out, or use share ratio 0"
                )
            if isinstance(hook, _COUNTING):
                self._check_mag_cache(hook.config, plan.steps)

    def _check_guidance(self, guided: bool) -> None:
        for hook in (hook for hooks in self._hooks.values() for hook in hooks):
            if isinstance(hook, FasterCacheDenoiserHook) and not hook.is_guidance_distilled and not guided:
                raise UnsupportedError(
                    "FasterCache takes the first half of a batch for the rows without text, but here there is no "
                    "guidance; set is_guidance_distilled=True of FasterCacheConfig, or disable the cache"
                )

    def _check_mag_cache(self, config: Any, steps: int) -> None:
        if config.calibrate:
            raise UnsupportedError("MagCache is calibrated in a call of the stock pipeline; set calibrate=False")
        if config.num_inference_steps != steps:
            raise UnsupportedError(
                f"MagCache has ratios for {config.num_inference_steps} steps, but the network is evaluated in {steps}; "
                f"set num_inference_steps={steps} of MagCacheConfig"
            )
        if len(self._hooks) > 1:
            raise UnsupportedError(
                "MagCache counts the steps of its own network, but this pipeline has two, each for a part of the "
                "steps; disable it, or use another cache"
            )

    def begin(self, step: int) -> None:
        """Begin with clean caches at the step of this number."""
        self._kept = [fresh(step) for _, _, fresh in self._slots]
        self._step, self._rows = step, (0, 0)

    @contextmanager
    def own(self, pipe: Any, t: Tensor, rows: int, times: int) -> Iterator[None]:
        """Within, the networks have this call's caches; raise UnsupportedError for one that this step would mix up.

        pipe   pipeline whose `current_timestep` is then the step's, for the caches that ask for it
        t      timestep of the step
        rows   latents of the step
        times  evaluations of each, 2 under guidance
        """
        if self._rows not in ((0, 0), (rows, times)):
            self.begin(self._step)  # a callback turned guidance off
        self._check_guidance(times > 1)
        clean, self._rows = self._rows == (0, 0), (rows, times)
        others = self._exchange(self._kept)
        vars(pipe)["_current_timestep"] = t
        try:
            self._check_timestep(t, clean)
            yield
        finally:
            vars(pipe)["_current_timestep"] = None
            self._kept = self._exchange(others)
            self._step += 1

    def check_call(self, network: nn.Module, found: int) -> None:
        """Raise UnsupportedError if the step's rows come in several network calls that a cache cannot tell apart.

        `found`: rows of the call of `network` that comes next.
        """
        rows, times = self._rows
        for hook in self._hooks.get(network, ()):
            cache, context = CACHES[type(hook)], None if isinstance(hook, _TIMED) else hook.state_manager._context
            named = context is not None and context.name != "inference"  # as MagCache calls what has no name
            if cache in ("FirstBlockCache", "TaylorSeer") and not named:
                raise UnsupportedError(
                    f"{cache} needs a stock pipeline that names its network calls (cache_context); disable it, or use "
                    "another cache"
                )
            if not named and found != rows * times:
                raise UnsupportedError(
                    f"{cache} would mix the network calls of a step: this one has {found} of the step's {rows * times} "
                    "rows; disable it, or use a cache that keeps them apart, such as FirstBlockCache"
                )

    def _exchange(self, values: list[Any]) -> list[Any]:
        """Put values into the slots and return what was there."""
        before = [getattr(owner, name) for owner, name, _ in self._slots]
        for (owner, name, _), value in zip(self._slots, values, strict=True):
            setattr(owner, name, value)
        return before

    def _check_timestep(self, t: Tensor, clean: bool) -> None:
        hooks = [hook for hooks in self._hooks.values() for hook in hooks if isinstance(hook, _TIMED)]
        for callback in {hook.current_timestep_callback for hook in hooks}:
            found = None if callback is None else callback()
            if found is None or float(found) != float(t):
                raise UnsupportedError(
                    f"current_timestep_callback of a step cache returned {found} at timestep {float(t):g}; let it "
                    "return the current_timestep of the pipeline that is called: lambda: pipe.current_timestep"
                )
        for hook in hooks if clean else ():
            distilled = isinstance(hook, FasterCacheBlockHook) and hook.is_guidance_distilled
            if distilled and hook.timestep_skip_range[0] < float(t) < hook.timestep_skip_range[1]:
                raise UnsupportedError(
                    "FasterCache with is_guidance_distilled has to begin outside its range of timesteps, but begins at "
                    f"{float(t):g} in {hook.timestep_skip_range}, the start of the call or a branch; let the range end "
                    "below, or branch earlier"
                )


def _cache_hooks(network: nn.Module) -> Iterator[Any]:
    for module in unwrap_module(network).modules():
        registry = getattr(unwrap_module(module), "_diffusers_hook", None)
        yield from (hook for hook in (registry.hooks.values() if registry else ()) if type(hook) in CACHES)


def _slots(hooks: Iterator[Any]) -> Iterator[tuple[Any, str, Callable[[int], Any]]]:
    """Yield where caches keep something: an object, its attribute, and what that is at the step of a number."""
    managers: dict[int, StateManager] = {}
    for hook in hooks:
        if isinstance(hook, _TIMED):
            yield hook, "state", partial(_clean_state, type(hook.state))
        managers |= {id(value): value for value in vars(hook).values() if isinstance(value, StateManager)}
    for manager in managers.values():
        yield manager, "_state_cache", lambda step: {}
        if manager._state_cls is MagCacheState:
            # The ratios of MagCache belong to steps of the schedule.
            yield manager, "_state_cls", lambda step: partial(_mag_cache_state, step)


def _clean_state(kind: Callable[[], Any], step: int) -> Any:
    return kind()


def _mag_cache_state(step: int) -> Any:
    state = MagCacheState()
    state.step_index = step
    return state
