"""Rows as clients post them, events and the history of a rank request, as SEQUENCE's columns."""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from pipeline.schema import WATCH_MS, EventColumns
from serve_app.ids import NO_REQUEST, TextId, own_id
from serve_app.schemas import Event, PostedRow, Refusal, TextValue

# event_time, item_id, request_id, watch_ms; then actions, request_features, outcomes as JSON
LoggedRow = tuple[int, int, int | None, int | None, str, str, str]
Value = TypeVar("Value")


def posted_columns(rows: Sequence[PostedRow], columns: EventColumns) -> dict[str, np.ndarray]:
    """Flat columns of SEQUENCE from posted rows, in the order given.

    An action, a request column or an outcome that is not among `columns` is left out.

        actions = (is_click, is_like)        known_mask   action_mask
        {}                                         0b00          0b00
        {is_click: false}                          0b01          0b00
        {is_click: false, is_like: true}           0b11          0b10
    """
    values: dict[str, list[Any]] = defaultdict(list)

    for row in rows:
        known_mask, action_mask = action_masks(row.actions, columns.actions)
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

    dtypes = _column_types(columns)
    flat = {}
    for name, found in values.items():
        flat[name] = np.array(found, dtypes.get(name, np.int64))
    return flat


def action_masks(did: Mapping[str, bool], actions: Sequence[str]) -> tuple[int, int]:
    """The bits of the actions that are known, and of those that happened."""
    known_mask, action_mask = 0, 0
    for bit, name in enumerate(actions):
        if name not in did:
            continue

        known_mask |= 1 << bit
        if did[name]:
            action_mask |= 1 << bit
    return known_mask, action_mask


def _column_types(columns: EventColumns) -> dict[str, type]:
    """The types of the columns that are not int64."""
    types: dict[str, type] = {}
    for column in columns.outcomes:
        if column.is_float:
            types[column.name] = np.float64
    return types


def event_columns(events: Sequence[Event], columns: EventColumns) -> dict[str, np.ndarray]:
    """`posted_columns` of events, and their `request_id`: NO_REQUEST where there is none.

    Rows of one time without one are one request, as in the builder.
    """
    flat = posted_columns(events, columns)
    flat["request_id"] = _fill_unknown([event.request_id for event in events], NO_REQUEST)
    return flat


def logged_columns(rows: Sequence[LoggedRow], columns: EventColumns) -> dict[str, np.ndarray]:
    """`event_columns` of events as a log has them, in a tenth of the time.

    Few of the texts differ, and each is read once.
    """
    event_time, item_id, request_id, watch_ms, actions, features, outcomes = zip(*rows, strict=True)
    flat = {
        "item_id": np.array(item_id, np.int64),
        "event_time": np.array(event_time, np.int64),
        "request_id": _fill_unknown(request_id, NO_REQUEST),
    }

    masks = _read_each(actions, lambda did: action_masks(did, columns.actions))
    known_mask, action_mask = zip(*masks, strict=True)
    flat["known_mask"] = np.array(known_mask, np.int64)
    flat["action_mask"] = np.array(action_mask, np.int64)

    for column in columns.request_columns:
        values = _read_value(features, column.name)
        flat[column.name] = _fill_unknown(values, column.unknown)

    dtypes = _column_types(columns)
    for column in columns.outcomes:
        is_field = column.name == WATCH_MS.name  # of its own, not among the outcomes
        values = watch_ms if is_field else _read_value(outcomes, column.name)
        dtype = dtypes.get(column.name, np.int64)
        flat[column.name] = _fill_unknown(values, column.unknown, dtype)
    return flat


def _read_value(texts: Sequence[str], name: str) -> list[Any]:
    """The value of this name in each JSON text, None where it has none."""
    return _read_each(texts, lambda found: found.get(name))


def _read_each(texts: Sequence[str], take: Callable[[dict[str, Any]], Value]) -> list[Value]:
    """`take` of the object in each JSON text."""
    values: dict[str, Value] = {}
    for text in set(texts):
        values[text] = take(json.loads(text))
    return [values[text] for text in texts]


def _fill_unknown(
    values: Sequence[float | None], unknown: float | None, dtype: type = np.int64
) -> np.ndarray:
    filled = [unknown if value is None else value for value in values]
    return np.array(filled, dtype)


def refuse_other_kind(
    loc: Sequence[str | int], value: int | None, column: str, text_ids: Collection[str]
) -> Refusal | None:
    """The refusal of an id that is text where `column` has integers, or the other way round."""
    if value is None or isinstance(value, TextId) == (column in text_ids):
        return None
    wanted = "text" if column in text_ids else "an integer"
    rule = f"must be {wanted}, as {column} is in the published sequences"
    return Refusal.of(loc, rule, own_id(value))


def refuse_text_values(
    loc: Sequence[str | int], values: Mapping[str, int], columns: EventColumns
) -> Refusal | None:
    """The refusal of a text for a request column that holds numbers."""
    for name, value in values.items():
        if isinstance(value, TextValue) and name not in columns.text_request:
            rule = "must be an integer, as the column has numbers in the logs"
            return Refusal.of([*loc, name], rule, value.text)
    return None


def find_refused_outcome(
    loc: Sequence[str | int], row: PostedRow, columns: EventColumns
) -> Refusal | None:
    """The first outcome of `row`, which lies at `loc`, that the sequences have no place for."""
    known = {}
    for column in columns.declared:
        known[column.name] = column

    for name, value in row.outcomes.items():
        where = [*loc, "outcomes"]
        if name == WATCH_MS.name:
            return Refusal.of(where, "watch_ms is a field of its own", name)
        if name not in known:
            return Refusal.of(where, f"one of {list(known)}", name)

        rule = known[name].refusal(value)
        if rule is not None:
            return Refusal.of([*where, name], rule, value)
    return None
