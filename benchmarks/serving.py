"""What `sage serve` must hold, measured with real processes: each row with its goal, and whether it was held.

    python -m benchmarks.serving saturation   throughput at saturation against the same pipeline called in process
    python -m benchmarks.serving half         half of that rate: latency
    python -m benchmarks.serving overload     three times that rate: goodput, refusals, health, metrics
    python -m benchmarks.serving slow         200 connections that send a byte a second beside a normal client
    python -m benchmarks.serving limits       what it costs to refuse what exceeds a limit
    python -m benchmarks.serving stops        SIGTERM under load; the model process killed, stopped and crashed
    python -m benchmarks.serving encoder      a request that needs no embedding, beside requests that need many
    python -m benchmarks.serving sessions     reworded prompts in sessions: saving, latency and quality
    python -m benchmarks.serving soak         10,000 requests of all kinds: memory, descriptors, threads, metrics
    python -m benchmarks.serving tests        the rows that tests hold
    python -m benchmarks.serving all          all of them, one after another: less than an hour on two idle cores

Each takes less than ten minutes there (soak: about fifteen). Options: --model FOLDER (default models/base),
--seconds S, --batch-size N, --prompts N (sessions), --requests N (soak), --into FILE (default work/serving.json). Rows
are kept in that file; the table of all rows in it is printed in Markdown and written beside it (work/serving.md). What
could not be measured is a row that was not held; the exit code is 1 if there is one.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.client import BadStatusLine, HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import PATH, Running, ask, at_rate, in_process, leaves, prompt, quantile, saturated
from benchmarks.sessions import sessions

_QUEUE = 64
_MIB = 1 << 20
_TESTS = 600  # seconds for the tests of a row
# The rows that tests hold, and the tests.
TESTS = {
    "2,000 generated bodies and the table of malformed JSON: no 5xx, no hang": [
        "tests/serving/test_fuzz.py",
        "tests/serving/test_app.py::test_a_malformed_body_is_the_clients_error",
        "tests/serving/test_app.py::test_other_ways_to_send_too_much_or_nothing",
    ],
    "groups are a partition, whatever the prompts and their order": ["tests/grouping/test_groups.py"],
    "client B's bytes are the same with and without A; nothing is shared across tenants": [
        "tests/serving/test_serve.py::test_a_clients_image_is_the_same_with_and_without_others",
        "tests/serving/test_engine.py::test_nothing_is_shared_across_tenants_or_where_nobody_asked",
    ],
    "one poison prompt of eight: seven images and one error": [
        "tests/serving/test_app.py::test_one_poison_prompt_of_eight_is_one_error",
        "tests/serving/test_engine.py::test_one_bad_job_fails_alone",
    ],
    "templates and markup of web UIs are errors by name": [
        "tests/serving/test_app.py::test_what_is_written_for_web_uis_is_refused_by_name_unless_it_is_said_to_be_text"
    ],
    "every refusal for want of room says when to try again, and 413 if that is of no use": [
        "tests/serving/test_app.py::test_metrics_are_what_the_client_counted"
    ],
    "a second SIGTERM answers what is open with 503 and ends at once": [
        "tests/serving/test_app.py::test_a_second_sigterm_ends_at_once"
    ],
    "every line of an accepted batch has one result, whoever is killed": ["tests/serving/test_batches.py"],
    "`sage generate`, killed at random, ends as if never killed": [
        "tests/prompts/test_generate_prompts.py::test_killed_at_random_and_started_again_it_ends_as_if_never_killed"
    ],
    "`sage generate --server` writes the folder that it writes without": [
        "tests/prompts/test_remote.py::test_the_folder_is_the_one_that_this_machine_makes"
    ],
    "OpenAI's client gets the pipeline's own images": [
        "tests/serving/test_serve.py::test_openais_client_gets_the_pipelines_own_images"
    ],
    "the page shows prompts as text, and images as they finish": ["tests/serving/test_try_page.py"],
    "five crashes of the model process within a minute end the server": [
        "tests/serving/test_app.py::test_five_crashes_end_the_server"
    ],
    "the model is swapped under load without a failed request; a bad version leaves the old one": [
        "tests/serving/test_app.py::test_another_version_is_served_without_a_failed_request_and_a_bad_one_not_at_all",
        "tests/serving/test_registered.py",
    ],
    "one line of log a request, without prompts or control characters": [
        "tests/serving/test_app.py::test_the_log_has_one_line_a_request_without_prompts_or_control_characters"
    ],
    "only the loopback address listens; foreign hosts and origins are refused": [
        "tests/serving/test_serve.py::test_only_the_loopback_address_listens",
        "tests/serving/test_app.py::test_other_hosts_and_origins_are_refused",
    ],
    "prefixes survive a restart": [
        "tests/serving/test_serve.py::test_prefixes_on_disk_survive_a_restart_even_by_a_kill",
        "tests/serving/test_prefix_files.py",
    ],
    "two replicas behind one address; one that drains is taken out": ["tests/serving/test_replicas.py"],
}


@dataclass(frozen=True)
class Row:
    """One promise: what was measured, the goal, and whether it was held (None: there is no goal)."""

    promise: str
    measured: str
    goal: str = ""
    held: bool | None = None


def at_most(promise: str, value: float, goal: float, unit: str = "") -> Row:
    """Return the row of a value that must not exceed a goal."""
    return Row(promise, f"{value:.3g}{unit}", f"at most {goal:.3g}{unit}", value <= goal)


def at_least(promise: str, value: float, goal: float, unit: str = "") -> Row:
    """Return the row of a value that must reach a goal."""
    return Row(promise, f"{value:.3g}{unit}", f"at least {goal:.3g}{unit}", value >= goal)


def equal(promise: str, ours: Any, theirs: Any) -> Row:
    """Return the row of what client and server counted."""
    return Row(promise, "equal" if ours == theirs else f"{ours} and {theirs}", "equal", ours == theirs)


def started(options: argparse.Namespace, *arguments: str) -> Running:
    """Start the server with a batch of the size that the options say."""
    return Running(options.model, "--batch-size", str(options.batch_size), *arguments)


def capacity(options: argparse.Namespace) -> float:
    """Return images per second of the pipeline in process: before the server is measured, and once more after it."""
    return in_process(options.model, options.batch_size, options.seconds)


def saturation(options: argparse.Namespace) -> list[Row]:
    """Measure throughput at saturation against the pipeline in process, before and after."""
    before = capacity(options)
    with started(options) as server:
        asyncio.run(saturated(server.url, 3 * options.batch_size, 3))
        busy = [one.cpu_times() for one in server.processes()]
        rate, statuses, _ = asyncio.run(saturated(server.url, 3 * options.batch_size, options.seconds))
        spent = [one.cpu_times().user - was.user for one, was in zip(server.processes(), busy, strict=True)]
    after = capacity(options)
    drawn = max(statuses[200], 1)
    return [
        at_most("time until it is ready", server.ready_after, 15, " s"),
        at_least(
            f"throughput at saturation ({rate:.2f} images/s), fraction of the pipeline in process "
            f"({before:.2f} before, {after:.2f} after)",
            rate / ((before + after) / 2),
            0.9,
        ),
        Row(
            "processor time an image, server and model process", " + ".join(f"{1000 * s / drawn:.1f} ms" for s in spent)
        ),
    ]


def half(options: argparse.Namespace) -> list[Row]:
    """Measure latency at half of the rate of the pipeline in process."""
    inside = capacity(options)
    batch = options.batch_size / inside
    with started(options) as server:
        asyncio.run(saturated(server.url, options.batch_size, 3))
        answers = asyncio.run(at_rate(server.url, inside / 2, 4 * options.seconds))
    return _latencies(f"half load for {4 * options.seconds:.0f} s", answers, batch)


def _latencies(load: str, answers: list[tuple[int, float]], batch: float) -> list[Row]:
    seconds = [took for _, took in answers]
    return [
        at_most(f"{load}: errors", sum(status != 200 for status, _ in answers), 0),
        at_most(f"{load}: p50, of the time of a batch in process ({batch:.2f} s)", quantile(seconds, 0.5) / batch, 1.5),
        at_most(f"{load}: p99, of the same", quantile(seconds, 0.99) / batch, 3),
        at_most(f"{load}: longest", max(seconds), 20, " s"),
    ]


def overload(options: argparse.Namespace) -> list[Row]:
    """Measure what three times the rate of the pipeline in process does."""
    inside = capacity(options)
    batch = options.batch_size / inside

    async def both(server: Running) -> tuple[list[tuple[int, float]], list[tuple[int, float]], float, float]:
        began = time.monotonic()
        load = asyncio.create_task(at_rate(server.url, 3 * inside, options.seconds))
        health = asyncio.create_task(at_rate(server.url, 5, options.seconds, "/healthz"))
        await asyncio.sleep(options.seconds)
        over = time.monotonic()
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            while time.monotonic() - over < options.seconds:
                status, seconds, _ = await ask(client, prompt="red heart", share="none")
                probes[status] += 1
                if status == 200 and seconds <= 1.5 * batch:
                    break
        normal = time.monotonic() - over
        answers = await load
        return answers, await health, time.monotonic() - began, normal

    probes: Counter[int] = Counter()
    with started(options) as server:
        rate, _, _ = asyncio.run(saturated(server.url, 3 * options.batch_size, 10))
        before = server.by_status()
        answers, health, took, normal = asyncio.run(both(server))
        counted = server.by_status() - before
        waiting = sum(server.counted("sage_images_open").values())
    statuses = Counter(status for status, _ in answers)
    drawn = [seconds for status, seconds in answers if status == 200]
    refused = [seconds for status, seconds in answers if status == 429]
    load = f"three times the rate in process for {options.seconds:.0f} s"
    ours = statuses + probes
    return [
        at_least(f"{load}: goodput, fraction of the rate in process", statuses[200] / took / inside, 0.85),
        Row(f"{load}: the same, fraction of the rate at saturation", f"{statuses[200] / took / rate:.3g}"),
        at_most(f"{load}: answers that are neither 200 nor 429", len(answers) - len(drawn) - len(refused), 0),
        at_least(f"{load}: answers 429", len(refused), 1),
        at_most(f"{load}: p99 of a 429", 1000 * quantile(refused, 0.99), 100, " ms"),
        at_most(
            f"{load}: p99 of an admitted image", quantile(drawn, 0.99), (_QUEUE / options.batch_size + 2) * batch, " s"
        ),
        at_most(f"{load}: p99 of /healthz", 1000 * quantile([took for _, took in health], 0.99), 200, " ms"),
        at_most(f"{load}: time until an image takes as long as at rest", normal, 2 * _QUEUE / inside, " s"),
        equal(f"{load}: answers by status, as the server counted them", dict(ours), dict(counted)),
        at_most(f"{load}: images open afterwards", waiting, 0),
    ]


def slow(options: argparse.Namespace) -> list[Row]:
    """Measure a normal client at half load, alone and beside 200 connections that send a byte a second."""

    async def trickle(port: int) -> None:
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                for byte in b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n" * 100:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(1)
            except OSError:
                await asyncio.sleep(1)  # the server has had enough of this one; the next one comes

    async def beside(server: Running) -> list[list[tuple[int, float]]]:
        found = []
        for count in (0, 200):
            tasks = [asyncio.create_task(trickle(server.port)) for _ in range(count)]
            await asyncio.sleep(2)
            found.append(await at_rate(server.url, inside / 2, options.seconds))
            for task in tasks:
                task.cancel()
        return found

    inside = capacity(options)
    with started(options) as server:
        asyncio.run(saturated(server.url, options.batch_size, 3))
        alone, crowded = asyncio.run(beside(server))
    rows = _latencies("half load beside 200 slow connections", crowded, options.batch_size / inside)
    medians = [quantile([took for _, took in answers], 0.5) for answers in (alone, crowded)]
    return [*rows, Row("p50 without them and with them", " and ".join(f"{median:.3f} s" for median in medians))]


def limits(options: argparse.Namespace) -> list[Row]:
    """Measure what it costs to refuse requests above each limit."""
    fields: dict[str, dict[str, Any]] = {
        "n of a million": {"n": 10**6},
        "a thousand million steps": {"steps": 10**9},
        "size of a million": {"size": "1000000x1000000"},
        "size 63": {"size": "63x63"},
        "a negative seed": {"seed": -1},
        "65 prompts": {"prompt": ["a"] * 65},
        "a prompt of 2,001 characters": {"prompt": "a" * 2001},
        "a million prompts": {"prompt": ["a"] * 10**6},
    }
    bodies = {name: json.dumps({"prompt": "a", **body}).encode() for name, body in fields.items()}
    bodies |= {"a body of 2 MiB": b" " * (2 * _MIB), "a header of 17 KiB": b'{"prompt": "a"}'}
    rows, count = [], 100
    with started(options) as server:
        process = server.processes()[0]
        for name, body in bodies.items():
            headers = {"Content-Type": "application/json", "X-Long": "a" * ((17 << 10) if "header" in name else 1)}

            def refused(body: bytes = body, headers: dict[str, str] = headers) -> tuple[int, float]:
                began, connection = time.monotonic(), HTTPConnection("127.0.0.1", server.port, timeout=60)
                with contextlib.closing(connection):
                    # The server need not read all of it; its answer may be there all the same.
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        connection.request("POST", PATH, body, headers)
                    try:
                        status = connection.getresponse().status
                    except (ConnectionResetError, BadStatusLine):
                        status = 413
                return status, time.monotonic() - began

            # The first ones grow buffers that stay; what grows after them is lost.
            for _ in range(count):
                refused()
            memory, busy = process.memory_info().rss, sum(process.cpu_times()[:2])
            answers = [refused() for _ in range(count)]
            spent, grown = sum(process.cpu_times()[:2]) - busy, process.memory_info().rss - memory
            odd = [status for status, _ in answers if status not in (400, 413, 422, 431)]
            rows += [
                at_most(f"{name}: answers that are not 400, 413, 422 or 431", len(odd), 0),
                at_most(f"{name}: processor time of the server for a refusal", 1000 * spent / count, 5, " ms"),
                at_most(f"{name}: growth of its memory in the second {count} refusals", grown / _MIB, 1, " MiB"),
                at_most(f"{name}: p99", 1000 * quantile([took for _, took in answers], 0.99), 50, " ms"),
            ]
        rows.append(at_least("an image after them", sum(status == 200 for status, _ in [_image(server)]), 1))
    return rows


def _image(server: Running, **fields: Any) -> tuple[int, float]:
    began = time.monotonic()
    try:
        status = httpx.post(server.url + PATH, json={"prompt": "red heart", **fields}, timeout=60).status_code
    except httpx.HTTPError:
        status = 0
    return status, time.monotonic() - began


def stops(options: argparse.Namespace) -> list[Row]:
    """Stop the server under load, and its model process in three ways."""
    rows = []
    count = 2 * options.batch_size
    with started(options) as server, ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(_image, server) for _ in range(count)]
        _until(lambda: _accepted(server) >= count)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        statuses = [one.result()[0] for one in waiting]
        code = server.process.wait(60)
        rows += [
            at_least(f"SIGTERM with {count} accepted: answered with an image", statuses.count(200), count),
            at_most("SIGTERM: time until the end", time.monotonic() - began, 30, " s"),
            at_most("SIGTERM: exit code", code, 0),
            at_most("SIGTERM: status of a request after it", _image(server)[0], 0),
        ]
    with started(options) as server, ThreadPoolExecutor(1) as pool:
        for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV):
            _until(lambda: httpx.get(server.url + "/readyz").status_code == 200)
            lost = pool.submit(_image, server, n=_QUEUE, steps=50)
            _until(lambda: sum(server.counted("sage_images_open").values()) > 0)
            os.kill(server.processes()[1].pid, number)
            said = _until(lambda: httpx.get(server.url + "/readyz").status_code == 503)
            status, _ = lost.result()
            back = said + _until(lambda: httpx.get(server.url + "/readyz").status_code == 200)
            name = f"model process gets {number.name}"
            rows += [
                at_most(f"{name}: time until /readyz says so", said, 2, " s"),
                Row(f"{name}: status of what was open", str(status), "503", status == 503),
                at_most(f"{name}: time until it is ready again", back, 20, " s"),
                at_least(f"{name}: images after it", int(_image(server)[0] == 200), 1),
            ]
    return rows


def _accepted(server: Running) -> float:
    return sum(sum(server.counted(name).values()) for name in ("sage_images_open", "sage_images_total"))


def _until(condition: Callable[[], bool], limit: float = 60) -> float:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > limit:
            raise SystemExit(f"not within {limit:.0f} s")
        time.sleep(0.02)
    return time.monotonic() - began


def encoder(options: argparse.Namespace) -> list[Row]:
    """Measure images that need no embedding, alone and beside large requests whose prompts are compared."""

    async def measured(server: Running, beside: bool) -> list[float]:
        async def compared() -> None:
            # Their few steps cost little; their embeddings are what they load the process with.
            async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
                number = 0
                while True:
                    texts = [f"{prompt(64 * number + place)} {number}" for place in range(_QUEUE - options.batch_size)]
                    await ask(client, prompt=texts, steps=2, guidance_scale=1.0, share_ratio=0.5)
                    number += 1

        task = asyncio.create_task(compared()) if beside else None
        answers = await at_rate(server.url, 1, options.seconds / 2)
        if task is not None:
            task.cancel()
        if any(status != 200 for status, _ in answers):
            raise SystemExit("an image failed")
        return [took for _, took in answers]

    with started(options) as server:
        texts = [prompt(number) for number in range(_QUEUE)]
        httpx.post(server.url + PATH, json={"prompt": texts, "steps": 2}, timeout=300)  # the encoder is loaded now
        alone, beside = (asyncio.run(measured(server, beside)) for beside in (False, True))
    return [
        Row(
            "p50 and p99 of an image, alone and beside requests with 56 prompts to compare",
            ", ".join(
                f"{quantile(values, 0.5):.3f} s and {quantile(values, 0.99):.3f} s" for values in (alone, beside)
            ),
        )
    ]


def replay(options: argparse.Namespace) -> list[Row]:
    """Replay sessions of reworded prompts, with and without sharing and prefixes."""
    found = sessions(options.model, options.prompts, options.batch_size)
    return [
        Row(f"sessions, shared: {mode}; {name}", str(value))
        for mode, values in found.items()
        for name, value in values.items()
    ]


@dataclass
class _Sent:
    """What clients of the soak have counted."""

    statuses: Counter[int]
    images: int = 0
    evaluations: float = 0.0


async def _soaked(server: Running, first: int, last: int, at_once: int, sent: _Sent) -> None:
    """Send requests of all kinds; most of them take one image of two steps."""
    numbers = iter(range(first, last))
    few = {"steps": 2, "guidance_scale": 1.0, "share_ratio": 0.5}

    async def loop(client: httpx.AsyncClient) -> None:
        for number in numbers:
            text, user = prompt(number % 120), f"user{number % 4}"
            if number % 400 == 399:
                await leaves(server.url, 1.0, prompt=text, n=8, steps=400, share="none")
                sent.statuses[499] += 1
                continue
            kinds: list[dict[str, Any]] = [
                {"prompt": text, "share": "none"},
                {"prompt": text, "share": "tenant", "user": user},
                {"prompt": text, "user": user},
                {"prompt": text, "seed": number},
                {"prompt": text, "steps": -1},
                {"prompt": text, "share": "tenant", "user": user, "negative_prompt": "blue"},
                {"prompt": [text, prompt(number % 120 + 120)]},
                {"prompt": text, "response_format": "url"} if number % 100 == 7 else {"prompt": [text, "\0"]},
            ]
            status, _, answer = await ask(client, **few | kinds[number % len(kinds)])
            sent.statuses[status] += 1
            if status == 200:
                sent.images += sum("error" not in item for item in answer["data"])
                sent.evaluations += answer["usage"]["evaluations"]

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(loop(client) for _ in range(at_once)))


def soak(options: argparse.Namespace) -> list[Row]:
    """Send many requests; compare memory, descriptors and threads with those after the first tenth (at least 100)."""
    sent, warm = _Sent(Counter()), max(options.requests // 10, 100)
    with started(options) as server:

        def rest(fds: int) -> dict[str, int]:
            """Return what is held at rest, once there are at most `fds` descriptors or 20 s have passed."""
            _until(lambda: sum(server.counted("sage_images_open").values()) == 0)
            time.sleep(7)  # the server closes idle connections after five seconds, or later beside other work
            found = [server.held()]
            while len(found) < 20 and found[-1]["fds"] > fds:
                time.sleep(1)
                found.append(server.held())
            return found[-1]

        asyncio.run(_soaked(server, 0, warm, options.batch_size, sent))
        before, began = rest(sys.maxsize), time.monotonic()
        asyncio.run(_soaked(server, warm, options.requests, options.batch_size, sent))
        rate = (options.requests - warm) / (time.monotonic() - began)
        after, statuses = rest(before["fds"]), server.by_status()
        images = server.counted("sage_images_total").get('{outcome="drawn"}', 0)
        evaluations = server.counted("sage_evaluations_total").get("", 0)
        restarts = server.counted("sage_worker_restarts").get("", 0)
    load = f"{options.requests} requests"
    growth = 100 * (after["bytes"] / before["bytes"] - 1)
    return [
        Row(
            f"{load}: memory after {warm}, and at the end",
            f"{before['bytes'] / _MIB:.0f}, {after['bytes'] / _MIB:.0f} MiB",
        ),
        at_most(f"{load}: growth of memory", growth, 5, "%"),
        at_most(f"{load}: further file descriptors", after["fds"] - before["fds"], 0),
        at_most(f"{load}: further threads", after["threads"] - before["threads"], 0),
        equal(f"{load}: answers by status, as the server counted them", dict(sent.statuses), dict(statuses)),
        equal(f"{load}: images, as the server counted them", sent.images, int(images)),
        # Each answer is rounded to 6 digits.
        at_most(f"{load}: evaluations, difference from the server's count", abs(sent.evaluations - evaluations), 0.1),
        at_most(f"{load}: restarts of the model process", restarts, 0),
        Row(f"{load}: requests a second", f"{rate:.1f}"),
    ]


def held_by_tests(options: argparse.Namespace) -> list[Row]:
    """Run the tests that hold a row."""
    rows = []
    for promise, tests in TESTS.items():
        command = [sys.executable, "-m", "pytest", "-m", "slow or not slow", *tests]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TESTS)
        except subprocess.TimeoutExpired:
            rows.append(Row(promise, f"not finished in {_TESTS} s", "passed", held=False))
            continue
        said = done.stdout.strip().splitlines() or ["none ran"]
        last = re.sub(r"[^\w ,.]| in [\d.]+s.*", "", said[-1]).strip()
        # What was skipped is no promise held.
        held = None if done.returncode == 0 and "skipped" in last else done.returncode == 0
        rows.append(Row(promise, last, "passed", held))
    return rows


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "saturation": saturation,
    "half": half,
    "overload": overload,
    "slow": slow,
    "limits": limits,
    "stops": stops,
    "encoder": encoder,
    "sessions": replay,
    "soak": soak,
    "tests": held_by_tests,
}


def measured(what: str, options: argparse.Namespace) -> list[Row]:
    """Return the rows of a measurement; if it ends with an error, a row that says so, and the others go on."""
    try:
        return MEASUREMENTS[what](options)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return [Row(f"{what} is measured", f"{type(error).__name__}: {error}"[:100], "measured", held=False)]


def machine(options: argparse.Namespace) -> str:
    """Return a sentence on what the rows were measured with."""
    threads = os.environ["OMP_NUM_THREADS"]
    return (
        f"{options.model}, batches of {options.batch_size}, OMP_NUM_THREADS={threads}, {os.cpu_count()} cores of "
        f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}"
    )


def table(measured: dict[str, list[Row]]) -> str:
    """Return all rows in Markdown, with the command that prints each."""
    marks = {True: "yes", False: "**no**", None: ""}
    lines = ["| what | measured | goal | held | command |", "|---|---|---|---|---|"]
    for what, rows in measured.items():
        for number, row in enumerate(rows):
            command = "the same" if number else f"`python -m benchmarks.serving {what}`"
            lines.append(f"| {row.promise} | {row.measured} | {row.goal} | {marks[row.held]} | {command} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, keep the rows and print the table of all that were kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*MEASUREMENTS, "all"])
    parser.add_argument("--model", default="models/base")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=480)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--into", type=Path, default=Path("work/serving.json"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for what in MEASUREMENTS if options.what == "all" else [options.what]:
        rows = measured(what, options)
        kept = json.loads(options.into.read_text()) if options.into.exists() else {}
        kept[what] = [asdict(row) for row in rows]
        options.into.parent.mkdir(parents=True, exist_ok=True)
        options.into.write_text(json.dumps(kept, indent=2))
    found = {what: [Row(**row) for row in kept[what]] for what in MEASUREMENTS if what in kept}
    verdicts = [row.held for rows in found.values() for row in rows if row.held is not None]
    text = f"{sum(verdicts)} of {len(verdicts)} held: {machine(options)}.\n\n{table(found)}\n"
    options.into.with_suffix(".md").write_text(text)
    print(text)
    if not all(verdicts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
