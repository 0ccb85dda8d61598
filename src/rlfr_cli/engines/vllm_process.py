"""vLLM's processes from outside: started so that Ctrl-C ends that, their asynchronous engine called from plain code.

Written against vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, Thread, current_thread, main_thread
from types import FrameType
from typing import Any, TypeVar

from rlfr_cli.engines.vllm_arguments import VllmSetup, within
from rlfr_cli.errors import WorkError

Result = TypeVar("Result")


def start(setup: VllmSetup) -> Any:
    """Start vLLM's processes; returns when they have loaded the model."""
    with within(setup.environment):
        from vllm import AsyncLLMEngine

        try:
            with interruptible():
                return AsyncLLMEngine.from_vllm_config(setup.config, disable_log_stats=True)
        except Exception as error:  # a process that dies at its start may do so for any reason
            raise WorkError(
                f"vLLM did not start: {str(error).strip()}",
                hint="what its processes said stands above; --engine hf does without them",
            ) from error


class _Interrupted(BaseException):
    """Ctrl-C, under a name that vLLM does not know."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end vLLM's start, which swallows a KeyboardInterrupt and goes on (vLLM 0.32)."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise _Interrupted

    in_main_thread = current_thread() is main_thread()  # the only one that may set handlers, and that they run in
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handled:
        signal.signal(number, interrupt)
    try:
        yield
    except _Interrupted:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)


async def all_of(tasks: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results in order; the first failure ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(task) for task in tasks]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in running]


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class LoopThread:
    """An event loop in a thread of its own, for callers without one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock, self._ending = Lock(), False
        self._thread = Thread(target=self._loop.run_forever, name="rlfr-vllm", daemon=True)
        self._thread.start()

    def run(self, task: Coroutine[Any, Any, Result]) -> Result:
        """The task's result; Ctrl-C cancels it.

        Raises:
            WorkError: tasks have been ended.
        """
        with self._lock:
            if self._ending:
                task.close()
                raise WorkError("vLLM is ending, and takes no more work")
            future = asyncio.run_coroutine_threadsafe(task, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # nothing, where it is done

    def end_tasks(self) -> None:
        """Cancel what runs and take nothing more: a task of another thread would never end in a loop that has."""
        with self._lock:
            self._ending = True
            ended = asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop)
        ended.result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
