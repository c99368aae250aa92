"""What the steps of an epoch hold: every example once, whatever the number of ranks, and the same
again on resuming.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.batches import steps as planning
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.examples import user_events, whole_examples
from pipeline.batches.features import fit_features
from pipeline.batches.loader import Share, TrainLoader, made_ahead
from pipeline.batches.steps import deck_slices, rank_decks, step_bounds, step_plan
from pipeline.config import ConfigError, RunConfig
from pipeline.sequences import store
from pipeline.train.trainee import Trainee
from tests.worlds.tiny import publish_sequences, tiny_config

CUTTING = {
    "users": {"batch_users": 5},
    "tokens": {"batch_users": None, "batch_tokens": 40},
    "short": {
        "batch_users": None,
        "batch_tokens": 40,
        "stochastic_length": {"alpha": 1.3, "max_len": 6},
    },
    "short, sampling": {
        "batch_users": 12,
        "max_targets_per_sequence": 2,
        "stochastic_length": {"alpha": 1.6, "max_len": 8, "balance": "sampling"},
    },
    "short, dealing": {
        "batch_users": None,
        "batch_tokens": 40,
        "stochastic_length": {"alpha": 1.3, "max_len": 6, "balance": "dealing"},
    },
    "tiny steps": {"batch_users": 1},
}


def world(folder: Path, **train: object) -> RunConfig:
    """Two pools of one bucket each."""
    settings = {"epochs": 3, "max_targets_per_sequence": 4, "pool_buckets": 1}
    cfg = tiny_config(folder / "runs", train=settings | train)
    publish_sequences(cfg)
    return cfg


def row_of(share: Share, number: int) -> tuple[int, ...]:
    """An example by what it is: its user and its bounds within that user's rows."""
    one, user = share.examples[number : number + 1], int(share.examples.user[number])
    first = int(share.users.events.offsets[user])
    bounds = (one.history_begin, one.history_end, one.target_begin, one.target_end)
    return int(share.users.user_id[user]), *(int(bound[0]) - first for bound in bounds)


def steps_of(
    cfg: RunConfig, epoch: int, world_size: int, first_step: int = 0
) -> list[list[tuple[int, ...]]]:
    """What all ranks together take in each step, sorted."""
    maps, plan = fit_features(cfg), step_plan(cfg)
    ranks = [
        list(TrainLoader(cfg, maps, plan, rank, world_size).epoch_shares(epoch, first_step))
        for rank in range(world_size)
    ]
    assert {len(shares) for shares in ranks} == {plan.steps_per_epoch - first_step}
    return [
        sorted(
            row_of(share, i)
            for share in shares
            if not share.idle
            for i in range(len(share.examples))
        )
        for shares in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("how", CUTTING)
def test_every_example_is_in_one_step_whatever_the_number_of_ranks(
    tmp_path: Path, how: str
) -> None:
    cfg = world(tmp_path, **CUTTING[how])
    users = user_events(store.read_sequences(cfg.sequence_dir), cfg.source, cfg.features)
    whole = Share(users, whole_examples(users, cfg.split, cfg.train), idle=False)
    targets = sorted(
        (row_of(whole, i)[0], *row_of(whole, i)[3:]) for i in range(len(whole.examples))
    )
    epochs = [steps_of(cfg, epoch, 1) for epoch in range(2)]
    for steps in epochs:
        assert all(steps), "an empty step"
        assert sorted((row[0], *row[3:]) for step in steps for row in step) == targets
    assert epochs[0] != epochs[1]
    for world_size in (2, 3, 5):
        assert steps_of(cfg, 1, world_size) == epochs[1]
    assert steps_of(cfg, 1, 3, first_step=4) == epochs[1][4:]  # a run that goes on with other ranks


@pytest.mark.parametrize(
    ("how", "readers"),
    [("users", 2), ("tokens", 5), ("short, sampling", 3), ("short, dealing", 2), ("tiny steps", 3)],
)
def test_steps_depend_on_the_readers_and_on_no_number_of_ranks(
    tmp_path: Path, how: str, readers: int
) -> None:
    cfg = world(tmp_path, readers=readers, **CUTTING[how])
    one_reader = steps_of(world(tmp_path / "one", **CUTTING[how]), 1, 1)
    steps = steps_of(cfg, 1, readers)
    assert all(steps), "an empty step"

    # the targets of the epoch, each once, in other steps than those of one reader
    assert targets_of(steps) == targets_of(one_reader)
    assert steps != one_reader
    for world_size in (1, 2, 7):
        assert steps_of(cfg, 1, world_size) == steps
    # a run that goes on with other ranks, in the middle of a pool
    assert steps_of(cfg, 1, 2, first_step=3) == steps[3:]


def targets_of(steps: list[list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """User and bounds of the targets of all examples, sorted."""
    return sorted((row[0], *row[3:]) for step in steps for row in step)


def test_a_rank_reads_its_own_buckets_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two readers, two buckets: one each, in planning, in training and in the next epoch."""
    cfg = world(tmp_path, batch_users=5, readers=2)
    maps, plan, read = fit_features(cfg), step_plan(cfg), []
    assert plan.pools == ((0, 1),)
    reading = store.read_bucket
    monkeypatch.setattr(store, "read_bucket", lambda *args: read.append(args[2]) or reading(*args))

    users = []
    for rank in range(2):
        read.clear()
        loader = TrainLoader(cfg, maps, plan, rank, world_size=2)
        shares = [share for epoch in range(3) for share in loader.epoch_shares(epoch)]
        assert read == [rank]
        users.append({int(user) for share in shares for user in share.users.user_id})
    assert users[0].isdisjoint(users[1])


def test_a_rank_whose_deck_is_empty_takes_steps_all_the_same(tmp_path: Path) -> None:
    """With more decks than users a rank has no example of its own, and adds nothing."""
    cfg = world(tmp_path, batch_users=5, readers=60)
    maps, plan = fit_features(cfg), step_plan(cfg)
    shares = [next(TrainLoader(cfg, maps, plan, rank, 60).epoch_shares(0)) for rank in range(60)]
    assert {share.idle for share in shares} == {False, True}
    assert all(len(share.examples) for share in shares)


@pytest.mark.parametrize(("readers", "ranks"), [(1, 4), (2, 4), (4, 2), (3, 8), (8, 3)])
def test_every_deck_is_read_and_its_sharers_take_turns(readers: int, ranks: int) -> None:
    found = [rank_decks(readers, rank, ranks) for rank in range(ranks)]
    assert {deck for share in found for deck in share.decks} == set(range(readers))
    for deck in range(readers):
        sharing = [share for share in found if deck in share.decks]
        assert sorted(share.turn for share in sharing) == list(range(len(sharing)))
        assert {share.sharers for share in sharing} == {len(sharing)}


def test_decks_take_every_user_of_a_pool_once() -> None:
    for buckets, readers in ((1, 3), (3, 2), (4, 4), (5, 8)):
        taken = [piece for deck in range(readers) for piece in deck_slices(buckets, readers, deck)]
        assert sum(last - first for _, first, last in taken) == pytest.approx(buckets)
        ends = {}
        for place, first, last in taken:
            assert first == ends.get(place, 0.0)  # where the deck before has ended
            ends[place] = last
        assert ends == dict.fromkeys(range(buckets), 1.0)


def test_steps_are_counted_alike_by_tasks_in_any_order(tmp_path: Path) -> None:
    cfg = world(tmp_path, readers=2, **CUTTING["short"])
    elsewhere = Elsewhere()
    assert step_plan(cfg, run=elsewhere) == step_plan(cfg)
    assert [(task.pool, task.deck) for task in elsewhere.asked] == [(0, 0), (0, 1)]


class Elsewhere:
    """Workers that get everything by pickle, and are done in another order."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(
        self, what: str, function: Callable, items: Sequence, memory_bytes: float = 0
    ) -> list:
        self.asked.extend(items)
        assert memory_bytes > 0
        found = [pickle.loads(pickle.dumps(function))(item) for item in reversed(items)]
        return pickle.loads(pickle.dumps(found))


def test_features_are_fitted_alike_by_tasks_in_any_order(tmp_path: Path) -> None:
    cfg = world(tmp_path)
    cfg = replace(cfg, retrieval=replace(cfg.retrieval, enabled=True))
    elsewhere = Elsewhere()
    folders = []
    for name, maps in (("here", fit_features(cfg)), ("tasks", fit_features(cfg, elsewhere))):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        maps.save(folders[-1])

    num_buckets = len(store.read_manifest(cfg.sequence_dir).buckets)
    assert num_buckets > 1
    # the training period, next items, labels
    assert [task.number for task in elsewhere.asked] == 3 * list(range(num_buckets))
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == sorted(path.name for path in folders[1].iterdir())
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_token_budget(tmp_path: Path) -> None:
    cfg = world(tmp_path, **CUTTING["tokens"])
    for epoch in range(2):
        steps = [
            share.examples.num_tokens
            for share in TrainLoader(cfg, fit_features(cfg), step_plan(cfg)).epoch_shares(epoch)
        ]
        tokens = np.array([step.sum() for step in steps])
        assert tokens.max() <= 40 + max(step.max() for step in steps)
        assert tokens.mean() <= 40
        # no more steps than the budget asks for, one more a pool
        assert len(tokens) <= 2 + tokens.sum() / 40


def test_step_bounds_cut_evenly_and_leave_no_step_empty() -> None:
    rng = np.random.default_rng(0)
    for number in range(200):
        tokens = rng.integers(1, 30, rng.integers(5, 60)).astype(np.float64)
        if number % 2:
            tokens[rng.integers(len(tokens))] = 1000  # longer than many steps
        num_steps = int(rng.integers(1, len(tokens) + 1))
        bounds = step_bounds(tokens, num_steps)
        assert (bounds[0], bounds[-1], len(bounds)) == (0, len(tokens), num_steps + 1)
        assert np.diff(bounds).min() >= 1
        assert np.add.reduceat(tokens, bounds[:-1]).max() <= tokens.sum() / num_steps + tokens.max()


def assert_same(left: SequenceBatch, right: SequenceBatch) -> None:
    for field in fields(SequenceBatch):
        one, other = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, (
            field.name
        )


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_resumed_epoch_has_the_same_batches_bit_for_bit(tmp_path: Path, num_threads: int) -> None:
    cfg = world(tmp_path, **CUTTING["short"])
    maps, plan = fit_features(cfg), step_plan(cfg)
    unbroken = TrainLoader(cfg, maps, plan, rank=1, world_size=2)
    epochs = [list(unbroken.batches(epoch)) for epoch in range(3)]
    assert len(epochs[1]) == plan.steps_per_epoch > 6
    threads = replace(cfg, train=replace(cfg.train, loader_threads=num_threads))
    for first_step in (0, 1, plan.steps[0], plan.steps_per_epoch - 1, plan.steps_per_epoch):
        resumed = TrainLoader(threads, maps, plan, rank=1, world_size=2)
        found = list(resumed.batches(1, first_step)) + list(resumed.batches(2))
        for batch, expected in zip(found, epochs[1][first_step:] + epochs[2], strict=True):
            assert_same(batch, expected)


def test_a_rank_without_an_example_adds_nothing(tmp_path: Path) -> None:
    cfg = world(tmp_path, batch_users=1)
    maps, plan = fit_features(cfg), step_plan(cfg)
    loaders = [TrainLoader(cfg, maps, plan, rank, 3) for rank in range(3)]
    batches = [next(loader.batches(0)) for loader in loaders]
    weights = [
        float(batch.label_weight.sum()) for batch in batches if batch.label_weight is not None
    ]
    assert weights[1:] == [0, 0]
    assert [batch.num_sequences for batch in batches] == [1, 1, 1]
    trainee = Trainee(cfg, maps, "cpu", rank=1, world_size=1)
    losses, _ = trainee.step(batches[1], 0, 10)
    assert losses.abs().sum() == 0
    assert all(
        p.grad is not None and p.grad.to_dense().abs().sum() == 0
        for p in trainee.model.parameters()
    )


def test_the_store_is_read_pool_by_pool_and_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = world(tmp_path, batch_users=5)
    maps, cache, read = fit_features(cfg), tmp_path / "steps.json", []
    reading = store.read_bucket

    def noted(folder: Path, manifest: store.Manifest, index: int):
        read.append(index)
        return reading(folder, manifest, index)

    monkeypatch.setattr(store, "read_bucket", noted)
    plan = step_plan(cfg, cache)
    assert sorted(read) == [0, 1]
    assert step_plan(cfg, cache) == plan
    assert len(read) == 2, "counted again"
    other = replace(cfg, train=replace(cfg.train, batch_users=2))
    assert step_plan(other, cache) != plan
    assert step_plan(cfg, cache) == plan
    read.clear()
    loader = TrainLoader(cfg, maps, plan)
    assert read == []
    order = planning.pool_order(2, 0, cfg.seed)
    # the second pool alone, and the next epoch's first
    batches = loader.batches(0, first_step=plan.steps[order[0]])
    next(batches)
    loader._reader.shutdown()
    first = planning.pool_order(2, 1, cfg.seed)[0]
    assert read == ([order[1]] if first == order[1] else [order[1], first])  # held already, or read


def test_a_store_of_one_pool_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = world(tmp_path, batch_users=5, pool_buckets=2)
    maps, plan, read = fit_features(cfg), step_plan(cfg), []
    reading = store.read_bucket
    monkeypatch.setattr(store, "read_bucket", lambda *args: read.append(args[2]) or reading(*args))
    loader = TrainLoader(cfg, maps, plan)
    epochs = [list(loader.batches(epoch)) for epoch in range(3)]
    assert read == [0, 1]
    for batch, expected in zip(TrainLoader(cfg, maps, plan).batches(2), epochs[2], strict=True):
        assert_same(batch, expected)


def test_an_error_in_the_background_is_seen() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError("bucket 2")
        return number

    found = []
    with pytest.raises(OSError, match="bucket 2"):
        found.extend(made_ahead(make, range(5), 2))
    assert list(made_ahead(make, [5, 3, 4], 8)) == [5, 3, 4]


def test_a_step_is_measured_in_sequences_or_in_tokens(tmp_path: Path) -> None:
    for wrong in ({"batch_tokens": 100}, {"batch_users": None}, {"batch_users": 0}):
        with pytest.raises(ConfigError, match=r"train\.batch_users"):
            tiny_config(tmp_path, train=wrong)
