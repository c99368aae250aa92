"""jobs.pipeline day after day: new logs join the sequences, and what was trained on others is
trained anew.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.pipeline
from pipeline.config import RunConfig, SideTable, SplitConfig
from pipeline.tracking import session
from serve_app import deployment, replay
from tests.worlds.tiny import DAY_MS, NUM_ITEMS, NUM_USERS, tiny_config

pytestmark = pytest.mark.cluster


def write_day(cfg: RunConfig, day: int) -> None:
    """Rows of one day; days 0 and 1 lie before validation begins, 3 and 4 in the test period."""
    rng, rows = np.random.default_rng(day), 200
    table = {
        "user_id": rng.integers(NUM_USERS, size=rows),
        "item_id": rng.integers(NUM_ITEMS, size=rows),
        "event_time": cfg.split.val_ms + (day - 2) * DAY_MS + rng.integers(DAY_MS, size=rows),
        "is_click": rng.integers(2, size=rows).astype(np.int8),
        "is_like": rng.integers(2, size=rows).astype(np.int8),
        "tab": rng.integers(3, size=rows).astype(np.int32),
    }
    pq.write_table(pa.table(table), Path(str(cfg.source.path)) / f"{day}.parquet")


def test_a_day_is_appended_and_trained_on(
    local_ray: None, mlflow_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "deploy_model", lambda *told: "served")
    monkeypatch.setattr(replay, "demo_request", lambda *told: None)
    monkeypatch.setattr(replay, "demo_table", lambda demo, tasks, serve, url: "")
    monkeypatch.setattr(jobs.pipeline, "recommend", lambda *told: {})
    monkeypatch.setattr(replay, "replay", lambda *told: replay.Report(0, 0.0, 0.0, 0.0))
    cfg = tiny_config(
        mlflow_runs,
        name="daily",
        train={"epochs": 1, "batch_users": 8, "num_workers": 1},
        tracking={"model_name": "daily"},
    )
    (tmp_path / "logs").mkdir()
    cities = pa.table(
        {"user_id": np.arange(NUM_USERS), "city": [f"city {i % 3}" for i in range(NUM_USERS)]}
    )
    pq.write_table(cities, tmp_path / "users.parquet")
    source = replace(cfg.source, kind="parquet", path=str(tmp_path / "logs"))
    source = replace(
        source, users=SideTable(path=str(tmp_path / "users.parquet"), id_column="user_id")
    )
    cfg = replace(
        cfg,
        source=source,
        split=SplitConfig(t_val="2026-01-03T00:00:00Z", t_test="2026-01-04T00:00:00Z"),
    )
    for day in range(4):
        write_day(cfg, day)
    with session(cfg) as tracker:
        first = jobs.pipeline.run_chain(cfg, tracker, "", force_first=True)
        write_day(cfg, 4)
        day_on = SplitConfig(t_val="2026-01-04T00:00:00Z", t_test="2026-01-05T00:00:00Z")
        cfg = replace(cfg, split=day_on)
        second = jobs.pipeline.run_chain(cfg, tracker, "", append=True)
        begun = json.loads((cfg.train_dir / "warm_start.json").read_text())
        again = jobs.pipeline.run_chain(cfg, tracker, "", append=True)
        assert tracker.find_champion().version == (2 if second["promoted"] else 1)
    assert begun["targets_since"] == "2026-01-03T00:00:00+00:00", "the end of the champion's"
    assert "/train_before/" in begun["checkpoint"], "its optimizer's moments go on"
    assert second["rows_in"] == first["rows_in"] + 200
    assert second["mlflow_run_id"] != first["mlflow_run_id"]
    assert (first["model_version"], second["model_version"]) == (1, 2)
    model = json.loads((cfg.model_dir / "artifact.json").read_text())["extra"]
    assert (
        model["sequences"] == json.loads((cfg.sequence_dir / "manifest.json").read_text())["digest"]
    )
    alike = second.keys() - {"train_seconds", "promoted", "promotion"}
    assert {key: again[key] for key in alike} == {key: second[key] for key in alike}, (
        "nothing new: nothing trained"
    )
