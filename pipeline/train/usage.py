"""What each worker takes of its machine, as curves of the tracker's run.

They are `system/rank_0/cpu_percent` and so on, which MLflow shows on a page of their own.

Every rank sends its own samples, from a thread. They are no part of the training: a tracker that
does not answer loses some.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

from pipeline.config import Outage

logger = logging.getLogger(__name__)

RANKS_AT_FULL_RATE = 8  # with more, each sends less often: the tracker gets as many samples
MB = 2**20

Send = Callable[[dict[str, float], int], None]  # samples and their number


class UsageMonitor:
    """Sends a sample of this process every `every_s` seconds for the length of the `with`
    block, and none with 0.
    """

    def __init__(
        self, send: Send, every_s: float, device: torch.device, rank: int, world_size: int
    ) -> None:
        self.send, self.device, self.rank = send, device, rank
        self.every_s = every_s * max(1.0, world_size / RANKS_AT_FULL_RATE)
        self.clock = ProcessClock()
        self.number = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def __enter__(self) -> "UsageMonitor":
        if self.every_s > 0:
            self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ended.set()  # the thread is not waited for: it may hang on a tracker that is gone

    def _run(self) -> None:
        while not self.ended.wait(self.every_s):
            self.send_sample()

    def send_sample(self) -> None:
        """Take a sample and send it."""
        values = {"cpu_percent": self.clock.cpu_percent(), "memory_mb": resident_bytes() / MB}
        if self.device.type == "cuda":
            values |= gpu_usage(self.device)

        named = {f"system/rank_{self.rank}/{name}": value for name, value in values.items()}
        try:
            self.send(named, self.number)
        except Outage as error:
            logger.debug("a sample of the system is lost: %s", error)
        self.number += 1


class ProcessClock:
    """Processor time of this process and its threads between two looks."""

    def __init__(self) -> None:
        self.wall, self.used = time.monotonic(), time.process_time()

    def cpu_percent(self) -> float:
        """Since the last call; 100 is one core."""
        wall, used = time.monotonic(), time.process_time()
        share = (used - self.used) / max(wall - self.wall, 1e-9)
        self.wall, self.used = wall, used
        return 100 * share


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 on systems without /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gpu_usage(device: torch.device) -> dict[str, float]:
    """Memory that PyTorch holds on the GPU, and how busy it is where NVIDIA's library can be
    asked.
    """
    values = {"gpu_memory_mb": torch.cuda.memory_reserved(device) / MB}
    # without nvidia-ml-py, or with a driver that says no
    with suppress(ModuleNotFoundError, RuntimeError):
        values["gpu_percent"] = float(torch.cuda.utilization(device))
    return values
