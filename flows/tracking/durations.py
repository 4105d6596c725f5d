"""How long the stages took on this machine, read from MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.tracking import place
from flows.tracking.place import EXPERIMENT
from flows.tracking.runs import address, client, flattened, profile


@dataclass(frozen=True)
class Duration:
    """Seconds that the latest finished run of a stage took, and the settings that are others now."""

    seconds: float
    changed: tuple[str, ...]


def durations(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Duration]:
    """Return the durations of those stages that have a finished run on a machine like this one.

    `sections` maps stages to their settings. Nothing is created or changed. A stage without a run is left out; if
    tracking is off, or its database is not made yet, so are all.
    """
    uri = address()
    if uri is None or place.missing(uri):
        return {}
    tracker = client(uri)
    experiment = tracker.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return {}
    found = {}
    for stage, settings in sections.items():
        query = (
            f"tags.`sage.stage` = '{stage}' and tags.`sage.profile` = '{profile()}' and attributes.status = 'FINISHED'"
        )
        runs = tracker.search_runs(
            [experiment.experiment_id], query, order_by=["attributes.start_time DESC"], max_results=1
        )
        for run in runs:
            now, then = dict(flattened(settings)), run.data.params
            changed = tuple(sorted(name for name in now.keys() & then.keys() if now[name] != then[name]))
            found[stage] = Duration((run.info.end_time - run.info.start_time) / 1000, changed)
    return found
