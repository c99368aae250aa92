"""Rates that candidates carry: against plain loops, the same everywhere, and never from a row's own
label.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline import config
from pipeline.batches import features
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.counts import LabelCounts, distinct_values, search_sorted
from pipeline.batches.example_batches import example_batch
from pipeline.batches.examples import (
    Examples,
    UserEvents,
    request_examples,
    training_examples,
    user_events,
)
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.rates import dense_width
from pipeline.config import DenseFeature, RunConfig, UserError
from pipeline.model.artifact import load_model, save_model
from pipeline.model.ranker import RankingModel
from tests.worlds.tiny import publish_sequences, tiny_config

HOUR_MS = 3_600_000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, pa.Table, FeatureMaps]:
    cfg = tiny_config(tmp_path_factory.mktemp("dense") / "runs")
    return cfg, publish_sequences(cfg), fit_features(cfg)


def test_counts_before_a_time_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    group, time, labels = (
        rng.integers(0, 9, 300),
        rng.integers(50, 70, 300),
        rng.integers(0, 2, (300, 4)),
    )
    halves = [
        LabelCounts.from_rows(group[part], time[part], labels[part])
        for part in (slice(0, 40), slice(40, 300))
    ]
    counts = LabelCounts.merge_parts(
        [*halves, LabelCounts.from_rows(group[:0], time[:0], labels[:0])]
    )
    asked, when = rng.integers(0, 12, 200), rng.integers(40, 80, 200)
    expected = [labels[(group == g) & (time < t)].sum(0) for g, t in zip(asked, when, strict=True)]
    np.testing.assert_array_equal(counts.count_earlier(asked, when), expected)
    totals = [labels[group == g].sum(0) for g in asked]
    np.testing.assert_array_equal(counts.whole_period().count_earlier(asked, when), totals)


# Against plain loops


def rows_of(table: pa.Table) -> list[dict]:
    """Every row of the store, in its order, with its user and what its user saw before its time."""
    rows = []
    for user in table.to_pylist():
        names = ("item_id", "event_time", "action_mask", "known_mask", "order_only", "tab")
        own = [{name: user[name][i] for name in names} for i in range(len(user["item_id"]))]
        for row in own:
            row["past"] = [other for other in own if other["event_time"] < row["event_time"]]
        rows += own
    return rows


def expected_feature(
    row: dict, rows: list[dict], feature: DenseFeature, cfg: RunConfig
) -> list[float]:
    """What `features.dense` says of one row, from its definition."""
    of_kind = lambda other: (
        feature.rows == "all" or other["order_only"] == (feature.rows == "order_only")
    )
    training = [
        other for other in rows if other["event_time"] < cfg.split.train_end_ms and of_kind(other)
    ]
    step = row["event_time"] // HOUR_MS
    pool = [o for o in row["past"] if of_kind(o)] if feature.live else training
    earlier = [other for other in pool if feature.live or other["event_time"] // HOUR_MS < step]
    if feature.within_minutes is not None:
        since = row["event_time"] - feature.within_minutes * HOUR_MS / 60
        earlier = [other for other in earlier if other["event_time"] >= since]
    columns = [name for name in feature.by if name != "user"]
    alike = [other for other in earlier if all(other[name] == row[name] for name in columns)]
    values, counted = [], 0
    for bit in (1, 2):
        label = lambda other, bit=bit: bool(other["action_mask"] & other["known_mask"] & bit)
        known = [other for other in alike if other["known_mask"] & bit]
        known_at_all = [other for other in training if other["known_mask"] & bit]
        base = sum(map(label, known_at_all)) / len(known_at_all)
        rate = (sum(map(label, known)) + feature.prior * base) / (len(known) + feature.prior)
        values.append(np.log(rate / (1 - rate)) - np.log(base / (1 - base)))
        counted = max(counted, len(known))
    return [*values, np.log1p(counted) / 4]


def target_rows(examples: Examples) -> np.ndarray:
    bounds = zip(examples.target_begin, examples.target_end, strict=True)
    return np.concatenate([np.arange(begin, end) for begin, end in bounds])


def dense_of(
    users: UserEvents, examples: Examples, maps: FeatureMaps, cfg: RunConfig
) -> np.ndarray:
    batch = example_batch(users, examples, maps, cfg, training=True)
    assert batch.dense is not None
    return batch.dense.numpy()


def test_every_training_and_validation_row_against_loops(
    world: tuple[RunConfig, pa.Table, FeatureMaps],
) -> None:
    cfg, table, maps = world
    users, rows = user_events(table, cfg.source, cfg.features), rows_of(table)
    examples = request_examples(users, 0, 2**62)
    chosen = target_rows(examples)
    width = len(cfg.tasks) + 1
    got = dense_of(users, examples, maps, cfg)
    assert got.shape == (len(chosen), dense_width(cfg.features, len(cfg.tasks)))
    for i, feature in enumerate(cfg.features.dense.values()):
        expected = [expected_feature(rows[row], rows, feature, cfg) for row in chosen]
        assert np.ptp(expected, axis=0).min() > 0.1, "a feature that does not differ proves nothing"
        np.testing.assert_allclose(
            got[:, i * width : (i + 1) * width], expected, rtol=1e-5, atol=1e-6
        )


def test_more_groups_than_are_told_apart_are_refused(
    world: tuple[RunConfig, pa.Table, FeatureMaps], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, _, maps = world
    groups = maps.num_groups(["item_id", "tab"], cfg.features)
    assert groups == (len(maps.item_ids) + 1) * maps.vocab_sizes["request.tab"]
    monkeypatch.setattr(features, "MOST_GROUPS", groups - 1)
    with pytest.raises(
        UserError, match=r"features\.dense\.item_tab\.by: \['item_id', 'tab'\] have .* combinations"
    ):
        fit_features(cfg)


def test_a_row_without_a_real_time_carries_nothing(
    world: tuple[RunConfig, pa.Table, FeatureMaps],
) -> None:
    cfg, table, maps = world
    users = user_events(table, cfg.source, cfg.features)
    examples = training_examples(users, cfg.split, cfg.train, np.random.default_rng(0))
    order_only = users.events.order_only[target_rows(examples)]
    dense = dense_of(users, examples, maps, cfg)
    assert order_only.sum() > 5
    assert (dense[order_only] == 0).all()
    assert (dense[~order_only] != 0).any(axis=1).all()


# The same numbers everywhere


def test_both_layouts_and_a_cut_history_give_the_same_numbers(
    world: tuple[RunConfig, pa.Table, FeatureMaps],
) -> None:
    cfg, table, maps = world
    users = user_events(table, cfg.source, cfg.features)
    by_row = {}
    cut = {"alpha": 1.2, "max_len": 3}
    for layout in ("user", "request"):
        lengths = config.StochasticLengthConfig(**cut)
        train = replace(
            cfg.train, layout=layout, max_targets_per_sequence=3, stochastic_length=lengths
        )
        changed = replace(cfg, train=train)
        examples = training_examples(users, changed.split, changed.train, np.random.default_rng(0))
        assert (examples.history_begin > users.events.offsets[examples.user]).any()
        dense = dense_of(users, examples, maps, changed)
        order = np.argsort(target_rows(examples), kind="stable")
        by_row[layout] = dense[order]
    np.testing.assert_array_equal(by_row["user"], by_row["request"])


def test_a_saved_model_knows_the_whole_training_period(
    world: tuple[RunConfig, pa.Table, FeatureMaps], tmp_path: Path
) -> None:
    """Rows after it read the same numbers from the maps of training; the ranker's tests hold
    serving against them.
    """
    cfg, table, maps = world
    save_model(
        tmp_path / "model", RankingModel(cfg, maps.vocab_sizes, maps.base_rates), cfg, maps, {}
    )
    saved = load_model(tmp_path / "model").maps
    users = user_events(table, cfg.source, cfg.features)
    later = request_examples(users, cfg.split.val_ms, 2**62)
    np.testing.assert_array_equal(
        dense_of(users, later, maps, cfg), dense_of(users, later, saved, cfg)
    )
    earlier = request_examples(users, 0, cfg.split.val_ms)
    assert not np.array_equal(
        dense_of(users, earlier, maps, cfg), dense_of(users, earlier, saved, cfg)
    )


# Leaks


def flipped(table: pa.Table, row: int) -> pa.Table:
    """The store with the labels of one row turned round."""
    users, count = table.to_pylist(), 0
    for user in users:
        place = row - count
        if 0 <= place < len(user["item_id"]):
            user["action_mask"][place] ^= 3
        count += len(user["item_id"])
    return pa.Table.from_pylist(users, schema=table.schema)


def own_label_moves(
    cfg: RunConfig, folder: Path, see: Callable[[RunConfig, FeatureMaps, pa.Table, int], np.ndarray]
) -> int:
    """For how many of some training rows what `see` returns depends on the row's own label."""
    table = publish_sequences(replace(cfg, runs_dir=str(folder / "plain")))
    maps = fit_features(replace(cfg, runs_dir=str(folder / "plain")))
    events = user_events(table, cfg.source, cfg.features).events
    rows = np.flatnonzero((events.event_time < cfg.split.train_end_ms) & ~events.order_only)[::4]
    moved = 0
    for row in rows.tolist():
        other_cfg = replace(cfg, runs_dir=str(folder / f"flipped-{row}"))
        other = flipped(table, row)
        publish_sequences(other_cfg, table=other)
        # one label in all of them: no leak
        other_maps = replace(fit_features(other_cfg), row_rates=maps.row_rates)
        moved += not np.array_equal(see(cfg, maps, table, row), see(cfg, other_maps, other, row))
    assert len(rows) > 20
    return moved


def batch_of_row(
    cfg: RunConfig, maps: FeatureMaps, table: pa.Table, row: int
) -> tuple[SequenceBatch, int]:
    """The training pass that has this row among its targets, and which of them it is."""
    users = user_events(table, cfg.source, cfg.features)
    examples = training_examples(users, cfg.split, cfg.train, np.random.default_rng(0))
    number = int(np.flatnonzero((examples.target_begin <= row) & (row < examples.target_end))[0])
    one = examples[number : number + 1]
    return example_batch(users, one, maps, cfg, training=True), row - int(one.target_begin[0])


def see_features(cfg: RunConfig, maps: FeatureMaps, table: pa.Table, row: int) -> np.ndarray:
    batch, place = batch_of_row(cfg, maps, table, row)
    assert batch.dense is not None
    return batch.dense[place].numpy()


def test_no_row_carries_its_own_label(tmp_path: Path) -> None:
    assert own_label_moves(tiny_config(Path()), tmp_path, see_features) == 0


def test_a_planted_leak_is_found(tmp_path: Path) -> None:
    """Rates of the whole training period, the row's own label among them."""
    see = lambda cfg, maps, table, row: see_features(cfg, maps.frozen(), table, row)
    assert own_label_moves(tiny_config(Path()), tmp_path, see) > 20


def test_no_row_moves_its_own_logit(tmp_path: Path) -> None:
    cfg = tiny_config(Path())
    plain = replace(cfg, runs_dir=str(tmp_path / "fit"))
    publish_sequences(plain)
    maps = fit_features(plain)
    torch.manual_seed(0)
    model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)

    @torch.no_grad()
    def see(cfg: RunConfig, maps: FeatureMaps, table: pa.Table, row: int) -> np.ndarray:
        batch, place = batch_of_row(cfg, maps, table, row)
        return model(batch)[place].numpy()

    assert own_label_moves(cfg, tmp_path, see) == 0
    leaking = lambda cfg, maps, table, row: see(cfg, maps.frozen(), table, row)
    assert own_label_moves(cfg, tmp_path / "leak", leaking) > 20


# Configuration


@pytest.mark.parametrize(
    ("feature", "complaint"),
    [
        ({"by": ["author"]}, "features.dense.x.by must be one of"),
        ({"by": ["hour"]}, "features.dense.x.by must be one of"),
        ({"by": []}, "features.dense.x.by must be at least one column"),
        ({"by": ["item_id"], "prior": 0}, "features.dense.x.prior must be greater than 0"),
        ({"by": ["item_id"], "rows": "old"}, "features.dense.x.rows must be one of"),
        (
            {"by": ["user"], "within_minutes": 0},
            "features.dense.x.within_minutes must be greater than 0",
        ),
        (
            {"by": ["item_id"], "within_minutes": 60},
            "features.dense.x.within_minutes must be null unless",
        ),
        (
            {"by": ["user"], "rows": "all", "within_minutes": 60},
            "features.dense.x.within_minutes must be null unless",
        ),
    ],
)
def test_a_mistake_is_told(feature: dict, complaint: str) -> None:
    with pytest.raises(config.ConfigError) as told:
        tiny_config(Path(), features={"request": {"hour": {}}, "dense": {"x": feature}})
    assert complaint in str(told.value)


def test_places_are_those_of_a_search_one_by_one() -> None:
    rng = np.random.default_rng(0)
    values = np.unique(rng.integers(-50_000, 50_000, 3000))
    for num in (0, 10, 5000):
        wanted = rng.integers(-60_000, 60_000, num)
        assert search_sorted(values, wanted).tolist() == [int((values < x).sum()) for x in wanted]


@pytest.mark.parametrize("values", [[], [4], [3, -1, 3, 2**62, -1]])
def test_distinct_values_are_numpys(values: list[int]) -> None:
    numbers = np.array(values, np.int64)
    assert distinct_values(numbers).tolist() == np.unique(numbers).tolist() == sorted(set(values))
