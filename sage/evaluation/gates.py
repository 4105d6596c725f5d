"""Gates: conditions that a model must meet, decided by a pure function that fails closed.

A gate says "no worse than the reference arm by more than this". It passes when the bad end of the interval of the
difference does, so too few pictures fail a gate and never pass it. Whatever is missing, not a finite number, measured
on another set, or at odds with the arms' own figures fails, with its reason.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sage.evaluation.arms import JUDGED
from sage.evaluation.registry import METRICS


@dataclass(frozen=True)
class Verdict:
    """What a gate decided: by how much the model is worse (negative: better), the limit, and why."""

    metric: str
    reference: str
    limit: float
    relative: bool
    value: float | None
    low: float | None
    high: float | None
    passed: bool
    reason: str


class _Unfit(Exception):
    """A figure that no gate may pass on; the message says why."""


def judge(results: Mapping[str, Any], expected: Mapping[str, Any], gates: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Return a verdict for each gate; `passed` needs every one, and at least one.

    `results` is what the evaluation wrote; `expected` is its "set" as it must be: digest of prompts, real pictures and
    groups, manifest of the generated pictures, n_prompts, n_real and seeds. Each gate has metric, reference,
    worse_by_at_most and relative.
    """
    return [verdict(results, expected, **gate) for gate in gates]


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Return whether there are verdicts and all are favourable."""
    return bool(verdicts) and all(verdict.passed for verdict in verdicts)


def verdict(
    results: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    metric: str,
    reference: str,
    worse_by_at_most: float,
    relative: bool,
) -> Verdict:
    """Return the decision of one gate."""
    try:
        _check_set(results, expected)
        n = expected["n_prompts"] * len(expected["seeds"])
        value, low, high = _difference(results, metric, reference, relative, n)
    except _Unfit as unfit:
        reason = f"The {metric.replace('_', ' ')} cannot be judged: {unfit}"
        return Verdict(metric, reference, worse_by_at_most, relative, None, None, None, False, reason)
    # Written so that a comparison with NaN fails.
    kept = bool(high <= worse_by_at_most)
    reason = _sentence(metric, reference, relative, worse_by_at_most, (value, low, high), kept)
    return Verdict(metric, reference, worse_by_at_most, relative, value, low, high, kept, reason)


def _check_set(results: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    found = results.get("set")
    if not isinstance(found, Mapping):
        raise _Unfit("the results do not say which set they were measured on.")
    for key, value in expected.items():
        if found.get(key) != value:
            raise _Unfit(f"it was measured on another set: {key} is {found.get(key)!r}, expected {value!r}.")


def _difference(
    results: Mapping[str, Any], metric: str, reference: str, relative: bool, n: int
) -> tuple[float, float, float]:
    """Return by how much the model is worse, after checking that the figures are whole and agree with each other."""
    ours = _number(_get(results, "arms", JUDGED, metric), "value", f"{JUDGED}'s figure")
    theirs = _number(_get(results, "arms", reference, metric), "value", f"{reference}'s figure")
    difference = _get(results, "worse_by", reference, metric)
    for figure in (_get(results, "arms", JUDGED, metric), _get(results, "arms", reference, metric), difference):
        if figure.get("n") != n or isinstance(figure.get("n"), bool):
            raise _Unfit(f"it was measured on n = {figure.get('n')!r} pictures, expected {n}.")
    worse = _number(difference, "value", "the difference")
    should_be = METRICS[metric].worse(ours, theirs)
    if not math.isclose(worse, should_be, rel_tol=1e-6, abs_tol=1e-6 * max(abs(ours), abs(theirs))):
        raise _Unfit(f"the difference is given as {worse:.4g}, but the arms differ by {should_be:.4g}.")
    figure = _get(difference, "relative") if relative else difference
    value, low, high = (_number(figure, end, f"the difference's {end}") for end in ("value", "low", "high"))
    if not low <= high:
        raise _Unfit(f"its interval runs from {low:.4g} down to {high:.4g}.")
    return value, low, high


def _get(results: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    for depth, key in enumerate(path):
        found = results.get(key)
        if not isinstance(found, Mapping):
            raise _Unfit(f"{'.'.join(path[: depth + 1])} is missing.")
        results = found
    return results


def _number(figure: Mapping[str, Any], key: str, what: str) -> float:
    number = figure.get(key)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _Unfit(f"{what} is {number!r}, which is no number.")
    if not math.isfinite(number):
        raise _Unfit(f"{what} is {number}, which is not finite.")
    return float(number)


def _sentence(
    metric: str, reference: str, relative: bool, limit: float, ends: tuple[float, float, float], kept: bool
) -> str:
    def written(number: float, digits: int) -> str:
        return f"{abs(number):.{digits}%}" if relative else f"{abs(number):.{digits + 3}g}"

    # As many digits as tell the bad end from the limit.
    digits = next((d for d in range(1, 13) if written(ends[2], d) != written(limit, d)), 1)

    def size(number: float) -> str:
        return written(number, digits)

    def side(number: float) -> str:
        return f"{size(number)} {'worse' if number > 0 else 'better'}"

    value, low, high = ends
    name, other = metric.replace("_", " ").capitalize(), reference.replace("_", " ").replace("nfe", "NFE")
    found = side(value) if low == high else f"{side(value)} ({side(low)} to {side(high)})"
    allowed = f"at most {size(limit)} worse is allowed" if limit >= 0 else f"at least {size(limit)} better is required"
    if metric == "nfe_per_image":
        name, found = "Network evaluations per image", found.replace("worse", "more").replace("better", "fewer")
        allowed = allowed.replace("worse", "more").replace("better", "fewer")
    return f"{name}: {found} than {other}; {allowed}, and the {'bad end keeps to it' if kept else 'bad end does not'}."
