"""Parts of an evaluation spread over Ray's workers, or over threads of this process.

The results come back in the order of the parts, whoever made them: the number of workers and the
order in which they finish change nothing.

PyTorch, NumPy and Arrow leave Python free while they compute, so two threads of one process do
nearly twice the work of one. They have the model already, where a worker of Ray's first imports
PyTorch, for seconds; more threads than a few wait for one another.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from pipeline.config import RayConfig, UserError
from pipeline.evaluate.parts import EvaluationJob, EvaluationPart, PartScores, score_part
from pipeline.evaluate.retrieval import (
    ItemScorers,
    PartMetrics,
    RankingJob,
    RetrievalPart,
    rank_for,
)
from pipeline.sequences.store import read_manifest

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
LARGE_STORE = 3_000_000  # rows: a minute of work, against the seconds of a cluster's start
MOST_THREADS = 4  # of an evaluation in this process
# Python's own 5 ms would be a thread's wait for a plot's after each operation of 1 ms
SWITCH_S = 0.0005


class Part(Protocol):
    """The work of one task."""

    @property
    def rows(self) -> int: ...


S = TypeVar("S")
P = TypeVar("P", bound=Part)
T = TypeVar("T")


def score_parts(job: EvaluationJob, parts: Sequence[EvaluationPart]) -> Iterator[PartScores]:
    """The scores of each part, in order, from the Ray cluster of this process where the job is
    spread over it.

    A worker has one CPU and, where the job's device is cuda, one GPU.
    """
    with Progress(parts) as progress:
        if job.spread:
            yield from _run_tasks(score_part, job, job.device, parts, progress)
        else:
            yield from _run_threads(score_part, job, job.device, parts, progress)


def rank_parts(
    job: EvaluationJob, scorers: ItemScorers, parts: Sequence[RetrievalPart]
) -> Iterator[PartMetrics]:
    """The metrics of each part of an evaluation of retrieval, in order, in the same way."""
    shared = RankingJob(job, replace(scorers, items=scorers.items.cpu()))
    with Progress(parts, "evaluation of retrieval") as progress:
        if job.spread:
            yield from _run_tasks(rank_for, shared, job.device, parts, progress)
        else:
            yield from _run_threads(rank_for, shared, job.device, parts, progress)


@contextmanager
def evaluation_cluster(cfg: RayConfig, runs_dir: str, sequence_dir: Path) -> Iterator[None]:
    """The Ray cluster to score on for the length of the block: one that there is to join
    (`ray.address`, or that of a submitted job), and for a large store a local one.
    """
    from pipeline.cluster import ray_cluster

    joins = cfg.address is not None or "RAY_ADDRESS" in os.environ
    if joins or read_manifest(sequence_dir).num_rows >= LARGE_STORE:
        with ray_cluster(cfg, runs_dir=runs_dir):
            yield
    else:
        yield


def is_worth_workers(device: str, parts: Sequence[EvaluationPart]) -> bool:
    """True where this process is connected to Ray, and the store is large, or the cluster has the
    GPU that `evaluate.device` asks for and this machine has not.
    """
    ray = sys.modules.get("ray")  # an evaluation outside Ray must not import it
    if ray is None or not ray.is_initialized():
        return False
    if device != "cpu" and not torch.cuda.is_available() and cluster_has_gpu():
        return True
    return len(parts) > 1 and sum(part.rows for part in parts) >= LARGE_STORE


def cluster_has_gpu() -> bool:
    """True where a GPU is registered in the cluster that this process is connected to."""
    import ray

    return ray.cluster_resources().get("GPU", 0) >= 1


def _run_threads(
    function: Callable[[S, P], T], shared: S, device: str, parts: Sequence[P], progress: "Progress"
) -> Iterator[T]:
    """Parts in threads of this process, as many as it has processors; on a GPU one after another.

    The processors are shared out among the threads, so that a part's numbers do not depend on how
    many others run beside it where each has one.
    """
    processors = len(os.sched_getaffinity(0))
    num_threads = 1 if device == "cuda" else min(processors, len(parts), MOST_THREADS)
    before, interval = torch.get_num_threads(), sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    with ThreadPoolExecutor(
        num_threads, "evaluation", torch.set_num_threads, (max(before // num_threads, 1),)
    ) as pool:
        coming = [pool.submit(function, shared, part) for part in parts]
        try:
            for number, result in enumerate(coming):
                yield result.result()
                progress.add_part(number)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)
            sys.setswitchinterval(interval)


def _run_tasks(
    function: Callable[[S, P], T], shared: S, device: str, parts: Sequence[P], progress: "Progress"
) -> Iterator[T]:
    import ray

    task = ray.remote(num_cpus=1, num_gpus=1 if device == "cuda" else 0)(_call)
    held = ray.put(shared)
    pending: dict[Any, int] = {}
    for number, part in enumerate(parts):
        pending[task.remote(function, held, part)] = number

    done: dict[int, Any] = {}  # by the part's number, until its turn
    next_part = 0
    try:
        while next_part < len(parts):
            for reference in ray.wait(list(pending))[0]:
                number = pending.pop(reference)
                done[number] = reference
                progress.add_part(number)

            while next_part in done:
                yield _taken(ray.get(done.pop(next_part)))
                next_part += 1
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _call(function: Callable[[S, P], T], shared: S, part: P) -> T | UserError:
    try:
        return function(shared, part)
    except UserError as error:
        # Ray would wrap it in its own, with a stack that says nothing to the user
        return error


def _taken(result: T | UserError) -> T:
    if isinstance(result, UserError):
        raise result
    return result


class Progress:
    """A line in the log every 10 s while the block runs: the parts that are done, and the time left
    at this rate.
    """

    def __init__(self, parts: Sequence[Part], what: str = "evaluation") -> None:
        self._parts, self._what = parts, what
        self._total = max(sum(part.rows for part in parts), 1)
        self._done, self._rows = 0, 0
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._teller = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> "Progress":
        self._teller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._teller.join()

    def add_part(self, number: int) -> None:
        self._done += 1
        self._rows += self._parts[number].rows

    def line(self) -> str:
        """What the log says at this moment."""
        elapsed = time.monotonic() - self._began
        left = "no part done yet"
        if self._rows:
            left = f"about {elapsed * (self._total - self._rows) / self._rows:.0f} s left"
        share = 100 * self._rows / self._total
        done = f"{self._done} of {len(self._parts)} parts, {share:.0f} % of the rows"
        return f"{self._what}: {done}, {elapsed:.0f} s, {left}"

    def _tell(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LINES):
            logger.info("%s", self.line())
