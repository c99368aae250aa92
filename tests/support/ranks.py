"""Processes of one process group: forked from one that has imported what they need."""

import multiprocessing
from collections.abc import Callable

import torch.multiprocessing as mp

NEEDED_BY_RANKS = ["tests.worlds.tiny", "tests.worlds.training"]


def run_ranks(target: Callable[..., None], arguments: tuple, num_ranks: int) -> None:
    """Run `target(rank, *arguments)` in `num_ranks` processes at once, until all have ended.

    A process that is spawned imports PyTorch and ours anew, which takes most of such a test's time.
    The one that they are forked from here is started once, and has no threads whose locks a fork
    could find taken.

    Raises:
        ProcessRaisedException: one of them raised.
        ProcessExitedException: one was killed.
    """
    multiprocessing.set_forkserver_preload(NEEDED_BY_RANKS)
    mp.start_processes(target, arguments, num_ranks, start_method="forkserver")  # pyright: ignore[reportPrivateImportUsage]
