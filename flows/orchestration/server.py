"""What the project sets on the Prefect server: killed runs are marked as crashed."""

from datetime import timedelta

import flows.orchestration.settings  # noqa: F401

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState

WATCH = "sage: runs without a sign of life have crashed"
_SILENCE = timedelta(seconds=90)  # three missed heartbeats; a busy machine may miss one
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
