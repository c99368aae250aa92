"""Events as they are posted, and a log of them."""

import numpy as np

from serve_app.schemas import Event

START = 1_651_500_000_000
NUM_USERS = 12


def logged(rng: np.random.Generator, num: int, *, request_ids: bool) -> list[dict]:
    """LOG rows with many ties in time and unknown actions; (user, item, time) never twice."""
    rows: dict[tuple, dict] = {}
    for _ in range(num):
        user, item, time = (int(rng.integers(n)) for n in (NUM_USERS, 30, 25))
        row = {
            "user_id": user,
            "item_id": item,
            "event_time": START + 60_000 * time,
            "tab": int(rng.integers(3)),
        }
        row |= {
            name: int(rng.integers(2)) for name in ("is_click", "is_like") if rng.random() < 0.8
        }
        if rng.random() < 0.3:
            del row["tab"]
        if rng.random() < 0.5:
            row["watch_ms"] = int(rng.integers(10_000))
        if request_ids and rng.random() < 0.7:
            row["request_id"] = int(rng.integers(3))
        rows[user, item, time] = row
    return list(rows.values())


def event(row: dict) -> Event:
    """The row as a client posts it."""
    rest = dict(row)
    actions = {name: bool(rest.pop(name)) for name in ("is_click", "is_like") if name in rest}
    tab = {"tab": rest.pop("tab")} if "tab" in rest else {}
    if "request_id" in rest:
        rest["request_id"] = str(rest["request_id"])
    return Event(actions=actions, request_features=tab, **rest)
