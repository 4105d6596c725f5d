"""Prefect's server for this machine alone: `python -m flows.orchestration.local PORT`.

`prefect server start` answers whatever host a request names, so a stranger's page whose name comes to point at this
machine (DNS rebinding) could read and start runs. Here such a request is refused.
"""

import sys

import flows.orchestration.settings  # noqa: F401

import uvicorn
from prefect.server.api.server import create_app
from starlette.middleware.trustedhost import TrustedHostMiddleware

HOST = "127.0.0.1"


def main(port: int) -> None:
    """Serve until interrupted, on loopback."""
    app = TrustedHostMiddleware(create_app(final=True), allowed_hosts=[HOST, "localhost"])
    uvicorn.run(app, host=HOST, port=port, timeout_keep_alive=5)


if __name__ == "__main__":
    main(int(sys.argv[1]))
