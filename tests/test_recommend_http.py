"""Recommended lists over HTTP, answered in this process."""

import json
from collections.abc import Callable

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from fastapi import FastAPI

from pipeline.batches.examples import user_events
from pipeline.index.histories import history_before
from serve_app.columns import MEDIA_TYPE, RankColumns
from serve_app.ranking.ranker import CutHistory
from serve_app.ranking.rollout import CHAMPION
from serve_app.recommend import recommender
from serve_app.schemas import RankRequest
from serve_app.web.api import make_api
from serve_app.web.settings import ApiLimits
from tests.support.exposition import sample
from tests.worlds.recommender import LIMITS, Served
from tests.worlds.tiny import NOT_A_USER
from tests.worlds.web import call

PATH = "/v1/recommend"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("recommend"))


@pytest.fixture(scope="module")
def api(served: Served) -> FastAPI:
    return make_api(
        served, ApiLimits(max_body_bytes=100_000, max_recommend_users=LIMITS.max_recommend_users)
    )


@pytest.fixture(scope="module")
def now(served: Served) -> int:
    """A time after all rows."""
    times = served.table["event_time"].to_pylist()
    return max(max(row) for row in times) + 1


@pytest.fixture
def ask(api: FastAPI, now: int) -> Callable[..., dict]:
    """The answer to a recommend request of these fields, which must be one."""

    def send(**fields: object) -> dict:
        answer = call(api, "POST", PATH, json={"request_time_ms": now} | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return send


def items(answer: dict) -> list[int]:
    return [item["item_id"] for item in answer["items"]]


def seen_items(served: Served, user: int) -> set[int]:
    (row,) = [row for row in served.table.to_pylist() if row["user_id"] == user]
    return set(row["item_id"])


# What is in a list -------------------------------------------------------------


def test_a_list_is_the_ranking_of_what_was_retrieved(served: Served, ask, now: int):
    answer = ask(user_id=3, n=10, request_features={"tab": 1}, explain=True)
    assert len(items(answer)) == len(set(items(answer))) == 10
    assert seen_items(served, 3).isdisjoint(items(answer))
    assert answer["model_version"] == 1
    assert answer["index_version"] == served.ranker.index.version
    assert (answer["ordered_by"], answer["unknown_user"], answer["note"]) == (
        "is_click",
        False,
        None,
    )

    # the scores are those of /v1/rank, and fall
    asked = [{"item_id": item} for item in items(answer)]
    body = {"user_id": 3, "request_time_ms": now, "request_features": {"tab": 1}}
    request = RankRequest.model_validate(body | {"candidates": asked})
    (ranked,) = served.ranker.rank([RankColumns.of(request)])
    scores = [item["score"] for item in answer["items"]]
    np.testing.assert_allclose(scores, ranked.scores["is_click"], atol=1e-6)
    assert scores == sorted(scores, reverse=True)

    first = answer["items"][0]
    assert first["title"] == f"item {first['item_id']}"
    assert first["source"] == first["why"]["sources"][0]
    assert first["why"]["scores"]["is_click"] == first["score"]
    assert {like["item_id"] for like in first["why"]["like"]} <= seen_items(served, 3)
    cosines = [like["cosine"] for like in first["why"]["like"]]
    assert len(cosines) == 3
    assert cosines == sorted(cosines, reverse=True)


def test_candidates_are_the_nearest_to_the_user(served: Served, ask):
    """Against the product of vectors that are made without the index."""
    answer = ask(user_id=3, n=20, explain=True)
    users = user_events(served.table, served.cfg.source, served.cfg.features)
    place = users.user_id.tolist().index(3)
    history = history_before(users, np.full(len(users.user_id), 2**60)).events
    mine = history.item_id[history.offsets[place] : history.offsets[place + 1]]
    assert mine.tolist() == served.table.to_pylist()[place]["item_id"]

    scores = {item["item_id"]: item["retrieval_score"] for item in answer["items"]}
    index = served.ranker.index
    assert index is not None
    assert index.vectors is not None
    seen = list(seen_items(served, 3))
    by_model = [item["item_id"] for item in answer["items"] if "model" in item["why"]["sources"]]
    assert len(by_model) > 10
    worst = min(scores[item] for item in by_model)
    wide = ask(user_id=3, n=20, filter={"author": [0, 1, 2, 3, 4]}, exclude={"items": seen})
    assert items(wide) == items(answer)
    assert -1 <= worst <= max(scores.values()) <= 1


def test_the_same_request_gets_the_same_list(ask):
    one, two = ask(user_id=5, n=8), ask(user_id=5, n=8)
    for answer in (one, two):
        del answer["took_ms"], answer["request_id"]
    assert one == two


def test_the_vector_that_was_not_asked_for_longest_goes(
    served: Served, ask, monkeypatch: pytest.MonkeyPatch
):
    own = served.rollout.recommenders[CHAMPION]
    encode, encoded = own._encode_user, []

    def note_and_encode(found: CutHistory) -> torch.Tensor:
        encoded.append(found.user_id)
        return encode(found)

    own._vectors.clear()
    monkeypatch.setattr(recommender, "VECTORS_KEPT", 2)
    monkeypatch.setattr(own, "_encode_user", note_and_encode)
    for user in (2, 4, 2, 6, 2, 4):
        ask(user_id=user)
    assert encoded == [2, 4, 6, 4]


def test_a_history_that_comes_along(served: Served, ask):
    rows = [{"item_id": 4, "event_time": 10**12}, {"item_id": 9, "event_time": 10**12 + 5}]
    answer = ask(history=[], n=3)
    assert answer["note"].startswith("the popular list")
    answer = ask(
        history=[row | {"event_time": 1_650_000_000_000} for row in rows], n=20, explain=True
    )
    assert answer["history_length"] == 2
    assert {4, 9}.isdisjoint(items(answer))
    assert any(item["source"] == "model" for item in answer["items"])


def test_who_is_unknown_gets_the_popular_list(served: Served, ask):
    answer = ask(user_id=NOT_A_USER, n=7)
    index = served.ranker.index
    assert index is not None
    popular = index.catalogue.item_ids[index.catalogue.popular_rows[:7]]
    assert items(answer) == popular.tolist()
    assert answer["unknown_user"]
    assert answer["ordered_by"] == "popularity"
    assert answer["note"] == ("the popular list: nothing is known of what this user did before")
    assert {item["source"] for item in answer["items"]} == {"popular"}
    assert {item["retrieval_score"] for item in answer["items"]} == {None}

    early = ask(user_id=3, n=7, request_time_ms=1_640_995_200_000)
    assert (early["history_length"], items(early)) == (0, popular.tolist())
    assert not early["unknown_user"]


def test_exclusions_filters_and_diversity(served: Served, ask):
    plain = ask(user_id=3, n=20)
    without = ask(user_id=3, n=20, exclude={"items": items(plain)[:2]})
    assert set(items(plain)[:2]).isdisjoint(items(without))
    assert without["num_allowed"] == plain["num_allowed"] - 2

    again = ask(user_id=3, n=20, exclude={"seen": False})
    assert again["num_allowed"] > plain["num_allowed"]

    of_author = ask(user_id=3, n=20, filter={"author": [1, 2]})
    assert {item % 5 for item in items(of_author)} == {1, 2}
    one_name = ask(user_id=3, n=20, filter={"name": "item 7", "author": {"at_least": 2}})
    assert items(one_name) == [7]

    capped = ask(user_id=3, n=20, diversify={"per": "author", "at_most": 2})
    assert max(np.bincount([item % 5 for item in items(capped)])) == 2
    assert len(items(capped)) == 10

    assert items(ask(user_id=3, n=20, diversify={"mmr": 1.0})) == items(plain)
    spread = ask(user_id=3, n=20, diversify={"mmr": 0.2})
    assert items(spread)[0] == items(plain)[0]
    assert items(spread) != items(plain)


def test_nothing_left_is_an_empty_list_that_says_so(served: Served, ask):
    every = served.ranker.maps.item_ids.tolist()
    for fields in ({"exclude": {"items": every}}, {"filter": {"name": "nowhere"}}):
        answer = ask(user_id=3, n=5, **fields)
        assert answer["items"] == []
        assert answer["num_allowed"] == 0
        assert answer["note"] == f"empty: exclusions and filters left none of {len(every)} items"


# Refusals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "loc", "message"),
    [
        ({"n": 0}, ["body", "n"], "greater than or equal to 1"),
        ({"n": 21}, ["body", "n"], "at most 20 items"),
        ({"n": "5"}, ["body", "n"], "valid integer"),
        ({"filter": {"colour": 1}}, ["body", "filter", "colour"], "one of the index's columns"),
        ({"filter": {"author": "x"}}, ["body", "filter", "author"], "an integer, as the column is"),
        ({"filter": {"name": {"below": 3}}}, ["body", "filter", "name"], "has no range"),
        ({"filter": {"author": 2**70}}, ["body", "filter", "author"], "an integer"),
        ({"filter": {"author": []}}, ["body", "filter", "author"], "a list of 1 to 1000 values"),
        ({"filter": {"author": {"min": 3}}}, ["body", "filter", "author"], "a range by at_least"),
        (
            {"filter": {"author": {"at_least": "2026-01-05"}}},
            ["body", "filter", "author"],
            "of dates and times ms since 1970",
        ),
        (
            {"filter": {"author": {"at_least": 5, "below": 2}}},
            ["body", "filter", "author"],
            "a range that some integer lies in",
        ),
        ({"diversify": {}}, ["body", "diversify"], "give mmr, or per with at_most"),
        ({"diversify": {"per": "author"}}, ["body", "diversify"], "belong together"),
        (
            {"diversify": {"per": "colour", "at_most": 1}},
            ["body", "diversify", "per"],
            "one of the index's columns",
        ),
        (
            {"filter": {"author": "x"}, "diversify": {"per": "author", "at_most": 1}},
            ["body", "filter", "author"],
            "an integer, as the column is",
        ),
        ({"diversify": {"mmr": 1.5}}, ["body", "diversify", "mmr"], "less than or equal to 1"),
        ({"exclude": {"items": [-1]}}, ["body", "exclude", "items", 0], "an integer from 0"),
        ({"order_by": "is_sold"}, ["body", "order_by"], "one of the tasks"),
        ({"request_features": {"x": 1}}, ["body", "request_features"], "one of ['tab']"),
        ({"top": 3}, ["body", "top"], "Extra inputs"),
    ],
)
def test_a_refusal_names_field_and_value(api: FastAPI, fields: dict, loc: list, message: str):
    answer = call(api, "POST", PATH, json={"user_id": 3} | fields)
    assert answer.status_code == 422
    listed = answer.json()["detail"]
    assert [problem["loc"] for problem in listed] == [loc]
    assert message in " ".join(problem["msg"] for problem in listed)

    many = call(
        api, "POST", f"{PATH}/batch", json={"requests": [{"user_id": 4}, {"user_id": 3} | fields]}
    )
    assert many.status_code == 422
    placed = ["body", "requests", 1, *loc[1:]]
    assert placed in [problem["loc"] for problem in many.json()["detail"]]


def test_a_version_without_an_index_says_so(tmp_path):
    bare = make_api(Served(tmp_path, with_index=False), ApiLimits(max_body_bytes=100_000))
    answer = call(bare, "POST", PATH, json={"user_id": 3})
    assert answer.status_code == 409
    assert "without an item index" in answer.json()["detail"]
    assert call(bare, "GET", "/v1/model").json()["index"] is None


# Several users -----------------------------------------------------------------


def test_many_users_in_one_call_as_one_after_another(api: FastAPI, ask, now: int):
    users = [3, 5, NOT_A_USER]
    shared = {"request_time_ms": now, "n": 6, "filter": {"author": [0, 1, 2]}}
    requests = [{"user_id": user} | shared for user in users]
    answer = call(api, "POST", f"{PATH}/batch", json={"requests": requests})
    assert answer.status_code == 200, answer.text

    for one, request in zip(answer.json()["lists"], requests, strict=True):
        alone = ask(**request)
        assert items(one) == items(alone)
        scores = [item["score"] for item in one["items"]]
        np.testing.assert_allclose(scores, [item["score"] for item in alone["items"]], atol=1e-6)
    names = [one["request_id"] for one in answer.json()["lists"]]
    assert len({*names, answer.headers["x-request-id"]}) == len(users) + 1, "one of each list"


def arrow_body(users: list, options: dict, **features: pa.Array) -> bytes:
    table = pa.table({"user_id": pa.array(users, pa.int64()), **features})
    table = table.replace_schema_metadata({"recommend": json.dumps(options)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def send_arrow(api: FastAPI, body: bytes) -> httpx.Response:
    headers = {"content-type": MEDIA_TYPE}
    return call(api, "POST", f"{PATH}/arrow", content=body, headers=headers)


def test_users_as_columns(api: FastAPI, ask, now: int):
    users = [3, 5, NOT_A_USER]
    options = {"request_time_ms": now, "n": 6, "request_features": {"tab": 2}}
    tabs = pa.array([1, None, 0], pa.int32())
    answer = send_arrow(api, arrow_body(users, options, tab=tabs))
    assert answer.status_code == 200, answer.text
    table = pa.ipc.open_stream(answer.content).read_all()
    heads = json.loads(table.schema.metadata[b"recommend"])
    assert [head["user_id"] for head in heads] == users
    assert [head["unknown_user"] for head in heads] == [False, False, True]

    for user, tab in zip(users, (1, 2, 0), strict=True):
        alone = ask(user_id=user, n=6, request_features={"tab": tab})
        rows = [row for row in table.to_pylist() if row["user_id"] == user]
        assert [row["item_id"] for row in rows] == items(alone)
        assert [row["place"] for row in rows] == list(range(6))
        assert [row["source"] for row in rows] == [item["source"] for item in alone["items"]]
        unknown = [row["retrieval_score"] is None for row in rows]
        assert unknown == [item["retrieval_score"] is None for item in alone["items"]]


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        (b"nothing of the kind", ["body"]),
        (arrow_body([], {}), ["body", "user_id"]),
        (arrow_body([-4], {}), ["body", "user_id"]),
        (arrow_body([3], {"n": 0}), ["body", "recommend", "n"]),
        (arrow_body([3], {"n": 21}), ["body", "requests", 0, "n"]),
        (arrow_body([3], {}, tab=pa.array([1.5])), ["body", "tab"]),
        (arrow_body([3] * 7, {}), ["body", "requests"]),
    ],
)
def test_bad_columns_are_named(api: FastAPI, body: bytes, loc: list):
    answer = send_arrow(api, body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == loc


# What is said of it --------------------------------------------------------------


def test_the_model_page_says_what_the_index_holds(served: Served, api: FastAPI):
    said = call(api, "GET", "/v1/model").json()["index"]
    assert said == served.ranker.index.describe()
    assert said["columns"] == {"author": "integer", "name": "text"}
    assert (said["search"], said["dimensions"], said["recall"]) == ("exact", 4, 1.0)


def test_stages_sources_and_empty_lists_are_counted(tmp_path, now: int):
    fresh = Served(tmp_path)
    api = make_api(fresh, ApiLimits(max_body_bytes=100_000))
    for fields in ({"user_id": 3}, {"user_id": NOT_A_USER}, {"user_id": 3, "filter": {"name": ""}}):
        answer = call(api, "POST", PATH, json={"request_time_ms": now, "n": 4} | fields)
        assert answer.status_code == 200
        assert answer.headers["server-timing"].startswith("recommender;dur=")

    text = call(api, "GET", "/metrics").text
    labels = {"version": "1", "role": "champion"}
    assert sample(text, "ranking_recommend_empty_lists_total", **labels) == 1
    assert sample(text, "ranking_recommend_popular_lists_total", **labels) == 1
    assert sample(text, "ranking_index_recall", **labels) == 1
    assert sample(text, "ranking_index_items", **labels) == len(fresh.ranker.maps.item_ids)
    sources = [
        sample(text, "ranking_recommend_items_total", **labels, source=source)
        for source in ("model", "popular")
    ]
    assert sources[0] <= 4 <= sources[1]
    assert sum(sources) == 8
    for stage in ("history", "encode", "retrieve", "features", "rank", "choose"):
        name = "ranking_recommend_seconds_count"
        assert sample(text, name, **labels, stage=stage) == 3
