"""Filters, sources and the choice of a list, without a model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.config import ConfigError, FollowedConfig, ServeConfig
from pipeline.recommend.diversify import capped_order, marginal_order
from pipeline.recommend.filters import FilterError, Range, filter_items
from pipeline.recommend.retriever import (
    ColumnCap,
    MarginalRelevance,
    NoVectors,
    Retrieved,
    Retriever,
    Wish,
)
from tests.worlds.items import (
    ACTIONS,
    ITEM_IDS,
    NUM_ITEMS,
    make_catalogue,
    make_history,
    make_index,
)

# one dimension: the product of row r with [1] is VECTORS[r]
VECTORS = np.array([[0.1], [0.2], [0.9], [0.2], [0.8], [0.7], [0.2], [0.3]], np.float32)
USER = torch.ones(1)
LIMITS = ServeConfig(
    retrieved_candidates=6, max_recommended=6, popular_candidates=1, followed_candidates=2
)

# Filters -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, [10, 20, 30, 40, 50, 60, 70, 80]),
        ({"author": 2}, [30, 40]),
        ({"author": [1, 3, 99]}, [10, 20, 50, 70]),
        ({"lang": "de"}, [20, 60]),
        ({"lang": ["de", "fr", "xx"]}, [20, 50, 60]),
        ({"lang": "xx"}, []),
        ({"is_short": False}, [30, 40, 60]),
        ({"seconds": 30}, [30]),
        ({"seconds": Range(at_least=20, below=60)}, [20, 30, 40]),
        ({"seconds": Range(above=20, at_most=60)}, [30, 40, 60]),
        ({"made": Range(above=6000)}, [70]),
        ({"seconds": Range(above=29.5, below=30.5)}, [30]),
        ({"author": Range(at_least=1.5, above=1, below=2.5)}, [30, 40]),
        ({"author": Range(at_least=2, at_most=2)}, [30, 40]),
        ({"lang": "en", "author": 3}, [70]),
    ],
)
def test_conditions_hold_together_and_unknown_values_fulfil_none(
    conditions: dict, expected: list[int]
):
    assert ITEM_IDS[filter_items(make_catalogue(), conditions)].tolist() == expected


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"colour": 1}, r"filter.colour must be one of the index's columns \['auth"),
        ({"author": "1"}, "filter.author must be an integer, as the column is, got '1'"),
        ({"author": 1.5}, "filter.author must be an integer, as the column is, got 1.5"),
        ({"author": True}, "filter.author must be an integer, as the column is, got True"),
        ({"author": [1, "x"]}, "filter.author must be an integer, as the column is, got 'x'"),
        ({"seconds": "long"}, "filter.seconds must be a number, as the column is, got 'long'"),
        ({"lang": 3}, "filter.lang must be a text, as the column is, got 3"),
        ({"is_short": 1}, "filter.is_short must be true or false, as the column is, got 1"),
        ({"lang": Range(at_least=1)}, "filter.lang must be a value or a list of values"),
        (
            {"seconds": Range(at_least=60, below=20.5)},
            r"filter.seconds must be a range .* lies in, got \{'at_least': 60, 'below': 20.5\}",
        ),
        ({"seconds": Range(above=20, at_most=20)}, "filter.seconds must be a range"),
        # no whole number lies between, though other numbers do
        ({"author": Range(above=1, below=2)}, "filter.author must be a range that some integer"),
    ],
)
def test_a_condition_that_cannot_be_answered_is_named(conditions: dict, message: str):
    with pytest.raises(FilterError, match=message):
        filter_items(make_catalogue(), conditions)


# Diversity ---------------------------------------------------------------------


def test_at_most_so_many_of_a_value():
    author = make_catalogue().columns["author"]  # 1 1 2 2 3 - 3 -
    rows = np.arange(NUM_ITEMS)
    assert capped_order(rows, author, rows, 1, 8).tolist() == [0, 2, 4, 5, 7]
    assert capped_order(rows[::-1], author, rows, 1, 3).tolist() == [7, 6, 5]
    assert capped_order(np.arange(3), author, np.array([6, 4, 2]), 1, 8).tolist() == [0, 2]


def marginal_oracle(scores: np.ndarray, vectors: np.ndarray, weight: float, num: int) -> list[int]:
    relevance = (scores - scores.min()) / (scores.max() - scores.min())
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    chosen: list[int] = []
    while len(chosen) < num:
        left = [i for i in range(len(scores)) if i not in chosen]
        value = {}
        for i in left:
            nearest = max((float(unit[i] @ unit[j]) for j in chosen), default=0.0)
            value[i] = weight * relevance[i] - (1 - weight) * nearest
        chosen.append(max(left, key=lambda i: (value[i], -i)))
    return chosen


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
def test_marginal_relevance_is_its_definition(weight: float):
    rng = np.random.default_rng(2)
    scores = rng.random(30).astype(np.float32)
    vectors = rng.normal(size=(30, 4)).astype(np.float32)
    expected = marginal_oracle(scores, vectors, weight, 12)
    assert marginal_order(scores, torch.from_numpy(vectors), weight, 12).tolist() == expected
    if weight == 1:
        assert expected == np.argsort(-scores, kind="stable")[:12].tolist()


def test_equal_scores_and_equal_items_keep_their_order():
    chosen = marginal_order(np.full(4, 0.5, np.float32), torch.ones(4, 2), 0.5, 9)
    assert chosen.tolist() == [0, 1, 2, 3]


# Retrieval ---------------------------------------------------------------------


def retrieve(wish: Wish, retriever: Retriever, history: list[int], actions=None) -> Retrieved:
    return retriever.retrieve(wish, make_history(history, actions), ACTIONS, USER)


def found(retrieved: Retrieved) -> dict[int, str]:
    """Item -> its first source."""
    items = ITEM_IDS[retrieved.rows].tolist()
    return {item: retrieved.first_source(place) for place, item in enumerate(items)}


def test_the_best_by_the_model_beside_what_is_popular():
    retriever = Retriever(make_index(VECTORS), LIMITS)
    got = retrieve(Wish(num=3), retriever, [50])
    # 20 is the most popular, and among the model's six best; 50 has been seen
    assert found(got) == dict.fromkeys([20, 30, 40, 60, 70, 80], "model")
    assert got.num_allowed == 7
    np.testing.assert_allclose(got.scores, VECTORS[got.rows, 0])

    narrow = replace(LIMITS, retrieved_candidates=3, max_recommended=3)
    got = retrieve(Wish(num=3), Retriever(make_index(VECTORS), narrow), [50])
    assert found(got) == {20: "popular", 30: "model", 60: "model"}


def test_what_is_excluded_is_not_retrieved():
    retriever = Retriever(make_index(VECTORS), LIMITS)
    again = retrieve(Wish(num=3, exclude_seen=False), retriever, [50])
    assert 50 in found(again)
    wish = Wish(num=3, exclude_items=np.array([30, 20, 999]), conditions={"author": [1, 2]})
    got = retrieve(wish, retriever, [50])
    assert sorted(found(got)) == [10, 40]
    assert got.num_allowed == 2

    nothing = retrieve(Wish(num=3, conditions={"lang": "xx"}), retriever, [50])
    assert (len(nothing.rows), nothing.num_allowed) == (0, 0)
    assert retriever.choose(Wish(num=3), nothing, np.zeros(0, np.float32)).tolist() == []


def test_newest_items_of_followed_authors():
    followed = FollowedConfig(action="is_follow", author_column="author")
    narrow = replace(LIMITS, retrieved_candidates=4, max_recommended=4)
    retriever = Retriever(make_index(VECTORS, followed=followed), narrow)
    got = retrieve(Wish(num=3), retriever, [10, 50], [2, 1])  # 10 was followed: author 1
    assert found(got) == dict.fromkeys([20, 30, 60, 80], "model")
    assert got.sources[0].tolist() == [True, True, True], "all sources found 20"

    got = retrieve(Wish(num=3), retriever, [50], [2])
    assert found(got) == {20: "model", 30: "model", 60: "model", 70: "followed"}


def test_without_history_the_popular_list_in_its_order():
    retriever = Retriever(make_index(VECTORS), LIMITS)
    got = retrieve(Wish(num=3), retriever, [])
    assert got.by_popularity
    assert set(found(got).values()) == {"popular"}
    assert np.isnan(got.scores).all()

    falling = -np.arange(len(got.rows), dtype=np.float32)[::-1]  # whatever the model says
    chosen = retriever.choose(Wish(num=3), got, falling)
    assert ITEM_IDS[got.rows[chosen]].tolist() == [20, 40, 70]

    capped = Wish(num=3, diversify=ColumnCap("author", 1))
    chosen = retriever.choose(capped, got, falling)
    assert ITEM_IDS[got.rows[chosen]].tolist() == [20, 40, 70]
    only = Wish(num=3, conditions={"author": 1})
    assert ITEM_IDS[retrieve(only, retriever, []).rows].tolist() == [20, 10]


def test_without_a_head_the_popular_items_are_candidates():
    retriever = Retriever(make_index(None), LIMITS)
    got = retriever.retrieve(Wish(num=3), make_history([20]), ACTIONS, None)
    assert found(got) == dict.fromkeys([10, 30, 40, 60, 70, 80], "popular")
    assert not got.by_popularity
    retriever.check_wish(Wish(num=3, diversify=ColumnCap("author", 1)))
    with pytest.raises(NoVectors):
        retriever.check_wish(Wish(num=3, diversify=MarginalRelevance(0.5)))


def test_the_list_is_by_score_ties_by_id():
    retriever = Retriever(make_index(VECTORS), LIMITS)
    got = retrieve(Wish(num=3), retriever, [50])  # 20 30 40 60 70 80
    scores = np.array([0.5, 0.7, 0.5, 0.9, 0.5, 0.5], np.float32)
    chosen = retriever.choose(Wish(num=4), got, scores)
    assert ITEM_IDS[got.rows[chosen]].tolist() == [60, 30, 20, 40]

    capped = retriever.choose(Wish(num=4, diversify=ColumnCap("author", 1)), got, scores)
    assert ITEM_IDS[got.rows[capped]].tolist() == [60, 30, 20, 70]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrieved_candidates": 9}, "serve.max_recommended must be at most serve.retr"),
        (
            {"popular_candidates": 460},
            r"serve.popular_candidates \+ serve.followed_candidates must be at most",
        ),
    ],
)
def test_limits_agree(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ServeConfig(**changes)
