"""Embeds the prompts of jobs in a thread of its own, so that a slow sentence encoder does not stall the steps."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flows.serving.requests import Job
from sage.grouping.embedding import embed

if TYPE_CHECKING:
    from sage.grouping.distilled import Distilled

_TOGETHER = 64  # prompts of different requests in one call; one call for each would cost several times as much

Embedded = np.ndarray | Exception


class Encoder:
    """Hands each job back with the embeddings of its prompts, or with the error that they gave.

    Requests that share within their tenant are embedded together; the rounding then depends on the company. The
    prompts of any other request are embedded alone, because its images must depend on nothing else.
    """

    def __init__(self, done: Callable[[Job, Embedded], object], distilled: "Distilled | None" = None) -> None:
        """Load the encoder in the background, by default the sentence encoder; `done` is called by the thread."""
        self._done, self._distilled = done, distilled
        self._waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, job: Job) -> None:
        """Embed a job's prompts soon."""
        self._waiting.put(job)

    def _run(self) -> None:
        self._embedded(["red heart"])  # loads the encoder, which takes seconds, before somebody waits for it
        while True:
            jobs = [self._waiting.get()]
            while not self._waiting.empty() and sum(len(job.prompts) for job in jobs) < _TOGETHER:
                jobs.append(self._waiting.get())
            together = [job for job in jobs if job.share == "tenant"]
            if together:
                self._embed(together)
            for job in jobs:
                if job.share != "tenant":
                    self._embed([job])

    def _embed(self, jobs: Sequence[Job]) -> None:
        found = self._embedded([prompt for job in jobs for prompt in job.prompts])
        if isinstance(found, Exception) and len(jobs) > 1:
            for job in jobs:  # one of them is at fault: it alone fails
                self._embed([job])
            return
        first = 0
        for job in jobs:
            last = first + len(job.prompts)
            self._done(job, found if isinstance(found, Exception) else found[first:last])
            first = last

    def _embedded(self, prompts: Sequence[str]) -> Embedded:
        try:
            return embed(prompts) if self._distilled is None else self._distilled.embed(prompts)
        except Exception as error:
            return error
