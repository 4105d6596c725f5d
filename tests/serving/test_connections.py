"""Clients that hold a connection: without the head of a request, or without reading the answer."""

import asyncio
import contextlib
import gc
import weakref

import pytest
import uvicorn
from prometheus_client import generate_latest
from uvicorn.server import ServerState

from flows.serving import connections, watch
from flows.serving.metrics import Metrics
from flows.serving.tenants import read_tokens
from flows.serving.watch import Watch

MADE = weakref.WeakSet()


async def slow(scope, receive, send):
    await asyncio.sleep(0.5)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.asynccontextmanager
async def listening():
    """Yield a function that connects, sends something, and returns all that comes until the connection is closed."""
    config = uvicorn.Config(slow, http=connections.Connection, ws="none", timeout_keep_alive=1)
    config.load()
    state = ServerState()

    async def sent(content):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(content)
        received = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        return received

    def connection():
        made = connections.Connection(config, state, {})
        MADE.add(made)
        return made

    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
    async with server:
        yield sent


def test_a_connection_without_the_head_of_a_request_is_closed_and_one_with_it_is_answered(monkeypatch):
    monkeypatch.setattr(connections, "_HEAD", 0.1)
    whole = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"

    async def run():
        async with listening() as sent:
            return await asyncio.gather(*map(sent, [b"", whole[:9], whole, whole + whole[:9]]))

    nothing, half, one, one_and_a_half = asyncio.run(run())
    assert nothing == half == b""
    assert one.endswith(b"ok") and one_and_a_half.count(b"ok") == 1


def test_a_closed_connection_is_not_kept_in_memory():
    async def run():
        async with listening() as sent:
            assert (await sent(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")).endswith(b"ok")
            await asyncio.sleep(0.1)
            gc.collect()
            return len(MADE)

    assert asyncio.run(run()) == 0


@pytest.mark.parametrize("reads", [True, False])
def test_a_client_that_does_not_read_is_given_up(monkeypatch, capsys, reads):
    monkeypatch.setattr(watch, "_STALLED", 0.05)
    left, metrics = [], Metrics()

    async def app(scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"image"})
        finally:
            left.append(True)

    async def send(message):
        if not reads and message["type"] == "http.response.body":
            await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost")], "route": None}
    asyncio.run(asyncio.wait_for(Watch(app, metrics, ["localhost"])(scope, None, send), 20))
    assert left == [True]
    counted = generate_latest(metrics.registry).decode()
    assert f'status="{200 if reads else 499}"}} 1.0' in counted


def test_two_tenants_with_one_token_are_refused(tmp_path):
    (tmp_path / "tokens").write_text("alice:secret\nbob:secret\n")
    with pytest.raises(ValueError, match="tenants alice and bob have one token") as refused:
        read_tokens(tmp_path / "tokens")
    assert "secret" not in str(refused.value)
