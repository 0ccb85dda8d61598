"""One worker process as its parent sees it: start, send a line, read lines, kill. No signals, no threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import rlfr_cli
from rlfr_cli.errors import WorkError

_PACKAGE_ROOT = str(Path(rlfr_cli.__file__).resolve().parents[1])


class WorkerProcess:
    """A running ``rlfr_cli.grading.worker`` and the bytes that it has written so far."""

    def __init__(self, memory_limit_bytes: int, timeout_s: float) -> None:
        self.ready = False
        self._buffer = b""
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by kill)
        paths = [_PACKAGE_ROOT, os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            # -P keeps the current folder, which may hold a file named like a library's, off the path.
            [
                *(sys.executable, "-P", "-m", "rlfr_cli.grading.worker"),
                *("--memory-bytes", str(memory_limit_bytes), "--timeout-s", str(timeout_s)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
            bufsize=0,
            # Ctrl-C goes to the parent alone, which then ends its workers.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def fileno(self) -> int:
        """The descriptor to wait on for replies."""
        return self._stdout.fileno()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def send(self, request: dict[str, Any]) -> None:
        """Write one request; a worker that is gone shows at the next receive."""
        message = memoryview(json.dumps(request).encode() + b"\n")
        try:
            while message:
                message = message[self._stdin.write(message) or 0 :]
        except BrokenPipeError:
            pass

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The replies that have arrived, and whether the worker has ended."""
        data = os.read(self.fileno(), 65536)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        replies = []
        for line in lines:
            try:
                reply = json.loads(line)
            except ValueError:  # something printed while Python starts, before the worker takes the pipe
                continue
            if isinstance(reply, dict):
                replies.append(reply)
        return replies, not data

    def start_failure(self) -> WorkError:
        """The error for a worker that ended, or stayed silent, before it was ready."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return WorkError(
            f"a grading worker could not start: {lines[-1] if lines else 'it gave no message'}",
            hint=f"run {sys.executable} -c 'import math_verify' to see whether math-verify works",
        )

    def kill(self) -> None:
        """End the process now and give back its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._stdin, self._stdout, self._errors):
            pipe.close()
