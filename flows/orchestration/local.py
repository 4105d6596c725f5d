"""Prefect's server for this machine alone: `python -m flows.orchestration.local PORT`.

`prefect server start` accepts requests with any Host header, so a web page could reach it by DNS rebinding and read or
start runs. This server rejects requests with a host other than 127.0.0.1 or localhost.
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
