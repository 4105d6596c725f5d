"""Promotion of a version to champion, and rollback to the champion before it."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.tracking import content
from flows.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    GATES,
    JUDGES,
    METRIC,
    MODEL,
    SET,
    aliases,
    connect,
    find,
    name_alias,
)
from sage.errors import RegistryError, SageError
from sage.evaluation.arms import JUDGED
from sage.evaluation.registry import METRICS, label
from sage.evaluation.results import Figure, Results, parse_figure

# Judges versions of the registry on one held-out set.
Judge = Callable[[Sequence[Any]], Sequence[Results]]

_REPLACED = "sage.replaced"  # tag of a version: the number of the champion that it replaced


def promote(version: str | None = None, to: str = MODEL, judge: Judge | None = None) -> str:
    """Make a version the champion and return its number; by default, promote the challenger.

    If `to` is another registered model, `version` (by default the champion) is first copied there, unless `to` already
    has a copy. If version and champion were evaluated on different held-out sets or by different judges, `judge`
    evaluates both anew. Raises RegistryError if the version is damaged, failed a gate, generates no image, cannot be
    compared with the champion, or is worse than it in a metric of a gate: their intervals do not overlap.
    """
    tracker, _ = connect()
    if to != MODEL:
        version = _copy(tracker, version or aliases(tracker).get(CHAMPION), to)
    named = aliases(tracker, to)
    candidate = find(tracker, version or named.get(CHALLENGER), to)
    number, champion = str(candidate.version), named.get(CHAMPION)
    if number != champion:
        _check(tracker, candidate)
        if champion is not None:
            _check_against(candidate, find(tracker, champion, to), judge)
            # Set this tag before the alias moves, so that a rollback is possible at any time.
            tracker.set_model_version_tag(to, number, _REPLACED, champion)
        name_alias(tracker, to, CHAMPION, number)
    if named.get(CHALLENGER) == number:
        tracker.delete_registered_model_alias(to, CHALLENGER)
    return number


def rollback(of: str = MODEL) -> str:
    """Make the previous champion the champion again, and return its number.

    Raises RegistryError if the champion replaced none, or if the previous one is damaged, failed a gate or generates no
    image.
    """
    tracker, _ = connect()
    champion = find(tracker, aliases(tracker, of).get(CHAMPION), of, CHAMPION)
    before = champion.tags.get(_REPLACED)
    if not before:
        raise RegistryError(f"version {champion.version} replaced no champion, so there is no version to go back to.")
    _check(tracker, find(tracker, before, of))
    name_alias(tracker, of, CHAMPION, before)
    return str(before)


def _copy(tracker: Any, version: str | None, to: str) -> str:
    """Copy a version with its tags to another registered model, unless it has a copy; return the copy's number."""
    found = find(tracker, version, MODEL, CHAMPION)
    same = f"name = '{to}' and tags.`{content.FILES_HASH}` = '{found.tags.get(content.FILES_HASH)}'"
    if copies := tracker.search_model_versions(same):
        return str(min(int(copy.version) for copy in copies))
    _check(tracker, found)
    copy = tracker.copy_model_version(f"models:/{MODEL}/{found.version}", to)
    # This tag refers to a version of the original model, so the copy must not have it.
    if _REPLACED in copy.tags:
        tracker.delete_model_version_tag(to, copy.version, _REPLACED)
    return str(copy.version)


def _check(tracker: Any, version: Any) -> None:
    """Raise RegistryError if a version failed a gate, is damaged, or generates no image."""
    gates = json.loads(version.tags.get(GATES, "[]"))
    if not gates or not all(gate["passed"] is True for gate in gates):
        raise RegistryError(f"version {version.version} has not passed its gates.")
    with tempfile.TemporaryDirectory() as temporary:
        if not content.draws(content.download(tracker, version, Path(temporary))):
            raise RegistryError(f"version {version.version} could not draw a picture.")


def _check_against(candidate: Any, champion: Any, judge: Judge | None) -> None:
    """Raise RegistryError if a version cannot be compared with the champion, or is worse in a metric of a gate."""
    names = f"version {candidate.version}", f"champion {champion.version}"
    if difference := _difference(candidate, champion):
        if judge is None:
            raise RegistryError(f"{names[0]} and {names[1]} cannot be compared: {difference}. Judge both anew.")
        try:
            theirs, ours = judge([champion, candidate])
        except SageError as error:
            raise RegistryError(
                f"{names[0]} and {names[1]} cannot be compared: {difference}, and they cannot be judged anew: {error}\n"
                "A model for other images has a champion of its own: `sage promote VERSION --to NAME`."
            ) from error
        if failed := [gate.reason for gate in ours.gates if not gate.passed]:
            raise RegistryError(f"{names[0]}, judged anew, failed a gate:\n  " + "\n  ".join(failed))
        metrics = {gate.metric for gate in ours.gates}
        figures: list[Mapping[str, Figure | None]] = [ours.arms[JUDGED], theirs.arms[JUDGED]]
    else:
        metrics = {gate["metric"] for gate in json.loads(candidate.tags[GATES])}
        figures = [
            {metric: parse_figure(version.tags.get(METRIC + metric, "")) for metric in metrics}
            for version in (candidate, champion)
        ]
    worse = []
    for metric in sorted(metrics):
        new, old = (_interval(name, metric, found.get(metric)) for name, found in zip(names, figures, strict=True))
        more = METRICS[metric].higher_is_better
        if new[2] < old[1] if more else new[1] > old[2]:
            worse.append(f"{metric} {new[0]:.4g} [{new[1]:.4g}, {new[2]:.4g}], champion {old[0]:.4g}")
    if worse:
        raise RegistryError(f"{names[0]} is worse than {names[1]}:\n  " + "\n  ".join(worse))


def _difference(candidate: Any, champion: Any) -> str | None:
    """Return why the recorded figures of two versions cannot be compared, or None if they can be."""
    ours, theirs = candidate.tags[SET], champion.tags[SET]
    if ours != theirs:
        return f"they were judged on different held-out sets, {ours[:12]} and {theirs[:12]}"
    by, champions = (version.tags.get(JUDGES, "a judge that was not recorded") for version in (candidate, champion))
    return None if by == champions else f"they were judged by different judges, {by} and {champions}"


def _interval(name: str, metric: str, figure: Figure | None) -> tuple[float, float, float]:
    """Return value, low and high of a version's metric; raise RegistryError if one is missing or not finite."""
    if figure is None or figure.value is None:
        raise RegistryError(f"{name} has no usable {label(metric)}, so it cannot be compared.")
    if figure.low is None or figure.high is None:
        raise RegistryError(
            f"{name} has no interval of {label(metric)}, so it cannot be compared. Evaluate it on more groups of "
            "prompts."
        )
    return figure.value, figure.low, figure.high
