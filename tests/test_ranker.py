"""The ranker against the evaluation path, and what its answers may not depend on."""

import copy
import itertools
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batches.examples import UserEvents, request_examples, user_events
from pipeline.batches.graphs import BatchGraphs
from pipeline.batches.loader import EvaluationBatch, evaluation_batch
from pipeline.config import ConfigError, ServeConfig, UserError
from pipeline.model.artifact import LoadedModel, load_model
from pipeline.model.inference import cuda_graph
from pipeline.model.inference.cached_scoring import HistoryCache, LayerCache
from pipeline.model.inference.quantize import as_served
from pipeline.schema import EventColumns, outcome_column
from serve_app.columns import RankColumns
from serve_app.history.published import PublishedSequences
from serve_app.history.rows import posted_columns
from serve_app.ranking.history_cache import CacheBudget, HistoryCaches, history_key, resident_bytes
from serve_app.ranking.ranker import Ranker, candidate_probabilities, split_passes
from serve_app.schemas import HistoryRow, RankRequest, RankResponse
from tests.support.graphs import capture_no_candidates, capture_none
from tests.worlds.model import make_config, make_model
from tests.worlds.tiny import NOT_A_USER, NUM_USERS, publish_sequences, save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ranker, UserEvents]:
    folder = tmp_path_factory.mktemp("ranker")
    cfg = tiny_config(folder / "runs")
    table = publish_sequences(cfg)
    loaded = load_model(save_tiny_model(cfg, folder / "model"))
    store = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, folder / "cache")
    limits = ServeConfig(max_candidates=50, max_history=30)
    return Ranker(loaded, store, 7, "tiny", limits), user_events(table, cfg.source, cfg.features)


def evaluated(world: tuple[Ranker, UserEvents]) -> tuple[EvaluationBatch, np.ndarray]:
    """All requests of all days, one per sequence, and the scores of an offline evaluation."""
    ranker, users = world
    examples = request_examples(users, 0, 2**62, ranker.cfg.examples.max_history)
    batch = evaluation_batch(users, examples, ranker.maps, ranker.cfg)
    return batch, candidate_probabilities(ranker.model, batch.batch)


def request_of(
    batch: EvaluationBatch, rows: slice, tabs: np.ndarray, **changes: object
) -> RankRequest:
    asked = [
        {"item_id": item, "request_features": {"tab": tab}}
        for item, tab in zip(batch.item_id[rows].tolist(), tabs[rows].tolist(), strict=True)
    ]
    fields = {
        "user_id": int(batch.user_id[rows.start]),
        "request_time_ms": int(batch.event_time[rows.start]),
    }
    return RankRequest.model_validate(fields | {"candidates": asked} | changes)


def all_requests(world: tuple[Ranker, UserEvents]) -> tuple[list[RankRequest], np.ndarray]:
    ranker, _ = world
    batch, scores = evaluated(world)
    num_targets = batch.batch.num_targets.numpy()

    # the candidates are the last rows of each sequence
    last = batch.batch.seq_offsets[1:].numpy() - 1
    begin = last - num_targets + 1
    places = np.concatenate([np.arange(b, e + 1) for b, e in zip(begin, last, strict=True)])
    tab = list(ranker.cfg.features.request).index("tab")
    tabs = batch.batch.request_codes[places, tab].numpy() - 1

    offsets = np.concatenate([[0], np.cumsum(num_targets)])
    return [request_of(batch, slice(b, e), tabs) for b, e in itertools.pairwise(offsets)], scores


def rank(ranker: Ranker, *requests: RankRequest) -> list[RankResponse]:
    asked = [RankColumns.of(request) for request in requests]
    return [answer.response() for answer in ranker.rank(asked)]


def as_array(ranker: Ranker, requests: list[RankRequest]) -> np.ndarray:
    scores = []
    for response in rank(ranker, *requests):
        scores.append(np.array([response.scores[task] for task in ranker.cfg.tasks]).T)
    return np.concatenate(scores)


def test_a_past_request_gets_the_scores_of_the_evaluation(world: tuple[Ranker, UserEvents]) -> None:
    requests, scores = all_requests(world)
    assert len(requests) > 100
    assert np.ptp(scores) > 0.1, "scores that do not differ prove nothing"
    np.testing.assert_allclose(as_array(world[0], requests), scores, atol=1e-6)


def test_a_query_anchored_model_is_served_without_a_cache(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "runs")
    train = replace(cfg.train, layout="request")
    model = replace(cfg.model, time_anchor="query", time_buckets=99)
    cfg = replace(cfg, train=train, model=model)
    table = publish_sequences(cfg)
    loaded = load_model(save_tiny_model(cfg, tmp_path / "model"))
    store = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, tmp_path / "cache")
    ranker = Ranker(loaded, store, 7, "tiny", ServeConfig(max_candidates=50, max_history=30))

    requests, scores = all_requests((ranker, user_events(table, cfg.source, cfg.features)))
    np.testing.assert_allclose(as_array(ranker, requests), scores, atol=1e-6)
    assert hits_and_misses(ranker) == (0, 0)


def test_a_model_of_short_histories_is_served_with_short_histories(
    world: tuple[Ranker, UserEvents], tmp_path: Path
) -> None:
    dense = {"item": {"by": ["item_id"], "prior": 3}}
    cfg = tiny_config(tmp_path / "runs", examples={"max_history": 3}, features={"dense": dense})
    table = publish_sequences(cfg)
    loaded = load_model(save_tiny_model(cfg, tmp_path / "model"))
    store = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, tmp_path / "cache")
    ranker = Ranker(loaded, store, 7, "tiny", ServeConfig(max_candidates=50, max_history=30))
    users = user_events(table, cfg.source, cfg.features)

    batch, scores = evaluated((ranker, users))
    assert (batch.batch.seq_offsets.diff() - batch.batch.num_targets).max() == 3
    tabs = np.full(len(batch.item_id), -1)
    offsets = np.concatenate([[0], np.cumsum(batch.batch.num_targets.numpy())])
    requests = [request_of(batch, slice(b, e), tabs) for b, e in itertools.pairwise(offsets)]
    np.testing.assert_allclose(as_array(ranker, requests), scores, atol=1e-6)


def test_scores_do_not_depend_on_the_company(world: tuple[Ranker, UserEvents]) -> None:
    ranker, _ = world
    requests, _ = all_requests(world)
    requests = requests[::7]
    alone = np.concatenate([as_array(ranker, [request]) for request in requests])
    np.testing.assert_allclose(as_array(ranker, requests), alone, atol=1e-6)
    np.testing.assert_allclose(as_array(ranker, requests[::-1])[::-1].sum(), alone.sum(), atol=1e-4)


def test_a_candidate_does_not_see_the_others(world: tuple[Ranker, UserEvents]) -> None:
    ranker, _ = world
    many = RankRequest.model_validate(
        {"user_id": 2, "candidates": [{"item_id": i} for i in range(40)]}
    )
    one = many.model_copy(update={"candidates": many.candidates[17:18]})
    np.testing.assert_allclose(as_array(ranker, [one])[0], as_array(ranker, [many])[17], atol=1e-6)


def test_the_same_history_in_the_body_differs_only_by_the_user(
    world: tuple[Ranker, UserEvents],
) -> None:
    ranker, _ = world
    sequence = ranker.store.sequence(1)
    assert sequence is not None
    (row,) = sequence.to_pylist()
    now = row["event_time"][-1] + 1
    names = ranker.cfg.source.actions
    history = [
        {
            "item_id": row["item_id"][i],
            "event_time": row["event_time"][i],
            "order_only": row["order_only"][i],
            "watch_ms": None if row["watch_ms"][i] < 0 else row["watch_ms"][i],
            "request_features": {"tab": row["tab"][i]},
            "actions": {
                name: bool(row["action_mask"][i] >> bit & 1)
                for bit, name in enumerate(names)
                if row["known_mask"][i] >> bit & 1
            },
        }
        for i in range(len(row["item_id"]))
    ]

    asked = {"candidates": [{"item_id": i} for i in range(5)], "request_time_ms": now}
    body = RankRequest.model_validate(
        {"history": history, "first_position": row["first_position"]} | asked
    )
    assert ranker.find_refusal(RankColumns.of(body)) is None
    by_id = RankRequest.model_validate({"user_id": 1} | asked)
    with_user = body.model_copy(update={"user_id": 1})
    np.testing.assert_allclose(as_array(ranker, [with_user]), as_array(ranker, [by_id]), atol=1e-6)

    other = body.model_copy(update={"user_id": 2})
    for nobody in (body, body.model_copy(update={"user_id": NOT_A_USER})):
        assert np.abs(as_array(ranker, [nobody]) - as_array(ranker, [by_id])).max() > 1e-4
        assert np.abs(as_array(ranker, [nobody]) - as_array(ranker, [other])).max() > 1e-4


def test_as_of_the_request(world: tuple[Ranker, UserEvents]) -> None:
    ranker, users = world
    place = users.user_id.tolist().index(4)
    first = int(users.events.event_time[users.events.offsets[place]])
    asked = {"user_id": 4, "candidates": [{"item_id": 1}]}
    lengths = [
        rank(ranker, RankRequest.model_validate(asked | {"request_time_ms": at}))[0].history_length
        for at in (first, first + 1)
    ]
    assert lengths[0] == 0
    assert lengths[1] >= 1


def test_unknown_items_and_users_are_scored_and_counted(world: tuple[Ranker, UserEvents]) -> None:
    ranker, _ = world
    asked = [{"item_id": 3}, {"item_id": 10**15}, {"item_id": 2**63 - 1}]
    (answer,) = rank(
        ranker, RankRequest.model_validate({"user_id": NOT_A_USER, "candidates": asked})
    )
    assert answer.unknown_items == 2
    assert answer.unknown_user
    assert answer.history_length == 0

    alike = answer.scores["is_click"][1:]
    assert alike[0] == pytest.approx(alike[1], rel=1e-6), (
        "one row; a matrix product may round its rows differently"
    )

    (known,) = rank(ranker, RankRequest.model_validate({"user_id": 5, "candidates": asked}))
    assert not known.unknown_user


def test_order_is_by_score_and_ties_keep_their_place(world: tuple[Ranker, UserEvents]) -> None:
    ranker, _ = world
    asked = [{"item_id": item} for item in [7, 3, 9, 11] * 16]
    (answer,) = rank(
        ranker,
        RankRequest.model_validate({"user_id": 2, "candidates": asked, "order_by": "is_like"}),
    )
    best_first = [(-answer.scores["is_like"][i], i) for i in answer.order]
    assert best_first == sorted(best_first)
    assert len({score for score, _ in best_first}) < len(asked), "no ties, nothing proven"
    assert answer.ordered_by == "is_like"


@pytest.fixture
def fresh(world: tuple[Ranker, UserEvents]) -> Iterator[Ranker]:
    """The ranker with an empty cache, and as it was afterwards."""
    ranker, _ = world
    limits, caches = ranker.limits, ranker.caches
    ranker.caches = HistoryCaches(CacheBudget.of_mb(limits.cache_mb))
    yield ranker
    ranker.limits, ranker.caches = limits, caches


def ask(user_id: int | None, **changes: object) -> RankRequest:
    fields = {
        "user_id": user_id,
        "request_time_ms": NOW,
        "candidates": [{"item_id": i} for i in range(5)],
    }
    return RankRequest.model_validate(fields | changes)


def hits_and_misses(ranker: Ranker) -> tuple[int, int]:
    stats = ranker.cache_stats()
    return stats["history_cache_hits"], stats["history_cache_misses"]


def test_a_history_is_encoded_once(fresh: Ranker) -> None:
    cold = as_array(fresh, [ask(2), ask(4)])
    assert hits_and_misses(fresh) == (0, 2)

    # a candidate's gap is not cached
    warm = as_array(fresh, [ask(4), ask(2, request_time_ms=NOW + 1000), ask(2)])
    assert hits_and_misses(fresh) == (3, 2)
    np.testing.assert_allclose(warm[10:], cold[:5], atol=1e-6)
    np.testing.assert_allclose(warm[:5], cold[5:], atol=1e-6)
    assert np.abs(warm[5:10] - cold[:5]).max() < 1e-2

    as_array(fresh, [ask(6), ask(6)])
    assert fresh.cache_stats()["history_cache_entries"] == 3


def test_another_history_is_another_entry(fresh: Ranker) -> None:
    sequence = fresh.store.sequence(4)
    assert sequence is not None
    last = sequence["event_time"][0].as_py()[-1]
    as_array(fresh, [ask(4)])
    as_array(fresh, [ask(4, request_time_ms=last + 1)])
    assert hits_and_misses(fresh) == (1, 1), "the same rows are visible"
    as_array(fresh, [ask(4, request_time_ms=last)])
    assert hits_and_misses(fresh) == (1, 2), "the last row is not yet there"


def test_new_events_are_appended_to_an_encoded_history(fresh: Ranker) -> None:
    """Users come back at the time of each of their newest events, when one more is visible."""
    times = {}
    for user in (2, 4):
        sequence = fresh.store.sequence(user)
        assert sequence is not None
        times[user] = sorted(set(sequence["event_time"][0].as_py()))[-4:]
    visits = []
    for visit in range(4):
        visits.append([ask(user, request_time_ms=times[user][visit]) for user in (2, 4)])
    growing = [as_array(fresh, visit) for visit in visits]
    stats = fresh.cache_stats()
    assert (stats["history_cache_misses"], stats["history_cache_appends"]) == (8, 6)

    for visit, expected in zip(reversed(visits), reversed(growing), strict=True):
        fresh.caches = HistoryCaches(CacheBudget.of_mb(fresh.limits.cache_mb))
        np.testing.assert_allclose(as_array(fresh, visit), expected, atol=1e-6)
        assert fresh.cache_stats()["history_cache_appends"] == 0

    # of another user nothing is taken, though the rows are the same
    fresh.caches = HistoryCaches(CacheBudget.of_mb(fresh.limits.cache_mb))
    rows = [{"item_id": i, "event_time": NOW - 9000 + i} for i in range(6)]
    as_array(fresh, [ask(2, history=rows[:4])])
    as_array(fresh, [ask(4, history=rows)])
    assert fresh.cache_stats()["history_cache_appends"] == 0
    as_array(fresh, [ask(2, history=rows)])
    assert fresh.cache_stats()["history_cache_appends"] == 1


@pytest.mark.parametrize("long_history", [1024, 2])
def test_of_a_long_history_the_newest_entry_alone_is_kept(fresh: Ranker, long_history: int) -> None:
    """Each event of theirs makes another entry, and those of others would go for it."""
    fresh.limits = replace(fresh.limits, long_history=long_history)
    rows = [{"item_id": i, "event_time": NOW - 9000 + i} for i in range(6)]
    others = [ask(4, history=rows[:2]), RankRequest.model_validate(
        {"history": rows[:5], "request_time_ms": NOW, "candidates": [{"item_id": 1}]}
    )]  # fmt: skip
    as_array(fresh, others)
    for num_rows in (3, 4, 5, 6):
        as_array(fresh, [ask(2, history=rows[:num_rows])])
        as_array(fresh, [ask(2, history=rows[1:num_rows])])  # the oldest has left
    stats = fresh.cache_stats()
    kept = 8 if long_history == 1024 else 2  # and of two rows, which are not long
    assert stats["history_cache_entries"] == len(others) + kept
    assert stats["history_cache_evictions"] == 0

    # the one that is there is found, and gives the scores of all
    before = hits_and_misses(fresh)
    as_array(fresh, [*others, ask(2, history=rows[1:])])
    assert hits_and_misses(fresh) == (before[0] + 3, before[1])


def test_a_history_that_only_begins_like_another_is_not_appended_to_it(fresh: Ranker) -> None:
    rows = [{"item_id": i, "event_time": NOW - 9000 + i} for i in range(6)]
    changed = [*rows[:2], {**rows[2], "item_id": 9}, *rows[3:]]
    as_array(fresh, [ask(2, history=rows[:4])])
    scores = as_array(fresh, [ask(2, history=changed)])
    assert fresh.cache_stats()["history_cache_appends"] == 0
    fresh.caches = HistoryCaches(CacheBudget.of_mb(fresh.limits.cache_mb))
    np.testing.assert_allclose(as_array(fresh, [ask(2, history=changed)]), scores, atol=1e-6)


def test_a_long_history_whose_entry_was_thrown_out_takes_nobodys_place(fresh: Ranker) -> None:
    fresh.limits = replace(fresh.limits, long_history=10)
    rows = [{"item_id": i % 7, "event_time": NOW - 9000 + 10 * i} for i in range(40)]
    as_array(fresh, [ask(2, history=rows[:20])])
    budget = fresh.caches.budget
    room, budget.max_bytes = budget.max_bytes, budget.num_bytes
    as_array(fresh, [ask(4)])
    assert fresh.cache_stats()["history_cache_evictions"] == 1

    budget.max_bytes = room
    as_array(fresh, [ask(2, history=rows[:21])])
    stats = fresh.cache_stats()
    assert (stats["history_cache_entries"], stats["history_cache_appends"]) == (2, 0)


def test_long_histories_of_nobody_known_do_not_take_each_others_place(fresh: Ranker) -> None:
    fresh.limits = replace(fresh.limits, long_history=10)
    rows = [{"item_id": i % 7, "event_time": NOW - 9000 + 10 * i} for i in range(40)]
    requests = [ask(None, history=rows[b : b + 20], first_position=b) for b in (0, 20)]
    for _ in range(2):
        as_array(fresh, requests)
    stats = fresh.cache_stats()
    assert (stats["history_cache_hits"], stats["history_cache_entries"]) == (2, 2)


def test_a_long_history_that_loses_its_oldest_rows_is_not_encoded_whole(fresh: Ranker) -> None:
    """As that of a user who has as many events as are read, with every event more."""
    fresh.limits = replace(fresh.limits, long_history=10)
    rows = [{"item_id": i % 7, "event_time": NOW - 9000 + 10 * i} for i in range(40)]
    ended = [(0, 20), (1, 21), (4, 25), (5, 25)]
    requests = [ask(2, history=rows[b:e], first_position=b) for b, e in ended]
    moved = [as_array(fresh, [request]) for request in requests]
    stats = fresh.cache_stats()
    assert (stats["history_cache_misses"], stats["history_cache_appends"]) == (4, 3)
    assert stats["history_cache_entries"] == 1

    def assert_encoded_whole(request: RankRequest) -> np.ndarray:
        before = fresh.cache_stats()["history_cache_appends"]
        scores = as_array(fresh, [request])
        assert fresh.cache_stats()["history_cache_appends"] == before
        return scores

    # another row among those that stayed, rows of another user, and nothing that is left of it
    changed = [*rows[6:15], {**rows[15], "item_id": 5}, *rows[16:26]]
    assert_encoded_whole(ask(2, history=changed, first_position=6))
    assert_encoded_whole(ask(4, history=rows[7:27], first_position=7))
    assert_encoded_whole(ask(2, history=rows[27:38], first_position=27))

    for request, expected in zip(requests, moved, strict=True):
        fresh.caches = HistoryCaches(CacheBudget.of_mb(fresh.limits.cache_mb))
        np.testing.assert_allclose(assert_encoded_whole(request), expected, atol=1e-6)

    # what is counted is given back
    fresh.caches.close()
    assert fresh.caches.budget.num_bytes == 0


def test_a_beginning_goes_with_its_entries() -> None:
    offsets = torch.tensor([0, 1])
    layer = LayerCache(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), offsets)
    entry = HistoryCache((layer,))
    caches = HistoryCaches(CacheBudget(2 * resident_bytes(1, 1)))

    caches.keep_entry(b"one row", entry, b"user", 1)
    caches.keep_entry(b"two rows", entry, b"user", 2)
    found = caches.find_beginning(b"user")
    assert found == (b"two rows", 2)
    caches.keep_entry(b"another", entry, b"other user", 1)  # the entry of one row goes
    assert caches.find_beginning(b"user") is not None
    caches.keep_entry(b"a third", entry, b"third user", 1)
    assert caches.find_beginning(b"user") is None
    caches.close()
    assert caches.find_beginning(b"third user") is None
    assert caches.budget.pages.num_free == 2


@pytest.mark.parametrize(
    "limits", [{"cache_mb": 0}, {"micro_batch": 1}, {"micro_batch": 3, "batch_tokens": 1}]
)
def test_limits_change_nothing_in_the_scores(
    world: tuple[Ranker, UserEvents], fresh: Ranker, limits: dict
) -> None:
    requests, scores = all_requests(world)
    requests = requests[:40]
    scores = scores[: sum(len(request.candidates) for request in requests)]

    fresh.limits = replace(fresh.limits, **limits)
    fresh.caches = HistoryCaches(CacheBudget.of_mb(fresh.limits.cache_mb))
    np.testing.assert_allclose(as_array(fresh, requests), scores, atol=1e-6)
    np.testing.assert_allclose(as_array(fresh, requests), scores, atol=1e-6)
    hits, misses = hits_and_misses(fresh)
    assert (hits == 0) == (fresh.limits.cache_mb == 0)
    assert misses > 0


def test_bf16_is_near_and_keeps_half_as_much(
    world: tuple[Ranker, UserEvents], fresh: Ranker
) -> None:
    requests, scores = all_requests(world)
    as_array(fresh, requests)
    full = sum(entry.num_bytes for entry in fresh.caches.budget.entries.values())
    fresh.caches = HistoryCaches(CacheBudget.of_mb(fresh.limits.cache_mb))
    fresh.limits = replace(fresh.limits, precision="bf16")
    for _ in range(2):
        difference = np.abs(as_array(fresh, requests) - scores)
        assert 1e-6 < difference.max() < 0.1
        assert difference.mean() < 5e-3
    assert 2 * sum(entry.num_bytes for entry in fresh.caches.budget.entries.values()) == full


def test_fp8_for_serving_alone(world: tuple[Ranker, UserEvents]) -> None:
    ranker, _ = world
    requests, scores = all_requests(world)
    limits = replace(ranker.limits, fp8=True)
    loaded = LoadedModel(copy.deepcopy(ranker.model), ranker.cfg, ranker.maps, {})
    difference = np.abs(
        as_array(Ranker(loaded, ranker.store, 1, "tiny", limits), requests) - scores
    )
    assert 1e-4 < difference.max() < 0.3


def test_requests_that_come_alone_are_replayed(
    world: tuple[Ranker, UserEvents], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: what a graph would hold is done again."""
    monkeypatch.setattr(BatchGraphs, "_capture", capture_none)
    monkeypatch.setattr(cuda_graph, "_capture", capture_no_candidates)
    ranker, _ = world
    requests, scores = all_requests(world)
    limits = replace(ranker.limits, use_gpu=True, cuda_graphs=True)
    loaded = LoadedModel(ranker.model, ranker.cfg, ranker.maps, {})
    graphed = Ranker(loaded, ranker.store, 1, "tiny", limits)

    assert graphed.graphed is not None
    encoding = graphed.graphed._encoding
    graphed.warm_up()  # candidates are recorded too, were there a GPU
    recorded, replayed = encoding.captured, encoding.replayed

    # whatever the length of a history, it was recorded
    answers = [as_array(graphed, [request]) for request in requests[:60]]
    found = np.concatenate(answers)
    np.testing.assert_allclose(found, scores[: len(found)], atol=1e-6)
    assert recorded == encoding.captured > 2
    assert encoding.replayed > replayed + 5  # others are appended to what is cached

    # an entry stays in its pages for the length of a pass, whether that ends well or not
    entries = graphed.caches.budget.entries
    assert entries and all(entry.readers == 0 for entry in entries.values())
    graphed.score_candidates, scorer = None, graphed.score_candidates  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        as_array(graphed, requests[:2])
    graphed.score_candidates = scorer
    assert all(entry.readers == 0 for entry in entries.values())

    # many together are launched, a few are replayed one after another
    batches = encoding.batches
    np.testing.assert_allclose(as_array(graphed, requests[-20:]), scores_of(world, -20), atol=1e-6)
    assert encoding.batches == batches
    fresh = Ranker(loaded, ranker.store, 1, "tiny", limits)
    np.testing.assert_allclose(as_array(fresh, requests[-3:]), scores_of(world, -3), atol=1e-6)
    assert fresh.graphed is not None
    assert fresh.graphed._encoding.batches == 3


def scores_of(world: tuple[Ranker, UserEvents], first: int) -> np.ndarray:
    """Scores of the requests from number `first` on."""
    batch, scores = evaluated(world)
    num_candidates = int(batch.batch.num_targets[first:].sum())
    return scores[len(scores) - num_candidates :]


def test_fp8_of_a_model_with_concat_ua_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.fp8.*model\.concat_ua"):
        make_config(fp8=True, concat_ua=True)
    with pytest.raises(UserError, match=r"serve\.fp8 is true.*model\.concat_ua"):
        as_served(make_model(make_config(concat_ua=True)), ServeConfig(fp8=True))


def test_an_entry_is_counted_with_its_whole_pages_and_its_objects(fresh: Ranker) -> None:
    as_array(fresh, [ask(2)])
    (entry,) = fresh.caches.budget.entries.values()
    num_pages = -(-entry.num_bytes // 4096)  # the numbers are multiples of 64 bytes
    assert fresh.caches.num_bytes == 4096 * num_pages + 1024 + 256 * len(entry.layers)


def test_the_least_recently_used_is_thrown_out(fresh: Ranker) -> None:
    as_array(fresh, [ask(2), ask(4), ask(6)])
    total = fresh.caches.num_bytes
    fresh.caches = HistoryCaches(CacheBudget(total))
    for user in (2, 4, 6, 2):
        as_array(fresh, [ask(user)])
    assert hits_and_misses(fresh) == (1, 3)

    fresh.caches.budget.max_bytes = total - 1
    as_array(fresh, [ask(8)])  # 4 goes, and whoever else must for 8
    assert fresh.caches.num_bytes <= fresh.caches.budget.max_bytes
    assert fresh.cache_stats()["history_cache_evictions"] >= 1

    before = hits_and_misses(fresh)
    as_array(fresh, [ask(4)])
    assert hits_and_misses(fresh) == (before[0], before[1] + 1)

    fresh.caches = HistoryCaches(CacheBudget(1))
    as_array(fresh, [ask(2)])
    assert fresh.cache_stats()["history_cache_entries"] == 0


def test_many_short_histories_are_counted_by_what_they_cost() -> None:
    """One row of two layers has 64 bytes of numbers, and takes a page and its objects."""
    offsets = torch.tensor([0, 1])
    caches = HistoryCaches(CacheBudget(2**20))
    for i in range(1000):
        layer = LayerCache(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), offsets)
        caches.keep_entry(str(i).encode(), HistoryCache((layer, layer)))

    stats = caches.cache_stats()
    assert stats["history_cache_bytes"] <= 2**20
    assert stats["history_cache_entries"] == 2**20 // (4096 + 1024 + 2 * 256)
    assert stats["history_cache_evictions"] == 1000 - stats["history_cache_entries"]


def test_requests_of_like_length_are_one_class(fresh: Ranker) -> None:
    prepared = fresh.prepare_request(RankColumns.of(ask(2)))
    assert prepared.history_length > 0
    length_class = 1 + prepared.history_length.bit_length()
    assert fresh.history_length_class(prepared) == length_class

    as_array(fresh, [ask(2)])
    assert fresh.history_length_class(prepared) == 0, "encoded already"


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        ([5, 5, 5, 30, 5], [[0, 1], [2], [3], [4]]),
        ([30], [[0]]),
        ([0, 0, 12], [[0, 1, 2]]),
        ([], []),
    ],
)
def test_passes_of_at_most_twelve_tokens(num_tokens: list[int], expected: list) -> None:
    passes = split_passes(np.array(num_tokens, np.int64), 12)
    assert [chosen.tolist() for chosen in passes] == expected


def test_posted_rows_as_columns() -> None:
    columns = EventColumns(
        actions=("is_click", "is_like"),
        request=("tab",),
        declared=(outcome_column("price", "float", 0),),
    )
    rows = [
        HistoryRow(item_id=1, event_time=5, actions={"is_click": False}, watch_ms=70),
        HistoryRow(item_id=2, event_time=5, request_features={"tab": 4}, outcomes={"price": 2.5}),
        HistoryRow(item_id=3, event_time=9, actions={"is_click": False, "is_like": True}),
    ]
    flat = posted_columns(rows, columns)
    assert np.isnan(flat["price"]).tolist() == [True, False, True]
    flat["price"] = np.nan_to_num(flat["price"])
    assert {name: values.tolist() for name, values in flat.items()} == {
        "item_id": [1, 2, 3],
        "event_time": [5, 5, 9],
        "known_mask": [0b01, 0b00, 0b11],
        "action_mask": [0b00, 0b00, 0b10],
        "watch_ms": [70, -1, -1],
        "tab": [-1, 4, -1],
        "price": [0.0, 2.5, 0.0],
    }
    assert posted_columns([], columns) == {}


NOW = int(time.time() * 1000)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"candidates": [{"item_id": 1}] * 51}, "candidates", "51"),
        ({"request_time_ms": NOW // 1000}, "request_time_ms", str(NOW // 1000)),
        ({"request_time_ms": NOW * 1000}, "request_time_ms", str(NOW * 1000)),
        ({"request_features": {"tap": 1}}, "request_features", "tap"),
        ({"candidates": [{"item_id": 1, "request_features": {"hour": 1}}]}, "candidates", "hour"),
        ({"request_features": {"tab": "home"}}, "tab", "home"),
        ({"candidates": [{"item_id": 1, "request_features": {"tab": "5"}}]}, "tab", "5"),
        (
            {
                "user_id": None,
                "history": [{"item_id": 1, "event_time": 5, "request_features": {"tab": "home"}}],
            },
            "tab",
            "home",
        ),
        ({"order_by": "is_bought"}, "order_by", "is_bought"),
        ({"user_id": None, "history": [{"item_id": 1, "event_time": NOW}] * 31}, "history", "31"),
        (
            {
                "user_id": None,
                "history": [{"item_id": 1, "event_time": NOW}],
                "request_time_ms": NOW,
            },
            "event_time",
            str(NOW),
        ),
        (
            {
                "user_id": None,
                "history": [{"item_id": 1, "event_time": 5, "actions": {"is_bought": True}}],
            },
            "actions",
            "is_bought",
        ),
    ],
    # names that do not hold the clock: each worker of the tests collects the same ones
    ids=[
        "candidates",
        "seconds",
        "microseconds",
        "request feature",
        "feature of a candidate",
        "text of a request",
        "text of a candidate",
        "text of a history",
        "order",
        "history",
        "event time",
        "action",
    ],
)
def test_what_this_model_cannot_answer(
    world: tuple[Ranker, UserEvents], change: dict, field: str, value: str
) -> None:
    request = RankRequest.model_validate({"user_id": 1, "candidates": [{"item_id": 1}]} | change)
    refusal = world[0].find_refusal(RankColumns.of(request))
    assert refusal is not None
    assert field in refusal.loc
    assert value in refusal.input


def test_warming_answers_something(world: tuple[Ranker, UserEvents]) -> None:
    world[0].warm_up()
    assert world[0].store.num_users == NUM_USERS


def test_every_column_of_a_history_is_in_its_key(world: tuple[Ranker, UserEvents]) -> None:
    _, users = world
    begin, end = users.events.offsets[:1], users.events.offsets[1:2]
    history, user = users.events.take(begin, end), np.zeros((1, 2), np.int32)
    mappings = {"request", "outcomes"}
    rows = {f.name for f in fields(history)} - {"offsets", "dense"} - mappings
    other = {name: replace(history, **{name: changed(getattr(history, name))}) for name in rows}
    for mapping in mappings:
        columns = getattr(history, mapping)
        for name, column in columns.items():
            another = replace(history, **{mapping: columns | {name: changed(column)}})
            other[f"{mapping}.{name}"] = another

    keys = {name: history_key(events, user) for name, events in other.items()}
    keys |= {
        "itself": history_key(history, user),
        "of another user": history_key(history, user + 1),
    }
    assert len(set(keys.values())) == len(keys) > 9
    assert history_key(users.events.take(begin, end), user) == keys["itself"]


def changed(column: np.ndarray) -> np.ndarray:
    """The same but for its last row."""
    column = column.copy()
    column[-1] = not column[-1] if column.dtype == bool else column[-1] + 1
    return column


def test_a_model_of_nan_is_not_taken_into_service(world: tuple[Ranker, UserEvents]) -> None:
    ranker, _ = world
    broken = copy.copy(ranker)
    broken.model = copy.deepcopy(ranker.model)
    with torch.no_grad():
        next(broken.model.heads.parameters()).fill_(float("nan"))
    ranker.warm_up()
    with pytest.raises(UserError, match=r"tiny version 7 is not served: its scores of is_click"):
        broken.warm_up()
