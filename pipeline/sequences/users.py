"""The rows of a bucket → its users' sequences, in one vectorised pass and without Ray.

Duplicates, the order within a user, the cap, requests and masks are decided here; which rows are
good at all, in pipeline/logs/cleaning.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.logs.cleaning import REASON, SOURCE_ROW, USER_BUCKET, LogRules
from pipeline.schema import LOG_REQUIRED, ROW_DIGEST, log_schema, sequence_lists, sequence_schema
from pipeline.sequences.order import argsort_rows, pack_rows, rank_rows

# why a row is left out, by a code per row
REPEATS = np.array(["", "exact_duplicate", "key_duplicate"], object)
EXACT_DUPLICATE, KEY_DUPLICATE = 1, 2


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

    Order within a user: event_time, then tie_breaker where there is one, then item_id; requests of
    one time stay together, in the order of their first rows. A request is what shares a request_id
    *and* a time.
    """
    broken, good = rows.slice(0, 0), rows
    if rows[REASON].null_count < rows.num_rows:
        broken, good = rows.filter(rows[REASON].is_valid()), rows.filter(rows[REASON].is_null())
    keys = {
        field.name: _key(good, field.name)
        for field in rules.schema
        if field.name not in (REASON, SOURCE_ROW)
    }
    moment = rank_rows([keys["user_id"], keys["event_time"]])  # both sorts below begin with it
    repeated = _repeats(keys, moment)
    order = _order(keys, moment, repeated)
    lengths = _run_lengths(keys["user_id"][order])
    kept = order[_newest(lengths, max_rows_per_user)]
    doubles = np.flatnonzero(repeated)
    left_out = good.take(pa.array(doubles))
    reasons = pa.array(REPEATS[repeated[doubles]], pa.string())
    left_out = left_out.set_column(
        left_out.schema.get_field_index(REASON), rules.schema.field(REASON), reasons
    )
    quarantine = pa.concat_tables([broken, left_out]).drop_columns([USER_BUCKET])
    return BuiltBucket(
        sequences=_sequences(good, keys, kept, lengths, rules),
        quarantine=quarantine.sort_by(
            [(name, "ascending") for name in (REASON, ROW_DIGEST, "tie_breaker")]
        ),
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


def _repeats(keys: dict[str, np.ndarray], moment: np.ndarray) -> np.ndarray:
    """Index into REPEATS per row: kept, the same source row again, or the same user, item and time
    again.
    """
    repeated = np.zeros(len(moment), np.int8)
    same = ("user_id", "event_time", "item_id")
    # few: only these are looked at closely
    suspects = _shared(pack_rows([moment, keys["item_id"]]))
    rest = [name for name in keys if name not in (*same, "tie_breaker", ROW_DIGEST)]
    by_tie = ("tie_breaker", *rest, ROW_DIGEST)
    order = _sorted(keys, suspects, (*same, ROW_DIGEST, *by_tie))
    exact = _as_before(keys, (*same, ROW_DIGEST), order)
    repeated[order[exact]] = EXACT_DUPLICATE
    order = _sorted(keys, order[~exact], (*same, *by_tie))
    repeated[order[_as_before(keys, same, order)]] = KEY_DUPLICATE
    return repeated


def _shared(values: np.ndarray) -> np.ndarray:
    """The rows whose value another row has too."""
    ascending = np.sort(values)
    again = ascending[1:][ascending[1:] == ascending[:-1]]
    if len(again) == 0:
        return np.zeros(0, np.int64)
    place = np.minimum(np.searchsorted(again, values), len(again) - 1)
    return np.flatnonzero(again[place] == values)


def _sorted(keys: dict[str, np.ndarray], rows: np.ndarray, by: tuple[str, ...]) -> np.ndarray:
    return rows[argsort_rows([keys[name][rows] for name in by])]


def _as_before(
    keys: dict[str, np.ndarray], names: tuple[str, ...], order: np.ndarray
) -> np.ndarray:
    """[order] bool: the row agrees with the one before it in all of `names`."""
    again = np.ones(len(order), bool)
    again[:1] = False
    for name in names:
        values = keys[name][order]
        again[1:] &= values[1:] == values[:-1]
    return again


def _order(keys: dict[str, np.ndarray], moment: np.ndarray, repeated: np.ndarray) -> np.ndarray:
    """The rows that are no repeats by user and, within a user, in the order of the sequence."""
    order = argsort_rows([moment, keys["tie_breaker"], keys["item_id"]])
    if repeated.any():
        order = order[repeated[order] == 0]
    time, request = moment[order], keys["request_id"][order]
    if np.all((request[1:] == request[:-1]) | (time[1:] != time[:-1])):
        return order  # one request at a time
    place = np.arange(len(order))
    by_request = argsort_rows([time, request, place])
    begins = np.r_[
        True,
        (np.diff(time[by_request]) != 0) | (request[by_request[1:]] != request[by_request[:-1]]),
    ]
    first = np.empty_like(place)
    # place of the first row of each row's request
    first[by_request] = by_request[begins][np.cumsum(begins) - 1]
    return order[argsort_rows([first, place])]


def _run_lengths(values: np.ndarray) -> np.ndarray:
    """int64 [runs], of equal values that follow each other."""
    begins = np.flatnonzero(np.r_[True, values[1:] != values[:-1]][: len(values)])
    return np.diff(np.r_[begins, len(values)])


def _newest(lengths: np.ndarray, most: int) -> np.ndarray:
    """Which rows, sorted by user and time, are among the last `most` of their user, who has
    `lengths` rows.
    """
    from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(lengths.sum())
    return from_end <= most


def _sequences(
    good: pa.Table,
    keys: dict[str, np.ndarray],
    kept: np.ndarray,
    all_rows: np.ndarray,
    rules: LogRules,
) -> pa.Table:
    """SEQUENCE of the rows `kept`, in their order; `all_rows` counts each user's rows with the
    older ones.
    """
    user, time, request = (keys[name][kept] for name in ("user_id", "event_time", "request_id"))
    lengths = _run_lengths(user)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    starts = offsets[:-1]
    known, mask = _masks(good, rules)
    count = np.cumsum(
        np.r_[
            True, (user[1:] != user[:-1]) | (time[1:] != time[:-1]) | (request[1:] != request[:-1])
        ][: len(kept)]
    )
    values = {
        "item_id": keys["item_id"][kept],
        "event_time": time,
        "action_mask": mask[kept],
        "known_mask": known[kept],
        "watch_ms": _filled(good, "watch_ms", -1)[kept],
        "request_index": count - np.repeat(count[starts], lengths),
        "order_only": _filled(good, "order_only", False)[kept],
        **{name: _filled(good, name, -1)[kept] for name in rules.request_columns},
    }
    lists = {
        name: pa.LargeListArray.from_arrays(
            offsets, pa.array(values[name].astype(dtype.to_pandas_dtype()), dtype)
        )
        for name, dtype in sequence_lists(rules.request_columns).items()
    }
    scalars = {
        "user_id": user[starts],
        "user_bucket": keys[USER_BUCKET][kept[starts]],
        "first_position": all_rows - lengths,
    }
    return pa.table(scalars | lists, schema=sequence_schema(rules.request_columns))


def _masks(good: pa.Table, rules: LogRules) -> tuple[np.ndarray, np.ndarray]:
    """Known mask and action mask, int32 per row.

    An action that is null, or whose known bit is 0, is not known.
    """
    everything = (1 << len(rules.actions)) - 1
    known = _filled(good, "known_mask", everything).astype(np.int32)
    mask = np.zeros(good.num_rows, np.int32)
    for bit, name in enumerate(rules.actions):
        known &= ~(good[name].is_null().to_numpy().astype(np.int32) << bit)
        mask |= _filled(good, name, 0).astype(np.int32) << bit
    return known, mask & known


def _filled(rows: pa.Table, name: str, value: Any) -> np.ndarray:
    return rows[name].fill_null(value).to_numpy()
