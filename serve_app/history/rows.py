"""Rows as clients post them, events and the history of a rank request, as SEQUENCE's columns."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.schema import WATCH_MS, EventColumns
from serve_app.schemas import PostedRow, Refusal


def posted_columns(rows: Sequence[PostedRow], columns: EventColumns) -> dict[str, np.ndarray]:
    """Flat columns of SEQUENCE from posted rows, in the order given.

    An action, a request column or an outcome that is not among `columns` is left out.

        actions = (is_click, is_like)        known_mask   action_mask
        {}                                         0b00          0b00
        {is_click: false}                          0b01          0b00
        {is_click: false, is_like: true}           0b11          0b10
    """
    bits = {action: 1 << bit for bit, action in enumerate(columns.actions)}
    values: dict[str, list[Any]] = defaultdict(list)

    for row in rows:
        known_mask, action_mask = 0, 0
        for name, did in row.actions.items():
            bit = bits.get(name, 0)
            known_mask |= bit
            if did:
                action_mask |= bit

        values["item_id"].append(row.item_id)
        values["event_time"].append(row.event_time)
        values["known_mask"].append(known_mask)
        values["action_mask"].append(action_mask)
        for column in columns.request_columns:
            value = row.request_features.get(column.name, column.unknown)
            values[column.name].append(value)
        for column in columns.outcomes:
            value = row.find_outcome(column.name)
            values[column.name].append(column.unknown if value is None else value)

    floats = {column.name for column in columns.outcomes if column.is_float}
    return {
        name: np.array(found, np.float64 if name in floats else np.int64)
        for name, found in values.items()
    }


def find_refused_outcome(
    loc: Sequence[str | int], row: PostedRow, columns: EventColumns
) -> Refusal | None:
    """The first outcome of `row`, which lies at `loc`, that the sequences have no place for."""
    known = {column.name: column for column in columns.declared}
    for name, value in row.outcomes.items():
        where = ["body", *loc, "outcomes"]
        if name == WATCH_MS.name:
            return Refusal.of(where, "watch_ms is a field of its own", name)
        if name not in known:
            return Refusal.of(where, f"one of {list(known)}", name)

        rule = known[name].refusal(value)
        if rule is not None:
            return Refusal.of([*where, name], rule, value)
    return None
