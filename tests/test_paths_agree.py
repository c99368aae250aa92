"""Whatever comes, in whatever order: histories kept in pages, rooms that one replay after another
fills, and passes over filled batches give the scores of the model's own forward pass.

What a path keeps between requests is the point: each case goes on with the rooms, graphs and pages
of those before it. There are no graphs on a CPU: what one would hold is done again.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.graphs import BatchGraphs
from pipeline.config import RunConfig
from pipeline.model.inference import cuda_graph
from pipeline.model.inference.cached_scoring import encode_history
from pipeline.model.inference.cuda_graph import Encoded, GraphedScorer
from pipeline.model.inference.graphed_model import GraphedModel
from pipeline.model.ranker import RankingModel
from serve_app.ranking.history_cache import CacheBudget, HeldHistory, HistoryCaches
from tests.support.graphs import capture_no_candidates, capture_none
from tests.test_cached import parts_of
from tests.worlds.model import make_batch, make_config, make_model, tokens_at

KEPT = 5  # rows that truncation leaves
# around the cut and around the sizes of the rooms
LENGTHS = (0, 1, KEPT - 1, KEPT, KEPT + 1, 7, 8, 9, 15, 16, 17, 33)
CANDIDATES = (1, 2, 3, 4, 5, 8, 9)
REQUESTS = 16
MODELS = {
    "whole": {"num_layers": 2},
    "cut behind one layer": {"num_layers": 3, "truncate_after_layer": 1, "truncate_to": KEPT},
    "cut behind two layers": {"num_layers": 3, "truncate_after_layer": 2, "truncate_to": KEPT},
}


def draw_request(rng: np.random.Generator, cfg: RunConfig) -> SequenceBatch:
    """One user, or a few together."""
    num_users = int(rng.choice([1, 1, 2, 4]))
    lengths = rng.choice(LENGTHS, num_users).tolist()
    candidates = rng.choice(CANDIDATES, num_users).tolist()
    batch = make_batch(lengths, candidates, seed=int(rng.integers(1000)))
    if cfg.features.user:
        return batch
    return replace(batch, user_codes=batch.user_codes[:, :0])


def one_history(history: SequenceBatch, user: int) -> SequenceBatch:
    begin, end = history.seq_offsets[user : user + 2].tolist()
    return tokens_at(
        history,
        torch.arange(begin, end),
        seq_offsets=torch.tensor([0, end - begin]),
        num_targets=torch.zeros(1, dtype=torch.int32),
        user_codes=history.user_codes[user : user + 1],
        max_seq_len=end - begin,
    )


class Server:
    """The parts of a ranker on a GPU that keep something between requests."""

    def __init__(self, model: RankingModel, cfg: RunConfig, rng: np.random.Generator) -> None:
        self.model, self.rng = model, rng
        self.score = GraphedScorer()
        self.graphed = GraphedModel(model, cfg)
        self.caches = HistoryCaches(CacheBudget(2**18, for_rooms=True))  # some go for others
        self.num_kept = 0

    def answer(self, batch: SequenceBatch) -> torch.Tensor:
        history, candidates = parts_of(batch)
        together = encode_history(self.model, history).split_histories()
        held: list[HeldHistory] = []
        encoded: list[Encoded] = []
        for user, one in enumerate(together):
            self.num_kept += 1
            key = str(self.num_kept).encode()
            if self.rng.random() < 0.5:
                keep = partial(self.caches.keep_entry, key)
                one = self.graphed.encode_kept(one_history(history, user), keep)
            if isinstance(one, HeldHistory):
                held.append(one)
                encoded.append(one)
                continue

            self.caches.keep_entry(key, one)
            kept = self.caches.hold_entry(key)
            if kept is not None:
                held.append(kept)
            encoded.append(one if kept is None or self.rng.random() < 0.3 else kept)

        scores = self.score(self.model, encoded, candidates, int(self.rng.choice([3, 4, 100])))
        self.caches.release_entries(held)
        return scores


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("with_context", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_was_kept_of_other_requests_changes_no_score(
    name: str, with_context: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchGraphs, "_capture", capture_none)
    monkeypatch.setattr(cuda_graph, "_capture", capture_no_candidates)
    monkeypatch.setattr(cuda_graph, "FEWEST_ROWS", 4)
    monkeypatch.setattr(cuda_graph, "FEWEST_KEYS", 8)

    rng = np.random.default_rng([len(name), with_context, seed])
    mask = {"window": 3, "full_rows": int(rng.choice([0, 2, 6])), "scaling_seq_len": 16}
    cfg = make_config(**MODELS[name], attention=mask)
    if not with_context:
        cfg = replace(cfg, features=replace(cfg.features, user={}, user_tokens={}))
    model = make_model(cfg, seed)
    server = Server(model, cfg, rng)

    for _ in range(REQUESTS):
        batch = draw_request(rng, cfg)
        expected = model(batch)
        torch.testing.assert_close(server.answer(batch), expected, rtol=1e-6, atol=1e-6)
        whole = server.graphed.score(batch)
        torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)

    assert len(server.score._rooms) > 2 and len(server.score._graphs) > 4
    assert server.caches.evictions > 0 and server.graphed._encoding.replayed > 0
    entries = server.caches.budget.entries
    assert all(entry.readers == 0 for entry in entries.values())
