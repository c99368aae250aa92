"""The history store: as of a time, from the published sequences."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import RunConfig, UserError
from pipeline.schema import EventColumns
from serve_app.history.published import PublishedSequences, histories, sequence_row
from tests.worlds.tiny import NOT_A_USER, NUM_USERS, publish_sequences, tiny_config


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path / "runs")


@pytest.fixture
def table(cfg: RunConfig) -> pa.Table:
    return publish_sequences(cfg)


def test_every_user_is_found_and_nobody_else(
    cfg: RunConfig, table: pa.Table, tmp_path: Path
) -> None:
    published = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, tmp_path / "cache")
    assert published.num_users == NUM_USERS
    for row in table.to_pylist():
        found = published.sequence(row["user_id"])
        assert found is not None
        assert found.to_pylist() == [row]
    for absent in (NOT_A_USER, NUM_USERS, 2**62):
        assert published.sequence(absent) is None


def test_only_strictly_earlier_rows_and_the_newest_of_them(
    cfg: RunConfig, table: pa.Table, tmp_path: Path
) -> None:
    published = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, tmp_path / "cache")
    asked = [
        (row["user_id"], time)
        for row in table.to_pylist()
        for time in {*row["event_time"], 0, 2**60}
    ]
    rows = [published.sequence(user) for user, _ in asked]
    for cap in (10_000, 3):
        found = histories(
            [r for r in rows if r],
            np.array([time for _, time in asked]),
            cfg.source,
            cfg.features,
            cap,
        )
        for i, (user, time) in enumerate(asked):
            (row,) = table.filter(pa.compute.equal(table["user_id"], user)).to_pylist()
            earlier = [
                item
                for item, at in zip(row["item_id"], row["event_time"], strict=True)
                if at < time
            ]
            dropped = max(0, len(earlier) - cap)
            begin, end = found.events.offsets[i : i + 2]
            assert found.events.item_id[begin:end].tolist() == earlier[dropped:]
            assert found.first_position[i] == row["first_position"] + dropped
            assert found.events.position[begin:end].tolist() == [
                row["first_position"] + n for n in range(dropped, len(earlier))
            ]


def test_a_row_from_columns_equals_the_published_one(cfg: RunConfig, table: pa.Table) -> None:
    row = table.slice(1, 1)
    columns = {
        name: np.array(row[name].to_pylist()[0])
        for name in ("item_id", "event_time", "action_mask", "tab")
    }
    columns |= {name: np.array(row[name].to_pylist()[0]) for name in ("known_mask", "order_only")}
    made = sequence_row(columns, cfg.source.events, row["first_position"][0].as_py())
    now = np.array([2**60])
    published, built = (
        histories(row.to_batches(), now, cfg.source, cfg.features, 100),
        histories([made], now, cfg.source, cfg.features, 100),
    )
    assert built.first_position == published.first_position
    for name in (
        "item_id",
        "event_time",
        "order_only",
        "action_mask",
        "known_mask",
        "position",
        "gap_ms",
    ):
        assert getattr(built.events, name).tolist() == getattr(published.events, name).tolist()
    assert built.events.request["tab"].tolist() == published.events.request["tab"].tolist()


def test_no_rows_at_all(cfg: RunConfig) -> None:
    found = histories(
        [sequence_row({}, EventColumns(request=("tab",)))] * 2,
        np.array([5, 6]),
        cfg.source,
        cfg.features,
        100,
    )
    assert found.events.offsets.tolist() == [0, 0, 0]


def test_the_copy_is_made_once_and_whole(cfg: RunConfig, table: pa.Table, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, cache)
    (copy,) = cache.iterdir()
    written = copy.stat().st_mtime_ns
    PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, cache)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]


def test_a_new_publication_takes_the_place_of_the_old_copy(
    cfg: RunConfig, table: pa.Table, tmp_path: Path
) -> None:
    old = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, tmp_path / "cache")
    shutil.rmtree(cfg.sequence_dir)
    renewed = publish_sequences(cfg, seed=1)
    new = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for published, expected in ((old, table), (new, renewed)):
        found = published.sequence(2)
        assert found is not None
        assert (
            found.to_pylist()
            == expected.filter(pa.compute.equal(expected["user_id"], 2)).to_pylist()
        )


def test_masks_of_other_actions_are_refused(
    cfg: RunConfig, table: pa.Table, tmp_path: Path
) -> None:
    other = replace(cfg, source=replace(cfg.source, actions=("is_like", "is_click")))
    with pytest.raises(UserError, match="is_like"):
        PublishedSequences(cfg.sequence_dir, other.source, other.features, tmp_path / "cache")


def test_nothing_published(cfg: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sequences are published"):
        PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, tmp_path / "cache")
