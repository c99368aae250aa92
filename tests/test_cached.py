"""A cached history gives the scores of the plain forward pass, whatever the model's switches and
the micro-batch.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline import config
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.rates import dense_width
from pipeline.config import DenseFeature, RunConfig
from pipeline.model.encoders.stu import projection_flops
from pipeline.model.inference import cuda_graph
from pipeline.model.inference.cached_scoring import (
    HistoryCache,
    encode_history,
    encode_history_rows,
    layer_outputs,
    score_candidates,
)
from pipeline.model.inference.cuda_graph import (
    MOST_REPLAYS,
    ROWS_A_REPLAY,
    GraphedScorer,
    bucket_size,
)
from pipeline.model.inference.rooms import fill_room, make_room
from pipeline.model.ranker import RankingModel
from pipeline.model.tokens import target_mask
from pipeline.model.work import (
    action_flops,
    cached_work,
    count_work,
    head_flops,
    input_flops,
)
from serve_app.ranking.history_cache import CacheBudget, HistoryCaches
from tests.support.graphs import capture_no_candidates
from tests.worlds.mixture import ENGAGED, EVERY_ROW, make_mixture
from tests.worlds.model import make_batch, make_config, make_model, tokens_at

TRUNCATED = {"num_layers": 3, "truncate_after_layer": 1, "truncate_to": 4}
FULL = {"window": 3, "full_rows": 2, "extra_prefix": 2, "scaling_seq_len": 16}


def with_dense(cfg: RunConfig) -> RunConfig:
    return replace(
        cfg, features=replace(cfg.features, dense={"popularity": DenseFeature(by=("item_id",))})
    )


CONFIGS = {
    "plain": make_config(),
    "causal": make_config(attention={"window": None, "full_rows": 0, "scaling_seq_len": 16}),
    "full rows and a prefix of events": make_config(attention=FULL),
    "truncation": make_config(**TRUNCATED, attention=FULL),
    "two tokens an event": make_config(**TRUNCATED, merge=False),
    "switches": make_config(
        silu_qkv=False, concat_ua=True, candidate_action="learned", **TRUNCATED
    ),
    "dense features": with_dense(make_config(**TRUNCATED, dense_to="both")),
    "mixture": make_mixture(
        "request", engaged={**ENGAGED, "max_len": 2}, all={**EVERY_ROW, **TRUNCATED}
    ),
    "the reference": make_config(**TRUNCATED, attention_backend="reference"),
}
BATCHES = {  # lengths of the histories, numbers of candidates
    "several users": ([9, 0, 4, 70, 1], [3, 5, 1, 7, 0]),
    "one user": ([11], [6]),
    "no history": ([0], [4]),
}


def parts_of(batch: SequenceBatch) -> tuple[SequenceBatch, SequenceBatch]:
    """The batch's histories without candidates, and its candidates without histories."""
    is_target = target_mask(batch.seq_offsets, batch.num_targets, batch.num_tokens)
    num_targets = batch.num_targets.long()
    num_history = batch.seq_offsets.diff() - num_targets
    history, candidates = (
        tokens_at(
            batch,
            chosen.nonzero()[:, 0],
            seq_offsets=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
            max_seq_len=int(lengths.max()),
        )
        for chosen, lengths in ((~is_target, num_history), (is_target, num_targets))
    )
    no_dense = None if batch.dense is None else batch.dense[:0]
    return replace(
        history, num_targets=torch.zeros_like(batch.num_targets), dense=no_dense
    ), candidates


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_cached_history_gives_the_scores_of_the_plain_pass(name: str, shape: str) -> None:
    model, batch = make_model(CONFIGS[name]), make_batch(*BATCHES[shape])
    cfg = CONFIGS[name]
    width = dense_width(cfg.features, len(cfg.tasks))
    dense = torch.randn(int(batch.num_targets.sum()), width, dtype=torch.float64)
    batch = replace(batch, dense=dense)
    expected = model(batch)
    history, candidates = parts_of(batch)
    cache = encode_history(model, history)
    for micro_batch in (1, 3, 1000):
        scores = score_candidates(model, cache, candidates, micro_batch)
        # float64 up to the last conversion
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_one_pass_gives_caches_and_the_newest_rows(name: str) -> None:
    model = make_model(CONFIGS[name])
    history, _ = parts_of(make_batch(*BATCHES["several users"]))
    with torch.no_grad():
        cache, rows = encode_history_rows(model, history)
        expected = model.encode(history, last_history=True).last_history_row
        alone = encode_history(model, history)
    torch.testing.assert_close(rows, expected)
    for one, other in zip(cache.layers, alone.layers, strict=True):
        torch.testing.assert_close(one.k_THD, other.k_THD)
        torch.testing.assert_close(one.v_THV, other.v_THV)


def test_without_context_tokens() -> None:
    raw = CONFIGS["truncation"]
    cfg: RunConfig = replace(raw, features=replace(raw.features, user={}, user_tokens={}))
    model, batch = (
        make_model(cfg),
        replace(make_batch([9, 0], [3, 2]), user_codes=torch.zeros(2, 0, dtype=torch.int32)),
    )
    history, candidates = parts_of(batch)
    scores = score_candidates(model, encode_history(model, history), candidates, 1000)
    torch.testing.assert_close(scores, model(batch), rtol=1e-6, atol=1e-6)
    alone = make_batch([0], [3])
    # no token at all to attend to
    alone = replace(alone, user_codes=torch.zeros(1, 0, dtype=torch.int32))
    history, candidates = parts_of(alone)
    scores = score_candidates(model, encode_history(model, history), candidates, 1000)
    torch.testing.assert_close(scores, model(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("encoder", ["ultra_hstu", "hstu", "hstu_merged", "sasrec", "fuxi_beta"])
@torch.no_grad()
def test_users_of_whom_nothing_is_known_have_rows_of_zeros(encoder: str) -> None:
    """All of a batch, for a model without context tokens: lists for new users alone."""
    cfg = make_config(encoder=encoder, attention={"window": None, "scaling_seq_len": 16})
    model = make_model(replace(cfg, features=replace(cfg.features, user={}, user_tokens={})))
    batch = make_batch([0, 0], [1, 2])
    history, _ = parts_of(replace(batch, user_codes=torch.zeros(2, 0, dtype=torch.int32)))
    row = model.encode(history, last_history=True).last_history_row
    assert row is not None
    assert torch.equal(row, torch.zeros_like(row)) and len(row) == 2
    if encoder == "ultra_hstu":
        assert torch.equal(encode_history_rows(model, history)[1], row)


@torch.no_grad()
def test_float32_scores_equal_to_1e_5() -> None:
    model = make_model(CONFIGS["truncation"]).float()
    batch = make_batch([300, 17], [40, 9])
    history, candidates = parts_of(batch)
    scores = score_candidates(model, encode_history(model, history), candidates, 16)
    torch.testing.assert_close(scores.sigmoid(), model(batch).sigmoid(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["truncation", "mixture"])
@torch.no_grad()
def test_caches_part_and_join(name: str) -> None:
    """One pass over several histories, kept apart and put together in another order and company."""
    model, batch = make_model(CONFIGS[name]), make_batch([9, 0, 4, 70], [3, 5, 1, 7])
    expected = model(batch).split([3, 5, 1, 7])
    history, candidates = parts_of(batch)
    caches = encode_history(model, history).split_histories()
    order = [3, 1, 0]
    rows = torch.cat(
        [torch.arange(b, e) for b, e in (candidates.seq_offsets[i : i + 2].tolist() for i in order)]
    )
    chosen = tokens_at(
        candidates,
        rows,
        seq_offsets=torch.tensor([0, 7, 12, 15]),
        num_targets=torch.tensor([7, 5, 3], dtype=torch.int32),
        max_seq_len=7,
    )
    scores = score_candidates(
        model, HistoryCache.join_histories([caches[i] for i in order]), chosen, 4
    )
    torch.testing.assert_close(
        scores, torch.cat([expected[i] for i in order]), rtol=1e-6, atol=1e-6
    )
    assert sum(cache.num_bytes for cache in caches) == encode_history(model, history).num_bytes
    held = sum(
        x.untyped_storage().nbytes()
        for layer in caches[1].layers
        for x in (layer.k_THD, layer.v_THV)
    )
    assert held == caches[1].num_bytes, "a kept part keeps the memory of the whole"


@pytest.mark.parametrize("name", ["plain", "truncation"])
def test_counted_work_is_that_of_one_pass_without_the_histories_last_layer(name: str) -> None:
    cfg = CONFIGS[name]
    batch = make_batch([40, 0, 9], [3, 5, 1])
    history, candidates = parts_of(batch)
    # two of them are the context
    num_rows = [42, 2, 11] if cfg.model.truncate_after_layer is None else [6, 2, 6]
    # U and Q of the histories, half of a projection, which one pass does not make
    unread = projection_flops(cfg.model, sum(num_rows)) // 2
    # of the candidates, which have none
    actions = action_flops(cfg.model, cfg.num_action_bits, 9)
    one_pass = count_work(batch, cfg).flops
    assert sum(cached_work(history, candidates, cfg.inputs)) == one_pass + unread - actions


def test_counted_work_of_a_mixture_is_that_of_its_channels() -> None:
    both, (history, candidates) = CONFIGS["mixture"], parts_of(make_batch([40, 0, 9], [3, 5, 1]))
    none = [
        input_flops(both.features, both.model, history.num_tokens, 3)
        + action_flops(both.model, both.num_action_bits, history.num_tokens),
        input_flops(both.features, both.model, 9, 0),
    ]
    alone, heads = [], []
    for name, channel in both.model.channels.items():
        cfg = make_mixture("request", **{name: config.to_dict(channel)})
        alone.append(cached_work(history, candidates, cfg.inputs))
        heads.append(head_flops(cfg.features, cfg.model, len(cfg.tasks), 9))
    whole_head = head_flops(both.features, both.model, len(both.tasks), 9)
    together = cached_work(history, candidates, both.inputs)
    assert together[0] - none[0] == sum(work[0] - none[0] for work in alone)
    assert together[1] - none[1] - whole_head == sum(
        work[1] - none[1] - head for work, head in zip(alone, heads, strict=True)
    )


@torch.no_grad()
def test_room_of_a_buckets_size_holds_a_shorter_history() -> None:
    """What a CUDA graph computes over: padded rows and keys, of which the offsets say how much
    counts.
    """
    model, batch = make_model(CONFIGS["truncation"]), make_batch([300], [40])
    history, candidates = parts_of(batch)
    cache = encode_history(model, history)
    sizes = tuple(bucket_size(len(layer.k_THD), 256) for layer in cache.layers)
    assert sizes == (512, 256, 256)
    room = make_room(encode_history(model, parts_of(make_batch([400], [1]))[0]), sizes)
    fill_room(room, cache)
    rows = model.encoder.candidate_rows(candidates)
    torch.testing.assert_close(rows, model.encoder.event_rows(candidates), rtol=0, atol=0)
    padded = torch.cat([rows, torch.full((24, rows.shape[1]), 1e3, dtype=rows.dtype)])
    out = layer_outputs(model, room.history, padded, torch.tensor([0, 40]))[:40]
    torch.testing.assert_close(
        model.score_rows(out, candidates), model(batch), rtol=1e-6, atol=1e-6
    )


@torch.no_grad()
def test_what_is_not_finite_leaves_the_room_with_its_history() -> None:
    model = make_model(CONFIGS["truncation"])
    longer = encode_history(model, parts_of(make_batch([300], [1]))[0])
    batch = make_batch([70], [9])
    history, candidates = parts_of(batch)
    shorter = encode_history(model, history)
    room = make_room(longer, tuple(bucket_size(len(layer.k_THD), 256) for layer in longer.layers))
    for layer in longer.layers:
        layer.k_THD.fill_(torch.nan)
        layer.v_THV.fill_(torch.inf)
    fill_room(room, longer)
    fill_room(room, shorter)
    rows = model.encoder.candidate_rows(candidates)
    broken = torch.full((7, rows.shape[1]), torch.nan, dtype=rows.dtype)
    out = layer_outputs(
        model, room.history, torch.cat([rows, broken]), torch.tensor([0, len(rows)])
    )
    torch.testing.assert_close(
        model.score_rows(out[: len(rows)], candidates), model(batch), rtol=1e-6, atol=1e-6
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["truncation", "mixture"])
def test_a_few_users_are_replayed_one_after_another(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: what a graph would hold is done again."""
    monkeypatch.setattr(cuda_graph, "_capture", capture_no_candidates)
    model, score = make_model(CONFIGS[name]), GraphedScorer()

    def scores_of(lengths: list[int], num_candidates: list[int]) -> torch.Tensor:
        batch = make_batch(lengths, num_candidates)
        history, candidates = parts_of(batch)
        caches = encode_history(model, history).split_histories()
        scores = score(model, caches, candidates, 64)
        torch.testing.assert_close(scores, model(batch), rtol=1e-6, atol=1e-6)
        return scores

    def replays() -> int:
        return sum(graph.replayed for graph in score._graphs.values())

    scores_of([300, 11, 70], [40, 3, 100])
    assert replays() == 4, "a hundred candidates are two parts"
    assert len(score._rooms) == 2, "of 256 and 512 rows"
    scores_of([9] * (MOST_REPLAYS + 1), [2] * (MOST_REPLAYS + 1))
    assert replays() == 4, "more users are launched together"
    lengths = [ROWS_A_REPLAY, *[9] * MOST_REPLAYS]
    scores_of(lengths, [2] * len(lengths))
    assert replays() == 4 + len(lengths), "unless their histories are long"


@torch.no_grad()
def test_a_room_made_for_a_kept_history_takes_those_that_truncation_cuts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All layers of two rows are of one length; of 70 rows those behind the cut are shorter, in two
    versions different ones.
    """
    monkeypatch.setattr(cuda_graph, "_capture", capture_no_candidates)
    budget = CacheBudget(2**22, for_rooms=True)
    for truncated in (1, 2):
        cfg = make_config(**TRUNCATED | {"truncate_after_layer": truncated}, attention=FULL)
        model, score, caches = make_model(cfg), GraphedScorer(), HistoryCaches(budget)
        for length in (2, 70):
            score_kept(model, score, caches, length)
        assert len(score._rooms) == 1


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["truncation", "mixture"])
def test_a_room_takes_kept_histories_in_any_order(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two buckets; truncation cuts some of them and leaves others whole."""
    monkeypatch.setattr(cuda_graph, "_capture", capture_no_candidates)
    model, score = make_model(CONFIGS[name]), GraphedScorer()
    caches = HistoryCaches(CacheBudget(2**24, for_rooms=True))
    lengths = np.random.default_rng(seed).permutation([1, 3, 30, 70, 200, 240, 300])
    for length in lengths.tolist():
        score_kept(model, score, caches, length)


def score_kept(
    model: RankingModel, score: GraphedScorer, caches: HistoryCaches, length: int
) -> None:
    """Keep an encoded history, score candidates by it, and compare with the plain pass."""
    batch = make_batch([length], [9], seed=length)
    history, candidates = parts_of(batch)
    key = str(length).encode()
    caches.keep_entry(key, encode_history(model, history))
    held = caches.hold_entry(key)
    assert held is not None
    scores = score(model, [held], candidates, 64)
    caches.release_entries([held])
    torch.testing.assert_close(scores, model(batch), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_cuda_graphs_give_the_same_scores() -> None:
    model, score = make_model(CONFIGS["truncation"]).float().cuda(), GraphedScorer()
    for length, num_candidates in ((300, 40), (11, 3), (400, 64), (300, 1)):
        batch = make_batch([length], [num_candidates])
        history, candidates = (part.to("cuda") for part in parts_of(batch))
        # what an earlier, broken history of the same bucket leaves behind
        broken = encode_history(model, parts_of(make_batch([500], [1]))[0].to("cuda"))
        for layer in broken.layers:
            layer.k_THD.fill_(torch.nan)
            layer.v_THV.fill_(torch.nan)
        score(model, [broken], candidates, 32)
        scores = score(model, [encode_history(model, history)], candidates, 32)
        torch.testing.assert_close(
            scores.sigmoid(), model(batch.to("cuda")).sigmoid(), rtol=0, atol=1e-5
        )
