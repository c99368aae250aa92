"""What a target of a shared pass sees: at least what it would see alone, or exactly that."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.semi_local_attention.reference import semi_local_mask
from pipeline.batches.collate import SequenceBatch, TokenPlaces
from pipeline.batches.events import ranges
from pipeline.batches.example_batches import example_batch
from pipeline.batches.examples import (
    Examples,
    UserEvents,
    cut_histories,
    keep_weighted,
    request_examples,
    request_passes,
    shared_end,
    user_events,
)
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import TrainLoader, evaluation_batch, token_batches
from pipeline.batches.steps import step_plan
from pipeline.batches.stochastic_length import cut_threshold, weighted_rows
from pipeline.config import ConfigError, RunConfig, from_dict, to_dict
from pipeline.model.encoders import check_run
from pipeline.model.encoders.transducer import truncate_history
from pipeline.model.ranker import RankingModel, attention_variance
from pipeline.model.work import count_work
from tests.worlds.tiny import publish_sequences, tiny_config

World = tuple[RunConfig, UserEvents, FeatureMaps]

MASK = {"window": 3, "full_rows": 2, "scaling_seq_len": 16}
WIDE = {"window": 500, "full_rows": 2, "scaling_seq_len": 16}
CAUSAL = {"window": None, "scaling_seq_len": 16}
PLAIN = {"attention": CAUSAL, "truncate_after_layer": None}
ENGAGED = {"actions": ["is_like"], "num_layers": 2, "attention": CAUSAL}
EVERY_TIME = 0, 2**62

EXACT = {
    "truncated": {},
    "truncated to less than the full rows": {"truncate_to": 1},
    "no truncation": {"truncate_after_layer": None, "attention": MASK},
    "window wider than every history": {"attention": WIDE, "truncate_to": 3},
    "no full rows": {"attention": {**MASK, "full_rows": 0}, "truncate_to": 3},
    "window of one row": {"attention": {**MASK, "window": 0, "extra_prefix": 2}},
    "causal and truncated": {"attention": CAUSAL, "truncate_to": 3},
    "one layer": {"num_layers": 1, "truncate_after_layer": None},
    "two channels": {
        "channels": {
            "all": {
                "num_layers": 2,
                "attention": MASK,
                "truncate_after_layer": 1,
                "truncate_to": 4,
            },
            "engaged": ENGAGED,
        }
    },
    "hstu": {**PLAIN, "encoder": "hstu", "relative_bias": True},
    "hstu_merged": {**PLAIN, "encoder": "hstu_merged", "relative_bias": True, "num_layers": 3},
    "transformer": {**PLAIN, "encoder": "transformer"},
    "sasrec": {**PLAIN, "encoder": "sasrec"},
    "din": {**PLAIN, "encoder": "din"},
    "fuxi_alpha": {**PLAIN, "encoder": "fuxi_alpha"},
    "fuxi_beta": {**PLAIN, "encoder": "fuxi_beta"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    cfg = tiny_config(tmp_path_factory.mktemp("runs"))
    sequences = publish_sequences(cfg)
    return cfg, user_events(sequences, cfg.source, cfg.features), fit_features(cfg)


def with_settings(cfg: RunConfig, model: dict, **train: object) -> RunConfig:
    raw = to_dict(cfg)
    raw["model"] |= {"dropout": 0.0, **model}
    raw["train"] |= {"layout": "user", **train}
    return from_dict(raw)


def random_model(cfg: RunConfig, maps: FeatureMaps) -> RankingModel:
    torch.manual_seed(0)
    model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that a wrong row shows
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.train()


def by_row(examples: Examples, values: torch.Tensor) -> dict[int, torch.Tensor]:
    rows, _ = ranges(examples.target_begin, examples.target_end)
    return dict(zip(rows.tolist(), values, strict=True))


def shared_batches(
    users: UserEvents, maps: FeatureMaps, cfg: RunConfig
) -> list[tuple[Examples, SequenceBatch]]:
    """Passes of at most five targets, as training reads them."""
    batches = []
    for part in token_batches(request_passes(users, *EVERY_TIME, 5), 100):
        batches.append((part, example_batch(users, part, maps, cfg, training=True)))
    return batches


def test_every_target_sees_at_least_what_its_request_shows(world: World) -> None:
    base, users, maps = world
    keep, full_rows = 4, 2
    cfg = with_settings(base, {"attention": MASK, "truncate_to": keep})
    model = random_model(cfg, maps)

    num_cut = 0
    for _, batch in shared_batches(users, maps, cfg):
        tokens = model.encoder(batch)
        num_context = model.encoder.num_context
        kept = truncate_history(tokens, num_context, keep)
        assert tokens.target_visible is not None and kept.target_visible is not None
        alone = (tokens.target_visible - num_context).clamp(max=keep)
        assert (kept.target_visible - num_context >= alone).all()
        num_cut += int(tokens.seq_offsets[-1] - kept.seq_offsets[-1])

        # the newest rows of each target are full ones
        first = 0
        for i, count in enumerate(tokens.num_targets.tolist()):
            length = int(tokens.seq_offsets[i + 1] - tokens.seq_offsets[i])
            full = full_rows + int(tokens.span[i])
            mask = semi_local_mask(length, count, MASK["window"], full, num_context)
            for visible in tokens.target_visible[first : first + count].tolist():
                rows = range(max(visible - full_rows, num_context), visible)
                assert all(mask[row, : row + 1].all() for row in rows)
            first += count
    assert num_cut > 0


@pytest.mark.parametrize("name", EXACT)
def test_exact_logits_are_those_of_each_request_alone(world: World, name: str) -> None:
    base, users, maps = world
    cfg = with_settings(base, EXACT[name], target_view="exact")
    model = random_model(cfg, maps)

    alone, shared = {}, {}
    with torch.no_grad():
        for part in token_batches(request_examples(users, *EVERY_TIME), 100):
            alone |= by_row(part, model(evaluation_batch(users, part, maps, cfg).batch))
        for part, batch in shared_batches(users, maps, cfg):
            shared |= by_row(part, model(batch))

    rows = sorted(alone)
    assert len(rows) > 100 and sorted(shared) == rows
    got, expected = (torch.stack([of[row] for row in rows]) for of in (shared, alone))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["truncated", "two channels"])
def test_exact_gradients_are_those_of_the_requests(world: World, name: str) -> None:
    base, users, maps = world
    cfg = with_settings(base, EXACT[name], target_view="exact")
    model = random_model(cfg, maps).double()
    weights = torch.randn(2**16, len(cfg.tasks), dtype=torch.float64)

    def gradients(batches: list[tuple[Examples, SequenceBatch]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part, batch in batches:
            rows, _ = ranges(part.target_begin, part.target_end)
            dense = None if batch.dense is None else batch.dense.double()
            logits = model(replace(batch, dense=dense))
            (logits * weights[rows]).sum().backward()
        found = {}
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[key] = parameter.grad.to_dense().clone()
        return found

    requests = []
    for part in token_batches(request_examples(users, *EVERY_TIME), 100):
        requests.append((part, evaluation_batch(users, part, maps, cfg).batch))
    got, expected = gradients(shared_batches(users, maps, cfg)), gradients(requests)
    assert got.keys() == expected.keys()
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("view", ["covering", "exact"])
def test_stochastic_length_counts_from_the_target(world: World, view: str) -> None:
    base, users, maps = world
    lengths = {"alpha": 1.5, "max_len": 16}  # 8 rows
    cfg = with_settings(base, PLAIN, target_view=view, stochastic_length=lengths)
    passes = request_passes(users, *EVERY_TIME, 5)
    cut = np.ones(len(passes), bool)
    kept = cut_histories(users, passes, cut, cfg.train)
    assert kept.num_history.sum() < passes.num_history.sum()

    batch = example_batch(users, kept, maps, cfg, training=True, cut=cut)
    rows, _ = ranges(kept.target_begin, kept.target_end)
    before = users.visible_end[rows] - users.events.offsets[users.row_user[rows]]
    assert batch.target_visible is not None
    if view == "covering":
        assert batch.target_from is None
        assert (batch.target_visible.numpy() >= np.minimum(before, 8)).all()
    else:
        assert batch.target_from is not None
        seen = batch.target_visible - batch.target_from
        assert seen.tolist() == np.minimum(before, 8).tolist()


@pytest.mark.parametrize("encoder", ["ultra_hstu", "hstu", "sasrec", "din"])
def test_a_cut_pass_is_exact_where_rows_are_read_once(world: World, encoder: str) -> None:
    """Of one layer: a deeper one reads rows which themselves have read what lies before the cut."""
    base, users, maps = world
    lengths = {"alpha": 1.5, "max_len": 16}
    model_settings = {**PLAIN, "encoder": encoder, "num_layers": 1}
    cfg = with_settings(base, model_settings, target_view="exact", stochastic_length=lengths)
    model = random_model(cfg, maps).double()

    def scores(examples: Examples, of: RunConfig) -> dict[int, torch.Tensor]:
        cut = np.ones(len(examples), bool)
        kept = cut_histories(users, examples, cut, of.train)
        batch = example_batch(users, kept, maps, of, training=True, cut=cut)
        dense = None if batch.dense is None else batch.dense.double()
        with torch.no_grad():
            return by_row(kept, model(replace(batch, dense=dense)))

    request = replace(cfg, train=replace(cfg.train, layout="request"))
    alone = scores(request_examples(users, *EVERY_TIME), request)
    shared = scores(request_passes(users, *EVERY_TIME, 5), cfg)
    for row, expected in alone.items():
        torch.testing.assert_close(shared[row], expected)


def test_the_variance_of_every_layer_is_measured_in_both_views(world: World) -> None:
    base, users, maps = world
    found = []
    for view in ("covering", "exact"):
        cfg = with_settings(base, {"attention": MASK}, target_view=view)
        _, batch = shared_batches(users, maps, cfg)[0]
        found.append(attention_variance(random_model(cfg, maps), batch))
    assert len(found[0]) == 2 and found[0] == found[1]


def test_the_work_of_an_exact_view_counts_both_forms(world: World) -> None:
    base, users, maps = world
    settings = {"attention": MASK, "truncate_to": 4}
    covering = with_settings(base, settings)
    exact = with_settings(base, settings, target_view="exact")
    _, batch = max(shared_batches(users, maps, covering), key=lambda part: part[1].num_tokens)

    more, fewer = count_work(batch, exact), count_work(batch, covering)
    assert more.flops > fewer.flops
    assert more.kept_pairs != fewer.kept_pairs


@pytest.mark.parametrize(
    "model",
    [
        {"num_layers": 3, "attention": MASK, "truncate_after_layer": None},
        {"num_layers": 3, "attention": CAUSAL, "truncate_after_layer": 1},
        {"channels": {"new": {"num_layers": 1, "max_len": 5, "attention": CAUSAL}}},
    ],
)
def test_an_exact_view_that_cannot_be_is_refused(tmp_path: Path, model: dict) -> None:
    cfg = with_settings(tiny_config(tmp_path), model, target_view="exact")
    with pytest.raises(ConfigError, match=r"train\.target_view must be covering, .* got 'exact'"):
        check_run(cfg.model, cfg.train, retrieval=cfg.retrieval.enabled)
    for allowed in ({"target_view": "covering"}, {"target_view": "exact", "layout": "request"}):
        cfg = with_settings(tiny_config(tmp_path), model, **allowed)
        check_run(cfg.model, cfg.train, retrieval=False)


WEIGHTED = {"alpha": 1.1, "max_len": 12, "rows": "weighted"}  # 3 rows are kept


def test_a_row_is_drawn_less_often_the_older_it_is():
    """Of four rows two, many times: each draw's first row by the weights of HSTU's table 13."""
    time = np.array([0, 6, 9, 10])
    rng = np.random.default_rng(0)
    drawn = np.array([weighted_rows(time, 2, rng) for _ in range(4000)])
    assert (drawn.sum(1) == 2).all()

    # exact: the chance of each row in two draws without replacement
    weight = 1 - (10 - time) / 15
    expected = np.zeros(4)
    for first in range(4):
        for second in range(4):
            if first != second:
                chance = weight[first] / weight.sum()
                chance *= weight[second] / (weight.sum() - weight[first])
                expected[[first, second]] += chance
    assert np.abs(drawn.mean(0) - expected).max() < 0.035  # over 4 standard errors

    assert weighted_rows(time, 4, rng).all()
    assert weighted_rows(np.zeros(3), 1, rng).sum() == 1  # of one time: all weigh the same
    assert weighted_rows(np.array([0, 5]), 1, rng).tolist() == [False, True]  # 0 of the weight


def test_a_cut_history_of_drawn_rows_shows_each_target_those_before_it(world: World):
    cfg, users, maps = world
    drawn = with_settings(cfg, {}, stochastic_length=WEIGHTED, max_targets_per_sequence=8)
    whole = request_passes(users, *EVERY_TIME, 8)
    shared = shared_end(users, whole) - whole.history_begin
    num_kept = cut_threshold(drawn.train.stochastic_length)
    cut = np.arange(len(whole)) % 2 == 0
    assert (cut & (shared > 3)).any() and (~cut & (shared > 3)).any()

    left = keep_weighted(users, whole, cut, num_kept, (drawn.seed, 1))
    batch = example_batch(users, whole, maps, drawn, training=True, epoch=1, cut=cut)
    plain = example_batch(users, whole, maps, drawn, training=True, epoch=1)
    newest = cut_histories(users, whole, cut, drawn.train)
    assert batch.num_tokens == newest.num_tokens.sum()  # what a step's size is counted by

    is_target = np.ones(plain.num_tokens, bool)
    rows_of = TokenPlaces.of(
        users.events.take(whole.history_begin, whole.history_end),
        users.events.take(whole.target_begin, whole.target_end),
    )
    is_target[rows_of.history] = left.kept
    for name in ("item_codes", "position", "gap_ms", "action_mask", "request_codes"):
        assert torch.equal(getattr(batch, name), getattr(plain, name)[torch.from_numpy(is_target)])
    assert torch.equal(batch.target_span, plain.target_span)
    for name in ("labels", "label_weight", "user_codes"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))

    # a target sees the kept ones of the rows that it saw
    at = 0
    for i in range(len(whole)):
        begin = int(left.begin[i])
        kept = left.kept[begin : begin + int(whole.num_history[i])]
        assert kept[: shared[i]].sum() == (min(shared[i], 3) if cut[i] else shared[i])
        assert kept[shared[i] :].all()
        for _ in range(int(whole.target_end[i] - whole.target_begin[i])):
            assert batch.target_visible[at] == kept[: int(plain.target_visible[at])].sum()
            at += 1

    # the draw is of the example and the epoch, whoever else is in the batch
    some = np.flatnonzero(cut & (shared > 3))[[1, 0]]
    alone = keep_weighted(users, whole[some], cut[some], num_kept, (drawn.seed, 1))
    for place, i in enumerate(some):
        own = alone.kept[alone.begin[place] :][: whole.num_history[i]]
        assert np.array_equal(own, left.kept[left.begin[i] :][: whole.num_history[i]])
    other = keep_weighted(users, whole, cut, num_kept, (drawn.seed, 2))
    assert not np.array_equal(other.kept, left.kept)


def test_the_loader_trains_on_drawn_rows(world: World):
    cfg, _, maps = world
    drawn = with_settings(cfg, {}, stochastic_length=WEIGHTED, max_targets_per_sequence=8)
    newest = with_settings(
        cfg, {}, stochastic_length=WEIGHTED | {"rows": "newest"}, max_targets_per_sequence=8
    )
    pairs = zip(
        TrainLoader(drawn, maps, step_plan(drawn)).batches(0),
        TrainLoader(newest, maps, step_plan(newest)).batches(0),
        strict=True,
    )
    differs = False
    for one, other in pairs:
        assert torch.equal(one.seq_offsets, other.seq_offsets)
        assert torch.equal(one.labels, other.labels)
        differs |= not torch.equal(one.item_codes, other.item_codes)
    assert differs


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"stochastic_length": {"rows": "weighted"}}, "newest where alpha is 2"),
        (
            {"stochastic_length": WEIGHTED, "target_view": "exact"},
            "newest with train.target_view exact",
        ),
    ],
)
def test_drawn_rows_that_are_none_are_refused(world: World, train: dict, message: str):
    with pytest.raises(ConfigError, match=f"train.stochastic_length.rows .*{message}"):
        with_settings(world[0], {}, **train)
