"""A simulated accelerator: a device whose tensors hold real values in the host's memory, under a name of its own.

It finds on a CPU what else needs a GPU: an operation that gets tensors of two devices raises, as on a GPU, and
`counted` counts what a GPU would wait for or copy. Its tensors are a subclass that runs each operation on the host;
factories such as `torch.zeros(device=DEVICE)` reach it through the PrivateUse1 dispatch key. No compiler is needed.
`register` makes it known to torch, for the whole process; importing this module does not.
Not simulated: random generators on the device, autocast, and faults of timing.
"""

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "simulated"
aten = torch.ops.aten

# Operations whose result, or the size of it, the host has to know: a GPU's queue is waited for.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
          "is_nonzero", "bincount", "repeat_interleave", "allclose"}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Operations that do not even take a number from the host. The others pass it to the kernel as an argument.
_STRICT = {"cat", "stack", "index_select", "mm", "addmm", "bmm", "baddbmm", "linear", "gather", "scatter", "embedding",
           "convolution", "native_layer_norm", "native_group_norm", "index_add", "index_add_"}  # fmt: skip


@dataclass
class Events:
    """What a GPU would have waited for, and copies between host and device, by the lines of code that asked for them.

    A copy from the device is also a wait. `waits` and `copies` map "file:line < file:line" to a count, first the line
    outside torch, then the innermost one of this project.
    """

    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)


_events: Events | None = None


@contextmanager
def counted() -> Iterator[Events]:
    """Count waits and copies within the context."""
    global _events
    _events, before = Events(), _events
    try:
        yield _events
    finally:
        _events = before


def _record(operation: str, *, wait: bool, copy: bool) -> None:
    if _events is None:
        return
    place = f"{operation} {_place()}"
    if wait:
        _events.waits[place] += 1
    if copy:
        _events.copies[place] += 1


def _place() -> str:
    frame: Any = sys._getframe(1)
    outside, own = None, None
    while frame is not None and own is None:
        name = frame.f_code.co_filename
        line = f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno}"
        if name != __file__ and "/torch/" not in name:
            outside = outside or line
            own = line if "/sage/" in name and "site-packages" not in name else None
        frame = frame.f_back
    return f"{outside} < {own}"


class OnDevice(Tensor):
    """A tensor on the simulated device; `host` holds its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "OnDevice":
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(DEVICE, 0),
        )
        made.host = host
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, values: "OnDevice") -> None:
        """Exchange the values, as `Module.to(dtype)` does."""
        Tensor.data.__set__(self, values)  # type: ignore[attr-defined]
        self.host = values.host

    # torch refuses these to every subclass, and not as a device would.

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {DEVICE}:0 device type tensor to numpy. Use Tensor.cpu() first")
        return self.cpu().numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnDevice":
        if id(self) not in memo:
            made: Any = OnDevice(self.host.clone()).requires_grad_(self.requires_grad)
            made._is_param = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = made
        return memo[id(self)]  # type: ignore[no-any-return]

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def __repr__(self, **kwargs: Any) -> str:
        return f"on the simulated device: {self.host!r}"

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the host's values; the result is on the device, unless the host asks for it."""
    name = func.overloadpacket.__name__
    if name == "copy_":
        return _copied(args[1], args[0])
    if name == "_to_copy":
        return _moved(func, args[0], dict(kwargs))
    tensors = list(_tensors([*args, *kwargs.values()]))
    _check(name, args, tensors)
    if name in _WAITS or (name in _INDEXING and any(t.dtype == torch.bool for t in _tensors(args[1]))):
        _record(name, wait=True, copy=False)
    on_device = True
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == DEVICE
        kwargs = kwargs | {"device": "cpu"}
    hosts = {id(t.host): t for t in tensors if isinstance(t, OnDevice)}
    out = func(*(_on_host(arg) for arg in args), **{key: _on_host(value) for key, value in kwargs.items()})
    for tensor in hosts.values():
        if (tensor.host.shape, tensor.host.dtype) != (tensor.shape, tensor.dtype):
            raise NotImplementedError(f"a tensor of {name} was given another shape or type, which is not simulated")
    return _from_host(out, hosts) if on_device else out


def _check(name: str, args: Any, tensors: list[Tensor]) -> None:
    """Raise RuntimeError if an operation gets tensors of two devices that a GPU would not take together."""
    if all(isinstance(t, OnDevice) for t in tensors):
        return
    indices = list(_tensors(args[1])) if name in _INDEXING and isinstance(args[0], OnDevice) else []
    for tensor in tensors:
        if isinstance(tensor, OnDevice):
            continue
        if any(tensor is index for index in indices):
            _record(f"{name} by an index of the host", wait=False, copy=True)
        elif tensor.ndim or name in _STRICT or (name.endswith("_") and tensor is args[0]):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE}:0 and cpu! "
                f"({name})"
            )


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy values into a tensor, between devices too."""
    there, here = isinstance(source, OnDevice), isinstance(target, OnDevice)
    if there != here:
        _record("copy_", wait=there, copy=True)
    _on_host(target).copy_(_on_host(source))
    return target


def _moved(func: Any, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Return a copy of another type or on another device."""
    there = isinstance(source, OnDevice)
    device = kwargs.pop("device", None)
    here = there if device is None else torch.device(device).type == DEVICE
    if there != here:
        _record("copy", wait=there, copy=True)
    out = func(_on_host(source), **kwargs)
    return OnDevice(out) if here else out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _on_host(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.host
    return [_on_host(item) for item in value] if isinstance(value, (list, tuple)) else value


def _from_host(value: Any, known: dict[int, OnDevice]) -> Any:
    """Return results on the device; what an operation in place returns is the tensor that it was given."""
    if isinstance(value, Tensor):
        return known.get(id(value)) if id(value) in known else OnDevice(value)
    return type(value)(_from_host(item, known) for item in value) if isinstance(value, (list, tuple)) else value


class _Module:
    """What torch asks of `torch.<device>`."""

    # Not to be chosen by a library that looks for an accelerator, in the other tests of the process.
    def is_available(self) -> bool:
        return False

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def _empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
           memory_format: Any = None) -> Tensor:  # fmt: skip
    return OnDevice(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _arange(*bounds: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
    return OnDevice(torch.arange(*bounds, dtype=dtype))


def _number(tensor: OnDevice) -> Any:
    _record("_local_scalar_dense", wait=True, copy=False)
    return tensor.host.item()


@functools.cache
def register() -> torch.library.Library:
    """Make the device known to torch; it stays known as long as the process."""
    _setup_privateuseone_for_python_backend(DEVICE, _Module())
    library = torch.library.Library("aten", "IMPL")
    # torch calls these with the subclass switched off, or without a tensor.
    for name, function in {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "arange": _arange,
        "arange.start": _arange,
        "arange.start_step": _arange,
        "_copy_from": _copied,
        "_local_scalar_dense": _number,
    }.items():
        library.impl(name, function, "PrivateUse1")
    return library
