"""A command in a process group of its own: how long it took, how much of the processor and how much
memory all of its processes took, and its end.

Its processes are those with a mark in their environment, which children inherit, also those of Ray
that leave the tree."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

MARK = "BENCHMARK_PROCESS_TREE"
SECONDS_BETWEEN_SAMPLES = 0.5
SECONDS_TO_END = 60  # for what a killed driver leaves behind


@dataclass
class Measured:
    seconds: float
    cpu_seconds: float = 0.0  # of all processes, each as it was seen last
    samples: list[tuple[float, int]] = field(default_factory=list)  # seconds since the start, bytes
    output: str = ""

    @property
    def peak_bytes(self) -> int:
        return max((size for _, size in self.samples), default=0)


class Command:
    """A running command; its output goes to `log`."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.mark, self.log, self.started = uuid.uuid4().hex, log, time.perf_counter()
        env = {**os.environ, **(environment or {}), MARK: self.mark}
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def finish(self, *, sample_memory: bool = False) -> Measured:
        """Wait for its end.

        Raises:
            RuntimeError: it failed, with the end of its output.
        """
        measured = Measured(0.0)
        cpu_seconds: dict[int, float] = {}  # by process: one that has ended keeps its last value
        next_sample = 0.0
        while self.process.poll() is None:
            passed = time.perf_counter() - self.started
            if passed >= next_sample:
                processes = self.processes()
                cpu_seconds.update(_cpu_seconds(processes))
                if sample_memory:
                    measured.samples.append((passed, memory_bytes(processes)))
                next_sample = time.perf_counter() - self.started + SECONDS_BETWEEN_SAMPLES
            time.sleep(0.02)
        measured.seconds = time.perf_counter() - self.started
        measured.cpu_seconds = sum(cpu_seconds.values())
        measured.output = self.log.read_text()
        if self.process.returncode:
            raise RuntimeError(f"exit code {self.process.returncode}\n{measured.output[-3000:]}")
        return measured

    def processes(self) -> list[int]:
        """All that are alive and carry the mark."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    if wanted in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
                except OSError:
                    continue  # it has ended, or is another user's
        return found

    def kill_after(self, seconds: float, *, only_driver: bool) -> bool:
        """SIGKILL to the command after so long, or to it and all that it has started; False if it
        had ended before.

        Returns when none of its processes is left.
        """
        try:
            self.process.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            everyone = [self.process.pid] if only_driver else self.processes()
        _kill(everyone)
        self.process.wait()
        deadline = time.monotonic() + SECONDS_TO_END
        while left := self.processes():
            if not only_driver or time.monotonic() > deadline:
                # started meanwhile; or daemons that have not noticed that their driver is gone
                _kill(left)
            time.sleep(0.1)
        return True


def memory_bytes(processes: Sequence[int]) -> int:
    """Memory of these processes, what they share counted once.

    Private pages and pages of files by their proportional share (Pss_Anon, Pss_File: a page
    that n processes map counts 1/n in each). Ray's object store is a file in /dev/shm, pages of
    which no process may have mapped at the moment: its allocated blocks are counted in place of
    Pss_Shmem.
    """
    total, stores = 0, {}
    for pid in processes:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += sum(_kilobytes(rollup, name) for name in ("Pss_Anon", "Pss_File")) * 1024
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                if "/dev/shm/" in os.readlink(descriptor):
                    status = os.stat(descriptor)
                    stores[status.st_dev, status.st_ino] = status.st_blocks * 512
        except OSError:
            continue  # it has ended meanwhile
    return total + sum(stores.values())


def _cpu_seconds(processes: Sequence[int]) -> dict[int, float]:
    """Seconds of the processor that each has used itself, without those it has started."""
    found = {}
    for pid in processes:
        try:
            # the fields behind the name, which may hold anything but ends in the last bracket
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        user_ticks, system_ticks = int(fields[11]), int(fields[12])
        found[pid] = (user_ticks + system_ticks) / os.sysconf("SC_CLK_TCK")
    return found


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has ended by itself


def _kilobytes(rollup: str, name: str) -> int:
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(f"{name}:"))
