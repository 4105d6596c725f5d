"""The Prefect flows: the graph, a registered version judged, a promotion, a batch of pictures.

The only package that imports prefect. DVC decides what is up to date; Prefect's own caching is off, for two caches
disagree one day.
"""

import os

# Before prefect is imported, which reads them: nothing is reported home.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# Two busy cores start the temporary server in 12 to 15 s; the default limit of 20 s is near that.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
# Seconds between signs of life; without them a killed run would be shown as running for ever.
os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")

from flows.pipeline.batch import generate_batch as generate_batch
from flows.pipeline.graph import sage_pipeline as sage_pipeline
from flows.pipeline.versions import evaluate_version as evaluate_version
from flows.pipeline.versions import promote_version as promote_version
