"""Small logs of a user's own names, and the build's configuration for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.config import RunConfig
from pipeline.logs.cleaning import LogRules
from pipeline.schema import EventColumns
from pipeline.sequences import build
from pipeline.sequences.repeats import RepeatRule
from pipeline.sequences.upkeep import maintenance
from pipeline.sequences.workers import Workers

MERGE, FIRST = RepeatRule(), RepeatRule(merge=False)
NOON = 1_650_000_000_000
RULES = LogRules(
    columns={},
    events=EventColumns(actions=("click", "like"), request=("tab",)),
    earliest_ms=0,
    latest_ms=2**60,
    num_buckets=1,
)


def log(num_users: int = 30, rows: int = 400, seed: int = 0, **columns: object) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "user_id": rng.integers(num_users, size=rows),
            "item_id": rng.integers(50, size=rows),
            "event_time": NOON + rng.integers(10_000, size=rows) * 1000,
            "click": rng.integers(2, size=rows).astype(np.int8),
            "like": rng.integers(2, size=rows).astype(np.int8),
            "tab": rng.integers(3, size=rows).astype(np.int32),
            **columns,
        }
    )


def config_for(folder: Path, *tables: pa.Table, **source: object) -> RunConfig:
    (folder / "in").mkdir(exist_ok=True)
    for number, table in enumerate(tables):
        pq.write_table(table, folder / "in" / f"{number}.parquet")
    return config.from_dict(
        {
            "name": "small",
            "runs_dir": str(folder / "runs"),
            "source": {
                "kind": "parquet",
                "path": str(folder / "in"),
                "actions": ["click", "like"],
                "request_columns": ["tab"],
                **source,
            },
            "sequences": {"num_buckets": 3},
            "checks": {"max_quarantined_share": 0.5},
            "tasks": ["click"],
        }
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets are built in this process: for what Ray has no part in."""

    @contextmanager
    def workers_here(*_: object) -> Iterator[Workers]:
        yield lambda _, function, items, memory_bytes=0: [function(item) for item in items]

    for module in (build, maintenance):
        monkeypatch.setattr(module, "workers", workers_here)
