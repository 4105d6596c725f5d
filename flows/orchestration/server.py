"""Settings of the Prefect server that the project needs: one writer per folder, and killed runs marked as crashed."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import flows.orchestration.settings  # noqa: F401

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.concurrency.sync import concurrency
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ObjectAlreadyExists, PrefectHTTPStatusError

from sage.files import digest

WATCH = "sage: runs without a sign of life have crashed"
_SILENCE = timedelta(seconds=90)  # three missed heartbeats; a busy machine may miss one
_LEASE = 60  # seconds until the slot of a killed run is free again
_CONFLICT = 409
# States without heartbeats; a suspended run has no process.
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Suspended")


def watch_for_dead_runs() -> None:
    """Create or update the automation that marks a run as crashed when its heartbeats stop."""
    automation = AutomationCore(
        name=WATCH,
        description="Created by sage: a killed process cannot report its own end.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in _ENDS)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=_SILENCE,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message="No heartbeat: the process was killed or stopped, or its machine was lost. Run it again; "
                "finished stages are not repeated.",
            )
        ],
    )
    with get_client(sync_client=True) as client:
        found = client.read_automations_by_name(WATCH)
        if found:
            client.update_automation(found[0].id, automation)
        else:
            client.create_automation(automation)


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold a Prefect concurrency slot for a folder of this machine; wait until no other run holds it."""
    place = f"{socket.gethostname()}:{folder.resolve()}"
    name = f"sage-writer-{digest(place)[:12]}"
    with get_client(sync_client=True) as client:
        try:
            client.upsert_global_concurrency_limit_by_name(name, limit=1)
        except ObjectAlreadyExists:
            pass  # another run created it at the same moment
        except PrefectHTTPStatusError as error:
            if error.response.status_code != _CONFLICT:
                raise
    # If the server is unreachable for a minute, the run loses its slot but continues: the folder has its own lock.
    with concurrency(name, lease_duration=_LEASE, strict=True, raise_on_lease_renewal_failure=False):
        yield
