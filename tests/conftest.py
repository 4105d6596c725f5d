"""What every test shares: nothing is recorded, downloaded or reported unless a test asks for it."""

import os
import signal

import pytest

# Before any library reads them.
os.environ |= {
    "SAGE_TRACKING_URI": "off",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "DVC_NO_ANALYTICS": "true",
    # Two processes of tests share two cores, and threads that wait for each other's core are slower than one.
    "OMP_NUM_THREADS": "1",
}

# A runner in the background inherits SIGINT as ignored, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with slow tests first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
