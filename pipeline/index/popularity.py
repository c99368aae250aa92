"""How often and since when items occur in the logs, counted once when an index is built."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import IndexConfig, SourceConfig
from pipeline.schema import DAY_MS
from pipeline.sequences import arrow_lists, store


@dataclass(frozen=True, slots=True)
class ItemCounts:
    """Facts of the rows of N items."""

    popularity: np.ndarray  # int64 [N], rows of the popular days
    # float64 [N], ms UTC of the first row; infinite, so the newest of all, where there is none
    first_seen: np.ndarray


def count_items(
    sequence_dir: Path, item_ids: np.ndarray, end_ms: int, source: SourceConfig, cfg: IndexConfig
) -> ItemCounts:
    """Counts over the published rows before `end_ms`.

    Rows whose time is only an order count for nothing.

        rows of item 7, days before the end    9   3   1       popular_days 7
        popularity                                 1 + 1  = 2
        first_seen                             9 days before the end

    Args:
        item_ids: int64 [N], rising; rows of other items are passed over.
    """
    popularity = np.zeros(len(item_ids), np.int64)
    first_seen = np.full(len(item_ids), np.inf)
    popular_from = end_ms - int(cfg.popular_days * DAY_MS)
    bits = _action_bits(source, cfg)

    manifest = store.read_manifest(sequence_dir)
    for index in range(len(manifest.buckets)):
        table = store.read_bucket(sequence_dir, manifest, index)
        item_id = arrow_lists.flat_column(table, "item_id")
        time = arrow_lists.flat_column(table, "event_time")
        order_only = arrow_lists.flat_column(table, "order_only")

        place = np.searchsorted(item_ids, item_id)
        place = np.minimum(place, len(item_ids) - 1)
        counted = (time < end_ms) & ~order_only & (item_ids[place] == item_id)
        np.minimum.at(first_seen, place[counted], time[counted].astype(np.float64))

        popular = counted & (time >= popular_from)
        if bits:
            popular &= (arrow_lists.flat_column(table, "action_mask") & bits) != 0
        popularity += np.bincount(place[popular], minlength=len(item_ids))
    return ItemCounts(popularity, first_seen)


def _action_bits(source: SourceConfig, cfg: IndexConfig) -> int:
    """The bits of `popular_actions` in an action mask; 0: every row counts."""
    bits = 0
    for action in cfg.popular_actions:
        bits |= 1 << source.actions.index(action)
    return bits
