"""A user's own logs of one row, and what a build makes of them and of what was exported."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import RunConfig
from pipeline.logs import open_logs
from pipeline.logs.cleaning import check_columns, normalise
from pipeline.sequences.checked_logs import log_rules
from pipeline.sequences.repeats import RepeatRule
from pipeline.sequences.users import build_bucket
from tests.worlds.live_events import START
from tests.worlds.tiny import tiny_config

TYPES = {
    "uid": pa.int32(),
    "item_id": pa.int64(),
    "shown_at": pa.timestamp("us", "Europe/Berlin"),
    "is_click": pa.bool_(),
    "is_like": pa.float32(),
    "tab": pa.int16(),
    "request_id": pa.int64(),
    "note": pa.string(),
}


def own_logs(folder: Path) -> RunConfig:
    """A user's own logs, under their own names and types, with a column that is none of ours."""
    (folder / "own").mkdir()
    first = {
        "uid": [0],
        "item_id": [1],
        "shown_at": [START],
        "is_click": [True],
        "is_like": [0.0],
        "tab": [1],
    }
    columns = {
        name: pa.array(first[name]).cast(TYPES[name]) for name in first if name != "shown_at"
    }
    columns["shown_at"] = pa.array([START], pa.timestamp("ms", "UTC")).cast(TYPES["shown_at"])
    columns |= {"request_id": pa.array([None], pa.int64()), "note": pa.array(["x"])}
    pq.write_table(pa.table(columns).select(list(TYPES)), folder / "own" / "log.parquet")
    source = {
        "kind": "parquet",
        "path": str(folder / "own"),
        "columns": {"user_id": "uid", "event_time": "shown_at"},
        "actions": ["is_click", "is_like"],
        "request_columns": ["tab"],
    }
    features = {"request": {"tab": {"dim": 2}}}
    return tiny_config(folder / "runs", source=source, features=features)


def built(cfg: RunConfig) -> list[dict]:
    """The SEQUENCE rows of all logs of the run; none of their rows is bad."""
    logs = open_logs(cfg.source, cfg.run_dir)
    rules = log_rules(cfg.source, cfg.sequences, logs, num_buckets=1)
    for file in logs.files:
        check_columns(pq.read_schema(file), rules, file)
    rows = pa.concat_tables([normalise(pq.read_table(file), rules) for file in logs.files])
    assert rows["reason"].null_count == len(rows)
    bucket = build_bucket(rows, rules, cfg.sequences.max_rows_per_user, RepeatRule())
    return bucket.sequences.to_pylist()
