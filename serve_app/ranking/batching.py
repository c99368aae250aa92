"""Requests that wait together are computed together; none is held back to fill a batch."""

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, Self

MAX_TOGETHER = 16  # requests of one call


class MicroBatcher:
    """Batches of what came while the batch before was computed.

        arrivals      a    b c d        e
        batches       [a        ] [b c d   ] [e]

    No request is held back to fill a batch. `work` runs in a thread, so that the event loop goes
    on answering health checks. An exception of `work` goes to every request of its batch.
    """

    def __init__(
        self, work: Callable[[list[Any]], Sequence[Any]], max_together: int = MAX_TOGETHER
    ) -> None:
        self._work = work
        self._max_together = max_together
        self._waiting: deque[tuple[Any, asyncio.Future]] = deque()
        self._running: asyncio.Task | None = None

    async def __call__(self, item: Any) -> Any:
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        while self._waiting:
            items, answers = self._next_batch()
            if not items:
                continue

            try:
                results = await asyncio.to_thread(self._work, items)
            except Exception as error:
                results = [error] * len(items)

            for answer, result in zip(answers, results, strict=True):
                _settle(answer, result)

    def _next_batch(self) -> tuple[list[Any], list[asyncio.Future]]:
        """The oldest requests, without those that nobody waits for any more."""
        items: list[Any] = []
        answers: list[asyncio.Future] = []

        for _ in range(min(len(self._waiting), self._max_together)):
            item, answer = self._waiting.popleft()
            if not answer.done():
                items.append(item)
                answers.append(answer)
        return items, answers


class BatchJob(Protocol):
    """A request with everything its computation needs."""

    def may_join(self, oldest: Self) -> bool:
        """Tell whether this job may share a forward pass with `oldest`, which has waited longer.

        The answer may change while a job waits.
        """
        ...

    @property
    def num_tokens(self) -> int: ...


class TokenBatcher:
    """Passes of at most `max_tokens` tokens; the job that has waited longest is always in the next.

        waiting, oldest first    long A   short B   long C   short D
        next passes              [A C]    [B D]

    `prepare` makes one request a job, `work` computes the jobs of a pass. Both run in
    the batcher's thread, never two at a time. A request that comes during a pass is prepared before
    the next one and may be part of it. A job of more than `max_tokens` tokens is a pass of its own.

    `niceness` above 0: other threads come first where processors are short, on Linux.
    """

    def __init__(
        self,
        prepare: Callable[[Any], BatchJob],
        work: Callable[[list[Any]], Sequence[Any]],
        max_tokens: Callable[[], int],
        niceness: int = 0,
    ) -> None:
        self._prepare = prepare
        self._work = work
        self._max_tokens = max_tokens
        self._arrived: list[tuple[Any, asyncio.Future]] = []
        self._ready: list[tuple[BatchJob, asyncio.Future]] = []  # the oldest first
        self._running: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(
            1, "rank", initializer=_come_behind_others, initargs=(niceness,)
        )

    async def __call__(self, item: Any) -> Any:
        answer = asyncio.get_running_loop().create_future()
        self._arrived.append((item, answer))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._arrived or self._ready:
            arrived, self._arrived = self._arrived, []
            done = await loop.run_in_executor(self._thread, self._prepare_and_work, arrived)
            for answer, result in done:
                _settle(answer, result)

    def _prepare_and_work(
        self, arrived: list[tuple[Any, asyncio.Future]]
    ) -> list[tuple[asyncio.Future, Any]]:
        """Prepare what has arrived, then compute one pass; results of both, exceptions included."""
        done = self._prepare_arrived(arrived)
        jobs, answers = self._next_pass()
        if not jobs:
            return done

        try:
            results = self._work(jobs)
        except Exception as error:
            results = [error] * len(jobs)

        done.extend(zip(answers, results, strict=True))
        return done

    def _prepare_arrived(
        self, arrived: list[tuple[Any, asyncio.Future]]
    ) -> list[tuple[asyncio.Future, Exception]]:
        """Add jobs to those that are ready; returns the requests that failed already."""
        failed: list[tuple[asyncio.Future, Exception]] = []

        for item, answer in arrived:
            if answer.done():  # nobody waits any more
                continue
            try:
                job = self._prepare(item)
            except Exception as error:
                failed.append((answer, error))
            else:
                self._ready.append((job, answer))
        return failed

    def _next_pass(self) -> tuple[list[BatchJob], list[asyncio.Future]]:
        """The oldest job and those that join it, in the order in which they came."""
        jobs: list[BatchJob] = []
        answers: list[asyncio.Future] = []
        left: list[tuple[BatchJob, asyncio.Future]] = []
        room = self._max_tokens()

        for job, answer in self._ready:
            if answer.done():  # nobody waits any more
                continue
            if not jobs or (job.num_tokens <= room and job.may_join(jobs[0])):
                jobs.append(job)
                answers.append(answer)
                room -= job.num_tokens
            else:
                left.append((job, answer))

        self._ready = left
        return jobs, answers


def _come_behind_others(niceness: int) -> None:
    """Lower this thread's priority; threads that it starts, as PyTorch's, get the same."""
    if niceness and sys.platform == "linux":  # elsewhere a process has one, not its threads
        thread = threading.get_native_id()
        before = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, before + niceness)


def _settle(answer: asyncio.Future, result: Any) -> None:
    """Wake whoever waits for `answer` with the result, or raise it there if it is an exception."""
    if answer.done():  # the client has gone away
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)
