"""A trace of some training steps, for chrome://tracing or https://ui.perfetto.dev."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)


class StepProfiler:
    """Watches steps `steps[0]` to `steps[1]`, counted from 1, and writes one trace; nothing where
    `steps` is None.
    """

    def __init__(
        self, steps: Sequence[int] | None, folder: Path | None, device: torch.device | str
    ) -> None:
        self.steps, self.folder = (steps, folder) if folder is not None else (None, None)
        self.activities = [ProfilerActivity.CPU]
        if torch.device(device).type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)
        self.running: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        if self.steps is None or not self.steps[0] <= number <= self.steps[1]:
            yield
            return
        if self.running is None:  # at the first of them that this attempt takes
            self.running = profile(activities=self.activities)
            self.running.start()
        with torch.profiler.record_function(f"step {number}"):
            yield
        if number == self.steps[1]:
            self._write()

    def _write(self) -> None:
        assert self.running is not None
        assert self.folder is not None
        assert self.steps is not None
        self.running.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"steps_{self.steps[0]}_to_{self.steps[1]}.json.gz"
        self.running.export_chrome_trace(str(path))
        self.running = None
        logger.info("trace of the steps %d to %d: %s", *self.steps, path)
