"""The rows of a bucket → its users' sequences, in one vectorised pass and without Ray.

Duplicates, the order within a user, the cap, requests and masks are decided here; which rows are
good at all, in pipeline/logs/cleaning.py.

Rows are ordered by several columns at once: the columns are packed into one 64-bit key as long as
their ranges leave room, and such a key is sorted by NumPy's vectorised sort. `np.lexsort`, which
sorts once per column, takes about ten times as long on logs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.logs.cleaning import REASON, SOURCE_ROW, USER_BUCKET, LogRules
from pipeline.schema import LOG_REQUIRED, ROW_DIGEST

# why a row is left out, by a code per row
REPEATS = np.array(["", "exact_duplicate", "key_duplicate"], object)
EXACT_DUPLICATE, KEY_DUPLICATE = 1, 2
KEY_BITS = 63
LAST_KEY = np.iinfo(np.int64).max


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
        field.name: _sort_key(good, field.name)
        for field in rules.schema
        if field.name not in (REASON, SOURCE_ROW)
    }
    moment = rank_rows([keys["user_id"], keys["event_time"]])  # both sorts below begin with it
    repeated = _find_repeats(keys, moment)
    order = _sequence_order(keys, moment, repeated)

    # the newest rows of each user
    lengths = _run_lengths(keys["user_id"][order])
    kept = order[_are_newest(lengths, max_rows_per_user)]

    # what is left out joins the broken rows
    doubles = np.flatnonzero(repeated)
    left_out = good.take(pa.array(doubles))
    reasons = pa.array(REPEATS[repeated[doubles]], pa.string())
    left_out = left_out.set_column(
        left_out.schema.get_field_index(REASON), rules.schema.field(REASON), reasons
    )
    quarantine = pa.concat_tables([broken, left_out]).drop_columns([USER_BUCKET])
    by = [(name, "ascending") for name in (REASON, ROW_DIGEST, "tie_breaker")]

    return BuiltBucket(
        sequences=_as_sequences(good, keys, kept, lengths, rules),
        quarantine=quarantine.sort_by(by),
        rows_in=rows.num_rows,
        rows_capped=len(order) - len(kept),
        nulls={
            field.name: (rows if field.name in LOG_REQUIRED else good)[field.name].null_count
            for field in rules.events.log_schema()
        },
    )


# Repeats and order -----------------------------------------------------------


def _sort_key(rows: pa.Table, name: str) -> np.ndarray:
    """A column as integers to sort and compare by; null sorts last.

    Of a float the bits, turned so that they compare as the numbers do:

        value       -2.5   -0.0    0.0    2.5   null
        key        small      0      0  large   last
    """
    column = rows[name]
    if pa.types.is_floating(column.type):
        # adding 0.0 makes -0.0 and 0.0 one value
        bits = (column.fill_null(0).to_numpy() + 0.0).view(np.int64)
        key = np.where(bits < 0, bits ^ LAST_KEY, bits)
        return np.where(column.is_null().to_numpy(), LAST_KEY, key)

    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    last = np.iinfo(column.type.to_pandas_dtype()).max
    return column.fill_null(last).to_numpy()


def _find_repeats(keys: dict[str, np.ndarray], moment: np.ndarray) -> np.ndarray:
    """Index into REPEATS per row: kept, the same source row again, or the same user, item and time
    again.

        user, time, item    a  a  a  b      in the order of tie_breaker, then of all other columns
        row_digest          7  7  9  7
        repeated            0  1  2  0
    """
    repeated = np.zeros(len(moment), np.int8)
    same = ("user_id", "event_time", "item_id")
    # few: only these are looked at closely
    suspects = _shared_rows(pack_rows([moment, keys["item_id"]]))

    others = [name for name in keys if name not in (*same, "tie_breaker", ROW_DIGEST)]
    by_tie = ("tie_breaker", *others, ROW_DIGEST)

    # the same source row again
    order = _sort_rows(keys, suspects, (*same, ROW_DIGEST, *by_tie))
    exact = _equal_the_one_before(keys, (*same, ROW_DIGEST), order)
    repeated[order[exact]] = EXACT_DUPLICATE

    # another row of the same event
    order = _sort_rows(keys, order[~exact], (*same, *by_tie))
    again = _equal_the_one_before(keys, same, order)
    repeated[order[again]] = KEY_DUPLICATE
    return repeated


def _shared_rows(values: np.ndarray) -> np.ndarray:
    """The rows whose value another row has too."""
    ascending = np.sort(values)
    again = ascending[1:][ascending[1:] == ascending[:-1]]
    if len(again) == 0:
        return np.zeros(0, np.int64)
    place = np.minimum(np.searchsorted(again, values), len(again) - 1)
    return np.flatnonzero(again[place] == values)


def _sort_rows(keys: dict[str, np.ndarray], rows: np.ndarray, by: tuple[str, ...]) -> np.ndarray:
    return rows[argsort_rows([keys[name][rows] for name in by])]


def _equal_the_one_before(
    keys: dict[str, np.ndarray], names: tuple[str, ...], order: np.ndarray
) -> np.ndarray:
    """[order] bool: the row agrees with the one before it in all of `names`."""
    again = np.ones(len(order), bool)
    again[:1] = False
    for name in names:
        values = keys[name][order]
        again[1:] &= values[1:] == values[:-1]
    return again


def _sequence_order(
    keys: dict[str, np.ndarray], moment: np.ndarray, repeated: np.ndarray
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
    if repeated.any():
        order = order[repeated[order] == 0]

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
    return rows[name].fill_null(value).to_numpy()


# Packed keys -----------------------------------------------------------------


def argsort_rows(columns: Sequence[np.ndarray]) -> np.ndarray:
    """The rows by the first column, then by the second, and so on.

    Rows equal in all of them come in any order.
    """
    return np.argsort(pack_rows(columns))


def rank_rows(columns: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [rows]: the number of different smaller rows.

    Equal rows share a rank, and ranks have no gaps.

        columns  (2, 5)  (1, 9)  (2, 5)  (2, 7)
        rank     1       0       1       2
    """
    return _rank_values(pack_rows(columns))


def pack_rows(columns: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [rows] that compares as the rows do: equal where all columns agree, smaller where they
    come first.

        columns  10 11 13   counted from the smallest   0 1 3      2 bits
                  7  7  6                               1 1 0      1 bit
        key                 first << 1 | second         1 3 6
    """
    key, bits = np.zeros(len(columns[0]), np.int64), 0
    if len(key) == 0:
        return key

    for column in columns:
        digit, width = _as_digit(column)
        if bits + width > KEY_BITS:
            key = _rank_values(key)
            bits = int(key.max()).bit_length()
        if bits + width > KEY_BITS:
            digit = _rank_values(digit)
            width = int(digit.max()).bit_length()  # two ranks fit: there are fewer than 2**31 rows
        key = key << width | digit if bits else digit
        bits += width
    return key


def _as_digit(column: np.ndarray) -> tuple[np.ndarray, int]:
    """The column counted from its smallest value, int64 from 0 on, and the bits that it needs."""
    low, high = int(column.min()), int(column.max())
    width = (high - low).bit_length()
    if width <= KEY_BITS and low >= -(2**63) and high < 2**63:
        return column.astype(np.int64, copy=False) - low, width
    ranks = _rank_values(column)
    return ranks, int(ranks.max()).bit_length()


def _rank_values(values: np.ndarray) -> np.ndarray:
    """int64 [rows]: the number of different smaller values."""
    order = np.argsort(values)
    values = values[order]
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.cumsum(np.r_[False, values[1:] != values[:-1]])
    return ranks
