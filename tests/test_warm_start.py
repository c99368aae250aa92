"""Training from a model that is there: rows by id, new ids unknown, new rows and a share of old."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batches.examples import user_events, whole_examples
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import step_plan
from pipeline.config import ColumnFeature, FeatureConfig, RunConfig, TrainConfig, UserError
from pipeline.model.artifact import load_model, save_model
from pipeline.sequences import store
from pipeline.train import loop
from pipeline.train.checkpoint import CheckpointFolder, TrainState, run_identity
from pipeline.train.trainee import Trainee
from pipeline.train.trainer import trained_on_other_rows
from pipeline.train.warm_start import (
    WarmStart,
    load_start,
    match_vocabularies,
    own_checkpoint,
    prepare_start,
    start_from,
    with_start,
)
from tests.worlds.tiny import DAY_MS, publish_sequences, save_tiny_model, tiny_config

LATER = "2022-05-02T00:00:00+08:00"


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    cfg = tiny_config(tmp_path_factory.mktemp("runs"), name="champion")
    publish_sequences(cfg)
    return cfg, save_tiny_model(cfg, cfg.model_dir)


def later(cfg: RunConfig, **train: object) -> RunConfig:
    """The same settings a day on: a longer training period, so new items and users in it."""
    day_on = replace(cfg.split, t_val=LATER, t_test="2022-05-04T00:00:00+08:00")
    return replace(cfg, split=day_on, train=replace(cfg.train, init="champion", **train))  # pyright: ignore[reportArgumentType]


def test_equal_vocabularies_give_the_champions_scores(champion: tuple[RunConfig, Path]) -> None:
    cfg, folder = champion
    maps = fit_features(cfg)
    trainee = Trainee(cfg, maps, "cpu", 0, 1)
    load_start(trainee, WarmStart(str(folder), "", LATER), maps, cfg.features)
    batch = next(TrainLoader(cfg, maps, step_plan(cfg)).batches(0))
    with torch.no_grad():
        expected = load_model(folder).model(batch)
        assert torch.equal(trainee.model.eval()(batch), expected)


def test_rows_go_by_id_and_new_ids_begin_as_unknown(champion: tuple[RunConfig, Path]) -> None:
    cfg, folder = champion
    old, cfg = load_model(folder), later(cfg)
    maps = fit_features(cfg)
    trainee = Trainee(cfg, maps, "cpu", 0, 1)
    load_start(trainee, start_from(cfg, folder), maps, cfg.features)

    path = trainee.table_paths["item_id"]
    before = old.model.state_dict()[path]
    now = trainee.model.state_dict()[path]
    new = 0
    for item in maps.item_ids:
        code = maps.item_codes[maps.item_rows(np.array([item])), 0].item()
        known = old.maps.item_codes[old.maps.item_rows(np.array([item])), 0].item()
        assert torch.equal(now[code], before[known]), item
        new += code > 0 and known == 0
    assert new > 0, "the later period has items of its own"
    assert torch.equal(now[0], before[0])


def test_codes_of_a_column_are_known_by_who_has_them() -> None:
    def maps(item_ids: list[int], codes: list[list[int]], tabs: list[int]) -> FeatureMaps:
        table = np.array([[0, 0], *codes], np.int32)
        sizes = {"item_id": 1 + len(item_ids), "item.tag": 5, "request.tab": 1 + len(tabs)}
        return FeatureMaps(
            item_ids=np.array(item_ids),
            item_codes=table,
            item_count=np.zeros(len(table), np.int64),
            user_ids=np.zeros(0, np.int64),
            user_codes=np.zeros((1, 0), np.int32),
            request_values={"tab": np.array(tabs)},
            vocab_sizes=sizes,
            base_rates={},
        )

    old = maps([7, 9, 12], [[1, 3], [2, 1], [3, 1]], [10, 30])
    # 5 and 20 are new; the column's values have other codes now, and item 12 another value
    new = maps([5, 7, 9, 12, 20], [[1, 4], [2, 1], [3, 2], [4, 2], [5, 3]], [10, 20, 30])
    found = match_vocabularies(old, new, FeatureConfig(item={"tag": ColumnFeature(dim=2)}))
    assert found["item_id"].tolist() == [0, 0, 1, 2, 3, 0]
    assert found["item.tag"].tolist() == [0, 3, 1, 0, 0]
    assert found["request.tab"].tolist() == [0, 1, 0, 2]


def test_moments_go_on_where_the_checkpoint_is_there(
    champion: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    base, _ = champion
    cfg = replace(base, name="daily", runs_dir=str(tmp_path))
    cfg = replace(cfg, sequences=replace(cfg.sequences, from_run="champion"))
    (tmp_path / "champion").symlink_to(base.run_dir)
    maps = fit_features(cfg)
    digest = store.read_manifest(cfg.sequence_dir).digest
    checkpoints = CheckpointFolder(cfg.train_dir / "checkpoints", keep=1)
    loader = TrainLoader(cfg, maps, step_plan(cfg))
    model = loop.train(cfg, maps, loader, digest, checkpoints=checkpoints)
    saved = checkpoints.newest()
    assert saved is not None
    facts = {"steps": saved.state.step, "sequences": digest}
    save_model(cfg.model_dir, model, cfg, maps, facts)
    assert own_checkpoint(cfg.train_dir, cfg.model_dir) == saved.folder

    day_on = later(cfg)
    start = prepare_start(day_on, cfg.model_dir, restart=True)
    assert start is not None
    assert start.checkpoint is not None
    assert not (cfg.train_dir / "checkpoints").exists()
    again = prepare_start(day_on, None, restart=False)
    assert again == start, "an attempt that goes on keeps it"

    before = Trainee(cfg, maps, "cpu", 0, 1)
    kept = Path(start.checkpoint)
    before.load_checkpoint(CheckpointFolder(kept.parent, keep=1).read(kept))
    new_maps = fit_features(day_on)
    trainee = Trainee(day_on, new_maps, "cpu", 0, 1)
    load_start(trainee, start, new_maps, day_on.features)
    assert trainee.rowwise.step_count == saved.state.step
    for path in trainee.dense:
        moment = before.adamw.state[path]["exp_avg_sq"]
        assert torch.equal(trainee.adamw.state[path]["exp_avg_sq"], moment), path
    path = trainee.table_paths["item_id"]
    rows = match_vocabularies(maps, new_maps, day_on.features)["item_id"]
    moments = before.rowwise.v[path][rows] * torch.from_numpy(rows > 0)
    assert torch.equal(trainee.rowwise.v[path], moments)


def test_a_day_has_its_own_passes_and_a_warm_up_that_fits(
    champion: tuple[RunConfig, Path],
) -> None:
    """Settings of a long training from nothing are no obstacle to a short one from the champion."""
    base, folder = champion
    cfg = later(base, epochs=3, warmup_steps=100)
    train = with_start(cfg.train, start_from(cfg, folder))
    assert (train.epochs, train.warmup_steps) == (1, None)
    cfg = later(base, epochs=3, champion_epochs=2)
    assert with_start(cfg.train, start_from(cfg, folder)).epochs == 2
    assert with_start(cfg.train, None).epochs == 3, "from nothing"


def test_other_rows_are_told_by_sequences_and_split(
    champion: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    """Where no file came but the days moved on, a training does not go on where it was."""
    base, _ = champion
    cfg = replace(base, name="today", runs_dir=str(tmp_path))
    assert not trained_on_other_rows(cfg, "a"), "no training yet"

    checkpoints = CheckpointFolder(cfg.train_dir / "checkpoints", keep=1)
    state = TrainState(steps_per_epoch=1, finished=True)
    checkpoints.save({"weight": torch.zeros(2)}, state, run_identity(cfg, "a"))
    assert not trained_on_other_rows(cfg, "a")
    assert trained_on_other_rows(cfg, "b")
    assert trained_on_other_rows(later(cfg), "a")
    assert not trained_on_other_rows(replace(cfg, seed=7), "a"), "a mistake, told elsewhere"


def test_new_rows_are_targets_and_a_share_of_the_old_ones(champion: tuple[RunConfig, Path]) -> None:
    base, folder = champion
    users = user_events(store.read_sequences(base.sequence_dir), base.source, base.features)

    def targets(cfg: RunConfig, train: TrainConfig) -> set[int]:
        found = whole_examples(users, cfg.split, train)
        rows: set[int] = set()
        for begin, end in zip(found.target_begin, found.target_end, strict=True):
            assert rows.isdisjoint(range(begin, end))
            rows |= set(range(begin, end))
        return rows

    whole = targets(later(base), base.train)
    cfg = later(base, replay_share=0.0)
    new = targets(cfg, with_start(cfg.train, start_from(cfg, folder)))
    times = users.request_time[sorted(new)]
    assert len(new) > 0
    assert times.min() >= base.split.val_ms
    assert times.max() < base.split.val_ms + DAY_MS

    some = later(base, replay_share=0.4, max_targets_per_sequence=2)
    replayed = targets(some, with_start(some.train, start_from(some, folder)))
    assert new < replayed < whole
    assert 0.2 < len(replayed - new) / len(whole - new) < 0.6

    everything = later(base, replay_share=1.0)
    from_there = with_start(everything.train, start_from(everything, folder))
    assert targets(everything, from_there) == whole


def test_what_does_not_fit_is_refused(champion: tuple[RunConfig, Path]) -> None:
    cfg, folder = champion
    with pytest.raises(UserError, match=r"has learned all rows before .*: move split\.t_val on"):
        start_from(replace(cfg, train=replace(cfg.train, init="champion")), folder)
    wider = later(replace(cfg, model=replace(cfg.model, d_model=32)))
    with pytest.raises(UserError, match=r"the champion has model\.d_model = 16, this run 32"):
        start_from(wider, folder)
