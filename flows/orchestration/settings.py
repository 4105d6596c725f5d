"""Settings that prefect reads when it is imported; `import flows.orchestration.settings` stands before that."""

import os

# Nothing is reported home.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# Two busy cores start the temporary server in 12 to 15 s; the default limit of 20 s is near that.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
# Seconds between heartbeats; without them a killed run would be shown as running for ever.
os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
