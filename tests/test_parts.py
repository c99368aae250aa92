"""Builds that go on: after a kill, with a new day of logs, with files and rows that come again."""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import config
from pipeline.config import RunConfig, SplitConfig, UserError
from pipeline.schema import DAY_MS
from pipeline.sequences import build, parts, sizes, store
from pipeline.sequences.buckets import find_record
from pipeline.sequences.build import build_sequences
from pipeline.sequences.workers import Workers
from tests.worlds.logs import NOON, config_for, here, log

ROOT = Path(__file__).parents[1]

__all__ = ["here"]


def day(number: int, rows: int = 300, num_users: int = 60) -> pa.Table:
    """A day of the log, with a row that is bad and one that comes twice."""
    table = log(num_users, rows, number)
    times = table["event_time"].to_numpy() + number * DAY_MS
    times[0] = -1
    table = table.set_column(2, "event_time", pa.array(times))
    return pa.concat_tables([table, table.slice(5, 1)])


def folder(path: Path, name: str, *days: pa.Table) -> RunConfig:
    (path / name).mkdir()
    return config_for(path / name, *days)


def add(cfg: RunConfig, name: str, table: pa.Table) -> None:
    pq.write_table(table, Path(str(cfg.source.path)) / f"{name}.parquet")


def test_days_that_are_appended_make_what_a_build_of_all_of_them_makes(here: None, tmp_path: Path):
    days = [day(number) for number in range(4)]
    # rows of days that are in already
    late = pa.concat_tables([days[2].slice(0, 20), day(0, rows=30).slice(7)])
    all_days = build_sequences(folder(tmp_path, "whole", *days, late))
    cfg = folder(tmp_path, "daily", days[0])
    versions = [build_sequences(cfg)]
    for number, table in enumerate([*days[1:], late], 1):
        add(cfg, f"later-{number}", table)
        versions.append(build_sequences(cfg, append=True))
    assert len({version.digest for version in versions}) == len(versions)
    names = [
        field.name
        for field in dataclasses.fields(store.Manifest)
        if field.name not in ("parts", "records")
    ]
    assert [getattr(versions[-1], name) for name in names] == [
        getattr(all_days, name) for name in names
    ]
    assert build_sequences(cfg) == versions[-1]
    whole = store.read_sequences(tmp_path / "whole" / "runs" / "small" / "sequences")
    assert store.read_sequences(cfg.sequence_dir).equals(whole)


def test_a_build_without_append_names_it(here: None, tmp_path: Path):
    cfg = folder(tmp_path, "a", day(0))
    build_sequences(cfg)
    add(cfg, "1", day(1))
    with pytest.raises(
        UserError, match=r"other logs or settings \(1 files of the logs are new\); pass --append"
    ):
        build_sequences(cfg)


def test_a_file_that_comes_again_under_another_name_is_known(
    here: None, tmp_path: Path, monkeypatch
):
    cfg = folder(tmp_path, "a", day(0), day(1))
    first = build_sequences(cfg)
    add(cfg, "again", day(1))
    monkeypatch.setattr(build, "build_files", lambda *_: pytest.fail("built again"))
    assert build_sequences(cfg, append=True) == first
    assert build_sequences(cfg) == first
    assert first.quarantined["exact_duplicate"] == 2


def test_a_part_that_was_cut_off_is_no_part(here: None, tmp_path: Path):
    cfg = folder(tmp_path, "cut", day(0))
    manifest = build_sequences(cfg)
    (part,) = (cfg.sequence_dir / parts.PARTS).glob("*.arrow")
    part.write_bytes(part.read_bytes()[:-8])
    add(cfg, "later", day(1))
    with pytest.raises(UserError, match="missing or cut off"):
        build_sequences(cfg, append=True)
    assert store.read_manifest(cfg.sequence_dir) == manifest
    build_sequences(cfg, overwrite=True)
    again = folder(tmp_path, "again", day(0), day(1))
    assert build_sequences(again).digest == store.read_manifest(cfg.sequence_dir).digest


def test_what_another_version_of_this_code_left_is_made_again(here: None, tmp_path: Path):
    cfg = folder(tmp_path, "a", day(0))
    manifest = build_sequences(cfg)
    for file, inside in (
        (f"parts/{manifest.parts[0]}.json", "sources"),
        (manifest.records[0], "statistics"),
    ):
        path = cfg.sequence_dir / file
        raw = json.loads(path.read_text())
        (raw[inside][0] if inside == "sources" else raw[inside])["a_field_of_later"] = 1
        path.write_text(json.dumps(raw))
    assert parts.find_part(cfg.sequence_dir, manifest.parts[0]) is None
    assert find_record(cfg.sequence_dir, manifest.records[0]) is None
    assert build_sequences(cfg, overwrite=True) == manifest
    assert find_record(cfg.sequence_dir, manifest.records[0]) is not None


def test_rows_of_files_that_are_gone_stay(here: None, tmp_path: Path):
    cfg = folder(tmp_path, "a", day(0))
    first = build_sequences(cfg)
    (Path(str(cfg.source.path)) / "0.parquet").unlink()
    add(cfg, "1", day(1))
    second = build_sequences(cfg, append=True)
    assert second.rows_in == 2 * first.rows_in
    assert second.digest == build_sequences(folder(tmp_path, "b", day(0), day(1))).digest


def test_buckets_without_a_new_row_keep_their_file(here: None, tmp_path: Path):
    cfg = folder(tmp_path, "a", day(0))
    first = build_sequences(cfg)
    inodes = {
        bucket.file: (cfg.sequence_dir / bucket.file).stat().st_ino for bucket in first.buckets
    }
    user = store.read_bucket(cfg.sequence_dir, first, 1)["user_id"][0].as_py()
    add(cfg, "1", day(1).slice(1, 1).set_column(0, "user_id", pa.array([user])))
    second = build_sequences(cfg, append=True)
    same = [bucket.file for bucket in second.buckets if inodes.get(bucket.file)]
    assert same == [first.buckets[0].file, first.buckets[2].file]
    assert [(cfg.sequence_dir / file).stat().st_ino for file in same] == [
        inodes[file] for file in same
    ]
    # the version before is there for its readers
    assert store.read_bucket(cfg.sequence_dir, first, 1).num_rows
    add(cfg, "2", day(2))
    build_sequences(cfg, append=True)
    assert not (cfg.sequence_dir / first.buckets[1].file).exists()
    named = {
        entry.file
        for v in store.versions(cfg.sequence_dir)
        for entry in (*v.buckets, *v.quarantine)
    }
    found = {
        str(path.relative_to(cfg.sequence_dir))
        for path in cfg.sequence_dir.glob("*/bucket-*.parquet")
    }
    assert found == named


def periods_counted(cfg: RunConfig) -> dict[str, dict[str, int]]:
    """Rows and labels of each period, row by row."""
    edges = [0, cfg.split.val_ms, cfg.split.test_ms, cfg.split.end_ms]
    names = ("train", "val", "test")
    empty = {"rows": 0, "click known": 0, "click": 0, "like known": 0, "like": 0}
    found = {name: dict(empty) for name in names}
    for user in store.read_sequences(cfg.sequence_dir).to_pylist():
        for place, time in enumerate(user["event_time"]):
            period = np.searchsorted(edges, time, side="right") - 1
            if period >= len(names) or user["order_only"][place]:
                continue
            counts = found[names[period]]
            counts["rows"] += 1
            for bit, action in enumerate(cfg.source.actions):
                known = user["known_mask"][place] >> bit & 1
                counts[f"{action} known"] += known
                counts[action] += known & user["action_mask"][place] >> bit & 1
    return found


def reported_split(cfg: RunConfig) -> dict[str, Any]:
    return json.loads((cfg.run_dir / "report" / "validation.json").read_text())["split"]


def test_periods_and_items_of_a_report(here: None, tmp_path: Path):
    def split(**days: float) -> SplitConfig:
        moments = {}
        for name, number in days.items():
            moment = datetime.fromtimestamp(NOON / 1000 + number * 86_400, UTC)
            moments[name] = moment.isoformat()
        return SplitConfig(**moments)

    rows = pa.concat_tables([day(number) for number in range(4)])
    flags = np.random.default_rng(0).integers(3, size=rows.num_rows)
    order_only = pa.array(flags == 0)
    rows = rows.set_column(4, "like", pa.array(flags, pa.int8(), mask=flags == 2))
    cfg = folder(tmp_path, "a", rows.append_column("order_only", order_only))
    source = dataclasses.replace(cfg.source, columns={"order_only": "order_only"})
    cfg = dataclasses.replace(cfg, source=source, split=split(t_val=1.05, t_test=2.05, t_end=3.05))
    build_sequences(cfg)

    items = {item for user in store.read_sequences(cfg.sequence_dir)["item_id"] for item in user}
    first = reported_split(cfg)
    assert first["items"] == len(items)
    assert first["periods"] == periods_counted(cfg)
    assert all(counts["rows"] for counts in first["periods"].values())

    # most buckets stay, whose periods were counted under the first split
    cfg = dataclasses.replace(cfg, split=split(t_val=0.05, t_test=1.01))
    add(cfg, "1", rows.slice(7, 2))
    build_sequences(cfg, append=True)
    assert reported_split(cfg)["periods"] == periods_counted(cfg) != first["periods"]


def test_a_day_of_nothing_but_bad_rows_is_refused_and_only_its_rows_are_kept(
    here: None, tmp_path: Path
):
    cfg = folder(tmp_path, "a", *(day(number) for number in range(3)))
    first = build_sequences(cfg)
    before = sorted(cfg.sequence_dir.rglob("*"))
    add(cfg, "bad", log(event_time=np.full(400, NOON // 1000)))
    cfg = dataclasses.replace(
        cfg, checks=dataclasses.replace(cfg.checks, max_quarantined_share=0.6)
    )
    with pytest.raises(
        UserError, match=r"new rows is 0.6, found 100.00%: .*event_time_before_range 400"
    ):
        build_sequences(cfg, append=True)
    assert store.read_manifest(cfg.sequence_dir) == first
    more = set(cfg.sequence_dir.rglob("*")) - set(before)
    assert {path.parent.name for path in more} == {"parts"}


def test_large_files_and_large_row_groups_make_the_same_sequences(
    here: None, tmp_path: Path, monkeypatch
):
    table = day(0, rows=1000)
    one = build_sequences(folder(tmp_path, "a", table))
    monkeypatch.setattr(parts, "PART_ROWS", 300)
    monkeypatch.setattr(parts, "RUN_ROWS", 150)
    monkeypatch.setattr(parts, "BATCH_ROWS", 40)
    cfg = folder(tmp_path, "b")
    pq.write_table(table, Path(str(cfg.source.path)) / "small-groups.parquet", row_group_size=70)
    other = build_sequences(cfg)
    assert len(other.parts) == 4
    assert other.digest == one.digest
    monkeypatch.setattr(parts, "PART_ROWS", 10_000)
    third = build_sequences(folder(tmp_path, "c", table))
    assert len(third.parts) == 1
    part = parts.find_part(tmp_path / "c/runs/small/sequences", third.parts[0])
    assert part is not None and max(map(len, part.batches.values())) == 7
    assert third.digest == one.digest


def test_many_small_files_share_a_part(here: None, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(parts, "PART_ROWS", 100)
    cfg = folder(tmp_path, "a", log(rows=0), *(log(rows=30, seed=seed) for seed in range(10)))
    manifest = build_sequences(cfg)
    assert len(manifest.parts) == 4
    assert build_sequences(cfg, append=True) == manifest  # the empty file is known, too


# Puts an end to the process in the place of its n-th renaming: each file of a build comes to its
# name by one.
KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pipeline import config
from pipeline.sequences import build, parts

@contextmanager
def workers_here(*_):
    yield lambda what, function, items, memory_bytes=0: [function(item) for item in items]

replace, left = os.replace, [int(sys.argv[2])]

def replace_or_die(*paths):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)

build.workers, os.replace, parts.PART_ROWS = workers_here, replace_or_die, 100
build.build_sequences(config.load(sys.argv[1]), append=True)
"""


@pytest.mark.parametrize(
    ("at", "parts_done", "buckets_done"),
    # 1 digests, 2-7 parts, 8-16 buckets, 17-18 the report, 19 the version, 20 the manifest
    [(5, 1, 0), (13, 3, 1), (20, 3, 3)],
    ids=["reading", "building", "publishing"],
)
def test_a_killed_build_goes_on_to_the_same_result(
    here: None, tmp_path: Path, monkeypatch, at: int, parts_done: int, buckets_done: int
):
    monkeypatch.setattr(parts, "PART_ROWS", 100)
    cfg = folder(tmp_path, "a", day(0))
    first = build_sequences(cfg)
    before = store.read_sequences(cfg.sequence_dir)
    for number in (1, 2, 3):
        add(cfg, str(number), day(number))
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(config.to_dict(cfg)))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "cfg.yaml"), str(at)], cwd=ROOT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert store.read_manifest(cfg.sequence_dir) == first
    assert store.read_sequences(cfg.sequence_dir).equals(before)
    assert list(cfg.sequence_dir.rglob(".*.json.*")), "a file that did not come to its name"

    asked: dict[str, int] = {}

    @contextmanager
    def counting(*_: object) -> Iterator[Workers]:
        def run(what: str, function: Callable, items: Sequence, memory_bytes: float = 0) -> list:
            asked[what] = len(items)
            return [function(item) for item in items]

        yield run

    monkeypatch.setattr(build, "workers", counting)
    resumed = build_sequences(cfg, append=True)
    assert asked == {"reading the logs": 3 - parts_done, "building buckets": 3 - buckets_done}
    assert resumed.digest == build_sequences(folder(tmp_path, "b", *map(day, range(4)))).digest
    hidden = {path.name for path in cfg.sequence_dir.rglob(".*")}
    assert hidden == {store.LOCK, store.DIGESTS}


def test_a_folder_that_an_older_version_wrote(here: None, tmp_path: Path):
    cfg = folder(tmp_path, "a", day(0))
    old = cfg.sequence_dir / "0123456789abcdef"
    old.mkdir(parents=True)
    (old / "bucket-00000.parquet").write_bytes(b"")
    (cfg.sequence_dir / "manifest.json").write_text(
        '{"schema_version": 1, "buckets": [], "digest": "0123"}'
    )
    with pytest.raises(UserError, match=r"has schema version 1, this code reads 3: .* --overwrite"):
        build_sequences(cfg)
    build_sequences(cfg, overwrite=True)
    assert store.read_sequences(cfg.sequence_dir).num_rows
    assert not old.exists()


def test_append_keeps_the_settings(here: None, tmp_path: Path):
    cfg = folder(tmp_path, "a", day(0))
    build_sequences(cfg)
    add(cfg, "1", day(1))
    other = dataclasses.replace(cfg, sequences=dataclasses.replace(cfg.sequences, num_buckets=5))
    with pytest.raises(UserError, match=r"sequences of other settings \(sequences.num_buckets\)"):
        build_sequences(other, append=True)


def test_the_number_of_buckets_follows_the_rows_and_stays(here: None, tmp_path: Path, monkeypatch):
    cfg = folder(tmp_path, "a", day(0))
    cfg = dataclasses.replace(cfg, sequences=dataclasses.replace(cfg.sequences, num_buckets=None))
    row_bytes = sizes.row_bytes(cfg.source.events)
    monkeypatch.setattr(sizes, "BUCKET_MEMORY", sizes.bucket_memory(301 / 4, row_bytes))
    assert build.plan_build(cfg)["buckets"] == 4
    assert build_sequences(cfg).num_buckets == 4
    add(cfg, "1", day(1))
    assert build_sequences(cfg, append=True).num_buckets == 4
    assert build_sequences(cfg, overwrite=True).num_buckets == 8


def test_capped_users_are_counted(here: None, tmp_path: Path):
    cfg = folder(tmp_path, "a", log(num_users=3, rows=90), log(num_users=40, rows=40, seed=1))
    cfg = dataclasses.replace(
        cfg, sequences=dataclasses.replace(cfg.sequences, max_rows_per_user=20)
    )
    manifest = build_sequences(cfg)
    table = store.read_sequences(cfg.sequence_dir)
    assert (
        manifest.users_capped
        == sum(dropped > 0 for dropped in table["first_position"].to_pylist())
        == 3
    )
    assert manifest.rows_capped == sum(table["first_position"].to_pylist())
