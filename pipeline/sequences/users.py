"""The rows of a bucket → its users' sequences, in one vectorised pass and without Ray.

The order within a user, the cap, requests and masks are decided here; which rows are good at all,
in pipeline/logs/cleaning.py, and what rows of one event come to, in repeats.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.logs.cleaning import REASON, SOURCE_FILE, SOURCE_ROW, USER_BUCKET, LogRules
from pipeline.schema import LOG_REQUIRED, ROW_DIGEST
from pipeline.sequences.packed_keys import argsort_rows, narrow_key, rank_rows, sort_key
from pipeline.sequences.repeats import MERGED, REASONS, RepeatRule, find_repeats, merge_repeats


@dataclass(frozen=True)
class BuiltBucket:
    """What the rows of one bucket became."""

    sequences: pa.Table  # SEQUENCE, sorted by user_id
    quarantine: pa.Table  # the rules' schema, without the bucket
    rows_in: int
    rows_merged: int  # into another row of their event
    rows_capped: int
    nulls: dict[str, int]  # by LOG column; of optional ones among the good rows


def build_bucket(
    rows: pa.Table, rules: LogRules, max_rows_per_user: int, repeat_rule: RepeatRule
) -> BuiltBucket:
    """Every user of one bucket at once: `rows` in any order, as `normalise` gives them.

    Order within a user: event_time, then tie_breaker where there is one, then item_id; requests of
    one time stay together, in the order of their first rows. A request is what shares a request_id
    *and* a time.
    """
    broken, good = rows.slice(0, 0), rows
    if rows[REASON].null_count < rows.num_rows:
        broken, good = rows.filter(rows[REASON].is_valid()), rows.filter(rows[REASON].is_null())
    nulls = {
        field.name: (rows if field.name in LOG_REQUIRED else good)[field.name].null_count
        for field in rules.events.log_schema()
    }

    keys = {
        field.name: sort_key(good, field.name)
        for field in rules.schema
        if field.name not in (REASON, SOURCE_ROW)
    }
    moment = rank_rows([keys["user_id"], keys["event_time"]])  # both sorts below begin with it

    # rows that repeat others: merged, or left out
    sort_keys = keys | {"item_id": narrow_key(keys["item_id"])}
    repeats = find_repeats(sort_keys, moment)
    codes = repeats.codes
    if repeat_rule.merge:
        good, codes = merge_repeats(good, repeats, rules.events, repeat_rule)
        keys["request_id"] = sort_keys["request_id"] = sort_key(good, "request_id")
    quarantine = pa.concat_tables([broken, _left_out(good, codes, rules)])
    by = [(name, "ascending") for name in (REASON, ROW_DIGEST, "tie_breaker", SOURCE_FILE)]

    # the newest rows of each user
    order = _sequence_order(sort_keys, moment, codes)
    lengths = _run_lengths(keys["user_id"][order])
    kept = order[_are_newest(lengths, max_rows_per_user)]

    return BuiltBucket(
        sequences=_as_sequences(good, keys, kept, lengths, rules),
        quarantine=quarantine.drop_columns([USER_BUCKET]).sort_by(by),
        rows_in=rows.num_rows,
        rows_merged=int((codes == MERGED).sum()),
        rows_capped=len(order) - len(kept),
        nulls=nulls,
    )


def _left_out(good: pa.Table, codes: np.ndarray, rules: LogRules) -> pa.Table:
    """The rows that repeat others and were not merged, with the reason."""
    doubles = np.flatnonzero((codes != 0) & (codes != MERGED))
    reasons = pa.array(REASONS[codes[doubles]], pa.string())
    place = rules.schema.get_field_index(REASON)
    return good.take(pa.array(doubles)).set_column(place, rules.schema.field(REASON), reasons)


# Order -----------------------------------------------------------------------


def _sequence_order(
    keys: dict[str, np.ndarray], moment: np.ndarray, codes: np.ndarray
) -> np.ndarray:
    """The rows that are no repeats by user and, within a user, in the order of the sequence.

    Requests of one time may lie mixed by tie_breaker and item; each comes together at the place of
    its first row:

        place (time, tie, item)   0  1  2  3  4  5
        time                      1  1  1  1  2  2
        request_id                A  B  A  B  A  A
        first row of the request  0  1  0  1  4  4
        order                     0  2  1  3  4  5
    """
    order = argsort_rows([moment, keys["tie_breaker"], keys["item_id"]])
    if codes.any():
        order = order[codes[order] == 0]

    time, request = moment[order], keys["request_id"][order]
    one_at_a_time = (request[1:] == request[:-1]) | (time[1:] != time[:-1])
    if np.all(one_at_a_time):
        return order

    # the rows by request, and where each request begins among them
    place = np.arange(len(order))
    by_request = argsort_rows([time, request, place])
    other_time = np.diff(time[by_request]) != 0
    other_request = request[by_request[1:]] != request[by_request[:-1]]
    begins = np.r_[True, other_time | other_request]

    # the place of the first row of each row's request
    number = np.cumsum(begins) - 1
    first = np.empty_like(place)
    first[by_request] = by_request[begins][number]
    return order[argsort_rows([first, place])]


def _run_lengths(values: np.ndarray) -> np.ndarray:
    """int64 [runs], of equal values that follow each other.

    values   a a a b b a
    lengths  3 2 1
    """
    begins = np.flatnonzero(_run_begins(values))
    return np.diff(np.r_[begins, len(values)])


def _run_begins(*columns: np.ndarray) -> np.ndarray:
    """[rows] bool: the row differs from the one before it in one of the columns."""
    num_rows = len(columns[0])
    begins = np.zeros(num_rows, bool)
    begins[:1] = True
    for values in columns:
        begins[1:] |= values[1:] != values[:-1]
    return begins


def _are_newest(lengths: np.ndarray, most: int) -> np.ndarray:
    """[rows] bool: the row is among the last `most` of its user, who has `lengths` rows.

    Rows are sorted by user and time.

        lengths   3 2         most = 2
        rows      a a a b b
        from end  3 2 1 2 1
        newest    . x x x x
    """
    from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(lengths.sum())
    return from_end <= most


# The rows as lists -----------------------------------------------------------


def _as_sequences(
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

    known, mask = _action_masks(good, rules)
    count = np.cumsum(_run_begins(user, time, request))  # of requests, over all users

    values = {
        "item_id": keys["item_id"][kept],
        "event_time": time,
        "action_mask": mask[kept],
        "known_mask": known[kept],
        "request_index": count - np.repeat(count[starts], lengths),
    }
    unknown = rules.events.unknown_values()
    lists = {}
    for name, dtype in rules.events.sequence_lists().items():
        flat = values[name] if name in values else _filled(good, name, unknown[name])[kept]
        flat = pa.array(flat.astype(dtype.to_pandas_dtype()), dtype)
        lists[name] = pa.LargeListArray.from_arrays(offsets, flat)

    scalars = {
        "user_id": user[starts],
        "user_bucket": keys[USER_BUCKET][kept[starts]],
        "first_position": all_rows - lengths,
    }
    return pa.table(scalars | lists, schema=rules.events.sequence_schema())


def _action_masks(good: pa.Table, rules: LogRules) -> tuple[np.ndarray, np.ndarray]:
    """Known mask and action mask, int32 per row.

    An action that is null, or whose known bit is 0, is not known.

        click, like (bits 0, 1)   1, 0    1, null    0, 1
        known_mask of the row     null    null       1
        known                     3       1          1
        mask                      1       1          0
    """
    everything = (1 << len(rules.actions)) - 1
    known = _filled(good, "known_mask", everything).astype(np.int32)
    mask = np.zeros(good.num_rows, np.int32)
    for bit, name in enumerate(rules.actions):
        known &= ~(good[name].is_null().to_numpy().astype(np.int32) << bit)
        mask |= _filled(good, name, 0).astype(np.int32) << bit
    return known, mask & known


def _filled(rows: pa.Table, name: str, value: Any) -> np.ndarray:
    column = rows[name]
    if column.null_count == 0:
        return column.to_numpy()
    if column.null_count == len(column):
        return np.full(len(column), value, np.dtype(column.type.to_pandas_dtype()))
    return column.fill_null(value).to_numpy()
