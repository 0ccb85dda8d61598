"""A headless Chromium to drive from a test: its DevTools protocol over two pipes, so that nothing listens on a port."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--window-size=1200,900",
]
READY = "Boolean(document.documentElement?.dataset.ready && document.querySelector('.tokens > span'))"


class Chromium:
    """One page of a browser of its own; skips the test where there is no Chromium.

    Args:
        profile: an empty folder for the browser.
    """

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium")
        if program is None:
            pytest.skip("chromium is not on PATH")
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()
        # The browser reads from 3 and writes to 4: neither of our ends may be one of these.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (read_commands, write_answers)]

        def take_places() -> None:
            for place, end in enumerate(ends, start=3):
                os.dup2(end, place, inheritable=True)

        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=take_places,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (read_commands, write_answers, *ends):
            os.close(end)
        self._received, self._number, self._session = b"", 0, None
        (page,) = [target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; events are passed over."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            received = os.read(self._answers, 1 << 20)
            assert received, "the browser has gone"
            self._received += received
        message, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(message))

    def evaluate(self, code: str) -> Any:
        """What an expression, or a promise, gives in the page."""
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def open(self, page: Path) -> None:
        """Load a file and wait until its script has run and its first tokens are there."""
        self.call("Page.navigate", url=page.as_uri())
        given_up = time.monotonic() + 60
        here = f"location.href === '{page.as_uri()}' && "
        while not self.evaluate(here + READY):
            assert not self.evaluate(here + "document.documentElement?.dataset.error"), "the page says that it failed"
            assert time.monotonic() < given_up, "the page is not ready"
            time.sleep(0.02)

    def move_mouse(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, selector: str | None = None) -> bytes:
        """The window, or the box of one element, as PNG."""
        clip: dict[str, Any] = {}
        if selector is not None:
            box = f"document.querySelector('{selector}').getBoundingClientRect()"
            found = self.evaluate(f"(b => ({{x: b.x, y: b.y + scrollY, width: b.width, height: b.height}}))({box})")
            clip["clip"] = {**found, "scale": 1}
        return base64.b64decode(self.call("Page.captureScreenshot", **clip)["data"])
