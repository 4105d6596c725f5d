"""Chromium without a window, driven over a pipe by its DevTools protocol: no driver and no further package."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

FLAGS = ["--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"]


def program() -> str:
    """Return Chromium's program; skip the test if there is none."""
    named = os.environ.get("SAGE_CHROMIUM")
    found = next(filter(None, map(shutil.which, [named] if named else ["chromium", "google-chrome"])), None)
    if found is None:
        pytest.skip(f"no Chromium: {named or 'chromium'} is not on PATH (Debian: apt-get install chromium)")
    return found


class Page:
    """One page of a running browser."""

    def __init__(self, send: int, receive: IO[bytes]) -> None:
        self._send, self._receive, self._buffer, self._number = send, receive, b"", 0
        self.console: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        size = {"width": 1100, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol; what the page logs meanwhile is kept in `console`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                piece = self._receive.read(1 << 16)
                assert piece, "the browser ended"
                self._buffer += piece
            one, self._buffer = self._buffer.split(b"\0", 1)
            answer = json.loads(one)
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.console.append(json.dumps(answer["params"]))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, (
                f"not within {seconds} s: {expression}\n{self.value('document.body.innerText')}"
            )
            time.sleep(0.05)

    def shoot(self, path: Path) -> None:
        """Write a picture of the page."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@contextmanager
def chromium():
    """Run Chromium and yield a page."""
    command = [program(), *FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]  # its sandbox refuses root
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # The protocol is spoken on the descriptors 3 and 4.
        script = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
        process = subprocess.Popen(
            [
                "bash",
                "-c",
                script,
                "bash",
                *command,
                "--remote-debugging-pipe",
                f"--user-data-dir={folder}",
                "about:blank",
            ],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            with os.fdopen(ours_in, "rb", 0) as answers:
                yield Page(ours_out, answers)
        finally:
            process.kill()
            process.wait()
            os.close(ours_out)
