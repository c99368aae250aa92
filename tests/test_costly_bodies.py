"""Bodies that would cost far more than a right one of their length: each is refused before it does.

What it would cost is counted here, not timed.
"""

import asyncio
import json
import struct
from collections.abc import AsyncIterator

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI

from serve_app.client_json import MOST_NAMES
from serve_app.columns import HEAD, BadBody, RankColumns
from serve_app.recommend.arrow import OPTIONS
from serve_app.schemas import Refusal
from serve_app.web import limits
from serve_app.web.api import make_api
from serve_app.web.settings import ApiAccess, ApiLimits
from tests.worlds.web import RANK, Fixed, call

JSON = {"content-type": "application/json"}
MANY = 20_000
WIDE = {"candidates": [{"item_id": item} for item in range(20)]}  # more than 300 bytes


@pytest.fixture(scope="module")
def api() -> FastAPI:
    return make_api(Fixed())


def stream(table: pa.Table, key: bytes, head: object) -> bytes:
    with_head = table.replace_schema_metadata({key: json.dumps(head)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, with_head.schema) as writer:
        writer.write_table(with_head)
    return sink.getvalue().to_pybytes()


def names(number: int) -> dict[str, int]:
    return {f"n{place}": 1 for place in range(number)}


@pytest.mark.parametrize("path", ["/v1/rank", "/v1/events", "/v1/recommend/batch"])
def test_of_ever_so_many_wrong_parts_the_first_is_told(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    original = Refusal.of

    def count(*arguments: object) -> Refusal:
        nonlocal made
        made += 1
        return original(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Refusal, "of", count)
    parts = {"/v1/rank": "candidates", "/v1/events": "events"}.get(path, "requests")
    wide = make_api(Fixed(), ApiLimits(max_recommend_users=MANY))
    answer = call(wide, "POST", path, json={"user_id": 1, parts: [1] * MANY})
    told = [one["loc"] for one in answer.json()["detail"] if one["loc"][1] == parts]
    assert (answer.status_code, told) == (422, [["body", parts, 0]])
    assert made <= 2


@pytest.mark.parametrize(
    "body",
    [
        RANK | names(MANY),
        RANK | {"request_features": names(MANY)},
        RANK | {"candidates": [{"item_id": 1, "request_features": names(MANY)}]},
        RANK | {"history": [{"item_id": 1, "event_time": 1, "actions": names(MANY)}]},
    ],
    ids=["fields", "features", "of a candidate", "actions"],
)
def test_an_object_has_so_many_names(api: FastAPI, body: dict) -> None:
    answer = call(api, "POST", "/v1/rank", json=body)
    (refusal,) = answer.json()["detail"]
    assert (answer.status_code, refusal["loc"]) == (422, ["body"])
    assert refusal["msg"] == f"at most {MOST_NAMES} names in an object"


@pytest.mark.parametrize("path", ["/v1/rank", "/v1/recommend", "/v1/events", "/page/user"])
def test_a_name_that_comes_twice_is_refused(path: str) -> None:
    """Of two values the last would win, and nobody would know."""
    from serve_app.web.page.routes import PageSettings

    with_page = make_api(Fixed(), page=PageSettings())
    answer = call(with_page, "POST", path, content=b'{"user_id":1,"user_id":2}', headers=JSON)
    (refusal,) = answer.json()["detail"]
    assert (answer.status_code, refusal["input"]) == (422, "user_id")
    assert "twice" in refusal["msg"]


def test_candidates_name_so_many_features_together(api: FastAPI) -> None:
    def body(number: int) -> dict:
        items = [{"item_id": 1, "request_features": {f"n{place}": 1}} for place in range(number)]
        return RANK | {"candidates": items}

    assert call(api, "POST", "/v1/rank", json=body(MOST_NAMES)).status_code == 200
    refused = call(api, "POST", "/v1/rank", json=body(MOST_NAMES + 1))
    where = ["body", "candidates", MOST_NAMES, "request_features"]
    assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, where)

    # one row, so that a batch says it of the row
    batch = call(api, "POST", "/v1/rank/batch", json={"requests": [RANK, body(MOST_NAMES + 1)]})
    assert [one["row"] for one in batch.json()["refused"]] == [1]


@pytest.mark.parametrize("head", [names(MANY), {"user_id": 1, "history": [1] * MANY}])
def test_the_head_of_an_arrow_body_is_read_like_a_body(api: FastAPI, head: dict) -> None:
    table = pa.table({"item_id": [1, 2]})
    answer = call(api, "POST", "/v1/rank/arrow", content=stream(table, HEAD, head))
    assert answer.status_code == 422
    assert len(answer.json()["detail"]) == 1
    assert answer.json()["detail"][0]["loc"][:2] == ["body", "rank"]


@pytest.mark.parametrize("text", [b"{", b"[" * MANY, b'{"user_id":' + b"9" * MANY + b"}", b"\xff"])
def test_a_head_that_is_no_json_is_refused(api: FastAPI, text: bytes) -> None:
    table = pa.table({"item_id": [1, 2]}).replace_schema_metadata({HEAD: text})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    answer = call(api, "POST", "/v1/rank/arrow", content=sink.getvalue().to_pybytes())
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", "rank"])


def test_too_many_users_are_refused_before_a_request_is_made_of_each(
    api: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a request was made")

    monkeypatch.setattr("serve_app.batch_columns.RankHead.model_construct", refuse)
    monkeypatch.setattr("serve_app.recommend.arrow.RecommendRequest.model_construct", refuse)
    users = pa.table({"user_id": np.arange(MANY)})
    bodies = {
        "/v1/rank/batch/arrow": stream(users.append_column("item_id", [np.arange(MANY)]), HEAD, {}),
        "/v1/recommend/arrow": stream(users, OPTIONS, {}),
    }
    for path, body in bodies.items():
        answer = call(api, "POST", path, content=body)
        assert answer.status_code == 422
        assert answer.json()["detail"][0] == {
            "loc": ["body", "requests"],
            "msg": "at most 100 users",
            "input": str(MANY),
        }


@pytest.mark.parametrize(
    ("path", "body", "field", "rule"),
    [
        ("/v1/rank", RANK, "candidates", "at most 2 candidates"),
        ("/v1/rank", RANK, "history", "at most 3 rows"),
        ("/v1/rank/batch", {}, "requests", "at most 4 users"),
        ("/v1/recommend/batch", {}, "requests", "at most 5 users"),
    ],
)
def test_a_list_that_is_too_long_is_refused_before_a_schema_looks_at_each(
    path: str, body: dict, field: str, rule: str
) -> None:
    limited = make_api(
        Fixed(), ApiLimits(max_candidates=2, max_history=3, max_rank_users=4, max_recommend_users=5)
    )
    most = int(rule.split()[2])
    for number in (most, most + 1):
        # of wrong parts: a schema would tell the first
        answer = call(limited, "POST", path, json=body | {field: [1] * number})
        told = answer.json()["detail"][0]
        assert answer.status_code == 422
        if number == most:
            assert told["loc"][:3] == ["body", field, 0]
        else:
            assert told == {"loc": ["body", field], "msg": rule, "input": str(number)}

    whole = [RANK, RANK | {"candidates": [{"item_id": 1}] * 3}]
    statuses = [call(limited, "POST", "/v1/rank", json=one).status_code for one in whole]
    assert statuses == [200, 422]


def test_columns_do_not_share_their_bytes() -> None:
    """A buffer's place is 16 bytes of a message: it may name megabytes that others have named."""
    num_rows, num_columns = 1024, 50
    columns = {"item_id": np.arange(num_rows)}
    for number in range(num_columns):
        columns[f"f{number}"] = np.zeros(num_rows, np.int32)
    body = stream(pa.table(columns), HEAD, {"user_id": 1})
    assert len(RankColumns.from_arrow(body).features) == num_columns

    _, batch = pa.ipc.MessageReader.open_stream(body)
    where = bytearray(batch.metadata.to_pybytes())
    first, size = 8 * num_rows, 4 * num_rows
    for number in range(num_columns):
        place = where.index(struct.pack("<qq", first + number * size, size))
        where[place : place + 16] = struct.pack("<qq", first, size)
    length = where.index(struct.pack("<q", batch.body.size))
    where[length : length + 8] = struct.pack("<q", first + size)

    begin = body.index(batch.metadata.to_pybytes())
    end = begin + len(where)
    shared = body[:begin] + bytes(where) + body[end : end + first + size]
    with pytest.raises(BadBody, match="bytes of their own"):
        RankColumns.from_arrow(shared)


def test_an_arrow_body_has_so_many_columns(api: FastAPI) -> None:
    features = {f"f{n}": pa.array([1], pa.int32()) for n in range(MOST_NAMES + 1)}
    table = pa.table({"item_id": [1]} | features)
    answer = call(api, "POST", "/v1/rank/arrow", content=stream(table, HEAD, {"user_id": 1}))
    assert (answer.status_code, answer.json()["detail"][0]["input"]) == (422, str(MOST_NAMES + 2))


def test_a_host_that_is_no_address_is_not_of_this_machine() -> None:
    api = make_api(Fixed(), access=ApiAccess(hosts=frozenset({"127.0.0.1"})))
    for header in ({"Host": "["}, {"Host": "::1]"}, {"Host": "127.0.0.1", "Origin": "http://["}):
        answer = call(api, "POST", "/v1/rank", headers=header, json=RANK)
        assert answer.status_code == 403, header


def test_the_bodies_of_all_clients_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_BODIES", 3)
    monkeypatch.setattr(limits, "CROWDED_BODY_S", 0.01)
    api = make_api(Fixed(), ApiLimits(max_body_bytes=1000, body_timeout_s=60))
    go_on = asyncio.Event()
    sent: list[int] = []

    async def half_of(size: int) -> AsyncIterator[bytes]:
        sent.append(size)
        yield b" " * size
        await go_on.wait()
        yield json.dumps(RANK).encode()

    async def scenario() -> tuple[int, list[int], int]:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            def post(size: int) -> asyncio.Task[httpx.Response]:
                body = half_of(size)
                return asyncio.create_task(client.post("/v1/rank", content=body, headers=JSON))

            three = [post(900) for _ in range(3)]
            longer = post(1001)  # nothing of it is held
            while len(sent) < 4:
                await asyncio.sleep(0)
            for _ in range(100):  # until all of them wait for more
                await asyncio.sleep(0)
            refused = await client.post("/v1/rank", json=RANK | {"trial_key": "x" * 50} | WIDE)

            go_on.set()
            kept = [(await one).status_code for one in (*three, longer)]
            after = await client.post("/v1/rank", json=RANK | WIDE)
            return refused.status_code, kept, after.status_code

    assert asyncio.run(scenario()) == (429, [200, 200, 200, 413], 200)
