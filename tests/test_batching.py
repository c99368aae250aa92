"""Requests that wait together are computed together: order, room, failures, clients that left."""

import asyncio
import os
import sys
import threading
import time
from dataclasses import dataclass

import pytest

from serve_app.ranking.batching import MicroBatcher, TokenBatcher


def test_what_waits_goes_together_and_every_answer_finds_its_request() -> None:
    batches: list[list[int]] = []

    def work(items: list[int]) -> list[int]:
        batches.append(items)
        time.sleep(0.05)
        return [item * 10 for item in items]

    async def main() -> list[int]:
        batcher = MicroBatcher(work, max_together=4)
        return await asyncio.gather(*(batcher(i) for i in range(10)))

    assert asyncio.run(main()) == [i * 10 for i in range(10)]
    assert max(map(len, batches)) == 4
    assert len(batches) < 10


def test_a_batch_that_fails_fails_its_own_requests_only() -> None:
    def work(items: list[int]) -> list[int]:
        if 0 in items:
            raise ValueError("zero")
        return items

    async def main() -> list[int | BaseException]:
        batcher = MicroBatcher(work, max_together=1)
        return await asyncio.gather(*(batcher(i) for i in range(3)), return_exceptions=True)

    failed, *others = asyncio.run(main())
    assert isinstance(failed, ValueError)
    assert others == [1, 2]


def test_what_nobody_waits_for_any_more_is_not_begun() -> None:
    begun: list[int] = []

    def work(items: list[int]) -> list[int]:
        begun.extend(items)
        time.sleep(0.1)
        return items

    async def main() -> list[int]:
        batcher = MicroBatcher(work, max_together=2)
        first = asyncio.create_task(batcher(0))
        await asyncio.sleep(0.03)
        waiting = [asyncio.create_task(batcher(i)) for i in (1, 2, 3, 4)]
        await asyncio.sleep(0)
        for task in waiting[:3]:
            task.cancel()
        return [await first, await waiting[3]]

    assert asyncio.run(main()) == [0, 4]
    assert begun == [0, 4]


@dataclass
class Length:
    """A job of so many tokens, which joins those of about as many.

    One of less than four joins any.
    """

    tokens: int
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.num_tokens = self.tokens

    def may_join(self, oldest: "Length") -> bool:
        return self.tokens < 4 or self.tokens.bit_length() == oldest.tokens.bit_length()


def passes_of(
    lengths: list[int], max_tokens: int, late: list[int] | None = None
) -> tuple[list[list[int]], list[int]]:
    """The passes that requests of these lengths form, all there from the start but the `late`, and
    the answers.
    """
    passes: list[list[int]] = []
    everybody_came = threading.Event()

    def work(jobs: list[Length]) -> list[int]:
        passes.append([job.tokens for job in jobs])
        assert everybody_came.wait(30)
        if any(job.tokens == 13 for job in jobs):
            raise ValueError("thirteen")
        return [job.tokens * 10 for job in jobs]

    async def main() -> list[int]:
        batcher = TokenBatcher(Length, work, lambda: max_tokens)
        waiting = [asyncio.create_task(batcher(n)) for n in lengths]
        while not passes:
            await asyncio.sleep(0.001)
        waiting += [asyncio.create_task(batcher(n)) for n in late or []]
        await asyncio.sleep(0)
        everybody_came.set()
        return await asyncio.gather(*waiting, return_exceptions=True)  # pyright: ignore[reportReturnType]

    return passes, asyncio.run(main())


def test_passes_hold_like_lengths_up_to_so_many_tokens_and_the_oldest_first() -> None:
    passes, answers = passes_of([5, 100, 6, 120, 7, 4, 90], max_tokens=220)
    assert passes == [[5, 6, 7, 4], [100, 120], [90]]
    assert answers == [50, 1000, 60, 1200, 70, 40, 900]
    passes, _ = passes_of([300, 5], max_tokens=220)
    assert passes == [[300], [5]], "what is longer than a pass may be goes alone"


def test_what_joins_any_pass_is_in_the_next_and_lets_nobody_join_its_own() -> None:
    assert passes_of([100, 5, 3, 110, 2], max_tokens=220)[0] == [[100, 3, 110, 2], [5]]
    assert passes_of([3, 100, 5, 2], max_tokens=220)[0] == [[3, 2], [100], [5]]


def test_what_comes_during_a_pass_joins_its_like() -> None:
    passes, _ = passes_of([100, 5, 110], max_tokens=120, late=[6, 101])
    assert passes == [[100], [5, 6], [110], [101]]


def test_a_pass_that_fails_fails_its_own_requests_only() -> None:
    passes, answers = passes_of([13, 14, 100], max_tokens=1000)
    assert passes == [[13, 14], [100]]
    assert [type(answer) for answer in answers] == [ValueError, ValueError, int]

    async def main() -> list[int | BaseException]:
        batcher = TokenBatcher(lambda n: Length(10 // n), lambda jobs: [0] * len(jobs), lambda: 100)
        return await asyncio.gather(*(batcher(n) for n in (0, 2)), return_exceptions=True)

    failed, answered = asyncio.run(main())
    assert isinstance(failed, ZeroDivisionError)
    assert answered == 0


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux' own")
def test_long_requests_come_behind_others_for_a_processor() -> None:
    def priority(jobs: list[Length]) -> list[int]:
        return [os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) for _ in jobs]

    async def main(niceness: int) -> int:
        return await TokenBatcher(Length, priority, lambda: 100, niceness)(1)

    usual = asyncio.run(main(0))
    assert usual == os.getpriority(os.PRIO_PROCESS, 0)
    assert asyncio.run(main(10)) == min(usual + 10, 19)
