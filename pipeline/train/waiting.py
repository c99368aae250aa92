"""Messages between ranks: how long a rank stands still for them, and numbers that arrive before
they are needed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class MessageClock:
    """Time in which a rank could not go on before a message had come: communication that nothing
    hides.

    On a CPU it is the caller's time. On a GPU the host goes on, and it is the time for which the
    device's queue stands still.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def wait(self, work: dist.Work | None) -> None:
        """Go on when the message is there."""
        assert work is not None
        with self.count():
            work.wait()

    @contextmanager
    def count(self) -> Iterator[None]:
        """The block does nothing but wait."""
        if not self.on_gpu:
            begin = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - begin
            return

        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self.events.append((begin, end))

    def take_seconds(self) -> float:
        """Since the last call; a GPU is waited for."""
        for begin, end in self.events:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        taken, self.seconds, self.events = self.seconds, 0.0, []
        return taken


class HostNumbers:
    """Numbers that follow from a message and that the host needs: asked for early and read late, so
    that nobody waits.

    On a GPU all of it runs on a stream of its own, beside what the device is busy with, and the
    host waits for that stream alone.
    """

    def __init__(self, device: torch.device | str, clock: MessageClock) -> None:
        self.clock = clock
        self.stream = torch.cuda.Stream(device) if clock.on_gpu else None

    @contextmanager
    def beside(self, reads: Sequence[Tensor]) -> Iterator[None]:
        """What the block launches may use all that was launched before it.

        `reads` are the tensors of the current stream that the block reads. Their memory is not
        given away while it does, whoever drops them: the current stream does not wait for the block
        before its numbers are read. What the block makes is safe on the current stream, which the
        next block waits for before it takes memory.
        """
        if self.stream is None:
            yield
            return

        self.stream.wait_stream(torch.cuda.current_stream())
        for tensor in reads:
            tensor.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield

    def ask(self, work: dist.Work | None, compute: Callable[[], Tensor]) -> Callable[[], list]:
        """`compute()` once `work` is done; the result reads its numbers, nested lists of the
        tensor's shape. To be called inside `beside`.
        """
        if self.stream is None:

            def read() -> list:
                if work is not None:
                    self.clock.wait(work)
                return compute().tolist()

            return read

        if work is not None:
            work.wait()  # the stream's, not the host's
        numbers = compute()
        on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        on_host.copy_(numbers, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read_copy() -> list:
            copied.synchronize()
            with self.clock.count():
                torch.cuda.current_stream().wait_event(copied)
            return on_host.tolist()

        return read_copy
