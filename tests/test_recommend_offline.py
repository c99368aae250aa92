"""Lists offline and over HTTP are the same: two ways from the same rows."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI

from pipeline.batches.examples import request_examples, user_events
from pipeline.config import UserError
from pipeline.index.histories import history_before
from pipeline.model.artifact import LoadedModel
from pipeline.recommend.everybody import (
    BucketTask,
    SharedRequest,
    check_request,
    recommend_bucket,
    recommend_everybody,
)
from pipeline.recommend.filters import Range
from pipeline.recommend.offline import Audience, OfflineRecommender, UserList, user_ranges
from pipeline.recommend.retriever import ColumnCap, MarginalRelevance, Wish
from pipeline.recommend.tables import lists_table
from serve_app.recommend.replay import (
    past_audience,
    request_body,
    score_difference,
    served_items,
)
from serve_app.web.api import make_api
from serve_app.web.settings import ApiLimits
from tests.worlds.recommender import LIMITS, Served
from tests.worlds.web import call


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("offline"))


@pytest.fixture(scope="module")
def api(served: Served) -> FastAPI:
    return make_api(served, ApiLimits(max_body_bytes=100_000))


@pytest.fixture(scope="module")
def recommender(served: Served) -> OfflineRecommender:
    ranker = served.ranker
    assert ranker.index is not None
    loaded = LoadedModel(ranker.model, ranker.cfg, ranker.maps, {})
    return OfflineRecommender(loaded, ranker.index, LIMITS)


@pytest.fixture(scope="module")
def audience(served: Served) -> Audience:
    """Requests of all days, each as of its time."""
    users = user_events(served.table, served.cfg.source, served.cfg.features)
    examples = request_examples(users, 0, 2**62)
    assert len(examples) > 150
    return past_audience(users, examples, LIMITS.max_history)


def assert_same_list(answer: dict, expected: UserList) -> None:
    """Two items may change places only where rounding cannot tell their scores apart."""
    assert score_difference(answer, expected) <= 1e-5
    scores = dict(zip(expected.item_id.tolist(), expected.score.tolist(), strict=True))
    for place, item in enumerate(served_items(answer)):
        assert abs(scores[item] - expected.score[place]) <= 1e-6


@pytest.mark.parametrize(
    ("asked", "wish"),
    [
        ({}, Wish(num=10)),
        (
            {"exclude": {"seen": False}, "filter": {"author": {"at_least": 2}}},
            Wish(num=10, exclude_seen=False, conditions={"author": Range(at_least=2)}),
        ),
        (
            {"diversify": {"per": "author", "at_most": 1}},
            Wish(num=10, diversify=ColumnCap("author", 1)),
        ),
        ({"diversify": {"mmr": 0.6}}, Wish(num=10, diversify=MarginalRelevance(0.6))),
    ],
    ids=["plain", "filtered", "capped", "spread"],
)
def test_past_requests_get_the_same_lists(
    api: FastAPI, recommender: OfflineRecommender, audience: Audience, asked: dict, wish: Wish
):
    num = 30 if asked else len(audience)
    lists = recommender.recommend(audience.part(0, num), wish, "is_click")
    by_popularity = 0
    for number, expected in enumerate(lists):
        body = request_body(audience, number) | {"n": 10} | asked
        answer = call(api, "POST", "/v1/recommend", json=body)
        assert answer.status_code == 200, answer.text
        assert_same_list(answer.json(), expected)
        assert [item["source"] for item in answer.json()["items"]] == expected.source
        by_popularity += expected.by_popularity
    assert 0 < by_popularity < num, "first requests have no history"


def test_a_list_depends_on_time_and_columns(recommender: OfflineRecommender, audience: Audience):
    """The parity would be worthless if neither mattered."""
    wish = Wish(num=10)
    now = recommender.recommend(audience.part(20, 60), wish, "is_click")
    tabs = {"tab": (audience.features["tab"][20:60] + 1) % 3}
    part = audience.part(20, 60)
    other = Audience(part.user_id, part.time_ms, part.past, tabs)
    changed = recommender.recommend(other, wish, "is_click")
    scores = [np.abs(a.score - b.score).max() for a, b in zip(now, changed, strict=True)]
    assert max(scores) > 1e-3


def test_a_table_of_lists_with_ids_of_text():
    scores = np.array([0.5, 0.25], np.float32)
    one = UserList(
        np.array(["b", "a"], object), scores, np.full(2, np.nan, np.float32), ["x"] * 2, True
    )
    none = UserList(np.array([], object), scores[:0], scores[:0], [], False)
    table = lists_table(np.array(["ann", "bob"], object), [none, one])
    assert table.schema.field("item_id").type == table.schema.field("user_id").type == pa.string()
    assert table.to_pydict() == {
        "user_id": ["bob", "bob"],
        "place": [0, 1],
        "item_id": ["b", "a"],
        "score": [0.5, 0.25],
        "retrieval_score": [None, None],
        "source": ["x", "x"],
    }
    empty = lists_table(np.zeros(0, np.int64), [])
    assert empty.schema.field("item_id").type == pa.int64()


def test_passes_hold_so_many_tokens():
    assert user_ranges(np.array([5, 5, 5, 30, 5]), 12) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert user_ranges(np.zeros(0, int), 12) == []


# All users ---------------------------------------------------------------------


def request(served: Served, **changes: object) -> SharedRequest:
    fields = {"wish": Wish(num=5), "task": "is_like", "time_ms": served.cfg.split.test_ms}
    return SharedRequest(**fields | changes)


def test_a_bucket_of_users_is_a_file(served: Served, recommender: OfflineRecommender, tmp_path):
    from pipeline.config import to_dict

    wanted = request(served, features={"tab": 1})
    results = []
    for number in range(2):
        results.append(
            recommend_bucket(
                BucketTask(number, 1),
                to_dict(served.cfg),
                served.cfg.model_dir,
                wanted,
                tmp_path,
            )
        )
    table = pq.read_table(tmp_path)
    assert table.num_rows == sum(result.items for result in results)
    assert sum(result.users for result in results) == served.table.num_rows
    assert sum(result.empty for result in results) == 0

    users = user_events(served.table.sort_by("user_id"), served.cfg.source, served.cfg.features)
    times = np.full(len(users.user_id), wanted.time_ms)
    tabs = {"tab": np.ones(len(times), np.int32)}
    everybody = Audience(users.user_id, times, history_before(users, times, 16_384), tabs)
    for user, expected in zip(
        users.user_id.tolist(),
        recommender.recommend(everybody, wanted.wish, "is_like"),
        strict=True,
    ):
        rows = [row for row in table.to_pylist() if row["user_id"] == user]
        assert [row["place"] for row in rows] == list(range(5))
        found = [row["score"] for row in sorted(rows, key=lambda row: row["place"])]
        # limits of the run: more candidates, so the lists are as good or better
        assert np.array(found).min() >= expected.score.min() - 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "is_sold"}, r"order_by must be one of the tasks \['is_click', 'is_like'\]"),
        ({"features": {"hour": 3}}, r"request_features must be of \['tab'\], got 'hour'"),
        (
            {"wish": Wish(num=5, conditions={"author": Range(at_least=3, at_most=2)})},
            r"filter.author must be a range .*, got \{'at_least': 3, 'at_most': 2\}",
        ),
        ({"wish": Wish(num=5, conditions={"colour": 1})}, "filter.colour must be one of"),
        ({"wish": Wish(num=5, diversify=ColumnCap("colour", 1))}, "diversify.per must be one of"),
    ],
)
def test_a_mistake_is_told_before_any_worker(
    served: Served, recommender: OfflineRecommender, changes: dict, message: str
):
    with pytest.raises(UserError, match=message):
        check_request(recommender, request(served, **changes))


def test_a_folder_of_something_else_is_left_alone(served: Served, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="it is not a folder of lists"):
        recommend_everybody(served.cfg, served.cfg.model_dir, request(served), tmp_path)


@pytest.mark.cluster
def test_everybody_on_ray(served: Served, local_ray: None, tmp_path: Path):
    out = tmp_path / "lists"
    for _ in range(2):  # the second time in the place of the first
        summary = recommend_everybody(served.cfg, served.cfg.model_dir, request(served), out)
    assert json.loads((out / "recommendations.json").read_text()) == summary
    assert summary["users"] == served.table.num_rows
    assert sorted(path.name for path in out.glob("*.parquet")) == [
        "bucket-00000.parquet",
        "bucket-00001.parquet",
    ]
