"""The processes of a benchmark of several GPUs, and what a run of them is timed and counted by."""

import gc
import os
import statistics
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """This process among the others of torchrun; alone without it."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = (
            f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        )
        if self.device != "cpu":
            torch.cuda.set_device(self.device)
        # multicast over NVLink needs a driver that not every machine of several GPUs has set up
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        if self.size > 1:
            own = None if self.device == "cpu" else torch.device(self.device)
            backend = "gloo" if own is None else "nccl"
            dist.init_process_group(backend, timeout=timedelta(minutes=30), device_id=own)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def alone(self, call: Callable[[], Any]) -> Any:
        """`call()` on rank 0, None on the others, which wait."""
        found = call() if self.rank == 0 else None
        self.wait()
        return found

    def all(self, true: bool) -> bool:
        if self.size == 1:
            return true
        flag = torch.tensor(int(true), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def largest(self, value: float) -> float:
        """Of what every rank found."""
        if self.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)


def temporary_folder(name: str) -> Path:
    """The same on all ranks."""
    return Path(tempfile.gettempdir()) / f"{name}-{os.environ.get('MASTER_PORT', 'alone')}"


class Traffic:
    """Messages of this rank, and the bytes that it sends to others in them, counted where
    `torch.distributed` is called.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sent = dict.fromkeys(("all_to_all_single", "all_reduce"), 0)
        self.messages = 0

    def __enter__(self) -> "Traffic":
        self.kept = {name: getattr(dist, name) for name in self.sent}
        for name in self.sent:
            setattr(dist, name, partial(self._call, name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self.kept.items():
            setattr(dist, name, call)

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        self.messages += 1
        others, size = self.ranks.size - 1, self.ranks.size
        if name == "all_to_all_single":
            tensor, splits = args[1], args[3] if len(args) > 3 else None
            own = tensor.numel() // size if splits is None else splits[self.ranks.rank]
            self.sent[name] += (tensor.numel() - own) * tensor.element_size()
        else:  # as a ring does it
            self.sent[name] += 2 * args[0].nbytes * others // size
        return self.kept[name](*args, **options)


def free_memory(ranks: Ranks) -> None:
    """Give the device what earlier runs held: hooks hold a trainee in a circle, with its tables."""
    if ranks.device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()


def timed_run(call: Callable[[], tuple[list[dict], int]], ranks: Ranks) -> dict[str, Any]:
    """Medians over the lines of a run but the first two (compilation, the allocator's growth).

    `call` gives the lines and the number of steps.
    """
    cuda = ranks.device != "cpu"
    free_memory(ranks)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with Traffic(ranks) as traffic:
        lines, steps = call()
    lines = lines[2:]

    names = "step_ms", "tokens_per_s", "data_wait_share", "message_wait_share"
    found: dict[str, Any] = {}
    for name in names:
        found[name] = statistics.median(line[f"train/{name}"] for line in lines)
    found["mb_sent_a_step"] = {name: sent / steps / 2**20 for name, sent in traffic.sent.items()}
    found["messages_a_step"] = traffic.messages / steps
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return found
