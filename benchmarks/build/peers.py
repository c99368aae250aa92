"""The build's task in Polars and in Ray's `groupby().map_groups`: Parquet logs to one row of lists
per user.

    python -m benchmarks.build.peers polars LOGS OUT
    python -m benchmarks.build.peers map_groups LOGS OUT --cpus 2 --object-store-mb 2000
    --partitions 16

For benchmarks/build/at_size.py, which holds their lists against the build's own. The lists are all
that is asked of them: no checks of types and ranges, no duplicates looked for, no quarantine, no
report, no checksums.
"""

import argparse
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import ray
import ray.data

from pipeline.cluster import ray_cluster
from pipeline.config import RayConfig

ACTIONS = ("is_click", "long_view", "is_like")  # of the synthetic logs
REQUEST_COLUMNS = ("tab",)
ORDER = ("event_time", "tie_breaker", "item_id")
LISTS = {
    "item_id": pa.int64(),
    "event_time": pa.int64(),
    "action_mask": pa.int32(),
    "known_mask": pa.int32(),
    "watch_ms": pa.int64(),
    "request_index": pa.int32(),
    "order_only": pa.bool_(),
    "tab": pa.int32(),
}
SCHEMA = pa.schema(
    [("user_id", pa.int64()), *((name, pa.large_list(dtype)) for name, dtype in LISTS.items())]
)


def build_with_polars(logs: Path, out: Path, engine: str) -> None:
    bit = lambda flag, place: flag.cast(pl.Int32) * 2**place
    known = [bit(pl.col(name).is_not_null(), place) for place, name in enumerate(ACTIONS)]
    happened = [bit(pl.col(name).fill_null(0), place) for place, name in enumerate(ACTIONS)]
    rows = pl.scan_parquet(logs / "*.parquet").select(
        "user_id",
        *ORDER,
        "request_id",
        action_mask=pl.sum_horizontal(happened),
        known_mask=pl.sum_horizontal(known),
        watch_ms=pl.col("watch_ms").fill_null(-1),
        order_only=pl.lit(False),
        tab=pl.col("tab").fill_null(-1),
    )
    new = [
        pl.col(name).ne_missing(pl.col(name).shift())
        for name in ("user_id", "event_time", "request_id")
    ]
    request = pl.col("request") - pl.col("request").first()
    users = (
        rows.sort("user_id", *ORDER)
        .with_columns(request=pl.any_horizontal(new).cast(pl.Int32).cum_sum())
        .group_by("user_id", maintain_order=True)
        .agg(*(pl.col(name) for name in LISTS if name != "request_index"), request_index=request)
        .select(SCHEMA.names)
    )
    out.mkdir(parents=True)
    users.sink_parquet(
        out / "users.parquet", compression="zstd", compression_level=1, engine=engine
    )


def build_user(rows: pa.Table) -> pa.Table:
    """The rows of one user."""
    rows = rows.sort_by([(name, "ascending") for name in ORDER])
    count = rows.num_rows
    known, happened = np.zeros(count, np.int32), np.zeros(count, np.int32)
    for place, name in enumerate(ACTIONS):
        known |= rows[name].is_valid().to_numpy().astype(np.int32) << place
        happened |= rows[name].fill_null(0).to_numpy().astype(np.int32) << place
    time, request = rows["event_time"].to_numpy(), rows["request_id"].to_numpy()
    new = (time[1:] != time[:-1]) | (request[1:] != request[:-1])
    columns = {
        "item_id": rows["item_id"].combine_chunks(),
        "event_time": rows["event_time"].combine_chunks(),
        "action_mask": happened,
        "known_mask": known,
        "watch_ms": rows["watch_ms"].fill_null(-1).combine_chunks(),
        "request_index": np.concatenate([[0], np.cumsum(new)]),
        "order_only": np.zeros(count, bool),
        "tab": rows["tab"].fill_null(-1).combine_chunks(),
    }
    offsets = pa.array([0, count], pa.int64())
    flat = [pa.array(columns[name]).cast(dtype) for name, dtype in LISTS.items()]
    lists = [pa.LargeListArray.from_arrays(offsets, values) for values in flat]
    return pa.Table.from_arrays([rows["user_id"].combine_chunks()[:1], *lists], schema=SCHEMA)


def build_with_map_groups(
    logs: Path, out: Path, cpus: int, object_store_mb: int, partitions: int
) -> None:
    with ray_cluster(
        RayConfig(num_cpus=cpus, object_store_mb=object_store_mb), runs_dir=out.parent
    ):
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.read_parquet(str(logs))
        users = rows.groupby("user_id", num_partitions=partitions).map_groups(
            build_user, batch_format="pyarrow"
        )
        users.write_parquet(str(out), compression="zstd")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=["polars", "polars-streaming", "map_groups"])
    parser.add_argument("logs", type=Path, help="folder of Parquet files")
    parser.add_argument("out", type=Path, help="folder to write, not there yet")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--object-store-mb", type=int, default=2000)
    parser.add_argument("--partitions", type=int, default=16)
    options = parser.parse_args()
    if options.peer == "map_groups":
        build_with_map_groups(
            options.logs, options.out, options.cpus, options.object_store_mb, options.partitions
        )
    else:
        engine = "streaming" if options.peer == "polars-streaming" else "in-memory"
        build_with_polars(options.logs, options.out, engine)


if __name__ == "__main__":
    main()
