"""Presets of public datasets that users download: each builds from a look-alike of its files."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.batches.example_batches import target_labels
from pipeline.batches.examples import request_examples, user_events
from pipeline.batches.features import fit_features
from pipeline.batches.loader import split_bounds
from pipeline.config import RunConfig
from pipeline.sequences import build, store

ROOT = Path(__file__).parents[1]
KUAIRAND_ACTIONS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate")
START = config.parse_time("", "2020-01-01T00:00:00+00:00")


def write_kuairand(folder: Path, rng: np.random.Generator) -> list[str]:
    """The standard logs in their parts, users and videos; returns what points the preset there."""
    videos, rows = np.arange(100, 400) * 1000, 600
    first, last = (
        config.parse_time("", f"2022-{day}T00:00:00+08:00") for day in ("04-08", "05-09")
    )
    folder.mkdir()
    for name in ("4_08_to_4_21_27k_part1", "4_22_to_5_08_27k_part1", "4_22_to_5_08_27k_part2"):
        time_ms = np.sort(rng.integers(first, last, rows))
        log = {"user_id": rng.integers(0, 20, rows), "video_id": rng.choice(videos, rows)}
        day = pd.to_datetime(time_ms, unit="ms", utc=True).tz_convert("Asia/Shanghai")
        log |= {"date": day.strftime("%Y%m%d"), "hourmin": day.strftime("%H00").astype(int)}
        log |= {"time_ms": time_ms}
        log |= {action: rng.integers(0, 2, rows) for action in KUAIRAND_ACTIONS}
        played = rng.integers(0, 60_000, rows)
        log |= {"long_view": (played > 30_000).astype(int), "play_time_ms": played}
        log |= {"duration_ms": rng.integers(5000, 60_000, rows), "profile_stay_time": 0}
        log |= {"comment_stay_time": 0, "is_profile_enter": rng.integers(0, 2, rows)}
        log |= {"is_rand": 0, "tab": rng.integers(0, 15, rows)}
        pd.DataFrame(log).to_csv(folder / f"log_standard_{name}.csv", index=False)
    pd.DataFrame({"user_id": [0]}).to_csv(folder / "log_random_4_22_to_5_08_27k.csv", index=False)

    users = {"user_id": np.arange(20), "user_active_degree": "high_active"}
    users |= {"is_lowactive_period": 0, "is_live_streamer": 0, "is_video_author": 1}
    users |= {"register_days": rng.integers(1, 2000, 20), "onehot_feat4": None}
    pd.DataFrame(users).to_csv(folder / "user_features_27k.csv", index=False)
    items = {"video_id": videos, "author_id": rng.integers(0, 50, 300), "video_type": "NORMAL"}
    items |= {"upload_dt": "2022-04-01", "upload_type": "ShortImport", "visible_status": 1}
    items |= {"video_duration": rng.integers(5000, 60_000, 300).astype(float)}
    items |= {"server_width": 720, "music_id": rng.integers(0, 2**40, 300), "tag": "12,65"}
    pd.DataFrame(items).to_csv(folder / "video_features_basic_27k.csv", index=False)
    return [
        f"source.path={folder}/log_standard_*.csv",
        f"source.users.path={folder}/user_features_27k.csv",
        f"source.items.path={folder}/video_features_basic_27k.csv",
    ]


def write_yambda(folder: Path, rng: np.random.Generator) -> list[str]:
    """The flat file of all events, sorted by user and time."""
    rows = 1500
    kinds = np.array(["listen", "like", "dislike", "unlike", "undislike"])
    kind = rng.choice(5, rows, p=[0.8, 0.1, 0.04, 0.03, 0.03])
    is_listen = kind == 0
    table = pa.table(
        {
            "uid": pa.array(rng.integers(0, 12, rows), pa.uint32()),
            "timestamp": pa.array(rng.integers(0, 26_000_000 // 5, rows) * 5, pa.uint32()),
            "item_id": pa.array(rng.integers(1, 200, rows), pa.uint32()),
            "is_organic": pa.array(rng.integers(0, 2, rows), pa.uint8()),
            "played_ratio_pct": pa.array(rng.integers(0, 130, rows), pa.uint16(), mask=~is_listen),
            "track_length_seconds": pa.array(rng.integers(60, 400, rows), mask=~is_listen),
            "event_type": pa.array(kinds[kind]).dictionary_encode(),
        }
    )
    folder.mkdir()
    pq.write_table(
        table.sort_by([("uid", "ascending"), ("timestamp", "ascending")]),
        folder / "multi_event.parquet",
    )
    return [f"source.path={folder}/multi_event.parquet"]


WRITERS = {"kuairand_27k": write_kuairand, "yambda_50m": write_yambda}


@pytest.fixture(scope="module", params=list(WRITERS))
def built(
    request: pytest.FixtureRequest, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """The preset over a look-alike of its files, its sequences published."""
    folder = tmp_path_factory.mktemp(request.param)
    places = WRITERS[request.param](folder / "files", np.random.default_rng(0))
    cfg = config.load(
        ROOT / "configs" / f"{request.param}.yaml",
        [*places, f"runs_dir={folder}", "sequences.num_buckets=1"],
    )
    build.build_sequences(cfg)
    return cfg


@pytest.mark.cluster
def test_the_preset_reads_every_row_and_knows_its_labels(built: RunConfig) -> None:
    manifest = store.read_manifest(built.sequence_dir)
    sequences = store.read_sequences(built.sequence_dir)
    users = user_events(sequences, built.source, built.features)
    assert manifest.quarantined == {}
    if built.name == "kuairand_27k":
        assert (manifest.num_users, manifest.rows_in) == (20, 1800)
        assert set(manifest.side_tables) == {"users", "items"}
    else:
        assert (manifest.num_users, manifest.rows_in) == (12, 1500)
        assert START <= manifest.first_event_ms <= manifest.last_event_ms < START + 26e9

    rows = np.arange(len(users.events.item_id))
    labels, weights = target_labels(users.events, rows, built.task_bits, 1.0)
    known = weights[:, 0] > 0
    assert 0.3 < labels[known, 0].mean() < 0.7
    assert known.mean() == 1.0 if built.name == "kuairand_27k" else 0.7 < known.mean() < 0.9

    for split in ("val", "test"):
        assert len(request_examples(users, *split_bounds(built.split, split))) > 0
    assert fit_features(built).vocab_sizes["item_id"] > 100
