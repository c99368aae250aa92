"""What a build's tasks ask of Ray: memory, and nodes with a label."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pipeline.config import RayConfig
from pipeline.sequences import workers

GB = 10**9
NODES = [
    {"Alive": True, "Resources": {"CPU": 4.0, "memory": 4.0 * GB}},
    {"Alive": True, "Resources": {"CPU": 8.0, "memory": 8.0 * GB}},
    {"Alive": False, "Resources": {"CPU": 8.0, "memory": 64.0 * GB}},
]


def test_a_task_asks_for_what_it_needs_and_never_for_more_than_a_node_has() -> None:
    assert workers.schedulable_memory(600e6, NODES) == 600_000_000
    assert workers.schedulable_memory(9 * GB, NODES) == 8 * GB  # else it would wait for ever
    assert workers.schedulable_memory(0, NODES) == 0


@pytest.mark.parametrize("private", [True, False])
def test_labels_count_on_a_joined_cluster_alone(
    monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    @contextmanager
    def cluster(*_: Any, **__: Any) -> Iterator[None]:
        yield

    asked = []
    monkeypatch.setattr(workers, "ray_cluster", cluster)
    monkeypatch.setattr(workers, "is_private", lambda _: private)
    monkeypatch.setattr(workers.ray, "nodes", lambda: NODES)
    monkeypatch.setattr(workers, "_run_tasks", lambda *args: asked.append(args[-1]) or [])
    with workers.workers(RayConfig(data_labels={"pool": "cpu_data"}), "runs") as run:
        run("reading", len, ["a part"], 1e6)

    labels = {} if private else {"label_selector": {"pool": "cpu_data"}}
    assert asked == [{"memory": workers.PROCESS_MEMORY + 1_000_000, **labels}]
