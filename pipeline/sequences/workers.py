"""One function over many items on Ray Data, with progress: both halves of a build are spread over a
cluster by it.
"""

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray.data

from pipeline.cluster import is_private, ray_cluster
from pipeline.config import RayConfig, UserError
from pipeline.disk import find_full_disk

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10
MOST_ITEMS = 8  # of a task: as many are done again when its worker dies
SMALLEST_TASKS = 12  # of the smallest, as many would be a CPU's work
AVX512 = "X86_V4 AVX512_ICL"  # as NumPy calls what it has for it
PROCESS_MEMORY = 350_000_000  # bytes of a worker that has imported what a task needs; 300 MiB seen


class Item(Protocol):
    """The work of one task."""

    @property
    def rows(self) -> int: ...


class Workers(Protocol):
    """Calls `function(item)` for each item, a few in a task, and returns the results, in no order.
    An item takes about so many bytes of its machine's memory.
    """

    def __call__(
        self,
        what: str,
        function: Callable[[Any], Any],
        items: Sequence[Item],
        memory_bytes: float = 0,
    ) -> list[Any]: ...


@contextmanager
def workers(cfg: RayConfig, runs_dir: str | Path, *, floats: bool = False) -> Iterator[Workers]:
    """On the cluster of `ray_cluster`, which is joined or started when there are items.

    A task takes one CPU and its memory, on a joined cluster on nodes with the labels
    `cfg.data_labels`. Items and results pass through the object store, so they should be small:
    what is read and written should be in files. A `UserError` in a task is raised as it is, and so
    is the error of a full disk; a task whose worker dies is run again.

    `floats`: the tasks compute with logarithms and the like, which NumPy may round otherwise
    where it is told to sort faster.
    """
    with ExitStack() as stack:

        def run(
            what: str,
            function: Callable[[Any], Any],
            items: Sequence[Item],
            memory_bytes: float = 0,
        ) -> list[Any]:
            if not items:
                return []
            stack.enter_context(ray_cluster(cfg, runs_dir=runs_dir))
            nodes = ray.nodes()
            asked = schedulable_memory(PROCESS_MEMORY + memory_bytes, nodes)
            needs: dict[str, Any] = {"memory": asked}
            if cfg.data_labels and not is_private(cfg):  # its one node has none
                needs["label_selector"] = cfg.data_labels
            slow_sorts = sorts_better_without_avx512(Path("/proc/cpuinfo"))
            if slow_sorts and is_private(cfg) and not floats:
                needs["runtime_env"] = {"env_vars": {"NPY_DISABLE_CPU_FEATURES": AVX512}}
            shares = share_out([item.rows for item in items], count_cpus(nodes))
            return _run_tasks(what, function, items, shares, needs)

        yield run


def schedulable_memory(needed: float, nodes: Sequence[Mapping[str, Any]]) -> int:
    """The bytes to ask of Ray's scheduler for a task: what it needs, and never more than the
    largest of these nodes (`ray.nodes()`) has, since that task would wait for ever.

        needed      600 MB      9 GB
        nodes       4 GB, 8 GB
        asked       600 MB      8 GB
    """
    largest = 0.0
    for node in nodes:
        if node["Alive"]:
            largest = max(largest, node["Resources"].get("memory", 0.0))
    return int(min(needed, largest))


def sorts_better_without_avx512(cpu_info: Path) -> bool:
    """True for processors of AMD that have AVX-512, as the file describes them.

    NumPy's sort of integers by AVX-512 writes with an instruction, vpcompressq to memory, that
    takes them as long as all else together: 50 ns a row, and 10 by AVX2.
    """
    try:
        described = cpu_info.read_text()
    except OSError:  # not Linux
        return False
    return "AuthenticAMD" in described and " avx512f " in described


def count_cpus(nodes: Sequence[Mapping[str, Any]]) -> int:
    """The CPUs of these nodes (`ray.nodes()`), 1 at least."""
    total = sum(node["Resources"].get("CPU", 0.0) for node in nodes if node["Alive"])
    return max(1, int(total))


def share_out(sizes: Sequence[int], num_cpus: int) -> list[list[int]]:
    """The items of each task, given by their numbers, of all items' sizes.

    From one task to the next a CPU waits for the scheduler, .1 to .2 s. So a task has several items
    where there are many, `MOST_ITEMS` at most. The largest come first, and towards the end tasks
    are small, so that all CPUs end at about the same time.

        sizes       9 9 9 9 9 9 9 9 5 2         two CPUs
        tasks       9 9, 9, 9, 9, 9, 9, 9, 5, 2
    """
    descending = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    left = sum(sizes)
    least = left / (SMALLEST_TASKS * num_cpus)
    shares: list[list[int]] = []
    share: list[int] = []
    share_size = 0
    for number in descending:
        enough = max(left / (2 * num_cpus), least)
        if share and (share_size + sizes[number] > enough or len(share) == MOST_ITEMS):
            shares.append(share)
            left -= share_size
            share, share_size = [], 0
        share.append(number)
        share_size += sizes[number]
    if share:
        shares.append(share)
    return shares


def quieten_ray_data(context: ray.data.DataContext) -> None:
    """Of Ray Data's lines those that a user can act on alone."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # it warns that its bars are off
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    # that a task took more memory than it asked for: to be set in a call of ours
    context.issue_detectors_config.detectors = []


def _run_tasks(
    what: str,
    function: Callable[[Any], Any],
    items: Sequence[Item],
    shares: Sequence[Sequence[int]],
    needs: Mapping[str, Any],
) -> list[Any]:
    quieten_ray_data(ray.data.DataContext.get_current())

    # one block, and so one task, per share
    rows = []
    for share in shares:
        numbered = [(number, items[number]) for number in share]
        rows.append({"share": pickle.dumps(numbered)})
    tasks = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        partial(run_share, function=function), batch_size=None, batch_format="pyarrow", **needs
    )
    # a result is seen when it is there, and not with the others of its task
    tasks.context.target_max_block_size = 1

    results, progress = [], Progress(what, items)
    for row in tasks.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, UserError | OSError):
            raise result
        results.append(result)
        progress.add_item(row["number"])
    return results


def run_share(batch: pa.Table, function: Callable[[Any], Any]) -> Iterator[pa.Table]:
    """One row for each item of the task: its number, and what the function returned."""
    # the C library keeps what a task frees for the next; Arrow's own allocator gives pages back
    # at once, and a tenth of a build's time went into getting new ones
    pa.set_memory_pool(pa.system_memory_pool())

    for share in batch["share"].to_pylist():
        for number, item in pickle.loads(share):
            try:
                result = function(item)
            except UserError as error:
                # Ray would wrap it in its own, with a stack that says nothing to the user
                result = error
            except OSError as error:
                if find_full_disk(error) is None:
                    raise
                result = error
            yield pa.table({"number": [number], "result": [pickle.dumps(result)]})


class Progress:
    """Lines in the log: the share of the rows that is done, and the time left at this rate."""

    def __init__(self, what: str, items: Sequence[Item]) -> None:
        self._what, self._items = what, items
        self._total = sum(item.rows for item in items)

        self._done, self._rows = 0, 0
        self._began = self._said = time.monotonic()

    def add_item(self, number: int) -> None:
        self._done += 1
        self._rows += self._items[number].rows

        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES or self._rows == 0:
            return
        self._said = now

        elapsed = now - self._began
        left = elapsed * (self._total - self._rows) / self._rows
        logger.info(
            "%s: %d of %d, %.0f %% of the rows, %.1f million rows/s, about %.0f s left",
            self._what,
            self._done,
            len(self._items),
            100 * self._rows / self._total,
            self._rows / elapsed / 1e6,
            left,
        )
