"""Gates: conditions that a model must meet, decided by a pure function that fails closed.

A gate limits how much worse than a reference arm the model may be. It passes if the worst case of the interval of the
difference is within the limit, so a small sample can fail a gate but not pass it by chance. A figure fails, with the
reason, if it is missing, not finite, measured on another set or on too few groups, or if the difference does not agree
with the figures of the two arms.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sage.evaluation import arms, bootstrap
from sage.evaluation.arms import JUDGED
from sage.evaluation.registry import METRICS, Metric, label, named
from sage.evaluation.results import Figure, JudgedSet, Results, Verdict

_F = TypeVar("_F", bound=Figure)


class _Unfit(Exception):
    """Raised for a figure that a gate cannot be decided on; the message is the reason."""


def judge(results: Results, expected: JudgedSet, gates: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Return a verdict for each gate.

    `expected` is the set on which the results must have been measured. Each gate is a mapping with the keys metric,
    reference, worse_by_at_most and relative.
    """
    return [verdict(results, expected, **gate) for gate in gates]


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Return whether every gate passed; False if there are no gates."""
    return bool(verdicts) and all(verdict.passed for verdict in verdicts)


def verdict(
    results: Results, expected: JudgedSet, *, metric: str, reference: str, worse_by_at_most: float, relative: bool
) -> Verdict:
    """Return the verdict of one gate.

    results           the evaluation
    expected          the set on which the results must have been measured
    metric            name of the metric
    reference         arm that the model is compared with
    worse_by_at_most  limit of the difference; negative if the model must be better
    relative          whether the limit is a fraction of the reference's value
    """
    value = low = high = None
    try:
        _check_set(results.set, expected)
        ends = _difference(results, metric, reference, relative, expected.n_prompts * len(expected.seeds))
    except _Unfit as unfit:
        kept, reason = False, f"The {label(metric, results.features, results.alignment)} cannot be judged: {unfit}"
    else:
        value, low, high = ends
        # Written so that a comparison with NaN fails.
        kept = bool(high <= worse_by_at_most)
        named_metric = named(results.features, results.alignment)[metric]
        reason = _sentence(named_metric, reference, relative, worse_by_at_most, results.confidence, value, high, kept)
    return Verdict(
        metric=metric,
        reference=reference,
        limit=worse_by_at_most,
        relative=relative,
        value=value,
        low=low,
        high=high,
        passed=kept,
        reason=reason,
    )


def _check_set(found: JudgedSet, expected: JudgedSet) -> None:
    for key, value in expected:
        if getattr(found, key) != value:
            raise _Unfit(f"it was measured on another set: {key} is {getattr(found, key)!r}, expected {value!r}.")


def _difference(results: Results, metric: str, reference: str, relative: bool, n: int) -> tuple[float, float, float]:
    """Return value, low and high of the difference; raise _Unfit if figures are missing, not finite, or disagree."""
    _check_blank(results, (JUDGED, reference), n)
    ours, theirs = (_figure(results.arms.get(arm, {}), metric, f"arms.{arm}") for arm in (JUDGED, reference))
    difference = _figure(results.worse_by.get(reference, {}), metric, f"worse_by.{reference}")
    for figure in (ours, theirs, difference):
        if figure.n != n:
            raise _Unfit(f"it was measured on n = {figure.n} images, expected {n}.")
    a, b = _number(ours.value, f"{JUDGED}'s figure"), _number(theirs.value, f"{reference}'s figure")
    worse, should_be = _number(difference.value, "the difference"), METRICS[metric].worse(a, b)
    if not math.isclose(worse, should_be, rel_tol=1e-6, abs_tol=1e-6 * max(abs(a), abs(b))):
        raise _Unfit(f"the difference is given as {worse:.4g}, but the arms differ by {should_be:.4g}.")
    if METRICS[metric].interval == "bootstrap":
        _check_groups(results, METRICS[metric].within_groups)
    found = difference.relative if relative else difference
    value = _number(found.value, "the difference's value")
    low, high = _number(found.low, "the difference's low"), _number(found.high, "the difference's high")
    if not low <= high:
        raise _Unfit(f"its interval runs from {low:.4g} down to {high:.4g}.")
    return value, low, high


def _check_blank(results: Results, compared: Sequence[str], n: int) -> None:
    """Raise _Unfit if an arm has blank images: they can raise a diversity, and their alignment means nothing."""
    for arm in compared:
        if blank := results.blank.get(arm):
            raise _Unfit(f"{blank} of {n} images of arm {arm} are of a single colour.")


def _check_groups(results: Results, within: bool) -> None:
    """Raise _Unfit if an interval comes from too few groups."""
    groups = results.groups(within)
    if groups < bootstrap.LEAST_GROUPS:
        kind = ("group" if groups == 1 else "groups") + (" of two or more prompts" if within else "")
        raise _Unfit(f"only {groups} {kind}; an interval needs at least {bootstrap.LEAST_GROUPS}.")


def _figure(figures: Mapping[str, _F], metric: str, where: str) -> _F:
    if metric not in figures or metric not in METRICS:
        raise _Unfit(f"{where}.{metric} is missing.")
    return figures[metric]


def _number(number: float | None, what: str) -> float:
    if number is None:
        raise _Unfit(f"{what} is missing.")
    # The reader of results refuses such numbers too; a gate does not rely on that.
    if not math.isfinite(number):
        raise _Unfit(f"{what} is {number}, which is not finite.")
    return number


def _sentence(
    metric: Metric,
    reference: str,
    relative: bool,
    limit: float,
    confidence: float,
    value: float,
    high: float,
    kept: bool,
) -> str:
    """Return the verdict as one sentence: difference, limit, worst case of the interval, and passed or failed.

    metric      the metric, as it is called
    reference   arm that the model was compared with
    relative    whether the numbers are fractions of the reference's value
    limit       largest allowed difference
    confidence  of the interval
    value       difference, positive if the model is worse
    high        upper end of the interval of the difference
    kept        whether the gate passed
    """
    worse, better = ("more", "fewer") if metric.interval == "exact" else ("worse", "better")

    def written(number: float, digits: int) -> str:
        return f"{abs(number):.{digits}%}" if relative else f"{abs(number):.{digits + 3}g}"

    # Use enough digits that the worst case and the limit are written differently.
    digits = next((d for d in range(1, 13) if written(high, d) != written(limit, d)), 1)

    def side(number: float) -> str:
        return f"{written(number, digits)} {worse if number > 0 else better}"

    size = f"{100 * abs(limit):.{digits}f}".rstrip("0").rstrip(".") + "%" if relative else written(limit, digits)
    allowed = f"limit {size} {worse}" if limit >= 0 else f"at least {size} {better} is required"
    worst = (
        f"; worst case of the {100 * confidence:g}% interval: {side(high)}" if metric.interval == "bootstrap" else ""
    )
    other = arms.label(reference)
    other = other[0].lower() + other[1:]
    return f"{metric.title}: {side(value)} than {other}; {allowed}{worst}. {'Passed' if kept else 'Failed'}."
