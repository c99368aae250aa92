"""Rows of a bucket that repeat: the same source row again, or another row of the same event.

An *event* is a user, an item and a time. By `sequences.repeats` the rows of one event are merged
(`merge`), or the first of them is kept (`first`). What is merged, column by column:

    actions                unknown < false < true: the largest
    outcomes, as watch_ms  unknown < any number: the largest, or that of the last file
    request columns,       the one value that is known; a row with another known value contradicts
    request_id, order_only the rows before it, is left alone and goes to the quarantine

So logs with a row per action give one row per event, and a label that arrives late reaches its
event. Posted events follow the same rule (serve_app/history/merging.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.logs.cleaning import SOURCE_FILE
from pipeline.schema import ROW_DIGEST, EventColumns
from pipeline.sequences.packed_keys import argsort_rows, pack_rows

# why a row is not a row of its own in the sequences, by a code per row
REASONS = np.array(
    ["", "exact_duplicate", "key_duplicate", "contradicts_its_event", "merged"], object
)
EXACT_DUPLICATE, KEY_DUPLICATE, CONTRADICTION, MERGED = 1, 2, 3, 4
EVENT = ("user_id", "event_time", "item_id")


@dataclass(frozen=True)
class RepeatRule:
    """What becomes of the rows of one event."""

    merge: bool = True  # False: the first of them is kept
    # place of each file among all, by `source_file`: outcomes are those of the last; None: the
    # largest, wherever it comes from
    file_order: Mapping[int, int] | None = None


@dataclass(frozen=True)
class Repeats:
    """The rows that repeat others, and the rows of events that have several."""

    codes: np.ndarray  # int8 per row, an index into REASONS
    # the rows of those events, event after event, the row that is kept first
    rows: np.ndarray  # int64 [R]
    event: np.ndarray  # int64 [R], counted from 0


def find_repeats(keys: dict[str, np.ndarray], moment: np.ndarray) -> Repeats:
    """Exact duplicates and key duplicates, the latter as under `sequences.repeats: first`.

    user, time, item    a  a  a  b      in the order of tie_breaker, then of all other columns
    row_digest          7  7  9  7
    codes               0  1  2  0
    rows, event         0, 2 are the rows of event 0
    """
    codes = np.zeros(len(moment), np.int8)
    # few: only these are looked at closely
    suspects = _shared_rows(pack_rows([moment, keys["item_id"]]))

    others = [name for name in keys if name not in (*EVENT, "tie_breaker", ROW_DIGEST, SOURCE_FILE)]
    by_tie = ("tie_breaker", *others, ROW_DIGEST, SOURCE_FILE)

    # the same source row again
    order = _sort_rows(keys, suspects, (*EVENT, ROW_DIGEST, *by_tie))
    exact = _equal_the_one_before(keys, (*EVENT, ROW_DIGEST), order)
    codes[order[exact]] = EXACT_DUPLICATE

    # another row of the same event
    order = _sort_rows(keys, order[~exact], (*EVENT, *by_tie))
    again = _equal_the_one_before(keys, EVENT, order)
    codes[order[again]] = KEY_DUPLICATE

    # events that have one row left are no repeats
    event = np.cumsum(~again) - 1
    several = np.bincount(event, minlength=1)[event] > 1 if len(event) else again
    _, event = np.unique(event[several], return_inverse=True)
    return Repeats(codes, order[several], event)


def merge_repeats(
    good: pa.Table, repeats: Repeats, columns: EventColumns, rule: RepeatRule
) -> tuple[pa.Table, np.ndarray]:
    """The table with each event's values in the row that is kept, and the codes of all rows.

    row        click  buy   tab   watch_ms
    0          1      null  0     null
    1          null   1     null  700
    2          0      0     1     900         tab 1 contradicts tab 0 of the event
    row 0 now  1      1     0     700         codes 0, MERGED, CONTRADICTION
    """
    if len(repeats.rows) == 0:
        return good, repeats.codes

    kept = repeats.rows[_event_begins(repeats.event)]
    changed: dict[str, pa.Array] = {}
    agrees = np.ones(len(repeats.rows), bool)

    # one column after the other: a row that has contradicted once says nothing about the next
    context = [*columns.request, "request_id", "order_only"]
    for name in context:
        value, known = _values(good, name, repeats.rows)
        if name == "order_only":
            known[:] = True  # none is "no"
        changed[name], agrees = _only_known(value, known, agrees, repeats.event)

    known, positive = _known_and_positive(good, repeats.rows, columns.actions)
    known[~agrees], positive[~agrees] = 0, 0

    begins = np.flatnonzero(_event_begins(repeats.event))
    known = np.bitwise_or.reduceat(known, begins)
    positive = np.bitwise_or.reduceat(positive, begins)
    for bit, name in enumerate(columns.actions):
        changed[name] = pa.array(positive >> bit & 1, mask=known >> bit & 1 == 0)
    changed["known_mask"] = pa.nulls(len(kept), pa.int32())  # nulls say it all

    files = None
    if rule.file_order is not None:
        files = _file_places(good[SOURCE_FILE].take(pa.array(repeats.rows)), rule.file_order)
    for column in columns.outcomes:
        value, known = _values(good, column.name, repeats.rows)
        changed[column.name] = _largest(value, known & agrees, repeats.event, files)

    codes = repeats.codes.copy()
    later = codes[repeats.rows] == KEY_DUPLICATE
    codes[repeats.rows[later]] = np.where(agrees[later], MERGED, CONTRADICTION)
    return _replace_rows(good, kept, changed), codes


def _event_begins(event: np.ndarray) -> np.ndarray:
    """[R] bool: the first row of its event."""
    return np.diff(event, prepend=-1) > 0


def _values(good: pa.Table, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A column's values in these rows, 0 where there is none, and where there is one."""
    column = good[name].take(pa.array(rows))
    known = column.is_valid().to_numpy()
    zero = pa.scalar(0).cast(column.type)
    return column.fill_null(zero).to_numpy(), known


def _only_known(
    value: np.ndarray, known: np.ndarray, agrees: np.ndarray, event: np.ndarray
) -> tuple[pa.Array, np.ndarray]:
    """The first known value of each event, null where there is none, and the rows that agree.

    event        0     0  0  1  1
    value        null  4  5  7  7
    of the event 4           7
    agrees       x     x  .  x  x
    """
    num_events = int(event[-1]) + 1
    of_event = np.zeros(num_events, value.dtype)
    found = np.zeros(num_events, bool)

    telling = np.flatnonzero(known & agrees)
    first = telling[_event_begins(event[telling])]
    of_event[event[first]] = value[first]
    found[event[first]] = True

    contradicts = known & (value != of_event[event])
    return pa.array(of_event, mask=~found), agrees & ~contradicts


def _known_and_positive(
    good: pa.Table, rows: np.ndarray, actions: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Bits per row, int64 [R]: the actions that are known, and those of them that happened."""
    everything = (1 << len(actions)) - 1
    mask, has_mask = _values(good, "known_mask", rows)
    known = np.where(has_mask, mask, everything).astype(np.int64)
    positive = np.zeros(len(rows), np.int64)

    for bit, name in enumerate(actions):
        did, told = _values(good, name, rows)
        known &= ~((~told).astype(np.int64) << bit)
        positive |= did.astype(np.int64) << bit
    return known, positive & known


def _largest(
    value: np.ndarray, known: np.ndarray, event: np.ndarray, files: np.ndarray | None
) -> pa.Array:
    """The largest known value of each event, null where there is none; with `files`, the place of
    each row's file, only those of its last file count.

        event              0    0    0     1
        value              700  900  null  null
        file               1    0    2     0
        largest            900             null
        of the last file   700             null
    """
    begins = np.flatnonzero(_event_begins(event))
    if files is not None:
        place = np.where(known, files, -1)
        known = known & (place == np.maximum.reduceat(place, begins)[event])

    least = -np.inf if value.dtype.kind == "f" else np.iinfo(value.dtype).min
    found = np.maximum.reduceat(np.where(known, value, least), begins)
    absent = ~np.logical_or.reduceat(known, begins)
    return pa.array(np.where(absent, 0, found), mask=absent)


def _file_places(source_files: pa.ChunkedArray, file_order: Mapping[int, int]) -> np.ndarray:
    """The place of each row's file among all."""
    unique, place = np.unique(source_files.fill_null(0).to_numpy(), return_inverse=True)
    places = np.array([file_order.get(int(key), 0) for key in unique])
    return places[place]


def _replace_rows(good: pa.Table, rows: np.ndarray, changed: Mapping[str, pa.Array]) -> pa.Table:
    """The table with other values in these rows; `changed` gives them in the order of `rows`."""
    ascending = pa.array(np.argsort(rows))
    chosen = np.zeros(good.num_rows, bool)
    chosen[rows] = True
    mask = pa.array(chosen)

    for name, values in changed.items():
        place = good.schema.get_field_index(name)
        field = good.schema.field(place)
        values = values.cast(field.type).take(ascending)
        column = pc.call_function("replace_with_mask", [good[name].combine_chunks(), mask, values])
        good = good.set_column(place, field, column)
    return good


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
