"""HTTP connections: closed if the head of a request does not come, so that nobody holds them all for nothing."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_HEAD = 10.0  # seconds between looks; a head that is incomplete at two of them is late


class Connection(H11Protocol):
    """A connection of uvicorn that is closed if it has sent no head of a request, or half of one, for 10 to 20 s.

    Uvicorn itself closes connections that are idle between two requests.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to look."""
        super().connection_made(transport)
        self._look(late=False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more: the timer would keep the connection and its buffers in memory."""
        self._next.cancel()
        super().connection_lost(exc)

    def _look(self, late: bool, before: object = None) -> None:
        waits = self.conn.their_state is h11.IDLE and (self.cycle is None or bool(self.conn.trailing_data[0]))
        if late and waits and self.cycle is before:
            self.transport.close()
            return
        self._next = self.loop.call_later(_HEAD, self._look, waits, self.cycle)
