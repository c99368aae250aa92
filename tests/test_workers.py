"""A build's tasks: the items of each, and what they ask of Ray, memory and nodes with a label."""

import errno
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.data

from pipeline.config import RayConfig
from pipeline.sequences import workers

GB = 10**9
NODES = [
    {"Alive": True, "Resources": {"CPU": 4.0, "memory": 4.0 * GB}},
    {"Alive": True, "Resources": {"CPU": 8.0, "memory": 8.0 * GB}},
    {"Alive": False, "Resources": {"CPU": 8.0, "memory": 64.0 * GB}},
]


@dataclass(frozen=True)
class Item:
    rows: int


@pytest.mark.parametrize("num_cpus", [1, 2, 64])
@pytest.mark.parametrize("sizes", [[], [0, 0], [7], [3, 900, 1, 40, 41] * 30])
def test_every_item_is_in_one_task_the_largest_first(sizes: list[int], num_cpus: int) -> None:
    shares = workers.share_out(sizes, num_cpus)
    in_order = list(chain.from_iterable(shares))
    assert sorted(in_order) == list(range(len(sizes)))
    assert [sizes[number] for number in in_order] == sorted(sizes, reverse=True)
    assert all(0 < len(share) <= workers.MOST_ITEMS for share in shares)


def test_tasks_become_smaller_towards_the_end() -> None:
    shares = workers.share_out([10] * 34, num_cpus=2)
    lengths = [len(share) for share in shares]
    assert lengths == [8, 6, 5, 3, 3, 2, 1, 1, 1, 1, 1, 1, 1]


def test_few_items_keep_every_cpu_busy() -> None:
    assert workers.share_out([5, 9, 5], num_cpus=4) == [[1], [0], [2]]


def test_the_cpus_of_a_cluster_are_those_of_nodes_alive() -> None:
    assert workers.count_cpus(NODES) == 12
    assert workers.count_cpus([]) == 1


def test_a_task_asks_for_what_it_needs_and_never_for_more_than_a_node_has() -> None:
    assert workers.schedulable_memory(600e6, NODES) == 600_000_000
    assert workers.schedulable_memory(9 * GB, NODES) == 8 * GB  # else it would wait for ever
    assert workers.schedulable_memory(0, NODES) == 0


@pytest.mark.parametrize("floats", [True, False])
@pytest.mark.parametrize("slow_avx512", [True, False])
@pytest.mark.parametrize("private", [True, False])
def test_labels_count_on_a_joined_cluster_alone_and_this_processor_on_our_own(
    monkeypatch: pytest.MonkeyPatch, private: bool, slow_avx512: bool, floats: bool
) -> None:
    @contextmanager
    def cluster(*_: Any, **__: Any) -> Iterator[None]:
        yield

    cfg = RayConfig(data_labels={"pool": "cpu_data"})
    asked = []
    monkeypatch.setattr(workers, "ray_cluster", cluster)
    monkeypatch.setattr(workers, "is_private", lambda _: private)
    monkeypatch.setattr(workers, "sorts_better_without_avx512", lambda _: slow_avx512)
    monkeypatch.setattr(workers.ray, "nodes", lambda: NODES)
    monkeypatch.setattr(workers, "_run_tasks", lambda *args: asked.append(args[-1]) or [])
    with workers.workers(cfg, "runs", floats=floats) as run:
        run("reading", len, [Item(5)], 1e6)

    labels = {} if private else {"label_selector": {"pool": "cpu_data"}}
    variables = {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL"}
    sorts_faster = private and slow_avx512 and not floats
    environment = {"runtime_env": {"env_vars": variables}} if sorts_faster else {}
    assert asked == [{"memory": workers.PROCESS_MEMORY + 1_000_000, **labels, **environment}]


@pytest.mark.parametrize(
    ("described", "is_slow"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512dq\n", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 sha_ni\n", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f avx512dq\n", False),
    ],
)
def test_processors_that_sort_better_without_avx512(
    tmp_path: Path, described: str, is_slow: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(described)
    assert workers.sorts_better_without_avx512(tmp_path / "cpuinfo") == is_slow
    assert not workers.sorts_better_without_avx512(tmp_path / "missing")


def write_to_a_full_disk(_: Item) -> None:
    Path("/dev/full").write_text("x")  # real, on Linux: it has no room for anybody


def read_what_is_gone(_: Item) -> None:
    Path("/nowhere/at/all").read_text()


def test_a_full_disk_comes_back_from_a_task_as_the_error_that_it_is() -> None:
    """Ray Data would tell whatever a task raises in 150 lines of its own."""
    batch = pa.table({"share": [pickle.dumps([(3, Item(rows=1))])]})
    (answer,) = workers.run_share(batch, write_to_a_full_disk)
    assert answer["number"].to_pylist() == [3]
    error = pickle.loads(answer["result"][0].as_py())
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC

    with pytest.raises(FileNotFoundError):
        list(workers.run_share(batch, read_what_is_gone))


def test_ray_advises_nobody_to_set_memory_in_a_call_of_ours() -> None:
    context = ray.data.DataContext()
    assert context.issue_detectors_config.detectors, "Ray has such advice"
    workers.quieten_ray_data(context)
    assert context.issue_detectors_config.detectors == []
    assert not context.enable_progress_bars
