"""`sage serve`: the application on uvicorn, with a drain on SIGTERM."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from flows.serving.app import create_app
from flows.serving.batch_files import BatchFolder
from flows.serving.batches import Batches
from flows.serving.connections import Connection
from flows.serving.metrics import Metrics, log
from flows.serving.state import Options, Server
from flows.serving.tenants import read_tokens
from flows.serving.watch import HEADERS
from flows.serving.worker import Source, Worker, main
from sage.errors import ConfigurationError

_DRAIN = 25.0  # seconds for accepted requests after SIGTERM; then they are answered with 503
_CLOSING = 0.3  # seconds until the listener is closed for certain
_FORCED = 1.0  # seconds for the answers that say so, after a second SIGTERM


class _Uvicorn(uvicorn.Server):
    """Uvicorn that ends with the code 0 after SIGTERM, and at once after a second one."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._sage = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests and answer those that were accepted; after a second signal, with 503 at once."""
        code, later = "draining", self._loop.call_later
        if self.should_exit:
            self._loop.call_soon_threadsafe(self._sage.fail_all, code, "the server was told to end at once")
            self._loop.call_soon_threadsafe(later, _FORCED, setattr, self, "force_exit", True)
            return
        self.should_exit = True
        # Nobody can connect once the listener is closed. Until then requests are taken, so that a proxy need not repeat
        # any; afterwards they are refused on the connections that are left.
        self._loop.call_soon_threadsafe(later, _CLOSING, setattr, self._sage, "draining", True)
        message = f"not finished within {_DRAIN:.0f} s of the shutdown; ask another server"
        self._loop.call_soon_threadsafe(later, _DRAIN, self._sage.fail_all, code, message)

    async def serve(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Serve until a signal."""
        self._loop = asyncio.get_running_loop()
        await super().serve()


def serve(
    source: Source,
    host: str,
    port: int,
    queue: int,
    tokens: Path | None,
    hosts: list[str],
    batches: Path | None = None,
    target: Callable[..., None] = main,
) -> int:
    """Serve until SIGTERM or Ctrl-C; return the exit code: 0, or 1 if the model process cannot run.

    source       the model and how it is drawn
    host, port   where to listen
    queue        images that may wait
    tokens       file of bearer tokens, lines of tenant:token; None: everybody may use the server
    hosts        further names by which clients reach it
    batches      folder of batches; None: it takes none
    target       what the model process runs
    """
    try:
        known = None if tokens is None else read_tokens(tokens)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the tokens cannot be read: {error}") from error
    try:
        folder = None if batches is None else BatchFolder(batches)
    except OSError as error:
        raise ConfigurationError(f"{batches} cannot hold batches: {error.strerror}; give another --batches") from error
    options = Options(queue=queue, tokens=known, hosts=(*Options.hosts, host, *hosts))
    code = 0

    def gave_up(reason: str) -> None:
        nonlocal code
        code = 1
        log(event="gave up", reason=reason)
        server.fail_all("worker_lost", reason)
        running.should_exit = True

    server = Server(Worker(source, gave_up, target), options, Metrics())
    config = uvicorn.Config(
        create_app(server, None if folder is None else Batches(server, folder)),
        host=host,
        port=port,
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=HEADERS,
        access_log=False,
        log_level="warning",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(_DRAIN) + 3,
        server_header=False,
    )
    running = _Uvicorn(config, server)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    running.run()
    return code
