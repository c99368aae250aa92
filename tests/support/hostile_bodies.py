"""Bodies that were good once, and what no answer to them may show."""

import json
import random

import pyarrow as pa

from serve_app.schemas import EVENT_EXAMPLE, RANK_EXAMPLE

INSIDES = (
    "Traceback",
    'File "',
    "site-packages",
    "serve_app",
    "pipeline",
    ".py",
    "sqlite",
    "pydantic",
    "tmp/",
)

RECOMMEND = {
    "user_id": 3,
    "n": 4,
    "exclude": {"seen": False, "items": [12]},
    "filter": {"author": [1, 2], "name": "item 7"},
    "diversify": {"per": "author", "at_most": 1},
    "explain": True,
}


def malformed(rng: random.Random) -> bytes:
    """A body that was good once."""
    body = rng.choice(
        [
            RANK_EXAMPLE,
            {"events": [EVENT_EXAMPLE]},
            {"history": [], "candidates": [{"item_id": 1}]},
            RECOMMEND,
        ]
    )
    text = json.dumps(body).encode()
    at = rng.randrange(len(text))
    odd = rng.choice(
        [
            b"",
            b"\x00",
            b"\xff",
            b"-",
            b"1e999",
            b"NaN",
            b'"',
            b"{",
            b"]",
            b"null",
            b"\\ud800",
            b"9" * 400,
        ]
    )
    kind = rng.randrange(8)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + odd + text[at + rng.randrange(3) :]
    if kind == 2:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
    if kind == 3:
        return text + text
    if kind == 4:
        return (b'{"a":' * 3000) if rng.random() < 0.1 else b"[" * rng.randrange(1000)
    changed = json.loads(text)
    spoil(changed, rng)
    return json.dumps(changed).encode()


def malformed_arrow(rng: random.Random) -> bytes:
    """An Arrow stream that was good once: bytes changed, cut off, or of other columns and types."""
    head = {"user_id": 3, "request_features": {"tab": 1}}
    if rng.random() < 0.3:
        spoil(head, rng)
    columns = {
        "item_id": pa.array([1, 2, 3], pa.int64()),
        "tab": pa.array([0, None, 1], pa.int32()),
    }
    if rng.random() < 0.2:
        types = [
            pa.string(),
            pa.float64(),
            pa.list_(pa.int64()),
            pa.dictionary(pa.int32(), pa.string()),
            pa.int8(),
        ]
        columns[rng.choice(["item_id", "tab", "", "score"])] = pa.array(
            [None] * 3, rng.choice(types)
        )
    table = pa.table(columns).replace_schema_metadata({"rank": json.dumps(head)})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=rng.choice([None, None, None, "lz4", "zstd"]))
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    body = bytearray(sink.getvalue().to_pybytes())
    for _ in range(rng.choice([0, 1, 1, 3, 30])):
        body[rng.randrange(len(body))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    return bytes(body[: rng.randrange(len(body))] if rng.random() < 0.3 else body)


def spoil(node: dict | list, rng: random.Random) -> None:
    """One value somewhere inside becomes something else, goes, or comes under another name."""
    key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
        return spoil(node[key], rng)
    values = [
        None,
        True,
        "",
        "x" * 5000,
        -1,
        2**63,
        2**64,
        1.5,
        1e300,
        float("inf"),
        [],
        {},
        [[]],
        {"a": {}},
        "\ud800",
    ]
    if rng.random() < 0.2 and isinstance(node, dict):
        node[rng.choice(["", "__class__", "user_id\x00", "é" * 500])] = node.pop(key)
    else:
        node[key] = rng.choice(values)


def insides(text: str) -> list[str]:
    """What an answer shows of the server."""
    return [word for word in INSIDES if word in text]
