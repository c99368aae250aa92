"""The rows of a bucket → its users' sequences, in one vectorised pass and without Ray.

Duplicates, the order within a user, the cap, requests and masks are decided here; which rows are good at all, in
pipeline/data/cleaning.py.
"""

import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.cleaning import REASON, SOURCE_ROW, USER_BUCKET, LogRules
from pipeline.data.sources.files import file_digest
from pipeline.data.statistics import count_bucket
from pipeline.data.store import Bucket
from pipeline.schema import LOG_REQUIRED, ROW_DIGEST, log_schema, sequence_lists, sequence_schema


@dataclass(frozen=True)
class BuiltBucket:
    """What the rows of one bucket became."""

    sequences: pa.Table  # SEQUENCE, sorted by user_id
    quarantine: pa.Table  # the rules' schema, without the bucket
    rows_in: int
    rows_capped: int
    nulls: dict[str, int]  # by LOG column; of optional ones among the good rows


def build_bucket(rows: pa.Table, rules: LogRules, max_rows_per_user: int) -> BuiltBucket:
    """Every user of one bucket at once: `rows` in any order, as `normalise` gives them.

    Order within a user: event_time, then tie_breaker where there is one, then item_id; requests of one time stay
    together, in the order of their first rows. A request is what shares a request_id *and* a time.
    """
    broken = rows.filter(rows[REASON].is_valid())
    good = rows.filter(rows[REASON].is_null())
    keys = {field.name: _key(good, field.name) for field in rules.schema if field.name not in (REASON, SOURCE_ROW)}
    repeated = _repeats(keys)
    order = _order(keys, np.flatnonzero(repeated == ""))
    kept = order[_newest(keys["user_id"][order], max_rows_per_user)]
    doubles = np.flatnonzero(repeated != "")
    left_out = good.take(pa.array(doubles))
    reasons = pa.array(repeated[doubles], pa.string())
    left_out = left_out.set_column(left_out.schema.get_field_index(REASON), rules.schema.field(REASON), reasons)
    quarantine = pa.concat_tables([broken, left_out]).drop_columns([USER_BUCKET])
    return BuiltBucket(
        sequences=_sequences(good, keys, order, kept, rules),
        quarantine=quarantine.sort_by([(name, "ascending") for name in (REASON, ROW_DIGEST, "tie_breaker")]),
        rows_in=rows.num_rows,
        rows_capped=len(order) - len(kept),
        nulls={
            field.name: (rows if field.name in LOG_REQUIRED else good)[field.name].null_count
            for field in log_schema(rules.actions, rules.request_columns)
        },
    )


def _key(rows: pa.Table, name: str) -> np.ndarray:
    """A column to sort and compare by; null sorts last."""
    column = rows[name]
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    last = np.iinfo(column.type.to_pandas_dtype()).max
    return column.fill_null(last).to_numpy()


def _repeats(keys: dict[str, np.ndarray]) -> np.ndarray:
    """Per row "" or why it is left out: the same source row again, or the same user, item and time again."""
    reason = np.full(len(keys["user_id"]), "", object)
    same = ("user_id", "event_time", "item_id")
    order = np.lexsort([keys[name] for name in reversed(same)])
    again = _as_before(keys, same, order)
    suspects = order[again | np.r_[again[1:], False]]  # few: only these are looked at closely
    rest = [name for name in keys if name not in (*same, "tie_breaker", ROW_DIGEST)]
    by_tie = ("tie_breaker", *rest, ROW_DIGEST)
    order = _sorted(keys, suspects, (*same, ROW_DIGEST, *by_tie))
    exact = _as_before(keys, (*same, ROW_DIGEST), order)
    reason[order[exact]] = "exact_duplicate"
    order = _sorted(keys, order[~exact], (*same, *by_tie))
    reason[order[_as_before(keys, same, order)]] = "key_duplicate"
    return reason


def _sorted(keys: dict[str, np.ndarray], rows: np.ndarray, by: tuple[str, ...]) -> np.ndarray:
    return rows[np.lexsort([keys[name][rows] for name in reversed(by)])]


def _as_before(keys: dict[str, np.ndarray], names: tuple[str, ...], order: np.ndarray) -> np.ndarray:
    """[order] bool: the row agrees with the one before it in all of `names`."""
    again = np.ones(len(order), bool)
    again[:1] = False
    for name in names:
        values = keys[name][order]
        again[1:] &= values[1:] == values[:-1]
    return again


def _order(keys: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """The rows by user and, within a user, in the order of the sequence."""
    order = _sorted(keys, rows, ("user_id", "event_time", "tie_breaker", "item_id"))
    if np.all(keys["request_id"] == keys["request_id"][:1]):
        return order  # no requests told apart but by their time
    place = np.arange(len(order))
    request = ("user_id", "event_time", "request_id")
    grouped = np.lexsort([place, *(keys[name][order] for name in reversed(request))])
    begins = ~_as_before(keys, request, order[grouped])
    first = np.empty_like(place)
    first[grouped] = grouped[begins][np.cumsum(begins) - 1]  # place of the first row of each row's request
    return order[np.lexsort([place, first])]


def _newest(user: np.ndarray, most: int) -> np.ndarray:
    """Which of the rows, sorted by user and time, are among the last `most` of their user."""
    ends = np.searchsorted(user, user, side="right")
    return np.arange(len(user)) >= ends - most


def _sequences(
    good: pa.Table, keys: dict[str, np.ndarray], order: np.ndarray, kept: np.ndarray, rules: LogRules
) -> pa.Table:
    user = keys["user_id"][kept]
    begins = ~_as_before(keys, ("user_id",), kept)
    starts = np.flatnonzero(begins)
    offsets = np.r_[starts, len(kept)].astype(np.int64)
    all_rows = np.unique(keys["user_id"][order], return_counts=True)[1]
    known, mask = _masks(good, rules)
    new_request = ~_as_before(keys, ("user_id", "event_time", "request_id"), kept)
    count = np.cumsum(new_request)
    values = {
        "item_id": keys["item_id"][kept],
        "event_time": keys["event_time"][kept],
        "action_mask": mask[kept],
        "known_mask": known[kept],
        "watch_ms": _filled(good, "watch_ms", -1)[kept],
        "request_index": count - np.repeat(count[starts], np.diff(offsets)),
        "order_only": _filled(good, "order_only", False)[kept],
        **{name: _filled(good, name, -1)[kept] for name in rules.request_columns},
    }
    lists = {
        name: pa.LargeListArray.from_arrays(offsets, pa.array(values[name].astype(dtype.to_pandas_dtype()), dtype))
        for name, dtype in sequence_lists(rules.request_columns).items()
    }
    scalars = {
        "user_id": user[starts],
        "user_bucket": keys[USER_BUCKET][kept][starts],
        "first_position": all_rows - np.diff(offsets),
    }
    return pa.table(scalars | lists, schema=sequence_schema(rules.request_columns))


def _masks(good: pa.Table, rules: LogRules) -> tuple[np.ndarray, np.ndarray]:
    """Known mask and action mask, int32 per row. An action that is null, or whose known bit is 0, is not known."""
    everything = (1 << len(rules.actions)) - 1
    known = _filled(good, "known_mask", everything).astype(np.int32)
    mask = np.zeros(good.num_rows, np.int32)
    for bit, name in enumerate(rules.actions):
        known &= ~(good[name].is_null().to_numpy().astype(np.int32) << bit)
        mask |= _filled(good, name, 0).astype(np.int32) << bit
    return known, mask & known


def _filled(rows: pa.Table, name: str, value: Any) -> np.ndarray:
    return rows[name].fill_null(value).to_numpy()


def write_partition(
    rows: pa.Table, rules: LogRules, max_rows_per_user: int, folder: str, utc_offset_ms: int
) -> pa.Table:
    """Build and write the buckets of one partition: the keyed shuffle leaves a bucket whole and may join several.

    Returns a JSON summary per bucket. A task that Ray runs again writes the same files again.
    """
    summaries = []
    for number in rows[USER_BUCKET].unique().to_pylist() if rows.num_rows else []:
        built = build_bucket(rows.filter(pc.field(USER_BUCKET) == number), rules, max_rows_per_user)
        name = f"bucket-{number:05d}.parquet"
        kept, left_out = built.sequences, built.quarantine
        summary = {
            "number": number,
            "bucket": asdict(write_table(kept, Path(folder), name, users=kept.num_rows)) if kept.num_rows else None,
            "quarantine": asdict(write_table(left_out, Path(folder), f"quarantine/{name}"))
            if left_out.num_rows
            else None,
            "statistics": asdict(count_bucket(built, rules, utc_offset_ms)),
        }
        summaries.append(json.dumps(summary))
    return pa.table({"summary": pa.array(summaries, pa.string())})


def write_table(table: pa.Table, folder: Path, name: str, users: int = 0) -> Bucket:
    """Write `folder/name` in one step; `users` is given for SEQUENCE rows, whose events are counted then."""
    path = folder / name
    half = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # a second attempt may run beside a lost first one
    pq.write_table(table, half, compression="zstd", row_group_size=2**16)
    half.rename(path)
    rows = len(table["item_id"].combine_chunks().flatten()) if users else table.num_rows
    return Bucket(file=name, users=users, rows=rows, bytes=path.stat().st_size, sha256=file_digest(path))
