"""Bodies that the request's schema or the model refuses, and what the answer must name."""

import json

import httpx

ONE = {"user_id": 3, "candidates": [{"item_id": 1}]}
BAD_BODIES = {  # body -> status, place and value that the answer must name
    "malformed JSON": (b'{"user_id": 3, "candidates": [', 422, ["body", 30], "JSON decode error"),
    "not UTF-8": (b"{\xff}", 400, None, "parsing the body"),
    "nothing": (b"", 422, ["body"], "required"),
    "a list": (b"[1]", 422, ["body"], "dictionary"),
    "nested deeply": (b"[" * 100_000, 400, None, "parsing the body"),
    "a number of 5,000 digits": (
        b'{"user_id": 1' + b"0" * 5000 + b"}",
        400,
        None,
        "parsing the body",
    ),
    "NaN": (b'{"user_id": NaN, "candidates": [{"item_id": 1}]}', 422, ["body", "user_id"], "nan"),
    "a lone surrogate": (
        b'{"user_id": 3, "candidates": [{"item_id": "\\ud800"}]}',
        422,
        None,
        "ud800",
    ),
    "a lone surrogate for a task": (
        b'{"user_id": 3, "order_by": "\\ud800", "candidates": [{"item_id": 1}]}',
        422,
        ["body", "order_by"],
        "ud800",
    ),
    "a lone surrogate for a column": (
        b'{"user_id": 3, "request_features": {"\\ud800": 1}, "candidates": [{"item_id": 1}]}',
        422,
        None,
        "request_features",
    ),
    "a lone surrogate for an action": (
        b'{"history": [{"item_id": 1, "event_time": 1, "actions": {"\\ud800": true}}],'
        b' "candidates": [{"item_id": 1}]}',
        422,
        None,
        "actions",
    ),
    "no candidates": (
        json.dumps({**ONE, "candidates": []}).encode(),
        422,
        ["body", "candidates"],
        "at least 1",
    ),
    "10,001 candidates": (
        json.dumps({**ONE, "candidates": [{"item_id": 1}] * 10_001}).encode(),
        422,
        ["body", "candidates"],
        "10001",
    ),
    "candidates missing": (b'{"user_id": 3}', 422, ["body", "candidates"], "required"),
    "first_position without history": (
        json.dumps({**ONE, "first_position": 3}).encode(),
        422,
        ["body"],
        "first_position belongs to history",
    ),
    "no history at all": (b'{"candidates": [{"item_id": 1}]}', 422, ["body"], "got neither"),
    "a misspelt field": (json.dumps({**ONE, "userid": 4}).encode(), 422, ["body", "userid"], "4"),
    "text for a number": (
        json.dumps({**ONE, "user_id": "3"}).encode(),
        422,
        ["body", "user_id"],
        "3",
    ),
    "a negative item": (b'{"user_id": 3, "candidates": [{"item_id": -1}]}', 422, None, "-1"),
    "an item beyond int64": (
        b'{"user_id": 3, "candidates": [{"item_id": 9223372036854775808}]}',
        422,
        None,
        "9223",
    ),
    "seconds for ms": (
        json.dumps({**ONE, "request_time_ms": 1_651_500_000}).encode(),
        422,
        ["body", "request_time_ms"],
        "1651500000",
    ),
    "an unknown request column": (
        json.dumps({**ONE, "request_features": {"tap": 1}}).encode(),
        422,
        ["body", "request_features"],
        "tap",
    ),
    "an unknown task": (
        json.dumps({**ONE, "order_by": "is_sold"}).encode(),
        422,
        ["body", "order_by"],
        "is_sold",
    ),
    "5 MB": (b" " * 5_000_000, 413, ["body"], "5000000 bytes"),
}


def check_refused(answer: httpx.Response, status: int, loc: list | None, said: str) -> None:
    assert answer.status_code == status, answer.text
    assert said.lower() in answer.text.lower()
    if loc is not None:
        assert loc in [entry["loc"] for entry in answer.json()["detail"]]
