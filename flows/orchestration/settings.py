"""Settings that prefect reads at import time, so this module must be imported before prefect."""

import os

# Turn telemetry off.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# The temporary server takes 12 to 15 s to start on two busy cores, close to the default limit of 20 s.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
# Seconds between heartbeats; without them a killed run would stay in state Running.
os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
