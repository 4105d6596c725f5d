"""The model process: started, watched and restarted by the server, which speaks to it over a pipe.

The process holds the pipeline and its engine. It ends when the pipe closes, so it never outlives the server. It sends a
sign of life twice a second; if it is silent, the server is not ready, and if it stays silent, it is killed. What it had
not answered then fails; nothing is kept for its successor.
"""

import asyncio
import hashlib
import io
import multiprocessing
import os
import queue
import re
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flows.serving.requests import Drawn, Failed, Grouped, Grouping, Job, Kept, Model, Progress, RequestError
from sage.errors import ConfigurationError

_BEAT = 0.5  # seconds between signs of life
_SILENT = 1.5  # seconds without one until the server is not ready
_DEAD = 5.0  # until the process is killed; while it loads, imports may block for long
_DEAD_LOADING = 120.0
_LOOK = 10.0  # seconds between looks at the alias of a registered model
_CRASHES, _WITHIN = 5, 60.0  # so many ends within so many seconds, and the server gives up

Event = Drawn | Failed | Progress | Grouped


@dataclass(frozen=True)
class Source:
    """What the process opens and how it draws: a model as `sage generate --model` takes it, rows of a network call."""

    model: str
    batch_size: int = 8
    deterministic: bool = False
    version: str | None = None  # of a registered model; None: the one that the alias names now
    loras: tuple[tuple[str, Path], ...] = ()  # by name
    prefix_memory: int = 64 << 20  # bytes of prefixes of earlier requests
    prefix_folder: Path | None = None  # where they outlive the process
    prefix_bytes: int = 1 << 30  # of the files in it
    across_tenants: bool = False  # whether tenants use each other's prefixes


def named(loras: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    """Return LoRAs by name, given as NAME=PATH; raise ConfigurationError for anything else."""
    found: dict[str, Path] = {}
    for one in loras:
        name, _, path = one.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or not path or name in found:
            raise ConfigurationError(
                f"--lora {one}: give NAME=PATH, a NAME of letters, digits, _ and -, and each NAME once"
            )
        found[name] = Path(path)
    return tuple(found.items())


@dataclass(frozen=True)
class _Moved:
    """The alias of the model names another version now."""

    version: str


@dataclass(frozen=True)
class _Ready:
    """The process can draw."""

    model: Model


@dataclass(frozen=True)
class _Refused:
    """The process cannot load its model."""

    message: str


class Worker:
    """The model process as the server sees it; all methods belong to the server's event loop."""

    def __init__(self, source: Source, gave_up: Callable[[str], None], target: Callable[..., None]) -> None:
        """`gave_up` gets the reason if there is no use in another restart; the process runs `target`."""
        self.source, self.model = source, None
        self.reason = "the model process is starting"
        self.restarts = 0
        self.kept = Kept()
        self.gave_up, self._target = gave_up, target
        self.moved: Callable[[str], None] = lambda version: None  # called if the alias names another version
        self._jobs: dict[str, asyncio.Queue[Event]] = {}
        self._ends: deque[float] = deque(maxlen=_CRASHES)
        self._heard = time.monotonic()
        self._stopping = False
        self._process: Any = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._watching: asyncio.Task[None] | None = None

    model: Model | None

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid if self._process is not None else None

    @property
    def jobs(self) -> int:
        """Number of open jobs."""
        return len(self._jobs)

    @property
    def problem(self) -> str | None:
        """Why the process cannot draw now, or None if it can."""
        if self.reason:
            return self.reason
        silent = time.monotonic() - self._heard
        return f"the model process is silent for {silent:.1f} s" if silent > _SILENT else None

    def successor(self, version: str, gave_up: Callable[[str], None]) -> "Worker":
        """Return a process, not started, for another version of the same model."""
        return Worker(replace(self.source, version=version), gave_up, self._target)

    def start(self) -> None:
        """Start the process; `problem` is None when it is ready."""
        self._start()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End the process."""
        self._stopping = True
        if self._watching is not None:
            self._watching.cancel()
        self._outbox.put(None)
        if self._process is not None:
            await asyncio.to_thread(self._process.join, 2.0)
            self._process.kill()
            await asyncio.to_thread(self._process.join)

    def submit(self, job: Job | Grouping) -> "asyncio.Queue[Event]":
        """Send a job or a question; return the queue of its events.

        Raises RequestError with status 503 if the process cannot take it now.
        """
        if problem := self.problem:
            raise RequestError(503, "not_ready", f"{problem}; try again", retry_after=5)
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._jobs[job.id] = events
        self._outbox.put(("submit" if isinstance(job, Job) else "group", job))
        return events

    def close(self, job: str, *, cancel: bool) -> None:
        """Forget a job; `cancel` if it is not finished."""
        if self._jobs.pop(job, None) is not None and cancel:
            self._outbox.put(("cancel", job))

    def fail_all(self, code: str, message: str) -> None:
        """Answer everything that is open with an error."""
        for job, events in self._jobs.items():
            events.put_nowait(Failed(job, None, code, message))

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._heard = time.monotonic()
        self._process = context.Process(target=self._target, args=(theirs, self.source), daemon=True)
        self._process.start()
        theirs.close()
        self._outbox = queue.SimpleQueue()
        loop = asyncio.get_running_loop()
        threading.Thread(target=_send_all, args=(ours, self._outbox), daemon=True).start()
        threading.Thread(target=self._listen, args=(ours, loop, self._process), daemon=True).start()

    def _listen(self, connection: Connection, loop: asyncio.AbstractEventLoop, process: Any) -> None:
        try:
            while True:
                loop.call_soon_threadsafe(self._hear, connection.recv())
        except (EOFError, OSError):
            pass
        except RuntimeError:
            return  # the loop is closed
        process.join(5.0)
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._ended, process)

    def _hear(self, messages: list[Any]) -> None:
        self._heard = time.monotonic()
        for message in messages:
            if isinstance(message, _Ready):
                self.model, self.reason = message.model, ""
                # After a crash the same version is loaded again, even if the alias has moved to one that cannot be.
                self.source = replace(self.source, version=message.model.version)
            elif isinstance(message, _Moved):
                self.moved(message.version)
            elif isinstance(message, _Refused):
                self.reason = message.message
                if self.model is None:
                    self._stopping = True
                    self.gave_up(message.message)
            elif isinstance(message, Kept):
                self.kept = message
            elif message.job in self._jobs:
                self._jobs[message.job].put_nowait(message)

    def _ended(self, process: Any) -> None:
        if self._stopping or process is not self._process:
            return
        self.reason = f"the model process ended with code {process.exitcode} and is starting again"
        self._outbox.put(None)
        self.kept = Kept()
        self.fail_all("worker_lost", "the model process ended before the image was finished; try again")
        now = time.monotonic()
        self._ends.append(now)
        self.restarts += 1
        if len(self._ends) == _CRASHES and now - self._ends[0] < _WITHIN:
            self.gave_up(f"the model process ended {_CRASHES} times within {_WITHIN:.0f} s")
            return
        self._start()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_BEAT / 2)
            silent = time.monotonic() - self._heard
            if silent > (_DEAD_LOADING if self.reason else _DEAD) and self._process.is_alive():
                self._process.kill()  # the listener then sees the pipe close


def _send_all(connection: Connection, outbox: "queue.SimpleQueue[Any]") -> None:
    """Send what is in the outbox, until None: a stopped process must block this thread, not the server."""
    while (message := outbox.get()) is not None:
        try:
            connection.send(message)
        except OSError:
            return
    connection.close()


def main(connection: Connection, source: Source) -> None:
    """Run the model process until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server decides when to end
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_send_events, args=(connection, outbox), daemon=True).start()
    try:
        engine, model = _load(source)
    except Exception as error:
        outbox.put(_Refused(f"{source.model} cannot be served: {type(error).__name__}: {error}"[:1000]))
        time.sleep(2 * _BEAT)
        return
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    outbox.put(_Ready(model))
    if model.version is not None:
        threading.Thread(target=_watch_alias, args=(source.model, model.version, outbox), daemon=True).start()
    _serve(engine, inbox, outbox)


def _serve(engine: Any, inbox: "queue.SimpleQueue[Any]", outbox: "queue.SimpleQueue[Any]") -> None:
    """Run the engine until the inbox has None: a step, then what has arrived, or wait for it if there is no step."""
    from flows.serving.encoder import Encoder

    encoder = Encoder(lambda job, embeddings: inbox.put(("embedded", (job, embeddings))), engine.distilled)
    embedded: set[str] = set()  # jobs whose prompts are being embedded
    kept = Kept()
    # Prefixes are written after their images have been sent, when there may be no step that would say so.
    engine.prefixes.notify(lambda: inbox.put(("written", None)))

    def take(name: str, content: Any) -> Sequence[Event]:
        if name == "submit":
            try:
                if engine.compares(content):
                    embedded.add(content.id)
                    encoder.submit(content)
                    return ()
            except Exception as error:
                return list(engine.submit(content, error))
            return list(engine.submit(content))
        if name == "embedded" and content[0].id in embedded:
            embedded.discard(content[0].id)
            return list(engine.submit(*content))
        if name == "group":
            threading.Thread(target=_group, args=(engine, content, outbox), daemon=True).start()
        if name == "cancel":
            embedded.discard(content)
            engine.cancel(content)
        return ()

    def report() -> None:
        nonlocal kept
        if (now := engine.prefixes.figures) != kept:
            outbox.put(kept := now)

    while True:
        while not engine.busy or not inbox.empty():
            try:
                message = inbox.get(timeout=engine.wait)
            except queue.Empty:
                break
            if message is None:
                return
            for event in take(*message):
                outbox.put(event)
            report()
        for event in engine.step():
            outbox.put(event)
        report()


def _group(engine: Any, asked: Grouping, outbox: "queue.SimpleQueue[Any]") -> None:
    """Answer a question beside the running engine: the embeddings of thousands of prompts take seconds."""
    try:
        outbox.put(Grouped(asked.id, engine.groups(asked.prompts, asked.settings)))
    except Exception as error:
        traceback.print_exc()
        outbox.put(Failed(asked.id, None, "generation_failed", f"{type(error).__name__}: {error}"[:500]))


def _load(source: Source) -> tuple[Any, Model]:
    """Return an engine that has drawn a test image, and the description of its model."""
    import sage.torchvision_ops  # noqa: F401

    from flows.prompts.generate import open_model
    from flows.serving.engine import Engine
    from flows.serving.prefixes import Prefixes
    from flows.terminal import quiet
    from sage.grouping.policy import Policy
    from sage.sampling import adapters

    quiet()
    opened, version = source.model, None
    if opened.startswith("models:/"):
        from flows.tracking import registry

        version = source.version or registry.current(opened)
        opened = f"models:/{registry.split(opened)[0]}/{version}"
    pipe, sha256, settings, grouping, distilled = open_model(opened)
    if distilled is not None:
        distilled.check(pipe.made_for(settings["steps"], settings["guidance_scale"]))
    loras = adapters.load(pipe, dict(source.loras))
    policy = Policy(**grouping.model_dump())
    prefixes = Prefixes(source.prefix_memory, _prefix_files(source, pipe, sha256, distilled))
    engine = Engine(
        pipe,
        policy,
        source.batch_size,
        source.deterministic,
        Path(source.model),
        prefixes,
        source.across_tenants,
        distilled,
    )
    size = pipe.drawn_size()
    multiple = pipe.vae_scale_factor * pipe._network.config.get("patch_size", 1)
    said = settings | {"group": grouping.model_dump(), "scheduler": type(pipe.scheduler).__name__}
    safe = pipe.safe_image_steps(settings["steps"], 1.0)
    model = Model(source.model, sha256, said, size, multiple, source.batch_size, int(time.time()), version, loras, safe)
    smoke = settings | {"negative_prompt": "", "height": size[0], "width": size[1], "share_ratio": 0.0}
    worn: list[dict[str, Any]] = [{"lora": ((name, 1.0, sha256),)} for name, sha256 in loras.items()]
    if loras:
        worn.append({"lora": ()})
    for own in worn or [{}]:
        events = engine.submit(Job("smoke", "smoke", ["red heart"], [0], smoke | own, "none", seeded=True))
        while engine.busy:
            events += engine.step()
        if not any(isinstance(event, Drawn) for event in events):
            raise RuntimeError(f"the test prompt cannot be drawn{own and f' with {own}'}: {events}")
    return engine, model


def _prefix_files(source: Source, pipe: Any, sha256: str, distilled: Any) -> Any:
    """Return the prefixes on disk that this pipeline, with its scheduler and precision, left or may leave; or None.

    Prefixes are found by the embeddings of their prompts, so those of a distilled encoder are its own.
    """
    from flows.serving.prefix_files import PrefixFiles

    if source.prefix_folder is None:
        return None
    scheduler = pipe.scheduler
    depends = [sha256, type(scheduler).__name__, sorted(scheduler.config.items()), str(pipe.dtype), pipe.device.type]
    depends += [] if distilled is None else [distilled.sha256]
    identity = hashlib.sha256(repr(depends).encode()).hexdigest()
    return PrefixFiles(source.prefix_folder, source.prefix_bytes, identity, pipe.device)


def _watch_alias(address: str, version: str, outbox: "queue.SimpleQueue[Any]") -> None:
    """Say when the alias names another version; a registry that does not answer changes nothing."""
    from flows.tracking import registry

    while True:
        time.sleep(_LOOK)
        try:
            found = registry.current(address)
        except Exception:
            traceback.print_exc()
            continue
        if found != version:
            version = found
            outbox.put(_Moved(version))


def _receive(connection: Connection, inbox: "queue.SimpleQueue[Any]") -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        inbox.put(None)


def _send_events(connection: Connection, outbox: "queue.SimpleQueue[Any]") -> None:
    """Send events as they come, images encoded as PNG, and a sign of life if there are none."""
    while True:
        try:
            events = [outbox.get(timeout=_BEAT)]
            while not outbox.empty():
                events.append(outbox.get())
        except queue.Empty:
            events = []
        try:
            connection.send([_encoded(event) for event in events])
        except OSError:
            os._exit(0)  # the server is gone


def _encoded(event: Any) -> Any:
    if not isinstance(event, Drawn):
        return event
    buffer = io.BytesIO()
    event.png.save(buffer, "PNG", compress_level=1)
    return replace(event, png=buffer.getvalue())
