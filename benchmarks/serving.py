"""The server under load, against the same pipeline called in process.

    python -m benchmarks.serving saturation     throughput at saturation, as a fraction of the pipeline in process
    python -m benchmarks.serving overload       three times that rate: goodput, refusals, health
    python -m benchmarks.serving slow           200 slow connections beside a normal client
    python -m benchmarks.serving sessions       reworded prompts in sessions, with and without sharing in the tenant

Options: --model FOLDER (default models/base), --seconds S, --batch-size N. Prints a table in Markdown.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import httpx

PATH = "/v1/images/generations"
NOUNS = ["cat", "dog", "fox", "owl", "tree", "house", "car", "ship", "heart", "star", "cup", "book"]
COLOURS = ["red", "green", "blue", "orange", "purple", "black", "brown", "pink", "white", "yellow"]
PLACES = ["on a mat", "on a rug", "in the rain", "at night", "in spring", "by the sea", "on a hill", "in the snow"]


class Running:
    """`sage serve` as a process."""

    def __init__(self, model: str, *arguments: str) -> None:
        """Start it and wait until it is ready; `ready_after` is in seconds."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-c", "from flows.cli import main; main()", "serve", model, "--port", str(self.port)]
        began = time.monotonic()
        self.process = subprocess.Popen([*command, *arguments], stderr=subprocess.DEVNULL)
        while not self._ready():
            if self.process.poll() is not None:
                raise SystemExit("the server ended")
            time.sleep(0.1)
        self.ready_after = time.monotonic() - began

    def _ready(self) -> bool:
        try:
            return httpx.get(self.url + "/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def __enter__(self) -> "Running":
        """Return the running server."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(40)


def in_process(model: str, batch_size: int, seconds: float) -> float:
    """Return images per second of the pipeline called in this process, PNG encoding included."""
    import io

    from flows.prompts.generate import open_model
    from sage.sampling.plan import Plan

    pipe, _, settings, _ = open_model(model)
    plan = Plan.independent(batch_size, pipe.evaluations(settings["steps"]))

    def once(number: int) -> None:
        prompts = [prompt(number * batch_size + place) for place in range(batch_size)]
        names = ("guidance_scale", "branch_noise")
        drawn = pipe(
            prompts,
            plan=plan,
            num_inference_steps=settings["steps"],
            batch_size=batch_size,
            seed=number,
            **{name: settings[name] for name in names},
        )
        for image in drawn.images:
            image.save(io.BytesIO(), "PNG", compress_level=1)

    once(0)
    count, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        count += 1
        once(count)
    return count * batch_size / (time.monotonic() - began)


def prompt(number: int) -> str:
    """Return one of a thousand prompts."""
    return f"{COLOURS[number % 10]} {NOUNS[number // 10 % 12]} {PLACES[number // 120 % 8]}"


async def ask(client: httpx.AsyncClient, **fields: Any) -> tuple[int, float, dict[str, Any]]:
    """Return status, seconds and answer; status 0 for no answer."""
    began = time.monotonic()
    try:
        answer = await client.post(PATH, json=fields)
    except httpx.HTTPError:
        return 0, time.monotonic() - began, {}
    return answer.status_code, time.monotonic() - began, answer.json()


async def saturated(url: str, clients: int, seconds: float) -> tuple[float, Counter[int], list[float]]:
    """Return images per second, statuses and latencies of clients that ask again at once."""
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        began = time.monotonic()

        async def loop(number: int) -> None:
            while time.monotonic() - began < seconds:
                status, took, _ = await ask(client, prompt=prompt(number), share="none")
                statuses[status] += 1
                latencies.append(took)
                number += clients

        await asyncio.gather(*map(loop, range(clients)))
        return statuses[200] / (time.monotonic() - began), statuses, latencies


async def at_rate(url: str, rate: float, seconds: float, path: str = PATH) -> list[tuple[int, float]]:
    """Return status and latency of requests sent at a rate, whether or not earlier ones were answered."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        tasks, began = [], time.monotonic()

        async def one(number: int) -> tuple[int, float]:
            if path != PATH:
                start = time.monotonic()
                return (await client.get(path)).status_code, time.monotonic() - start
            status, took, _ = await ask(client, prompt=prompt(number), share="none")
            return status, took

        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0, began + number / rate - time.monotonic()))
            tasks.append(asyncio.create_task(one(number)))
        return list(await asyncio.gather(*tasks))


def quantile(values: list[float], share: float) -> float:
    """Return a quantile, 0 without values."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def saturation(options: argparse.Namespace) -> dict[str, Any]:
    """Measure throughput at saturation against the pipeline in process."""
    inside = in_process(options.model, options.batch_size, options.seconds)
    with Running(options.model, "--batch-size", str(options.batch_size)) as server:
        clients = 3 * options.batch_size
        asyncio.run(saturated(server.url, clients, 3))
        rate, statuses, latencies = asyncio.run(saturated(server.url, clients, options.seconds))
    again = in_process(options.model, options.batch_size, options.seconds)
    inside = (inside + again) / 2
    return {
        "ready after s": round(server.ready_after, 1),
        "in process images/s": round(inside, 2),
        "served images/s": round(rate, 2),
        "fraction": round(rate / inside, 3),
        "p50 s": round(quantile(latencies, 0.5), 3),
        "p99 s": round(quantile(latencies, 0.99), 3),
        "statuses": dict(statuses),
    }


def overload(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what three times the rate at saturation does."""
    with Running(options.model, "--batch-size", str(options.batch_size)) as server:
        asyncio.run(saturated(server.url, 3 * options.batch_size, 3))
        rate, _, _ = asyncio.run(saturated(server.url, 3 * options.batch_size, options.seconds))

        async def both() -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
            load = asyncio.create_task(at_rate(server.url, 3 * rate, options.seconds))
            health = asyncio.create_task(at_rate(server.url, 5, options.seconds, "/healthz"))
            return await load, await health

        began = time.monotonic()
        answers, health = asyncio.run(both())
        took = time.monotonic() - began
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        ours = [line for line in lines if line.startswith("sage_requests_total")]
        counted = {
            status: sum(float(line.split()[-1]) for line in ours if f'"{status}"' in line) for status in (200, 429)
        }
    statuses = Counter(status for status, _ in answers)
    drawn = [seconds for status, seconds in answers if status == 200]
    refused = [seconds for status, seconds in answers if status == 429]
    return {
        "saturation images/s": round(rate, 2),
        "goodput": round(statuses[200] / took / rate, 3),
        "statuses": dict(statuses),
        "server counted (with warm-up)": counted,
        "admitted p99 s": round(quantile(drawn, 0.99), 3),
        "429 p99 ms": round(1000 * quantile(refused, 0.99), 1),
        "healthz p99 ms": round(1000 * quantile([seconds for _, seconds in health], 0.99), 1),
    }


def slow(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a normal client beside 200 connections that send a byte a second."""

    async def trickle(port: int) -> None:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            for byte in b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n" * 100:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(1)
        except OSError:
            pass

    async def beside(server: Running) -> tuple[list[float], list[float]]:
        found = []
        for count in (0, 200):
            tasks = [asyncio.create_task(trickle(server.port)) for _ in range(count)]
            await asyncio.sleep(1)
            answers = await at_rate(server.url, 2, options.seconds)
            assert {status for status, _ in answers} == {200}
            found.append([seconds for _, seconds in answers])
            for task in tasks:
                task.cancel()
        return found[0], found[1]

    with Running(options.model, "--batch-size", str(options.batch_size)) as server:
        alone, crowded = asyncio.run(beside(server))
    return {
        f"{name} {label} s": round(quantile(values, share), 3)
        for label, values in (("alone", alone), ("with 200", crowded))
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }


def stream_of_sessions(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return (user, prompt) in order of arrival: Zipf-like subjects, reworded again and again in sessions."""
    rng = random.Random(seed)
    subjects = [f"{colour} {noun}" for noun in NOUNS for colour in COLOURS]
    rng.shuffle(subjects)
    weights = [1 / (rank + 1) for rank in range(len(subjects))]
    arrivals = []
    for session in range(count // 6):
        (subject,) = rng.choices(subjects, weights)
        for turn in range(6):
            place = rng.choice(PLACES) if turn else PLACES[0]
            again = turn and rng.random() < 0.25  # the very same prompt once more
            text = arrivals[-1][2] if again else f"{rng.choice(['a', 'the', 'one'])} {subject} {place}"
            arrivals.append((session * 3 + turn * rng.random() * 4, f"user{session % 8}", text))
    return [(user, text) for _, user, text in sorted(arrivals)]


def sessions(options: argparse.Namespace) -> dict[str, Any]:
    """Measure saving and latency on sessions of reworded prompts, with and without sharing within the tenant."""

    async def replay(url: str, share: str) -> dict[str, Any]:
        limit = asyncio.Semaphore(options.batch_size)
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:

            async def one(user: str, text: str) -> tuple[int, float, dict[str, Any]]:
                async with limit:
                    return await ask(client, prompt=text, user=user, share=share)

            began = time.monotonic()
            answers = await asyncio.gather(*(one(*arrival) for arrival in stream_of_sessions(options.prompts)))
            took = time.monotonic() - began
        assert {status for status, _, _ in answers} == {200}
        spent = sum(answer["usage"]["evaluations"] for _, _, answer in answers)
        alone = sum(answer["usage"]["evaluations_alone"] for _, _, answer in answers)
        starts = Counter(str(answer["data"][0]["prefix"]) for _, _, answer in answers)
        grouped = sum(answer["data"][0]["shared_with_other_requests"] > 0 for _, _, answer in answers)
        return {
            "saving": round(1 - spent / alone, 3),
            "images/s": round(len(answers) / took, 2),
            "p50 s": round(quantile([seconds for _, seconds, _ in answers], 0.5), 3),
            "starts": dict(starts),
            "in a group": grouped,
        }

    found = {}
    for share in ("none", "request", "tenant"):
        with Running(options.model, "--batch-size", str(options.batch_size)) as server:
            found[share] = asyncio.run(replay(server.url, share))
    return found


def main() -> None:
    """Run one measurement and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["saturation", "overload", "slow", "sessions"])
    parser.add_argument("--model", default="models/base")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=480)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measured = globals()[options.what](options)
    print(json.dumps({"what": options.what, "model": options.model, **measured}, indent=2))


if __name__ == "__main__":
    main()
