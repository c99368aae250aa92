"""Evaluation of retrieval against plain loops over sorted lists."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batches.features import fit_features
from pipeline.batches.stored import StoredUsers
from pipeline.config import RunConfig
from pipeline.evaluate import evaluator, item_knn, parts, retrieval, spread
from pipeline.evaluate.item_knn import ItemKNN
from pipeline.evaluate.retrieval import AskedRows, asked_users, evaluate_retrieval
from pipeline.evaluate.retrieval_metrics import RetrievalMetrics, positive_ranks, top_items
from pipeline.model.artifact import LoadedModel, load_model, save_model
from pipeline.model.ranker import RankingModel
from pipeline.sequences import store
from tests.worlds.tiny import publish_sequences, tiny_config

LIKED = 2  # bit of is_like


def eval_config(folder: Path, **evaluate: object) -> RunConfig:
    small = {"d_model": 16, "d_qk": 8, "d_v": 8, "head_hidden": 8, "encoder": "sasrec"}
    return tiny_config(
        folder,
        tasks=[],
        features={"request": {"tab": {"dim": 2}}},
        model=small | {"attention": {"window": None}, "ffn_dim": 16},
        retrieval={"enabled": True, "positives": ["is_like"], "dim": 8},
        evaluate={"cutoffs": [3, 8], "batch_tokens": 40} | evaluate,
        split={
            "t_val": "2022-05-01T00:00:00+08:00",
            "t_test": "2022-05-02T00:00:00+08:00",
        },
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval_evaluation")
    cfg = eval_config(folder)
    publish_sequences(cfg)
    torch.manual_seed(0)
    maps = fit_features(cfg)
    model = RankingModel(cfg, maps.vocab_sizes, {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_model(cfg.model_dir, model, cfg, maps, {})
    return folder


def asked_by_hand(cfg: RunConfig, loaded: LoadedModel, begin: int, end: int) -> dict:
    """Per user the rows before what is asked for, and the different items that are."""
    found = {}
    for row in store.read_sequences(cfg.sequence_dir).to_pylist():
        taken = []
        for number, time in enumerate(row["event_time"]):
            likes = row["action_mask"][number] & row["known_mask"][number] & LIKED
            if begin <= time < end and likes and not row["order_only"][number]:
                taken.append(number)
        if not taken:
            continue

        if cfg.evaluate.retrieval_protocol == "leave_one_out":
            taken = taken[-1:]
            before = row["event_time"][taken[0]]
        else:
            before = begin
        history = [i for i, time in enumerate(row["event_time"]) if time < before]
        seen = {row["item_id"][i] for i in history}
        items = {row["item_id"][i] for i in taken}
        if cfg.evaluate.remove_seen:
            items -= seen
        if items:
            found[row["user_id"]] = len(history), seen, items
    return found


@pytest.mark.parametrize("protocol", ["global_time", "leave_one_out"])
@pytest.mark.parametrize("remove_seen", [True, False])
def test_popularity_by_hand(folder: Path, protocol: str, remove_seen: bool) -> None:
    cfg = eval_config(folder, retrieval_protocol=protocol, remove_seen=remove_seen)
    loaded = load_model(cfg.model_dir)
    begin, end = cfg.split.val_ms, cfg.split.test_ms
    found = evaluate_retrieval(asked_rows(cfg), loaded, ["val"], "cpu")
    asked = asked_by_hand(cfg, loaded, begin, end)

    counts = dict(zip(loaded.maps.item_ids.tolist(), loaded.maps.next_count[1:], strict=True))
    listed = sorted(counts, key=lambda item: (-counts[item], item))
    sums = dict.fromkeys(("hr_3", "recall_3", "ndcg_3", "mrr"), 0.0)
    for _, seen, items in asked.values():
        places = [item for item in listed if not (remove_seen and item in seen)]
        # seen ones stand behind all others, and what is not known behind these
        ranks = [places.index(item) if item in places else len(counts) for item in items]
        best = sum(1 / math.log2(i + 2) for i in range(min(3, len(items))))
        sums["hr_3"] += min(ranks) < 3
        sums["recall_3"] += sum(rank < 3 for rank in ranks) / min(3, len(items))
        sums["ndcg_3"] += sum(1 / math.log2(rank + 2) for rank in ranks if rank < 3) / best
        sums["mrr"] += 1 / (min(ranks) + 1)

    assert found["val/users"] == len(asked) > 5
    for name, total in sums.items():
        assert found[f"val/popularity/{name}"] == pytest.approx(total / len(asked)), name


def asked_rows(cfg: RunConfig) -> AskedRows:
    return AskedRows(cfg.sequence_dir, cfg.split, cfg.evaluate)


def test_histories_are_what_lies_before(folder: Path) -> None:
    for protocol in ("global_time", "leave_one_out"):
        cfg = eval_config(folder, retrieval_protocol=protocol)
        loaded = load_model(cfg.model_dir)
        by_hand = asked_by_hand(cfg, loaded, cfg.split.val_ms, cfg.split.test_ms)
        found = {}
        for bucket in range(len(store.read_manifest(cfg.sequence_dir).buckets)):
            users, asked = asked_users(asked_rows(cfg), loaded, "val", bucket)
            ids = users.user_id[asked.examples.user].tolist()
            found |= dict(zip(ids, asked.examples.num_history.tolist(), strict=True))
        assert found == {user: length for user, (length, _, _) in by_hand.items()}


@pytest.mark.parametrize("most_items", [0, 2**13])
def test_item_knn_by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch, most_items: int) -> None:
    monkeypatch.setattr(item_knn, "MOST_ITEMS", most_items)
    cfg = eval_config(folder)
    loaded = load_model(cfg.model_dir)
    num_items = len(loaded.maps.item_ids)
    takers: list[set[int]] = [set() for _ in range(num_items)]
    for row in store.read_sequences(cfg.sequence_dir).to_pylist():
        for number, time in enumerate(row["event_time"]):
            likes = row["action_mask"][number] & row["known_mask"][number] & LIKED
            if time < cfg.split.val_ms and likes:
                place = np.searchsorted(loaded.maps.item_ids, row["item_id"][number])
                takers[int(place)].add(row["user_id"])

    stored = StoredUsers(cfg.sequence_dir, cfg.source, cfg.features)
    end_ms = cfg.split.train_end_ms
    knn = ItemKNN.fit(stored, cfg.positive_bits, end_ms, loaded.maps)
    assert (knn.cosines is None) == (most_items == 0)
    users, asked = asked_users(asked_rows(cfg), loaded, "val", 0)
    scores = knn.scores(users, asked.examples, loaded.maps)
    first, end = int(asked.examples.history_begin[0]), int(asked.examples.history_end[0])
    events = users.events
    liked = events.action_mask[first:end] & events.known_mask[first:end] & LIKED
    history = set(loaded.maps.item_rows(events.item_id[first:end][liked > 0]).tolist())
    for item in range(num_items):
        expected = 0.0
        for row in history - {0}:
            a, b = takers[item], takers[row - 1]
            if a and b:
                expected += len(a & b) / math.sqrt(len(a) * len(b))
        assert scores[0, item].item() == pytest.approx(expected, abs=1e-5)


def test_a_model_for_retrieval_alone_is_evaluated(folder: Path) -> None:
    cfg = eval_config(folder)
    metrics = evaluator.evaluate_model(cfg, cfg.model_dir)
    assert 0 <= metrics["val/ndcg_3"] <= metrics["val/hr_3"] <= 1
    assert metrics["test/item_knn/users"] == metrics["test/users"] > 0
    assert not any("/ne/" in name for name in metrics)


@pytest.mark.cluster
def test_workers_rank_as_one_process_does(
    folder: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = eval_config(folder)
    alone = evaluate_retrieval(asked_rows(cfg), load_model(cfg.model_dir), evaluator.SPLITS, "cpu")

    monkeypatch.setattr(spread, "LARGE_STORE", 1)
    found = evaluator.evaluate_model(cfg, cfg.model_dir, name="spread")
    assert alone["test/users"] > 0
    assert {key: found[key] for key in alone} == pytest.approx(alone, abs=1e-6, nan_ok=True)


def test_baselines_are_made_once_for_all_models(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = eval_config(folder, cutoffs=[4])
    loaded = load_model(cfg.model_dir)
    made = evaluate_retrieval(asked_rows(cfg), loaded, ["val"], "cpu")

    def not_again(*_: object) -> None:
        raise AssertionError("the baselines of these sequences are kept")

    monkeypatch.setattr(ItemKNN, "fit", not_again)
    found = evaluate_retrieval(asked_rows(cfg), loaded, ["val"], "cpu")
    assert found == made and found["val/item_knn/users"] == found["val/users"] > 0

    # whatever decides them makes others
    others = [
        (eval_config(folder, cutoffs=[4], remove_seen=False), ["val"]),
        (eval_config(folder, cutoffs=[4], retrieval_protocol="leave_one_out"), ["val"]),
        (eval_config(folder, cutoffs=[5]), ["val"]),
        (cfg, ["val", "test"]),
    ]
    for other, splits in others:
        with pytest.raises(AssertionError, match="are kept"):
            evaluate_retrieval(asked_rows(other), loaded, splits, "cpu")


@pytest.mark.parametrize(("protocol", "mask"), [("leave_one_out", None), ("global_time", 3)])
def test_users_are_found_by_the_vectors_of_the_pass_that_scores_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, mask: int | None
) -> None:
    """The joint model's own vectors: the same lists, and no history encoded once more."""
    masked = {"attention": {"window": 3, "full_rows": 2}, "truncate_to": 4}
    causal = {"attention": {"window": None}, "truncate_after_layer": None}
    cfg = tiny_config(
        tmp_path,
        model=causal if mask is None else masked,
        retrieval={"enabled": True, "positives": ["is_like"], "dim": 8},
        evaluate={"cutoffs": [3], "retrieval_protocol": protocol},
        split={"t_val": "2022-05-01T00:00:00+08:00", "t_test": "2022-05-02T00:00:00+08:00"},
    )
    publish_sequences(cfg)
    torch.manual_seed(0)
    maps = fit_features(cfg)
    model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_model(cfg.model_dir, model, cfg, maps, {})
    loaded = load_model(cfg.model_dir)

    alone = {}
    for split in evaluator.SPLITS:
        for bucket in range(len(store.read_manifest(cfg.sequence_dir).buckets)):
            users, asked = asked_users(asked_rows(cfg), loaded, split, bucket)
            rows = retrieval._encode_users(loaded, users, asked.examples, torch.device("cpu"))
            has_history = asked.examples.num_history > 0
            for user, row in zip(users.user_id[asked.examples.user], rows, strict=True):
                alone[split, int(user)] = row
            for user in users.user_id[asked.examples.user][~has_history]:
                del alone[split, int(user)]

    planned = parts.plan_parts(store.read_manifest(cfg.sequence_dir))
    shared = {}
    for part in planned:
        scores = parts.score_users(cfg, loaded, evaluator.SPLITS, part, with_vectors=True)
        for split, found in scores.vectors.items():
            for user, row in zip(found.user_id.tolist(), found.vectors, strict=True):
                shared[split, user] = row
    assert shared.keys() == alone.keys() and len(alone) > 10
    for key, row in alone.items():
        torch.testing.assert_close(shared[key], row, rtol=1e-4, atol=1e-5)

    expected = evaluate_retrieval(asked_rows(cfg), loaded, evaluator.SPLITS, "cpu")
    monkeypatch.delattr(retrieval, "_encode_users")
    metrics = evaluator.evaluate_model(cfg, cfg.model_dir)
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, nan_ok=True)


def test_scores_do_not_depend_on_the_batch(folder: Path) -> None:
    cfg = eval_config(folder)
    loaded = load_model(cfg.model_dir)
    together = replace(cfg, evaluate=replace(cfg.evaluate, batch_tokens=10_000))
    found = [evaluate_retrieval(asked_rows(c), loaded, ["test"], "cpu") for c in (cfg, together)]
    assert found[0]["test/users"] > 0 and found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], nan_ok=True), name


def test_equal_scores_stand_in_the_order_of_codes() -> None:
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.1], [0.0, 0.0, 0.0, 0.0]])
    user, item = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 3, 0, 3])
    assert positive_ranks(scores, user, item).tolist() == [2, 3, 0, 3]
    assert top_items(scores, 3).tolist() == [[1, 0, 2], [0, 1, 2]]


@pytest.mark.parametrize("levels", [3, 50, 100_000])
def test_the_first_items_are_those_of_a_stable_sort(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (60, 41), generator=generator) / 7
    scores[torch.rand(60, 41, generator=generator) < 0.3] = -torch.inf  # seen
    sorted_whole = scores.sort(dim=1, descending=True, stable=True).indices
    for k in (1, 10, 60):
        assert torch.equal(top_items(scores, k), sorted_whole[:, :k])


def test_the_lists_themselves_by_hand() -> None:
    """Two users, lists [0, 1] and [0, 2] of four items, of which 8, 4, 2, 2 of 16 events are."""
    metrics = RetrievalMetrics(np.array([8, 4, 2, 2]), [2])
    top = np.array([[0, 1], [0, 2]])
    metrics.add(np.array([1, 1]), np.array([1, 9]), np.array([1, 3]), top)
    found = metrics.result()
    assert found["coverage_2"] == 3 / 4
    assert found["novelty_2"] == pytest.approx((1 + 2 + 1 + 3) / 4)
    listed, taken = (0.5 + 0.25 + 0.5 + 0.125) / 4, (0.25 + 0.125) / 2
    assert found["popularity_2"] == pytest.approx(listed / taken)
    assert found["mrr"] == pytest.approx((1 / 2 + 1 / 10) / 2)
