"""Requests that wait together are scored together."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

MAX_TOGETHER = 16  # requests of one forward pass


class MicroBatcher:
    """Requests that came while a batch was computed form the next one: nothing waits for company.

    `work` runs in a thread, so that the event loop goes on answering health checks.
    """

    def __init__(self, work: Callable[[list[Any]], Sequence[Any]], max_together: int = MAX_TOGETHER) -> None:
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
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_together))]
            batch = [(item, answer) for item, answer in batch if not answer.done()]  # else nobody waits any more
            if not batch:
                continue
            try:
                results = await asyncio.to_thread(self._work, [item for item, _ in batch])
            except Exception as error:  # whatever it was, it belongs to those who wait for these answers
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), result in zip(batch, results, strict=True):
                if not answer.done():  # else the client has gone away
                    answer.set_result(result)
