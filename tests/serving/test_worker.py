"""The model process's loop says what it keeps, also when nothing is drawn."""

import queue
import threading

import tiny
from waiting import wait_for

from flows.serving import worker
from flows.serving.engine import Engine
from flows.serving.prefix_files import PrefixFiles
from flows.serving.prefixes import Prefixes
from flows.serving.requests import Drawn, Job, Kept
from sage.grouping.policy import Policy
from sage.sampling.pipeline import SharedSamplingPipeline

SETTINGS = {
    "steps": 4,
    "guidance_scale": 1.0,
    "share_ratio": 0.5,
    "branch_noise": 1.0,
    "negative_prompt": "",
    "height": 16,
    "width": 16,
}


def test_a_prefix_that_a_slow_disk_takes_after_the_last_step_is_counted(tmp_path, monkeypatch):
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", tmp_path))
    released, write = threading.Event(), PrefixFiles._write

    def slow(self, *prefix):
        assert released.wait(60)
        write(self, *prefix)

    monkeypatch.setattr(PrefixFiles, "_write", slow)
    prefixes = Prefixes(1 << 20, PrefixFiles(tmp_path / "prefixes", 1 << 20, "model"))
    engine = Engine(pipe, Policy(max_size=6, near_duplicate=0.999, threshold=0.5), 4, prefixes=prefixes)
    inbox, outbox, sent = queue.SimpleQueue(), queue.SimpleQueue(), []
    thread = threading.Thread(target=worker._serve, args=(engine, inbox, outbox))
    thread.start()

    def found(wanted):
        while not outbox.empty():
            sent.append(outbox.get())
        return any(map(wanted, sent))

    try:
        inbox.put(("submit", Job("one", "t", ["a red cat"], [0], SETTINGS, "tenant", seeded=True)))
        wait_for(lambda: found(lambda event: isinstance(event, Drawn)), 60)
        wait_for(lambda: not engine.busy, 60)
        assert not found(lambda event: isinstance(event, Kept) and event.files)
        released.set()
        wait_for(lambda: found(lambda event: isinstance(event, Kept) and event.files >= 1), 60)
    finally:
        released.set()
        inbox.put(None)
        thread.join(60)
    assert not thread.is_alive()
