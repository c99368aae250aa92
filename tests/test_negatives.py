"""Logs of positives only: found at the build, refused by training as they are, and trained with
drawn items.
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.batches.example_batches import example_batch, example_candidates
from pipeline.batches.examples import request_examples, user_events, whole_examples
from pipeline.batches.features import fit_features
from pipeline.batches.labels import TaskCounts
from pipeline.batches.loader import evaluation_batch, split_bounds
from pipeline.batches.training_rows import refuse_one_class
from pipeline.config import ExampleConfig, RunConfig, UserError
from pipeline.sequences import store
from pipeline.sequences.build import build_sequences
from pipeline.tracking.model_card import _drawn_note
from tests.worlds.logs import NOON, config_for, here, log

__all__ = ["here"]  # a fixture

DAY = 24 * 3600 * 1000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Eight days of clicks; `like` is told of some rows."""
    rng = np.random.default_rng(0)
    times = NOON + np.sort(rng.integers(8 * DAY, size=600))
    popular = rng.zipf(1.5, size=600) % 40
    table = log(num_users=12, rows=600)
    table = table.set_column(1, "item_id", pa.array(popular))
    table = table.set_column(2, "event_time", pa.array(times))
    table = table.set_column(3, "click", pa.array(np.ones(600, np.int8)))

    cfg = config_for(tmp_path_factory.mktemp("positives"), table)
    split = replace(
        cfg.split, t_val="2022-04-20T00:00:00+00:00", t_test="2022-04-22T00:00:00+00:00"
    )
    cfg = replace(cfg, split=split, tasks=("click",))
    with pytest.MonkeyPatch.context() as patch:
        here.__wrapped__(patch)  # buckets are built in this process
        build_sequences(cfg)
    return cfg


def with_draws(cfg: RunConfig, number: int) -> RunConfig:
    return replace(cfg, examples=ExampleConfig(negatives=number))


def test_a_build_says_that_there_are_positives_only(
    here: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = log(rows=50, click=pa.array(np.ones(50, np.int8)))
    cfg = config_for(tmp_path, table)
    with caplog.at_level(logging.WARNING):
        build_sequences(cfg)
    assert "click: true wherever known, logs of positives only" in caplog.text
    assert "like: true" not in caplog.text
    page = (cfg.run_dir / "report" / "validation.html").read_text()
    assert "click is true wherever it is known" in page


def test_labels_that_are_all_alike_are_refused_before_training(world: RunConfig) -> None:
    with pytest.raises(UserError, match=r"tasks: click is 1 in all .* set examples\.negatives"):
        fit_features(world)
    maps = fit_features(with_draws(world, 4))
    assert maps.base_rates == {"click": 1 / 5}
    fit_features(replace(world, tasks=("like",)))

    for known, positive, words in ((0, 0, "known in no row"), (9, 0, "is 0 in all 9 rows")):
        counts = TaskCounts(np.array([known]), np.array([positive]))
        with pytest.raises(UserError, match=f"tasks: click is {words}".replace("is is", "is")):
            refuse_one_class(["click"], counts, world.split, 4)


def test_drawn_items_are_none_of_the_users_own_up_to_the_moment(world: RunConfig) -> None:
    cfg = with_draws(world, 3)
    maps = fit_features(cfg)
    users = user_events(store.read_sequences(cfg.sequence_dir), cfg.source, cfg.features)
    examples = whole_examples(users, cfg.split, cfg.train)
    found = example_candidates(users, examples, maps, cfg.task_bits, 3, drawn_by=(cfg.seed, 0))

    events = users.events
    num_rows = int((examples.target_end - examples.target_begin).sum())
    assert len(found.rows) == 4 * num_rows
    assert (~found.drawn).sum() == num_rows
    later = 0
    for row, item, drawn in zip(found.rows, found.item_id, found.drawn & found.usable, strict=True):
        if not drawn:
            continue
        user = users.row_user[row]
        own = slice(events.offsets[user], users.visible_end[row])
        assert item not in events.item_id[own]
        later += item in events.item_id[users.visible_end[row] : events.offsets[user + 1]]
    assert later > 0, "what the user comes to later is not left out"

    # by popularity, where the most popular are not the users' own yet
    visible = users.visible_end[found.rows] - events.offsets[users.users_of(found.rows)]
    early = found.item_id[found.drawn & found.usable & (visible < 2)]
    assert maps.item_count[maps.item_rows(early)].mean() > 2 * maps.item_count[1:].mean()


def test_training_reads_drawn_items_as_negatives(world: RunConfig) -> None:
    cfg = with_draws(replace(world, tasks=("click", "like")), 2)
    maps = fit_features(cfg)
    users = user_events(store.read_sequences(cfg.sequence_dir), cfg.source, cfg.features)
    examples = whole_examples(users, cfg.split, cfg.train)
    found = example_candidates(users, examples, maps, cfg.task_bits, 2, drawn_by=(cfg.seed, 3))
    batch = example_batch(users, examples, maps, cfg, training=True, epoch=3)
    assert batch.labels is not None
    assert batch.label_weight is not None
    assert batch.target_visible is not None
    assert int(batch.num_targets.sum()) == len(found.rows) == len(batch.labels)

    labels, weight = batch.labels.numpy(), batch.label_weight.numpy()
    like = users.events.action_mask[found.rows] >> 1 & 1
    drawn = found.drawn & found.usable
    assert (labels[drawn] == 0).all()
    assert (weight[drawn, 0] == 1).all()
    np.testing.assert_array_equal(weight[drawn, 1], like[drawn])  # where the row is a positive
    assert (weight[found.drawn & ~found.usable] == 0).all()

    # a drawn item sees what its row sees
    visible = batch.target_visible.numpy()
    own = np.flatnonzero(~found.drawn)
    np.testing.assert_array_equal(visible, visible[own][np.cumsum(~found.drawn) - 1])


def test_the_same_items_in_any_batch_process_and_run(world: RunConfig) -> None:
    cfg = with_draws(world, 3)
    maps = fit_features(cfg)
    users = user_events(store.read_sequences(cfg.sequence_dir), cfg.source, cfg.features)
    examples = request_examples(users, *split_bounds(cfg.split, "val"))
    whole = evaluation_batch(users, examples, maps, cfg)
    other_seed = evaluation_batch(users, examples, maps, replace(cfg, seed=7))
    assert whole.item_id.tolist() == other_seed.item_id.tolist()
    assert whole.known[~whole.drawn].all()
    assert (whole.labels[whole.drawn] == 0).all()

    # bucket by bucket, and one example at a time
    alone: dict[tuple, list[int]] = {}
    manifest = store.read_manifest(cfg.sequence_dir)
    for index in range(len(manifest.buckets)):
        some = user_events(
            store.read_bucket(cfg.sequence_dir, manifest, index), cfg.source, cfg.features
        )
        for i, _ in enumerate(one := request_examples(some, *split_bounds(cfg.split, "val"))):
            part = evaluation_batch(some, one[i : i + 1], maps, cfg)
            alone[int(part.user_id[0]), int(part.event_time[0])] = part.item_id.tolist()
    keys = zip(whole.user_id.tolist(), whole.event_time.tolist(), strict=True)
    together: dict[tuple, list[int]] = {}
    for key, item in zip(keys, whole.item_id.tolist(), strict=True):
        together.setdefault(key, []).append(item)
    assert alone == together

    # of training each epoch draws its own
    passes = whole_examples(users, cfg.split, cfg.train)
    draws = []
    for epoch in (0, 1, 0):
        drawn_by = cfg.seed, epoch
        negatives = cfg.examples.negatives
        found = example_candidates(users, passes, maps, cfg.task_bits, negatives, drawn_by)
        draws.append(found.item_id)
    assert draws[0].tolist() == draws[2].tolist() != draws[1].tolist()


def test_the_model_card_says_so(world: RunConfig) -> None:
    assert _drawn_note(0) == ""
    assert "Beside each positive 4 items" in _drawn_note(4)
