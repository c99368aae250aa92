"""Candidates of several users in one call, as JSON and as columns."""

import asyncio
import json

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI

from serve_app.columns import MEDIA_TYPE, RankColumns, RankedColumns
from serve_app.schemas import Refusal
from serve_app.web.api import make_api
from serve_app.web.rank_batch import ROWS_TOGETHER
from serve_app.web.replica import Overloaded, Unavailable
from serve_app.web.settings import ApiLimits
from tests.worlds.recommender import Served
from tests.worlds.tiny import NOT_A_USER
from tests.worlds.web import Fixed, call

PATH = "/v1/rank/batch"
NOW = 1_651_500_000_000
MOST_USERS = 5


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("batch"))


@pytest.fixture(scope="module")
def api(served: Served) -> FastAPI:
    return make_api(served, ApiLimits(max_body_bytes=100_000, max_rank_users=MOST_USERS))


def asking(user: int, items: list[int], **fields: object) -> dict:
    candidates = [{"item_id": item} for item in items]
    return {"user_id": user, "request_time_ms": NOW, "candidates": candidates} | fields


def alone(api: FastAPI, request: dict) -> dict:
    answer = call(api, "POST", "/v1/rank", json=request)
    assert answer.status_code == 200, answer.text
    return answer.json()


def same_scores(found: dict, expected: dict) -> None:
    for task, scores in expected["scores"].items():
        np.testing.assert_allclose(found["scores"][task], scores, atol=1e-6)


# JSON ----------------------------------------------------------------------------


def test_each_user_is_answered_as_alone(api: FastAPI):
    requests = [
        asking(3, [1, 7, 9]),
        asking(5, [2, 8], order_by="is_like", top_k=1),
        asking(NOT_A_USER, [4]),
    ]
    answer = call(api, "POST", PATH, json={"requests": requests})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["refused"] == []

    ids = [one["request_id"] for one in found["answers"]]
    assert len(set(ids)) == 3
    for one, request in zip(found["answers"], requests, strict=True):
        expected = alone(api, request)
        same_scores(one, expected)
        for answered in (one, expected):
            del answered["request_id"], answered["scores"]
        assert one == expected


def test_a_row_that_is_refused_is_named_and_fails_no_other(api: FastAPI):
    bad = [asking(3, [1], order_by="is_sold"), asking(3, [1], request_features={"tap": 1})]
    requests = [asking(3, [1, 7]), bad[0], asking(5, [2]), bad[1]]
    answer = call(api, "POST", PATH, json={"requests": requests})
    assert answer.status_code == 200
    found = answer.json()
    assert [one is None for one in found["answers"]] == [False, True, False, True]
    assert [(one["row"], one["status"]) for one in found["refused"]] == [(1, 422), (3, 422)]
    where = [one["detail"][0]["loc"] for one in found["refused"]]
    assert where == [
        ["body", "requests", 1, "order_by"],
        ["body", "requests", 3, "request_features"],
    ]
    same_scores(found["answers"][2], alone(api, requests[2]))

    # nobody is answered: then the request is not
    nobody = call(api, "POST", PATH, json={"requests": bad})
    assert nobody.status_code == 422
    assert [one["loc"][2] for one in nobody.json()["detail"]] == [0, 1]


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({"requests": []}, ["body", "requests"]),
        ({"requests": [asking(3, [1])] * (MOST_USERS + 1)}, ["body", "requests"]),
        (
            {"requests": [asking(3, [1]), asking(3, [1], topk=1)]},
            ["body", "requests", 1, "topk"],
        ),
        ({"requests": [asking(3, [])]}, ["body", "requests", 0, "candidates"]),
    ],
)
def test_a_body_that_no_batch_has_is_refused_whole(api: FastAPI, body: dict, loc: list):
    answer = call(api, "POST", PATH, json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == loc


def test_items_of_two_kinds_are_their_rows_mistake(api: FastAPI):
    mixed = asking(3, [1]) | {"candidates": [{"item_id": 1}, {"item_id": "x"}]}
    answer = call(api, "POST", PATH, json={"requests": [asking(3, [1]), mixed]})
    (refused,) = answer.json()["refused"]
    assert refused["detail"][0]["loc"] == ["body", "requests", 1, "candidates", 0, "item_id"]


class Moody(Fixed):
    """Fails for some users, and says how many it had at once."""

    def __init__(self) -> None:
        self.at_once = 0
        self.most_at_once = 0

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        if request.user_id == 1:
            raise Unavailable
        if request.user_id == 2:
            raise Overloaded
        return await super().rank(request)


def test_an_outage_is_of_the_rows_that_it_met():
    replica = Moody()
    api = make_api(replica, ApiLimits(max_body_bytes=100_000))
    requests = [asking(user, [4]) for user in (0, 1, 2, 3)]
    found = call(api, "POST", PATH, json={"requests": requests}).json()
    assert [(one["row"], one["status"]) for one in found["refused"]] == [(1, 503), (2, 429)]
    assert [one is None for one in found["answers"]] == [False, True, True, False]

    for user, status in ((1, 503), (2, 429)):
        answer = call(api, "POST", PATH, json={"requests": [asking(user, [4])]})
        assert answer.status_code == status
        assert answer.headers["Retry-After"] == "1"

    many = [asking(3, [4])] * 60
    assert call(api, "POST", PATH, json={"requests": many}).status_code == 200
    assert replica.most_at_once == ROWS_TOGETHER


# Columns -------------------------------------------------------------------------


def arrow_body(users: list, items: list, head: dict | None, **features: pa.Array) -> bytes:
    ids = {"user_id": pa.array(users, pa.int64()), "item_id": pa.array(items, pa.int64())}
    table = pa.table(ids | features)
    if head is not None:
        table = table.replace_schema_metadata({"rank": json.dumps(head)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def send_arrow(api: FastAPI, body: bytes) -> httpx.Response:
    headers = {"content-type": MEDIA_TYPE}
    return call(api, "POST", f"{PATH}/arrow", content=body, headers=headers)


def test_users_and_candidates_as_columns(api: FastAPI):
    head = {"request_time_ms": NOW, "request_features": {"tab": 2}}
    users, items = [3, 3, 5, 5, 5, 3], [1, 7, 2, 8, 1, 9]
    tabs = pa.array([1, None, 0, None, None, None], pa.int32())
    answer = send_arrow(api, arrow_body(users, items, head, tab=tabs))
    assert answer.status_code == 200, answer.text
    table = pa.ipc.open_stream(answer.content).read_all()
    assert table["user_id"].to_pylist() == users
    assert table["item_id"].to_pylist() == items

    said = json.loads(table.schema.metadata[b"rank"])
    assert said["refused"] == []
    assert [one["user_id"] for one in said["answers"]] == [3, 5, 3]
    places = []
    for begin, end in ((0, 2), (2, 5), (5, 6)):
        request = asking(users[begin], items[begin:end], request_features={"tab": 2})
        for row, tab in enumerate(tabs.to_pylist()[begin:end]):
            if tab is not None:
                request["candidates"][row]["request_features"] = {"tab": tab}
        expected = alone(api, request)
        found = table["score.is_like"].to_numpy()[begin:end]
        np.testing.assert_allclose(found, expected["scores"]["is_like"], atol=1e-6)
        places += np.argsort(expected["order"]).tolist()
    assert table["place"].to_pylist() == places

    best = send_arrow(api, arrow_body(users, items, head | {"top_k": 1}))
    table = pa.ipc.open_stream(best.content).read_all()
    assert table["user_id"].to_pylist() == [3, 5, 3]


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        (b"nothing of the kind", ["body"]),
        (arrow_body([3], [1], None), ["body", "rank"]),
        (arrow_body([3], [1], {"top_k": 0}), ["body", "rank", "top_k"]),
        (arrow_body([], [], {}), ["body", "item_id"]),
        (arrow_body([-1], [1], {}), ["body", "user_id"]),
        (arrow_body([3], [-1], {}), ["body", "item_id"]),
        (arrow_body([3], [None], {}), ["body", "item_id"]),
        (arrow_body([3], [1], {}, tab=pa.array([1.5])), ["body", "tab"]),
        (arrow_body([3], [1], {}, tap=pa.array([1], pa.int32())), ["body", "requests", 0]),
        (arrow_body(list(range(MOST_USERS + 1)), [1] * (MOST_USERS + 1), {}), ["body", "requests"]),
    ],
)
def test_bad_columns_are_named(api: FastAPI, body: bytes, loc: list):
    answer = send_arrow(api, body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][: len(loc)] == loc
