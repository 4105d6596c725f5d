"""Prompts in sessions, reworded again and again, replayed against `sage serve`: saving, latency and quality.

Four servers answer the same stream of prompts: without any sharing, with prefixes of the same prompt, with sharing
among a tenant's requests, and with both. Quality compares each image with the independent image of its prompt and seed.
"""

import asyncio
import base64
import io
import random
import time
from collections import Counter
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.load import COLOURS, NOUNS, PLACES, Running, ask, quantile

# How the requests share, and further arguments of the server.
MODES = {
    "nothing": ("none", ()),
    "prefixes of the same prompt": ("request", ()),
    "groups in the tenant": ("tenant", ("--prefix-memory", "0")),
    "groups and prefixes in the tenant": ("tenant", ()),
}


def stream_of_sessions(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return (user, prompt) in order of arrival: Zipf-like subjects, reworded again and again in sessions."""
    rng = random.Random(seed)
    subjects = [f"{colour} {noun}" for noun in NOUNS for colour in COLOURS]
    rng.shuffle(subjects)
    weights = [1 / (rank + 1) for rank in range(len(subjects))]
    arrivals: list[tuple[float, str, str]] = []
    for session in range(count // 6):
        (subject,) = rng.choices(subjects, weights)
        for turn in range(6):
            place = rng.choice(PLACES) if turn else PLACES[0]
            again = turn and rng.random() < 0.25  # the very same prompt once more
            text = arrivals[-1][2] if again else f"{rng.choice(['a', 'the', 'one'])} {subject} {place}"
            arrivals.append((session * 3 + turn * rng.random() * 4, f"user{session % 8}", text))
    return [(user, text) for _, user, text in sorted(arrivals)]


async def replayed(url: str, share: str, prompts: int, at_once: int) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """Return prompt and item of each answer, and what the replay cost."""
    limit = asyncio.Semaphore(at_once)
    arrivals = stream_of_sessions(prompts)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def one(user: str, text: str) -> tuple[int, float, dict[str, Any]]:
            async with limit:
                return await ask(client, prompt=text, user=user, share=share)

        began = time.monotonic()
        answers = await asyncio.gather(*(one(*arrival) for arrival in arrivals))
        took = time.monotonic() - began
    if {status for status, _, _ in answers} != {200}:
        raise RuntimeError(f"statuses {Counter(status for status, _, _ in answers)}")
    items = [answer["data"][0] for _, _, answer in answers]
    spent = sum(answer["usage"]["evaluations"] for _, _, answer in answers)
    alone = sum(answer["usage"]["evaluations_alone"] for _, _, answer in answers)
    seconds = [seconds for _, seconds, _ in answers]
    return [(text, item) for (_, text), item in zip(arrivals, items, strict=True)], {
        "saving": round(1 - spent / alone, 3),
        "images/s": round(len(answers) / took, 2),
        "p50 s": round(quantile(seconds, 0.5), 3),
        "p99 s": round(quantile(seconds, 0.99), 3),
        "starts": dict(Counter(str(item["prefix"]) for item in items)),
        "in a group": sum(item["shared_with_other_requests"] > 0 for item in items),
    }


async def independent(url: str, asked: list[tuple[str, int]], at_once: int) -> list[Any]:
    """Return the items of these prompts and seeds drawn alone."""
    limit = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def one(text: str, seed: int) -> Any:
            async with limit:
                _, _, answer = await ask(client, prompt=text, seeds=[seed], share="none")
                return answer["data"][0]

        return list(await asyncio.gather(*(one(*pair) for pair in asked)))


class Quality:
    """Distances to independent images, in the features of stage evaluate."""

    def __init__(self) -> None:
        """Load what measures."""
        import sage.torchvision_ops  # noqa: F401

        from sage.evaluation.extractors import EfficientNetLite0

        self._extract = EfficientNetLite0()

    def features(self, items: list[Any]) -> np.ndarray:
        """Return a row for each item's image."""
        images = [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))).convert("RGB")) for item in items
        ]
        return self._extract(images)

    def measured(self, items: list[Any], alone: list[Any], others: list[Any]) -> dict[str, Any]:
        """Compare images with the independent ones of the same prompts and seeds; `others` have other seeds."""
        from sage.evaluation.distances import frechet_distance

        ours, theirs, elsewhere = map(self.features, (items, alone, others))

        def apart(one: np.ndarray, other: np.ndarray) -> float:
            return round(float(np.linalg.norm(one - other, axis=1).mean()), 3)

        return {
            "mean feature distance to the independent image of the same seed": apart(ours, theirs),
            "the same for an independent image of another seed": apart(elsewhere, theirs),
            "Frechet distance to the independent images": round(frechet_distance(ours, theirs), 3),
            "the same for independent images of other seeds": round(frechet_distance(elsewhere, theirs), 3),
        }


def sessions(model: str, prompts: int, batch_size: int) -> dict[str, Any]:
    """Return saving, latency and quality by how requests share."""
    found, quality = {}, Quality()
    for mode, (share, arguments) in MODES.items():
        with Running(model, "--batch-size", str(batch_size), *arguments) as server:
            answers, cost = asyncio.run(replayed(server.url, share, prompts, batch_size))
            items = [item for _, item in answers]
            pairs = [(text, item["seed"]) for text, item in answers]
            alone = asyncio.run(independent(server.url, pairs, batch_size))
            others = asyncio.run(independent(server.url, [(text, seed + 1) for text, seed in pairs], batch_size))
        found[mode] = cost | quality.measured(items, alone, others)
    return found
