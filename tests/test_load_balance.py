"""Stochastic length over many ranks: equal loads, the same mean length."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.training.example_time import fit_times
from benchmarks.training.load_balance import WARM_UP, simulate, zipf_lengths
from pipeline.batches.features import fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import cut_steps, deal_steps, step_plan
from pipeline.batches.stochastic_length import balanced_cuts, deal_examples, example_loads
from pipeline.config import ConfigError, RunConfig, StochasticLengthConfig
from tests.worlds.tiny import publish_sequences, tiny_config

PLAIN = StochasticLengthConfig(alpha=1.6, max_len=16_384)


@pytest.mark.parametrize("balance", ["published", "sampling", "dealing"])
def test_64_ranks_come_to_equal_loads(balance: str) -> None:
    """As published with many histories a rank only, else with few as well."""
    per_rank = 128 if balance == "published" else 32
    lengths = zipf_lengths(
        64 * per_rank * (WARM_UP + 4), 1.0, 256, 16_384, np.random.default_rng(0)
    )
    plain = simulate(lengths, PLAIN, 64, per_rank, published=False)
    cfg = PLAIN if balance == "published" else replace(PLAIN, balance=balance)
    even = simulate(lengths, cfg, 64, per_rank, published=balance == "published")
    assert plain.worst > 1.15
    assert even.worst <= 1.05
    assert abs(even.mean_length / plain.mean_length - 1) < 0.02


def test_draws_turn_round_only_towards_the_target() -> None:
    whole, short = np.array([10.0, 8, 6, 3]), np.array([2.0, 2, 2, 3])  # the last cannot be cut
    order = np.arange(4)
    none = np.zeros(4, bool)
    assert balanced_cuts(none, whole, short, 27, order).tolist() == [False] * 4
    assert balanced_cuts(none, whole, short, 19, order).tolist() == [True, False, False, False]
    assert balanced_cuts(none, whole, short, 19, order[::-1]).tolist() == [False, True, True, False]
    assert balanced_cuts(none, whole, short, 0, order).tolist() == [True, True, True, False]
    assert balanced_cuts(~none, whole, short, 100, order).tolist() == [False, False, False, True]


def test_dealing_gives_every_example_once_and_every_rank_one() -> None:
    rng = np.random.default_rng(0)
    for num_ranks in (1, 3, 8):
        load = rng.random(8 * num_ranks - 7) + 0.1
        dealt = deal_examples(load, num_ranks)
        assert sorted(np.concatenate(dealt).tolist()) == list(range(len(load)))
        assert min(map(len, dealt)) > 0
    heavy = deal_examples(np.array([9.0, 1, 1, 1]), 2)
    assert [rows.tolist() for rows in heavy] == [[0], [1, 2, 3]]


def test_examples_are_dealt_by_their_predicted_times() -> None:
    """Many short ones weigh more than their tokens where each has a price of its own."""
    tokens = np.array([90, 30, 30, 30])
    by_time = StochasticLengthConfig(load_times=(60, 1, 0.01))
    assert example_loads(tokens, by_time).tolist() == [231, 99, 99, 99]
    by_tokens = deal_examples(example_loads(tokens, StochasticLengthConfig()), 2)
    assert [rows.tolist() for rows in by_tokens] == [[0], [1, 2, 3]]
    dealt = deal_examples(example_loads(tokens, StochasticLengthConfig(load_times=(60, 1, 0))), 2)
    assert [rows.tolist() for rows in dealt] == [[0, 3], [1, 2]]


def test_the_times_of_examples_are_found_from_those_of_batches() -> None:
    rng = np.random.default_rng(0)
    facts = np.column_stack([np.ones(30), rng.uniform(1, 9, (30, 3))])
    expected = np.array([4.0, 0, 2, 0.5])
    times = facts @ expected
    np.testing.assert_allclose(fit_times(facts, times), expected, atol=1e-9)
    # an example never takes less than nothing
    assert (fit_times(facts, times - facts[:, 1]) >= 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_times": (1.0, 2.0)}, r"load_times must be three numbers, not all 0, or null"),
        ({"load_times": (0.0, 0.0, 0.0)}, r"load_times must be three numbers"),
        ({"load_times": (1.0, 2.0, 0.0), "load_exponent": 2.0}, r"load_exponent must be 1\.0 with"),
    ],
)
def test_loads_of_two_kinds_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StochasticLengthConfig(**settings)


def test_steps_of_a_reader_come_to_equal_loads() -> None:
    """By what they hold themselves, since no other rank's examples make up for a heavy one."""
    rng = np.random.default_rng(0)
    load = zipf_lengths(5000, 1.2, 64, 4096, rng).astype(np.float64)
    order = rng.permutation(len(load))

    def loads(steps: list[np.ndarray]) -> np.ndarray:
        assert sorted(np.concatenate(steps).tolist()) == list(range(len(load)))
        return np.array([load[step].sum() for step in steps]) / (load.sum() / len(steps))

    assert loads(cut_steps(order, load, 500)).max() > 1.3
    assert loads(deal_steps(order, load, 500)).max() < 1.05
    # one step more than are dealt together: it too shares with others
    some = order[:170]
    shared = deal_steps(some, load, 17)
    last = [load[step].sum() / load[some].sum() for step in (shared[0], shared[-1])]
    assert last == pytest.approx([1 / 17, 1 / 17], rel=0.1)
    assert [len(step) for step in deal_steps(order[:3], load, 5)] == [1, 1, 1, 0, 0]


def test_one_readers_steps_are_dealt_by_tokens(tmp_path: Path) -> None:
    """So that batches of few sizes come, where a step is so many tokens."""
    spread = {}
    for balance in ("none", "dealing"):
        cfg = world(tmp_path / balance, balance)
        cfg = replace(cfg, train=replace(cfg.train, batch_users=None, batch_tokens=60, readers=1))
        publish_sequences(cfg)
        loader = TrainLoader(cfg, fit_features(cfg), step_plan(cfg))
        tokens = [int(share.examples.num_tokens.sum()) for share in loader.epoch_shares(0)]
        spread[balance] = np.std(tokens) / np.mean(tokens)
    assert spread["dealing"] < 0.5 * spread["none"]


def world(folder: Path, balance: str) -> RunConfig:
    cfg = tiny_config(folder / "runs", sequences={"num_buckets": 2})
    lengths = StochasticLengthConfig(alpha=1.3, max_len=6, balance=balance)  # pyright: ignore[reportArgumentType]
    train = replace(cfg.train, batch_users=6, max_targets_per_sequence=2, stochastic_length=lengths)
    return replace(cfg, train=train)


@pytest.mark.parametrize("balance", ["none", "sampling", "dealing"])
def test_ranks_come_to_loads_as_equal_as_their_examples_allow(tmp_path: Path, balance: str) -> None:
    cfg = world(tmp_path, balance)
    publish_sequences(cfg)
    maps, plan = fit_features(cfg), step_plan(cfg)
    loaders = [TrainLoader(cfg, maps, plan, rank, 2) for rank in range(2)]
    tokens = [[batch.num_tokens for batch in loader.batches(1)] for loader in loaders]
    off = np.abs(np.subtract(tokens[0], tokens[1])).mean() / np.mean(tokens)
    # three short histories a rank
    bounds = {"none": (0.3, 1), "sampling": (0, 0.1), "dealing": (0, 0.1)}
    assert bounds[balance][0] <= off <= bounds[balance][1]
