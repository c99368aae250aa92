"""Requests that wait together are worked on together."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

MAX_TOGETHER = 16  # requests of one call


class MicroBatcher:
    """Requests that came while a batch was computed form the next one: nothing waits for company.

    `work` runs in a thread, so that the event loop goes on answering health checks.
    """

    def __init__(
        self, work: Callable[[list[Any]], Sequence[Any]], max_together: int = MAX_TOGETHER
    ) -> None:
        self._work, self._max_together = work, max_together
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
            batch = [
                self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_together))
            ]
            # else nobody waits any more
            batch = [(item, answer) for item, answer in batch if not answer.done()]
            if not batch:
                continue
            try:
                results = await asyncio.to_thread(self._work, [item for item, _ in batch])
            except Exception as error:
                # whatever it was, it belongs to those who wait for these answers
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), result in zip(batch, results, strict=True):
                if not answer.done():  # else the client has gone away
                    answer.set_result(result)


class BatchJob(Protocol):
    """What a request asks for, looked up."""

    def joins(self, oldest: Self) -> bool:
        """Whether it is worth doing in the pass of one that has waited longer.

        It may change while a job waits.
        """
        ...

    @property
    def num_tokens(self) -> int: ...


class TokenBatcher:
    """Jobs form passes of at most `max_tokens` tokens; the one that has waited longest is always in
    the next.

    `prepare` makes one request a job, `work` does those of a pass; both run in a thread, never two
    at a time. What comes while a pass is computed is looked up before the next one and may be part
    of it.
    """

    def __init__(
        self,
        prepare: Callable[[Any], BatchJob],
        work: Callable[[list[Any]], Sequence[Any]],
        max_tokens: Callable[[], int],
    ) -> None:
        self._prepare, self._work, self._max_tokens = prepare, work, max_tokens
        self._arrived: list[tuple[Any, asyncio.Future]] = []
        self._ready: list[tuple[BatchJob, asyncio.Future]] = []  # the oldest first
        self._running: asyncio.Task | None = None

    async def __call__(self, item: Any) -> Any:
        answer = asyncio.get_running_loop().create_future()
        self._arrived.append((item, answer))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        while self._arrived or self._ready:
            arrived, self._arrived = self._arrived, []
            done = await asyncio.to_thread(self._step, arrived)
            for answer, result in done:
                if answer.done():  # the client has gone away
                    continue
                if isinstance(result, Exception):
                    answer.set_exception(result)
                else:
                    answer.set_result(result)

    def _step(self, arrived: list[tuple[Any, asyncio.Future]]) -> list[tuple[asyncio.Future, Any]]:
        """Look up what has arrived, and do one pass; whatever goes wrong belongs to those whose
        request it was.
        """
        done: list[tuple[asyncio.Future, Any]] = []
        for item, answer in arrived:
            if answer.done():  # nobody waits any more
                continue
            try:
                self._ready.append((self._prepare(item), answer))
            except Exception as error:
                done.append((answer, error))
        jobs = self._next_pass()
        if jobs:
            try:
                results = self._work([job for job, _ in jobs])
            except Exception as error:
                results = [error] * len(jobs)
            done += [(answer, result) for (_, answer), result in zip(jobs, results, strict=True)]
        return done

    def _next_pass(self) -> list[tuple[BatchJob, asyncio.Future]]:
        """The oldest job and those that join it, in the order in which they came."""
        self._ready = [(job, answer) for job, answer in self._ready if not answer.done()]
        if not self._ready:
            return []
        oldest, room = self._ready[0][0], self._max_tokens()
        chosen, left = [], []
        for job, answer in self._ready:
            if not chosen or (job.num_tokens <= room and job.joins(oldest)):
                chosen.append((job, answer))
                room -= job.num_tokens
            else:
                left.append((job, answer))
        self._ready = left
        return chosen
