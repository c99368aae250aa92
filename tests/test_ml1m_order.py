"""MovieLens-1M by order: both forms of the data give the same logs; no time tells what comes."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.quality.ml1m_order import order_log, read_films, read_ratings
from pipeline import config

ROOT = Path(__file__).parents[1]


def test_a_user_s_last_tenths_are_validation_and_test() -> None:
    position = np.r_[np.arange(20), np.arange(10)[::-1]]
    user = np.repeat([7, 3], [20, 10])
    log = order_log(user, 100 + position, position, np.ones(30, np.int64))
    cfg = config.load(ROOT / "configs" / "ml_1m_order.yaml")
    rows = log.to_pandas()
    period = (rows["event_time"] >= cfg.split.val_ms).astype(int)
    period += rows["event_time"] >= cfg.split.test_ms
    assert period[rows["user_id"] == 7].value_counts().sort_index().tolist() == [16, 2, 2]
    assert period[rows["user_id"] == 3].value_counts().sort_index().tolist() == [8, 1, 1]
    assert rows.groupby("user_id")["item_id"].is_monotonic_increasing.all()
    assert rows.groupby("user_id")["event_time"].is_monotonic_increasing.all()
    gaps = rows["event_time"].groupby([rows["user_id"], period]).diff().dropna()
    assert set(gaps) == {1000}, "the same for the user of ten and of twenty"


def test_both_forms_of_the_data_give_the_same_log(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    user, item = np.repeat([1, 2], 12), rng.permutation(24) + 1
    time, stars = rng.integers(0, 6, 24), rng.integers(1, 6, 24)
    (tmp_path / "theirs").mkdir()
    lines = [f"{u}::{i}::{s}::{t}\n" for u, i, s, t in zip(user, item, stars, time, strict=True)]
    (tmp_path / "theirs" / "ratings.dat").write_text("".join(lines))
    films = "1::Café, The (1990)::Comedy|Drama\n2::Other (1991)::Drama\n"
    (tmp_path / "theirs" / "movies.dat").write_text(films, "latin-1")
    assert read_films(tmp_path / "theirs")["title"].to_pylist()[0] == "Café, The (1990)"

    position = np.empty(24, np.int64)
    for one in (1, 2):
        mine = np.flatnonzero(user == one)
        position[mine[np.argsort(time[mine], kind="stable")]] = np.arange(12)
    good = (stars >= 3).astype(np.int64)
    (tmp_path / "ours").mkdir()
    table = pa.table({"user_id": user, "item_id": item, "position": position, "rating_ge3": good})
    pq.write_table(table, tmp_path / "ours" / "interactions.parquet")
    assert read_ratings(tmp_path / "theirs").equals(read_ratings(tmp_path / "ours"))
    unknown = order_log(user, item, position, np.full(24, -1))
    assert unknown["good"].null_count == 24
