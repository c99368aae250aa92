"""KuaiRand-Pure, the subset in data/kuairand_pure_subset: timed exposures and ordered histories
without times.

Each history item becomes a LOG row one second before the next, the last at `last_time_ms`. That is
an order and not a time (`order_only`), and only two actions are known of it: whether the item is in
the user's tail of liked and of long-viewed items. Both tails reach back at least as far as the
history does.
"""

from collections.abc import Container
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import SourceConfig, UserError
from pipeline.logs.cleaning import row_digest
from pipeline.logs.files import open_parquet, path_inside
from pipeline.logs.imported import ImportReport
from pipeline.schema import ROW_DIGEST

ACTIONS: tuple[str, ...] = (
    "is_click",
    "long_view",
    "is_like",
    "is_profile_enter",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
)
# the actions known of a history item
TAILS = {"is_like": "liked_items", "long_view": "long_view_items"}
# The other columns of items.parquet are counters over the whole month, test period included.
ITEM_COLUMNS = (
    "item_id",
    "author_id",
    "video_type",
    "upload_dt",
    "upload_type",
    "visible_status",
    "video_duration",
    "server_width",
    "server_height",
    "music_id",
    "music_type",
    "tag",
)
FILES = {
    "events": ("user_id", "item_id", "time_ms", "play_time_ms", "tab", *ACTIONS),
    "user_history": ("user_id", "last_time_ms", "history_items", *TAILS.values()),
    "items": ITEM_COLUMNS,
    "users": ("user_id",),
}
LOG = pa.schema(
    [
        *((name, pa.int64()) for name in ("user_id", "item_id", "event_time")),
        *((name, pa.int8()) for name in ACTIONS),
        ("tab", pa.int32()),
        ("watch_ms", pa.int64()),
        ("order_only", pa.bool_()),
        ("known_mask", pa.int32()),
        ("tie_breaker", pa.int64()),
        (ROW_DIGEST, pa.uint64()),
    ]
)
BAD_HISTORY = "history_not_before_first_event"


def plan(source: SourceConfig) -> dict[str, object]:
    """How many rows each file has, for `--dry-run`."""
    return {"source_rows": {name: _open(source, name).metadata.num_rows for name in FILES}}


def write_logs(source: SourceConfig, _seed: int, folder: Path) -> ImportReport:
    """The LOG, USER and ITEM tables and the quarantined histories, as Parquet under `folder`.

    Raises:
        UserError: an action that the dataset does not have, or a file that is missing or of other
            columns.
    """
    tables = {name: _open(source, name).read() for name in FILES}
    unknown = [name for name in source.actions if name not in ACTIONS]
    if unknown:
        raise UserError(f"source.actions: KuaiRand has no {unknown}; it has {list(ACTIONS)}")

    # a history that reaches into the events is no history
    events, histories = tables["events"], tables["user_history"]
    late = _not_before_first_event(histories, events)
    good = histories.filter(pa.array(~late))
    bad = histories.filter(pa.array(late))

    event_log = event_rows(events, source.actions)
    history_log, outside = history_rows(good, source.actions)
    log = pa.concat_tables([event_log, history_log])

    (folder / "log").mkdir()
    pq.write_table(log, folder / "log" / "part-00000.parquet", row_group_size=2**17)
    pq.write_table(tables["users"], folder / "users.parquet")
    pq.write_table(tables["items"].select(ITEM_COLUMNS), folder / "items.parquet")
    reasons = pa.array([BAD_HISTORY] * bad.num_rows, pa.string())
    pq.write_table(bad.append_column("reason", reasons), folder / "quarantine.parquet")

    bad_items = bad["history_items"].combine_chunks().flatten()
    return ImportReport(
        kind="kuairand",
        rows=log.num_rows,
        files=["log/part-00000.parquet"],
        quarantined={BAD_HISTORY: bad.num_rows} if bad.num_rows else {},
        counts={
            "history_items_quarantined": len(bad_items),
            "tail_items_outside_history": outside,
        },
    )


def event_rows(events: pa.Table, actions: tuple[str, ...]) -> pa.Table:
    """events.parquet as LOG rows; ties are broken by the row number."""
    rows = events.num_rows
    columns = {
        "user_id": events["user_id"],
        "item_id": events["item_id"],
        "event_time": events["time_ms"],
        **{name: events[name] for name in ACTIONS},
        "tab": events["tab"].cast(pa.int32()),
        "watch_ms": events["play_time_ms"].cast(pa.int64()),
        "order_only": pa.array(np.zeros(rows, bool)),
        "known_mask": pa.array(np.full(rows, _mask(actions, ACTIONS), np.int32)),
        "tie_breaker": pa.array(np.arange(rows)),
        ROW_DIGEST: pa.array(row_digest(events)),
    }
    return pa.table(columns, schema=LOG)


def history_rows(histories: pa.Table, actions: tuple[str, ...]) -> tuple[pa.Table, int]:
    """user_history.parquet as LOG rows, and how many tail items are in no history.

    Only the last item has a time; the others are counted back from it, a second each.

        history_items   [7 8 9]      last_time_ms 5000      liked_items [8]
        place           0 1 2
        event_time      3000 4000 5000
        is_like         0 1 0
    """
    owner, item = _flat(histories, "history_items")
    length = np.bincount(owner, minlength=histories.num_rows)
    begin = np.cumsum(length) - length
    place = np.arange(len(owner)) - np.repeat(begin, length)  # 0 is the oldest

    last = histories["last_time_ms"].to_numpy()
    num_later = length[owner] - 1 - place

    # of most actions nothing is known; the tails say which items had the others
    unknown = pa.nulls(len(owner), pa.int8())
    columns = dict.fromkeys(ACTIONS, unknown)
    pairs, outside = _pairs(owner, item), 0
    for action, tail in TAILS.items():
        tail_pairs = _pairs(*_flat(histories, tail))
        did = np.isin(pairs, tail_pairs)
        columns[action] = pa.array(did.astype(np.int8))

        in_history = np.isin(tail_pairs, pairs)
        outside += int((~in_history).sum())

    columns |= {
        "user_id": pa.array(histories["user_id"].to_numpy()[owner]),
        "item_id": pa.array(item),
        "event_time": pa.array(last[owner] - num_later * 1000),
        "tab": pa.nulls(len(owner), pa.int32()),
        "watch_ms": pa.nulls(len(owner), pa.int64()),
        "order_only": pa.array(np.ones(len(owner), bool)),
        "known_mask": pa.array(np.full(len(owner), _mask(actions, TAILS), np.int32)),
        "tie_breaker": pa.array(place),
    }
    log = pa.table({name: columns[name] for name in LOG.names if name != ROW_DIGEST})
    return log.append_column(ROW_DIGEST, pa.array(row_digest(log))).cast(LOG), outside


def _not_before_first_event(histories: pa.Table, events: pa.Table) -> np.ndarray:
    """bool [histories]: the history does not end before the user's first event.

    events       user 3 at 50, 40     user 7 at 60
    histories    3 until 39    3 until 40    5 until 99
    late         no            yes           no, there is no event of 5
    """
    user, row = np.unique(events["user_id"].to_numpy(), return_inverse=True)
    first = np.full(len(user), np.iinfo(np.int64).max)
    np.minimum.at(first, row, events["time_ms"].to_numpy())

    owner = histories["user_id"].to_numpy()
    place = np.searchsorted(user, owner).clip(max=len(user) - 1)
    has_events = user[place] == owner
    return has_events & (histories["last_time_ms"].to_numpy() >= first[place])


def _flat(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (row of the table, value), both int64.

    [7 8] null [9]     rows 0 0 2     values 7 8 9
    """
    lists = table[column].combine_chunks()
    lengths = lists.value_lengths().fill_null(0).to_numpy()
    row = np.repeat(np.arange(len(lists)), lengths)
    return row, lists.flatten().to_numpy().astype(np.int64)


def _pairs(owner: np.ndarray, item: np.ndarray) -> np.ndarray:
    """One number of each row and item."""
    return owner << 32 | item  # item ids are int32 in the files


def _mask(actions: tuple[str, ...], known: Container[str]) -> int:
    """The bits of the actions that are among `known`."""
    return sum(1 << bit for bit, name in enumerate(actions) if name in known)


def _open(source: SourceConfig, name: str) -> pq.ParquetFile:
    """The file of this name, with the columns that are read of it.

    Raises:
        UserError: it is not there, is no Parquet, or lacks a column.
    """
    path = path_inside(str(source.path), f"{name}.parquet")
    try:
        file = open_parquet(path)
    except UserError as error:
        raise UserError(f"source.path: {error}") from None

    missing = [column for column in FILES[name] if column not in file.schema_arrow.names]
    if missing:
        raise UserError(f"{path} has no columns {missing}; found {file.schema_arrow.names}")
    return file
