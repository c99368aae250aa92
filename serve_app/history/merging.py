"""What two postings of one event come to: the rule of the builder for rows of one event
(pipeline/sequences/repeats.py).

An exposure may be posted when it happens and its outcome later. Merging is the same in any order
and any number of times, so that a client may send again whatever it is not sure of.
"""

from collections.abc import Mapping
from typing import TypeVar

from serve_app.schemas import Event

Value = TypeVar("Value", int, float)


def merge_postings(kept: Event, posted: Event) -> Event | None:
    """Both as one event; None where they contradict each other.

        kept      {}                     is_click true       tab 1
        posted    is_click true          is_click false      tab 2
        merged    is_click true          is_click true       None

    An action is unknown < false < true, so a "false" after a "true" changes nothing. Of numbers the
    largest stays. A request column or the request_id contradicts where both know it and differ.
    """
    both = kept.request_features.keys() & posted.request_features.keys()
    for name in both:
        if kept.request_features[name] != posted.request_features[name]:
            return None
    if None not in (kept.request_id, posted.request_id) and kept.request_id != posted.request_id:
        return None

    actions = dict(kept.actions)
    for name, did in posted.actions.items():
        actions[name] = actions.get(name, False) or did

    return kept.model_copy(
        update={
            "actions": actions,
            "request_features": kept.request_features | posted.request_features,
            "request_id": posted.request_id if kept.request_id is None else kept.request_id,
            "watch_ms": _larger(kept.watch_ms, posted.watch_ms),
            "outcomes": _larger_each(kept.outcomes, posted.outcomes),
        }
    )


def _larger(one: Value | None, other: Value | None) -> Value | None:
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)


def _larger_each(kept: Mapping[str, float], posted: Mapping[str, float]) -> dict[str, float]:
    merged = dict(kept)
    for name, value in posted.items():
        merged[name] = max(merged.get(name, value), value)
    return merged
