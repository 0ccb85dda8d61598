"""Grades responses against accepted answers in worker processes that can be killed.

Reads response texts and accepted answers, returns a :class:`Grade` for each. Numbers and exact copies are
judged here; the rest goes to math-verify in a worker, one answer at a time, and a worker that takes too long
is killed and replaced. This process uses no signals, so the pool works from any thread and in notebooks.
"""

from __future__ import annotations

import selectors
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rlfr_cli.errors import ConfigError
from rlfr_cli.grading.answers import AnswerFallback, extract_answer
from rlfr_cli.grading.grades import Grade
from rlfr_cli.grading.numbers import MAX_ANSWER_CHARACTERS, plain_number, quick_grade
from rlfr_cli.grading.process import WorkerProcess

CACHE_SIZE = 16384
START_TIMEOUT_S = 120.0
"""Importing sympy takes half a second, and much longer on a busy machine with a cold disk."""


class GradingPool:
    """Workers that judge answers; they start with the first answer that needs one.

    Args:
        num_workers: processes at most.
        timeout_s: wall-clock seconds for one answer against all its accepted answers; then ``timeout``. A
            worker that dies meanwhile, of its memory limit for example, also gives ``timeout``.
        memory_limit_bytes: address space of a worker.
        fallback: what to take as answer where there is no box.
    """

    def __init__(
        self,
        num_workers: int = 1,
        timeout_s: float = 3.0,
        memory_limit_bytes: int = 2 * 1024**3,
        fallback: AnswerFallback | str = AnswerFallback.NONE,
    ) -> None:
        if num_workers < 1 or timeout_s <= 0:
            raise ConfigError(f"grading needs a worker and time, not {num_workers} workers and {timeout_s} s")
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._memory_limit_bytes = memory_limit_bytes
        self._fallback = AnswerFallback(fallback)
        self._lock = threading.Lock()
        self._idle: list[WorkerProcess] = []
        self._verdicts: OrderedDict[tuple[str, tuple[str, ...]], Grade] = OrderedDict()
        self._closed = False

    def grade(self, responses: Sequence[str], answers: Sequence[Sequence[str]]) -> list[Grade]:
        """One verdict a response, in order, against the accepted answers of the same index.

        Equal pairs are judged once. Verdicts are remembered, time-outs excepted: those may pass.
        """
        grades: list[Grade | None] = []
        pending: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        with self._lock:
            for index, (response, accepted) in enumerate(zip(responses, answers, strict=True)):
                golds = tuple(gold.strip() for gold in accepted)
                answer = extract_answer(response, self._fallback) if golds else ""
                if not golds:
                    grades.append(Grade.UNGRADED)
                elif answer is None:
                    grades.append(Grade.NO_ANSWER)
                else:
                    grade = quick_grade(answer, golds) or self._remembered((answer, golds))
                    grades.append(grade)
                    if grade is None:
                        pending.setdefault((answer, golds), []).append(index)
            requests = [{"answer": answer, "accepted": golds} for answer, golds in pending]
            for (pair, indices), result in zip(pending.items(), self._run(requests), strict=True):
                grade = Grade(result)
                if grade is not Grade.TIMEOUT:
                    self._remember(pair, grade)
                for index in indices:
                    grades[index] = grade
        return [grade for grade in grades if grade is not None]

    def parse_failures(self, answers: Sequence[Sequence[str]]) -> list[int]:
        """Indices of rows with an accepted answer that is empty or that math-verify cannot read in time."""
        distinct = {gold.strip() for accepted in answers for gold in accepted}
        unclear = sorted(gold for gold in distinct if plain_number(gold) is None)
        with self._lock:
            short = [gold for gold in unclear if 0 < len(gold) <= MAX_ANSWER_CHARACTERS]
            results = dict(zip(short, self._run([{"parse": gold} for gold in short]), strict=True))
        failed = {gold for gold in unclear if results.get(gold) != "parsed"}
        return [row for row, golds in enumerate(answers) if any(gold.strip() in failed for gold in golds)]

    def close(self) -> None:
        """End the workers. May be called twice; a closed pool grades nothing more."""
        with self._lock:
            self._closed = True
            while self._idle:
                self._idle.pop().kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _remembered(self, pair: tuple[str, tuple[str, ...]]) -> Grade | None:
        if pair in self._verdicts:
            self._verdicts.move_to_end(pair)
        return self._verdicts.get(pair)

    def _remember(self, pair: tuple[str, tuple[str, ...]], grade: Grade) -> None:
        self._verdicts[pair] = grade
        if len(self._verdicts) > CACHE_SIZE:
            self._verdicts.popitem(last=False)

    def _run(self, requests: list[dict[str, Any]]) -> list[str]:
        """Each request's result, ``timeout`` for those whose worker had to be replaced."""
        if self._closed:
            raise RuntimeError("this grading pool is closed")
        batch = _Batch(requests, self._timeout_s)
        try:
            while not batch.done():
                while batch.waiting and len(batch.busy) < self._num_workers:
                    batch.assign(self._idle.pop() if self._idle else self._start_worker())
                self._idle += batch.collect()
        finally:  # after an interruption, a half-done worker would answer the next batch's question
            for worker in batch.busy:
                worker.kill()
            batch.selector.close()
        return batch.results

    def _start_worker(self) -> WorkerProcess:
        return WorkerProcess(self._memory_limit_bytes, self._timeout_s)


class _Batch:
    """The requests of one call, the workers at work on them, and when each must have answered."""

    def __init__(self, requests: list[dict[str, Any]], timeout_s: float) -> None:
        self.requests = requests
        self.results = [str(Grade.TIMEOUT)] * len(requests)
        self.waiting = deque(range(len(requests)))
        self.busy: dict[WorkerProcess, tuple[int, float]] = {}
        self.selector = selectors.DefaultSelector()
        self._timeout_s = timeout_s

    def done(self) -> bool:
        return not self.waiting and not self.busy

    def assign(self, worker: WorkerProcess) -> None:
        """Give the next request to a worker, at once or when it is ready."""
        if not worker.is_running():  # it died while it had nothing to do
            worker.kill()
            return
        index = self.waiting.popleft()
        self.busy[worker] = (index, time.monotonic() + START_TIMEOUT_S)
        self.selector.register(worker, selectors.EVENT_READ)
        if worker.ready:
            self._send(worker)

    def collect(self) -> list[WorkerProcess]:
        """Wait for a reply or the nearest deadline; return the workers that are free again."""
        nearest = min(deadline for _, deadline in self.busy.values())
        free = []
        for key, _ in self.selector.select(max(0.0, nearest - time.monotonic())):
            worker: Any = key.fileobj
            replies, ended = worker.receive()
            for reply in replies:
                if not worker.ready:
                    if reply.get("ready"):
                        worker.ready = True
                        self._send(worker)
                elif worker in self.busy and reply.get("id") == self.busy[worker][0]:
                    self.results[reply["id"]] = reply["result"]
                    self._release(worker)
                    free.append(worker)
            if ended and worker in self.busy:
                self._replace(worker)
        for worker in [w for w, (_, deadline) in self.busy.items() if deadline <= time.monotonic()]:
            self._replace(worker)
        return free

    def _send(self, worker: WorkerProcess) -> None:
        index, _ = self.busy[worker]
        worker.send({"id": index, **self.requests[index]})
        self.busy[worker] = (index, time.monotonic() + self._timeout_s)

    def _release(self, worker: WorkerProcess) -> None:
        self.selector.unregister(worker)
        del self.busy[worker]

    def _replace(self, worker: WorkerProcess) -> None:
        if not worker.ready:
            raise worker.start_failure()
        self._release(worker)
        worker.kill()
