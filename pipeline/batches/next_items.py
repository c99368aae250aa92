"""Next items: which events a history is asked for in training for retrieval, and from where.

    a target of a pass → the history row before its request → its item

Targets are those of examples.py, so the two kinds of training read the same rows. An event is asked
for from the last row before its request: never from its own row, nor from one shown beside it.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.batches.events import Events, offsets_of
from pipeline.batches.features import FeatureMaps
from pipeline.batches.labels import positive_rows


@dataclass(frozen=True, slots=True)
class NextItems:
    """P next items of B sequences, ordered by sequence."""

    num: np.ndarray  # int32 [B]
    visible: np.ndarray  # int32 [P]: history rows before it, 1 or more
    code: np.ndarray  # int64 [P]: row in the table of item ids, 1 or more
    weight: np.ndarray  # float32 [P]


def next_items(
    events: Events,
    rows: np.ndarray,
    offsets: np.ndarray,
    visible: np.ndarray,
    maps: FeatureMaps,
    bits: int,
    order_only_weight: float,
) -> NextItems:
    """The next items among the targets `rows`, int64 [C], of B sequences with `offsets` [B + 1].

    `visible`, int32 [C], is how many rows of its history lie before each target's request. A target
    without one is left out, as are events that do not count. Those of order_only rows weigh
    `order_only_weight`.

        rows          7 8 9      8 has none of the actions, 9 came with it in one request
        visible       4 5 5
        next items    7   9      asked for after 4 and 5 rows of the history
    """
    code = maps.item_codes[maps.item_rows(events.item_id[rows]), 0]
    counts = positive_rows(events.action_mask[rows], events.known_mask[rows], bits)
    kept = counts & (visible > 0) & (code > 0)

    weight = np.where(events.order_only[rows], order_only_weight, 1.0)
    kept_before = offsets_of(kept)
    return NextItems(
        num=np.diff(kept_before[offsets]).astype(np.int32),
        visible=visible[kept].astype(np.int32),
        code=code[kept].astype(np.int64),
        weight=weight[kept].astype(np.float32),
    )
