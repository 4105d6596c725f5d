"""Numbers as callers have them: of Python, numpy or torch. A truth value is no number."""

import operator
from typing import Any

from sage.errors import ConfigurationError


def single(value: Any) -> bool:
    """Return whether a value is one number, not a sequence of them."""
    return getattr(value, "ndim", None) == 0 or not hasattr(value, "__len__")


def whole(name: str, value: Any) -> int:
    """Return a whole number as an int; raise ConfigurationError, which names the argument, for anything else."""
    if type(value) is int:
        return value
    try:
        if not _truth(value):
            return operator.index(value)
    except TypeError:
        pass
    raise ConfigurationError(f"{name} is {value!r} ({type(value).__name__}); give a whole number")


def real(name: str, value: Any) -> float:
    """Return a number as a float; raise ConfigurationError, which names the argument, for anything else.

    A number of single or half precision means the shortest decimal that it is nearest to: 0.29, not 0.28999999.
    """
    if type(value) is float:
        return value
    try:
        if single(value) and not _truth(value) and hasattr(value, "__float__"):
            plain = getattr(value, "numpy", lambda: value)()
            return float(str(plain)) if getattr(plain, "itemsize", 8) < 8 else float(plain)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ConfigurationError(f"{name} is {value!r} ({type(value).__name__}); give a number")


def _truth(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
