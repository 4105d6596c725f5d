"""A server whose model process draws nothing: each image is one pixel, finished after a fixed time."""

import argparse
import queue
import sys
import threading
import time
from functools import partial
from pathlib import Path

from flows.serving import server, worker
from flows.serving.requests import Drawn, Failed, Grouped, Model, Progress

PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU"
    b"\x00\x00\x00\nIDATx\x9cc`\x00\x00\x00\x02\x00\x01H\xaf\xa4q\x00\x00\x00\x00IEND\xaeB`\x82"
)
SETTINGS = {"steps": 6, "guidance_scale": 1.0, "share_ratio": 0.34, "branch_noise": 1.0, "batch_size": 128}


def draw(seconds, connection, source):
    """Answer jobs in order, one image in `seconds`; a prompt "poison" fails, "crash" ends the process.

    A model that is a file stands for an alias: it holds the version, of which "bad" cannot be loaded.
    """
    lock = threading.Lock()

    def send(*events):
        with lock:
            connection.send(list(events))

    def beat():
        while True:
            time.sleep(0.5)
            try:
                send()
            except OSError:
                return

    threading.Thread(target=beat, daemon=True).start()
    if source.model == "broken":
        send(worker._Refused("broken cannot be served"))
        time.sleep(1)
        return
    file, version = Path(source.model), source.version
    if file.is_file():
        version = version or file.read_text()
        if version == "bad":
            send(worker._Refused("bad cannot be served"))
            time.sleep(1)
            return

        def look():
            seen = version
            while True:
                time.sleep(0.1)
                if file.read_text() != seen:
                    seen = file.read_text()
                    send(worker._Moved(seen))

        threading.Thread(target=look, daemon=True).start()
    model = Model(
        source.model, (version or "").rjust(64, "0"), SETTINGS, (64, 64), 8, source.batch_size, version=version
    )
    send(worker._Ready(model))
    inbox, cancelled = queue.SimpleQueue(), set()

    def listen():
        try:
            while True:
                name, content = connection.recv()
                if name == "group":
                    send(Grouped(content.id, alike(content.prompts)))
                    continue
                cancelled.add(content) if name == "cancel" else inbox.put(content)
        except (EOFError, OSError):
            inbox.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (job := inbox.get()) is not None:
        for index, prompt in enumerate(job.prompts):
            if job.id in cancelled:
                break
            if prompt == "crash":
                sys.exit(1)
            time.sleep(seconds)
            if prompt == "poison":
                send(Failed(job.id, index, "generation_failed", "poison"))
                continue
            if job.progress:
                send(Progress(job.id, index, len(job.prompts)))
            groups = alike(job.prompts) if job.groups is None and job.share == "request" else job.groups
            mates = next((group for group in groups or () if index in group), [index])
            shared = [other for other in mates if other != index]
            send(Drawn(job.id, index, PNG, job.seeds[index], 4.5, 6, shared, steps=6))


def alike(prompts):
    """Group the prompts that begin with the same word."""
    words = {}
    for number, prompt in enumerate(prompts):
        words.setdefault(prompt.split()[0], []).append(number)
    return list(words.values())


def main():
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--batches", type=Path)
    parser.add_argument("--model", default="quick")
    given = parser.parse_args()
    source = worker.Source(given.model, batch_size=1)
    target = partial(draw, given.seconds)
    return server.serve(source, "127.0.0.1", given.port, given.queue, given.tokens, [], given.batches, target)


if __name__ == "__main__":
    sys.exit(main())
