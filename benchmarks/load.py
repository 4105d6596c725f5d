"""`sage serve` as a process, clients that load it, and the same pipeline called in process."""

import asyncio
import contextlib
import io
import socket
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import httpx
import psutil

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

    def processes(self) -> list[psutil.Process]:
        """Return the server's process and the model process."""
        worker = httpx.get(self.url + "/readyz").json()["worker_pid"]
        return [psutil.Process(self.process.pid), psutil.Process(worker)]

    def held(self) -> dict[str, int]:
        """Return bytes of memory, file descriptors and threads of both processes."""
        both = self.processes()
        return {
            "bytes": sum(one.memory_info().rss for one in both),
            "fds": sum(one.num_fds() for one in both),
            "threads": sum(one.num_threads() for one in both),
        }

    def counted(self, name: str) -> dict[str, float]:
        """Return the values of a metric by its labels as /metrics writes them."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        found = [line.rpartition(" ") for line in lines if line.startswith((name + " ", name + "{"))]
        return {labels.removeprefix(name): float(value) for labels, _, value in found}

    def by_status(self) -> Counter[int]:
        """Return the server's own count of answers to requests for images, by status."""
        found = self.counted("sage_requests_total")
        return Counter({int(labels.split('"')[3]): int(n) for labels, n in found.items() if f'"{PATH}"' in labels})

    def __enter__(self) -> "Running":
        """Return the running server."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(40)


def in_process(model: str, batch_size: int, seconds: float) -> float:
    """Return images per second of the pipeline called in this process, PNG encoding included."""
    from flows.prompts.generate import open_model
    from sage.sampling.plan import Plan

    pipe, _, settings, *_ = open_model(model, groups=False)
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


async def leaves(url: str, seconds: float, **fields: Any) -> None:
    """Ask for images, and close the connection before they are finished."""
    async with httpx.AsyncClient(base_url=url, timeout=seconds) as client:
        with contextlib.suppress(httpx.ReadTimeout):
            await client.post(PATH, json=fields)
            raise RuntimeError("the request that should be given up was answered; ask for more")
