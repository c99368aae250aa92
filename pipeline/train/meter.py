"""Batches made ahead of their use, with the work in them, and the speed at which they are used."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.filling import BatchFiller
from pipeline.model.flops import Flops
from pipeline.train.checkpoint import TrainState
from pipeline.train.loader_process import Counted

T = TypeVar("T")


def count_batches(
    batches: Iterator[SequenceBatch], count: Callable[[SequenceBatch], Flops]
) -> Iterator[Counted]:
    """Each batch with the work of one forward pass over it, counted before it leaves the CPU.

    `count` is `count_work` of the run.
    """
    for batch in batches:
        yield batch, count(batch)


def fill_batches(batches: Iterator[Counted], filler: BatchFiller | None) -> Iterator[Counted]:
    """The same, each filled up to one of few sizes; as they are without a `filler`."""
    for batch, work in batches:
        yield (batch if filler is None else filler.fill(batch)), work


def pin_batches(batches: Iterator[Counted]) -> Iterator[Counted]:
    """The same, each in one buffer of pinned memory, from which a GPU copies beside its work."""
    for batch, work in batches:
        yield batch.pack(pin_memory=True), work


def prefetch_batches(batches: Iterator[T]) -> Iterator[T]:
    """The same batches, the next one made in the background while the present one is used."""
    with ThreadPoolExecutor(1, "prefetch") as pool:
        next_batch = pool.submit(next, batches, None)
        while (batch := next_batch.result()) is not None:
            next_batch = pool.submit(next, batches, None)
            yield batch


class Meter:
    """Speed since the last `take_speed`: rank 0's own times, its counts multiplied by the number of
    ranks.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._reset()

    def _reset(self) -> None:
        self.begin = time.perf_counter()
        self.wait = 0.0
        self.steps = 0
        self.tokens = 0
        self.filling = 0  # tokens that only fill batches up
        self.work = Flops()

    def wait_for_batches(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, the time until each arrives counted as waiting for data."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.wait += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def count_step(self, batch: SequenceBatch, work: Flops) -> None:
        self.steps += 1
        self.tokens += batch.own_tokens
        self.filling += batch.num_tokens - batch.own_tokens
        self.work.add(work)

    @contextmanager
    def pause_clock(self, state: TrainState) -> Iterator[None]:
        """Time that counts for the run and not for the speed of its steps."""
        asked = time.perf_counter()
        yield
        spent = time.perf_counter() - asked
        self.begin += spent
        state.seconds += spent

    def take_speed(self, state: TrainState, message_s: float = 0.0) -> dict[str, float]:
        """The values of a line of metrics; counting begins anew, and `state` gets the seconds.

        `message_s`: the part of them in which nothing but a message was waited for.
        """
        seconds = time.perf_counter() - self.begin
        state.seconds += seconds

        examples, ranks = self.work.candidates, self.world_size
        # Backward costs twice the forward products; lengths are those that stochastic length drew.
        flops = 3 * self.work.flops
        values = {
            "train/examples_per_s": examples * ranks / seconds,
            "train/tokens_per_s": self.tokens * ranks / seconds,
            "train/gflop_per_example": flops / max(examples, 1) / 1e9,
            "train/data_wait_share": self.wait / seconds,
            "train/message_wait_share": message_s / seconds,
            "train/step_ms": 1000 * seconds / max(self.steps, 1),
        }
        if self.filling:
            values["train/filled_share"] = self.filling / (self.tokens + self.filling)
        self._reset()
        return values
