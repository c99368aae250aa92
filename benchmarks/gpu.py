"""What the benchmarks of kernels share: the device, times, and parity checks in several processes.

Without a GPU they can be tried, not measured: `TRITON_INTERPRET=1 python -m benchmarks.gpu_check
--smoke` runs tiny checks and calls in Triton's interpreter, where a time is no time (`nan`).
"""

import json
import math
import os
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from kernels.backend import INTERPRETED, Backend

DEVICE = "cpu" if INTERPRETED else "cuda"
TOKENS = 65_536
REPEATS = 30
FLUSH_BYTES = 256 * 2**20  # five times the L2 of an H100
MOST_FLUSHES = 40
MOST_PROCESSES = 14
NOT_RUN = "not run: "  # begins what is told of a check that found no time
PATIENCE = 30.0  # s, with checks under way when time is up

Name = TypeVar("Name", bound=Hashable)
Check = tuple  # a function and what it is called with; it says what is wrong, or None


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), device=DEVICE).to(dtype)


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=generator(seed), device=DEVICE)


def offsets_of(lengths: list[int] | tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": torch.cuda.get_device_name(),
    }


# Times
# ------------------------------------------------------------


class Timing(NamedTuple):
    """Milliseconds of a call: the median of its runs, and what 10 and 90 % of them do not pass."""

    median: float
    low: float
    high: float

    def as_numbers(self) -> dict[str, Any]:
        return {"ms": self.median, "range_ms": [self.low, self.high]}


class Timer:
    """Times by device events; before each run L2 is flushed several times over.

    A flush takes the device some 0.06 to 0.1 ms. There are so many that the host, which meanwhile
    prepares the run, is done before the device begins: its work does not show.
    """

    def __init__(self, repeats: int = REPEATS) -> None:
        self.repeats = repeats
        self.flush = torch.empty(1 if INTERPRETED else FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
        self.flush_ms = math.nan if INTERPRETED else self._time_flush()

    def __call__(self, call: Callable[[], object], repeats: int | None = None) -> float:
        """Milliseconds of a call, the median of `repeats` runs."""
        return self.in_turns({"alone": call}, repeats)["alone"].median

    def in_turns(
        self, calls: dict[Name, Callable[[], object]], repeats: int | None = None
    ) -> dict[Name, Timing]:
        """Times of calls that take turns, each `repeats` times or as often as the timer was made
        for.

        A card's clock falls by 5 to 10 % while it is hot; in turns, it falls for all alike.
        """
        if INTERPRETED:
            for call in calls.values():
                call()
            return dict.fromkeys(calls, Timing(math.nan, math.nan, math.nan))

        flushes = {name: self._count_flushes(call) for name, call in calls.items()}
        runs: dict[Name, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        for _ in range(repeats or self.repeats):
            for name, call in calls.items():
                for _ in range(flushes[name]):
                    self.flush.zero_()
                begin, end = _event(), _event()
                begin.record()
                call()
                end.record()
                runs.setdefault(name, []).append((begin, end))
        torch.cuda.synchronize()

        return {
            name: _timing([begin.elapsed_time(end) for begin, end in events])
            for name, events in runs.items()
        }

    def _time_flush(self, count: int = 20) -> float:
        begin, end = _event(), _event()
        self.flush.zero_()
        begin.record()
        for _ in range(count):
            self.flush.zero_()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / count

    def _count_flushes(self, call: Callable[[], object]) -> int:
        """Flushes that take the device twice as long as the host takes for a warm call."""
        host_ms = 0.0
        for number in range(3 + 3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            if number >= 3:
                host_ms = max(host_ms, 1e3 * (time.perf_counter() - begin))
        # a call that waits for the device itself, as some of PyTorch's do, wants no more than this
        return min(4 + math.ceil(2 * host_ms / self.flush_ms), MOST_FLUSHES)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _timing(times: list[float]) -> Timing:
    """
    runs 5 4 1 3 2 9 7 8 6 10, ms  →  median 6, low 2, high 10
    """
    ordered, count = sorted(times), len(times)
    return Timing(ordered[count // 2], ordered[count // 10], ordered[9 * count // 10])


def host_us(call: Callable[[], object], count: int = 300) -> float:
    """Microseconds of host work of a call so small that the device is never behind."""
    if INTERPRETED:
        call()
        return math.nan
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent / count * 1e6


def copy_call(moved: float) -> Callable[[], object]:
    """A copy that reads half of `moved` bytes and writes half."""
    source = torch.empty(max(int(moved) // 2, 1), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_ms(timer: Timer, moved: float) -> float:
    return timer(copy_call(moved))


def time_ceilings(timer: Timer) -> dict[str, float]:
    a, b = (torch.randn(n, 512, device=DEVICE, dtype=torch.bfloat16) for n in (TOKENS, 2048))
    gemm_ms = timer(lambda: a @ b.T)
    return {
        "copy_tb_s": 2**30 / copy_ms(timer, 2**30) / 1e9,
        "gemm_tflops": 2 * TOKENS * 512 * 2048 / gemm_ms / 1e9,
    }


# Parity
# ------------------------------------------------------------


@contextmanager
def no_waiting(of: Backend = "triton") -> Iterator[None]:
    """What makes the host wait for the device raises; plain PyTorch may."""
    if DEVICE == "cuda" and of == "triton":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def found_in(path: Path, *suites: str) -> dict[str, Any]:
    """What `benchmarks.gpu_check --out` wrote about these suites: the number of checks, what was
    wrong, and whether the benchmarks' kernels lie compiled in Triton's cache.
    """
    written = json.loads(path.read_text())
    found = written["parity"]
    if missing := [name for name in suites if name not in found]:
        raise SystemExit(
            f"{path} has no {missing}: run `python -m benchmarks.gpu_check --only "
            f"{' '.join(suites)}`"
        )
    return {
        "cases": sum(found[name]["cases"] for name in suites),
        "wrong": [line for name in suites for line in found[name]["wrong"]],
        "not_run": sum(found[name].get("not_run", 0) for name in suites),
        "compiled": written.get("compiled", False),
    }


def name_of(check: Check) -> str:
    function, *arguments = check
    return f"{function.__name__}({', '.join(map(str, arguments))})"


_broken: list[str] = []  # of this process: the check after which its CUDA context was of no use


def run_check(check: Check) -> tuple[str | None, bool]:
    """What is wrong, and whether the check was not run at all.

    New tensors start as NaN: what is not written shows.
    """
    if _broken:
        return f"not run: {_broken[0]} had left the process without its device", True
    function, *arguments = check
    torch.use_deterministic_algorithms(True)  # fills new tensors; the kernels do not depend on it
    try:
        return function(*arguments), False
    except Exception as error:  # the report must name the check, whatever went wrong in its process
        if "CUDA error" in str(error) or "illegal" in str(error):
            _broken.append(name_of(check))
        return f"{type(error).__name__}: {str(error)[:300]}", False
    finally:
        torch.use_deterministic_algorithms(False)


def num_processes() -> int:
    """One for each core that this process may use."""
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


def parity(checks: list[Check], seconds: float = math.inf) -> list[str]:
    """One line for each check that fails, printed as it is found; after `seconds` no further check
    is begun.

    Each check runs in one of several processes: compiling takes most of the time.
    """
    begin, wrong = time.perf_counter(), []

    def report(check: Check, found: str | None) -> None:
        if found is not None:
            wrong.append(f"{name_of(check)}: {found}")
            print(f"WRONG {wrong[-1]}", flush=True)

    if INTERPRETED:
        for check in checks:
            report(check, run_check(check)[0])
    left = [] if INTERPRETED else checks
    for _ in range(3):  # what a broken process did not run gets a new one
        again = []
        with ProcessPoolExecutor(num_processes(), get_context("spawn")) as pool:
            pending: dict[Any, Check] = {pool.submit(run_check, check): check for check in left}
            while pending and time.perf_counter() - begin < seconds:
                done, _ = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    check = pending.pop(future)
                    crash = future.exception()  # of a process that died
                    found, skipped = (
                        (f"{type(crash).__name__}: {crash}", False) if crash else future.result()
                    )
                    if skipped:
                        again.append(check)
                    else:
                        report(check, found)
            late = [future for future in pending if future.cancel()]
            for future in late:
                report(pending.pop(future), f"{NOT_RUN}{seconds:.0f} s had passed")
            _, hanging = wait(pending, timeout=PATIENCE)
            for future, check in pending.items():
                report(check, "still running" if future in hanging else future.result()[0])
            if hanging:
                for process in active_children():  # the pool would wait for them
                    process.kill()
        left = again
        if not left:
            break
    for check in left:
        report(check, "not run: earlier checks left three processes without their device")
    spent = time.perf_counter() - begin
    print(f"parity: {len(checks)} checks, {len(wrong)} wrong, {spent:.0f} s", flush=True)
    return wrong
