"""A published store and an untrained model of a few users, for tests that serve or register."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import config
from pipeline.batches.features import fit_features
from pipeline.batches.stored import StoredUsers
from pipeline.config import RunConfig
from pipeline.index.folder import build_index
from pipeline.model.artifact import save_model
from pipeline.model.ranker import RankingModel
from pipeline.sequences import store

DAY_MS = 86_400_000
NUM_USERS = 24
NUM_ITEMS = 60
NOT_A_USER = 10_000


def tiny_config(runs_dir: Path, **sections: dict) -> RunConfig:
    return config.from_dict(
        {
            "name": "tiny",
            "runs_dir": str(runs_dir),
            "source": {
                "kind": "synthetic",
                "actions": ["is_click", "is_like"],
                "request_columns": ["tab"],
            },
            "tasks": ["is_click", "is_like"],
            "features": {
                "request": {"tab": {"dim": 2}, "hour": {"dim": 2}},
                "user": {"city": {"dim": 4}},
                "user_tokens": {"place": ["city"]},
                "watch_seconds": [10, 40],
                "dense": {
                    "item": {"by": ["item_id"], "prior": 3},
                    "item_tab": {"by": ["item_id", "tab"], "prior": 1},
                    "before": {"by": ["item_id"], "rows": "order_only", "prior": 2},
                    "user": {"by": ["user"], "rows": "all", "prior": 5},
                    "user_tab": {"by": ["user", "tab"], "prior": 1},
                    "today": {"by": ["user"], "within_minutes": 1440, "prior": 2},
                    "tab_lately": {"by": ["user", "tab"], "within_minutes": 4000.5, "prior": 1},
                },
            },
            "model": {
                "d_model": 16,
                "num_layers": 2,
                "d_qk": 8,
                "d_v": 8,
                "head_hidden": 8,
                "attention": {"window": 4, "full_rows": 2, "scaling_seq_len": 16},
                "truncate_after_layer": 1,
                "truncate_to": 6,
                "dense_to": "both",
            },
            "serve": {"port": 0},
        }
        | sections
    )


def publish_sequences(cfg: RunConfig, seed: int = 0, table: pa.Table | None = None) -> pa.Table:
    """Users 0, 1, … in two buckets, rows before, in and after the validation period; some with
    order_only rows.

    With `table`, an altered copy of what an earlier call returned, that.
    """
    rng = np.random.default_rng(seed)
    rows = [_user(user, rng, cfg) for user in range(NUM_USERS)]
    if table is not None:
        rows = sorted(table.to_pylist(), key=lambda row: row["user_id"])
    folder = cfg.sequence_dir
    folder.mkdir(parents=True)
    buckets = []
    for number in range(2):
        table = pa.Table.from_pylist(rows[number::2], schema=cfg.source.events.sequence_schema())
        buckets.append(
            _write(
                folder,
                f"bucket-{number}.parquet",
                table,
                sum(map(len, table["item_id"].to_pylist())),
            )
        )
    cities = pa.table(
        {"user_id": np.arange(NUM_USERS), "city": [f"city {i % 3}" for i in range(NUM_USERS)]}
    )
    times = [time for row in rows for time in row["event_time"]]
    manifest = store.Manifest(
        digest=hashlib.sha256(str(seed).encode()).hexdigest(),
        num_users=NUM_USERS,
        num_rows=len(times),
        rows_in=len(times),
        rows_merged=0,
        rows_capped=0,
        users_capped=0,
        quarantined={},
        counts={},
        first_event_ms=min(times),
        last_event_ms=max(times),
        actions=cfg.source.actions,
        request_columns=cfg.source.request_columns,
        num_buckets=2,
        buckets=tuple(buckets),
        side_tables={"users": _write(folder, "users.parquet", cities, NUM_USERS)},
        quarantine=(),
        parts=(),
        records=(),
        config={},
        inputs="",
    )
    store.write_manifest(folder, manifest)
    return store.read_sequences(folder)


def _user(user: int, rng: np.random.Generator, cfg: RunConfig) -> dict:
    length = int(rng.integers(3, 20))
    num_order_only = int(rng.integers(0, 3)) if user % 2 else 0
    request = np.sort(rng.integers(0, length, length))
    # each its own, before the others
    request[:num_order_only] = np.arange(num_order_only) - num_order_only
    request = np.unique(request, return_inverse=True)[1]
    start = cfg.split.val_ms - 3 * DAY_MS
    return {
        "user_id": user,
        "user_bucket": user % 2,
        "first_position": 4 if user == 1 else 0,
        "item_id": rng.integers(0, NUM_ITEMS, length).tolist(),
        "event_time": (start + np.cumsum(rng.integers(1, DAY_MS, length))[request]).tolist(),
        "action_mask": rng.integers(0, 4, length).tolist(),
        "known_mask": rng.integers(0, 4, length).tolist(),
        "watch_ms": np.random.default_rng(user).integers(-1, 60_000, length).tolist(),
        "request_index": request.tolist(),
        "order_only": (np.arange(length) < num_order_only).tolist(),
        "tab": rng.integers(0, 3, length).tolist(),
    }


def _write(folder: Path, name: str, table: pa.Table, rows: int) -> store.Bucket:
    pq.write_table(table, folder / name)
    return store.Bucket(name, table.num_rows, rows, (folder / name).stat().st_size, "")


def save_tiny_model(
    cfg: RunConfig, folder: Path, seed: int = 0, val_ne: float = 0.9, **extra: Any
) -> Path:
    """Random weights, large enough that scores differ visibly, and the numbers of an evaluation.

    `extra` is what the artifact says of its training.
    """
    torch.manual_seed(seed)
    maps = fit_features(cfg)
    model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    save_model(folder, model, cfg, maps, extra)
    metrics = {f"val/ne/{task}": val_ne for task in cfg.tasks} | {"test/auc/is_click": 0.7}
    metrics |= {f"val/baseline_ne/{task}": 0.99 for task in cfg.tasks}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def index_model(cfg: RunConfig, model_dir: Path) -> None:
    """Build the index of a model that the run trained."""
    stored = StoredUsers(cfg.sequence_dir, cfg.source, cfg.features)
    build_index(cfg.index, stored, cfg.split.train_end_ms, model_dir)
