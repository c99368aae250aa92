"""Compaction, retention and forgetting users: against builds of what should be left, and killed in
between.
"""

import fcntl
import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.config import DriftConfig, RunConfig, UserError
from pipeline.logs import live_log_dir
from pipeline.schema import DAY_MS
from pipeline.sequences import build, parts, store, versions
from pipeline.sequences.build import build_sequences
from pipeline.sequences.forgotten import read_forgotten
from pipeline.sequences.quality import drift
from pipeline.sequences.upkeep import maintenance
from pipeline.sequences.upkeep.compaction import read_retired
from pipeline.sequences.upkeep.maintenance import compact_sequences, forget_users
from pipeline.sequences.workers import Workers
from serve_app.history.published import PublishedSequences
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.schemas import Event

START = 1_650_000_000_000
DAYS = 6


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    """Tasks run in this process: workers are not the point."""

    @contextmanager
    def workers_here(*_: object) -> Iterator[Workers]:
        yield lambda _, function, items, memory_bytes=0: [function(item) for item in items]

    with pytest.MonkeyPatch.context() as patch:
        for module in (build, maintenance):
            patch.setattr(module, "workers", workers_here)
        yield


@pytest.fixture(scope="module")
def six_days(here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("six_days")
    day_by_day(folder)
    return folder


@pytest.fixture
def built(six_days: Path, tmp_path: Path) -> Path:
    """A folder with logs and sequences that were built day by day, to be changed at will."""
    return shutil.copytree(six_days, tmp_path / "built")


def day(number: int, rows: int = 200, users: int = 12) -> pa.Table:
    """A day's rows: a few of them doubled, a few broken."""
    rng = np.random.default_rng(number)
    item = rng.integers(30, size=rows)
    user, time = rng.integers(users, size=rows), rng.integers(DAY_MS // 1000, size=rows) * 1000
    user[-1], item[-1], time[-1] = 0, 1, DAY_MS - 1  # the newest row, from which ages are counted
    table = pa.table(
        {
            "user_id": user,
            "item_id": item,
            "event_time": START + number * DAY_MS + time,
            # 5 is no action's value
            "click": np.where(item == 7, 5, rng.integers(2, size=rows)).astype(np.int8),
            "tab": rng.integers(3, size=rows).astype(np.int32),
        }
    )
    return pa.concat_tables([table, table.slice(0, 9)])


def run_in(folder: Path, **sequence_settings: object) -> RunConfig:
    source = {
        "kind": "parquet",
        "path": str(folder / "in"),
        "actions": ["click"],
        "request_columns": ["tab"],
    }
    source["users"] = {"path": str(folder / "users.parquet"), "id_column": "user_id"}
    return config.from_dict(
        {
            "name": "kept",
            "runs_dir": str(folder / "runs"),
            "source": source,
            "sequences": {
                "num_buckets": 3,
                "latest_time": "2100-01-01T00:00:00Z",
                "max_dropped_share": 1,
                **sequence_settings,
            },
            "checks": {"max_quarantined_share": 0.5},
            "tasks": ["click"],
        }
    )


def write_logs(folder: Path, days: range) -> None:
    (folder / "in").mkdir(parents=True, exist_ok=True)
    for number in days:
        pq.write_table(day(number), folder / "in" / f"{number}.parquet")
    pq.write_table(
        pa.table({"user_id": range(12), "city": [f"city {i}" for i in range(12)]}),
        folder / "users.parquet",
    )


def day_by_day(folder: Path, days: int = DAYS, **settings: object) -> RunConfig:
    cfg = run_in(folder, **settings)
    for number in range(days):
        write_logs(folder, range(number, number + 1))
        build_sequences(cfg, append=number > 0)
    return cfg


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_compaction_leaves_few_parts_and_the_same_version(built: Path):
    cfg = run_in(built)
    folder = cfg.sequence_dir
    before, held = store.read_manifest(folder), store.read_sequences(folder)
    assert len(before.parts) == DAYS
    after = compact_sequences(cfg)
    assert len(after.parts) == 1
    assert (after.digest, after.buckets, after.quarantine) == (
        before.digest,
        before.buckets,
        before.quarantine,
    )
    assert replace(after, parts=before.parts, records=before.records) == before
    assert store.read_manifest(folder) == after
    assert store.read_sequences(folder).equals(held)
    assert sorted(path.stem for path in (folder / "parts").iterdir()) == sorted(
        [*after.parts, *after.parts]
    )
    assert compact_sequences(cfg) == after
    assert build_sequences(cfg, append=True) == after  # its files are known
    write_logs(built, range(DAYS, DAYS + 1))
    appended = build_sequences(cfg, append=True)
    write_logs(built / "other", range(DAYS + 1))
    assert appended.digest == build_sequences(run_in(built / "other")).digest


def test_after_compaction_new_rows_touch_their_buckets_only(built: Path):
    cfg = run_in(built)
    before = compact_sequences(cfg)
    one_user = day(DAYS, users=1).filter(pa.array(day(DAYS, users=1)["item_id"].to_numpy() != 7))
    pq.write_table(one_user, built / "in" / f"{DAYS}.parquet")
    after = build_sequences(cfg, append=True)
    assert len(set(after.buckets) - set(before.buckets)) == 1


@pytest.mark.parametrize("cap", [16_384, 25])
def test_retention(tmp_path: Path, cap: int):
    cfg = day_by_day(tmp_path, keep_days=2, max_rows_per_user=cap)
    whole = store.read_sequences(cfg.sequence_dir)
    manifest = compact_sequences(cfg)
    since = store.read_manifest(cfg.sequence_dir).kept_since_ms
    assert since == max(time[-1] for time in whole["event_time"].to_pylist()) - 2 * DAY_MS
    kept = {row["user_id"]: row for row in store.read_sequences(cfg.sequence_dir).to_pylist()}
    for row in whole.to_pylist():
        old = sum(time < since for time in row["event_time"])
        found = kept[row["user_id"]]
        assert found["first_position"] == row["first_position"] + old
        for name in ("item_id", "event_time", "action_mask", "tab"):
            assert found[name] == row[name][old:]
    held = versions.held_parts(cfg.sequence_dir, manifest)
    rules = maintenance.held_rules(manifest)
    for number in range(3):
        batches = parts.batches_of(held, number)
        rows = parts.read_rows(cfg.sequence_dir, batches, number, rules)
        assert min(rows["event_time"].to_pylist()) >= since, (
            "in the parts, quarantined and capped ones too"
        )
    assert compact_sequences(cfg) == manifest


def test_a_killed_compaction_leaves_what_was_published(
    built: Path, monkeypatch: pytest.MonkeyPatch
):
    cfg = run_in(built, keep_days=2)
    before = store.read_manifest(cfg.sequence_dir)
    whole = shutil.copytree(built, built.with_name("whole"))

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_manifest", kill)
        with pytest.raises(KeyboardInterrupt):
            compact_sequences(cfg)
    assert store.read_manifest(cfg.sequence_dir) == before
    assert compact_sequences(cfg) == compact_sequences(run_in(whole, keep_days=2))
    assert files(cfg.sequence_dir).keys() == files(whole / "runs" / "kept" / "sequences").keys()


def test_retention_day_by_day_is_retention_at_once(tmp_path: Path):
    cfg = run_in(tmp_path / "days", keep_days=2)
    for number in range(DAYS):
        write_logs(tmp_path / "days", range(number, number + 1))
        build_sequences(cfg, append=number > 0)
        manifest = compact_sequences(cfg)
    write_logs(tmp_path / "once", range(DAYS))
    once = run_in(tmp_path / "once", keep_days=2)
    build_sequences(once)
    assert compact_sequences(once).digest == manifest.digest
    assert manifest.rows_in < 3 * 209 + 209


STRAYS = {"years after the others": START + 900 * DAY_MS, "after the clock": START + 9999 * DAY_MS}


@pytest.mark.parametrize("stray", STRAYS)
def test_one_row_of_another_time_moves_neither_retention_nor_drift(tmp_path: Path, stray: str):
    """Retention and drift go by the newest event: 2,509 rows, and one of a user's wrong clock."""
    found = []
    for name in ("without", "with"):
        write_logs(tmp_path / name, range(12))
        cfg = run_in(tmp_path / name, keep_days=3)
        if name == "with":
            one = day(0).slice(0, 1)
            one = one.set_column(2, "event_time", pa.array([STRAYS[stray]]))
            pq.write_table(one, tmp_path / name / "in" / "stray.parquet")

        manifest = build_sequences(cfg)
        newest_day = drift.count_profile(cfg.sequence_dir, manifest, days=1)
        found.append((newest_day.rows, compact_sequences(cfg)))

    (rows, without), (rows_with, with_stray) = found
    assert without.kept_since_ms == with_stray.kept_since_ms == START + 9 * DAY_MS - 1
    assert with_stray.rows_in == without.rows_in + 1
    assert 100 < rows == rows_with


def test_a_compaction_that_would_drop_too_much_is_refused(built: Path):
    cfg = run_in(built, keep_days=2, max_dropped_share=0.5)
    before, held = store.read_manifest(cfg.sequence_dir), files(cfg.sequence_dir)
    told = (
        r"would drop \d+ of 1,254 rows \(6\d.\d\d%\), those from before 2022-04-.*keep_days: 2\), "
        r"and nothing is changed: sequences.max_dropped_share is 0.5. "
        r".* set it to 0.6\d for this run"
    )
    with pytest.raises(UserError, match=told) as refused:
        compact_sequences(cfg)
    assert store.read_manifest(cfg.sequence_dir) == before
    assert files(cfg.sequence_dir).keys() == held.keys()

    enough = float(str(refused.value).partition("set it to ")[2].split()[0])
    assert compact_sequences(run_in(built, keep_days=2, max_dropped_share=enough)) != before


def test_a_longer_keep_days_brings_nothing_back(built: Path):
    cfg = run_in(built, keep_days=2)
    manifest = compact_sequences(cfg)
    longer = run_in(built, keep_days=100)
    assert compact_sequences(longer) == manifest


USERS = np.array([3, 8])
ABSENT = 123_456_789_012_345  # so long that no hash and no key shows it by chance


def test_forgotten_users_are_in_no_file_and_the_rest_is_a_build_without_them(built: Path):
    cfg = run_in(built, keep_days=4)
    compact_sequences(cfg)  # some of their rows are retired
    write_logs(built, range(DAYS, DAYS + 1))
    build_sequences(cfg, append=True)
    removed = forget_users(cfg, USERS)
    assert all(
        removed[name] > 0 for name in ("sequences", "quarantine", "parts", "retired", "users")
    )
    folder = cfg.sequence_dir
    manifest = store.read_manifest(folder)
    assert [version.digest for version in store.versions(folder)] == [manifest.digest]
    seen: list[int] = []
    for path in folder.rglob("*.parquet"):
        seen += pq.read_table(path)["user_id"].to_pylist()
    for path in (folder / "parts").glob("*.arrow"):
        seen += pa.ipc.open_file(path).read_all()["user_id"].to_pylist()
    assert set(USERS.tolist()) & set(seen) == set()
    assert set(seen) == set(range(12)) - set(USERS.tolist())
    for path in [*(folder / "records").iterdir(), cfg.run_dir / "report" / "validation.json"]:
        assert '"user_id": 3,' not in path.read_text().replace("\\", "")

    other = built / "other"  # the same without them from the start
    without = run_in(other, keep_days=4)
    for numbers in (range(DAYS), range(DAYS, DAYS + 1)):
        write_logs(other, numbers)
        for file in [other / "users.parquet", *(other / "in" / f"{n}.parquet" for n in numbers)]:
            rows = pq.read_table(file)
            pq.write_table(rows.filter(pa.array(~np.isin(rows["user_id"].to_numpy(), USERS))), file)
        expected = build_sequences(without, append=numbers.start > 0)
        if numbers.start == 0:
            compact_sequences(without)
    assert (expected.buckets, expected.side_tables) == (manifest.buckets, manifest.side_tables)
    assert sum(entry.rows for entry in expected.quarantine) == sum(
        entry.rows for entry in manifest.quarantine
    )


def test_forgotten_users_do_not_come_back(built: Path):
    cfg = run_in(built)
    forget_users(cfg, USERS)
    manifest = store.read_manifest(cfg.sequence_dir)
    assert build_sequences(cfg) == manifest  # the same files: nothing to do
    write_logs(built, range(DAYS, DAYS + 1))
    appended = build_sequences(cfg, append=True)
    rebuilt = build_sequences(cfg, overwrite=True)
    assert appended.digest == rebuilt.digest
    assert not set(store.read_sequences(cfg.sequence_dir)["user_id"].to_pylist()) & set(
        USERS.tolist()
    )
    users = store.read_side_table(cfg.sequence_dir, "users")
    assert users is not None and not set(users["user_id"].to_pylist()) & set(USERS.tolist())


def test_a_row_without_a_user_is_nobodys(built: Path):
    cfg = run_in(built)
    forget_users(cfg, np.array([0]))
    rows = day(DAYS).set_column(0, "user_id", pa.array([None, 0, 4, 5] * 53, pa.int64())[:209])
    pq.write_table(rows, built / "in" / "nobody.parquet")
    before = store.read_manifest(cfg.sequence_dir).quarantined
    after = build_sequences(cfg, append=True).quarantined
    assert (before.get("null_user_id", 0), after["null_user_id"]) == (0, 53)


def test_forgetting_again_changes_nothing(built: Path):
    cfg = run_in(built)
    forget_users(cfg, USERS)
    before = files(cfg.run_dir)
    assert set(forget_users(cfg, USERS).values()) == {0}
    assert files(cfg.run_dir) == before
    assert set(forget_users(cfg, np.array([ABSENT])).values()) == {0}

    forgotten = read_forgotten(cfg.sequence_dir)
    assert forgotten.has_users(np.array([3, 4, 8, ABSENT])).tolist() == [True, False, True, True]
    assert str(ABSENT) not in (cfg.sequence_dir / store.FORGOTTEN).read_text()


@pytest.mark.parametrize(
    "at",
    [
        "store.write_json",
        "held_parts",
        "sweep_part",
        "store.write_manifest",
        "store.remove_unnamed",
    ],
)
def test_a_killed_run_is_finished_by_the_next(
    built: Path, monkeypatch: pytest.MonkeyPatch, at: str
):
    killed, whole = run_in(built), run_in(built.with_name("whole"))
    live = killed.run_dir / "live_logs"
    live.mkdir()
    pq.write_table(day(DAYS), live / "events-00000.parquet")
    build_sequences(killed, append=True)
    shutil.copytree(built, built.with_name("whole"))

    class Kill(Exception):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(f"pipeline.sequences.upkeep.maintenance.{at}", kill)
        with pytest.raises(Kill):
            forget_users(killed, USERS)
    store.read_sequences(killed.sequence_dir)  # one version or the other is there, whole
    forget_users(killed, USERS)
    forget_users(whole, USERS)
    assert (
        store.read_manifest(killed.sequence_dir).digest
        == store.read_manifest(whole.sequence_dir).digest
    )
    names = [
        {name for name in files(cfg.run_dir) if not name.startswith("sequences/.")}
        for cfg in (killed, whole)
    ]
    assert names[0] == names[1]
    for cfg in (killed, whole):
        rows = pq.read_table(cfg.run_dir / "live_logs" / "events-00000.parquet")
        assert not set(rows["user_id"].to_pylist()) & set(USERS.tolist())
        # the changed file is a known one
        assert build_sequences(cfg) == store.read_manifest(cfg.sequence_dir)


def test_mistakes(tmp_path: Path):
    cfg = run_in(tmp_path)
    with pytest.raises(UserError, match="no sequences are published"):
        compact_sequences(cfg)
    with pytest.raises(UserError, match="no sequences are published"):
        forget_users(cfg, USERS)
    cfg = day_by_day(tmp_path, days=1)
    with pytest.raises(UserError, match=r"other settings \(sequences.max_rows_per_user\)"):
        forget_users(run_in(tmp_path, max_rows_per_user=5), USERS)
    with pytest.raises(UserError, match="no rows would be left"):
        forget_users(cfg, np.arange(12))
    assert json.loads((cfg.sequence_dir / store.MANIFEST).read_text())["num_users"] == 12
    assert read_retired(cfg.sequence_dir, None).num_rows == 0


def test_the_drift_of_an_appended_day(built: Path):
    cfg = run_in(built)
    forget_users(cfg, np.array([11]))  # which leaves one version
    with pytest.raises(UserError, match="keeps no version before"):
        drift.version_before(cfg.sequence_dir)
    write_logs(built, range(DAYS, DAYS + 1))
    before, after = store.read_manifest(cfg.sequence_dir), build_sequences(cfg, append=True)
    found = drift.version_before(cfg.sequence_dir)
    assert found == before
    changes = drift.compare_profiles(
        *(drift.count_profile(cfg.sequence_dir, m) for m in (found, after)), cfg.drift
    )
    rows = next(change for change in changes if change.quantity == "rows")
    assert (rows.before, rows.after) == (before.num_rows, after.num_rows)


def test_a_build_that_drifts_is_not_published(built: Path):
    cfg = run_in(built)
    limits = DriftConfig(new_item_rows=0.3, lengths=None)
    cfg = replace(cfg, checks=replace(cfg.checks, drift=True), drift=limits)
    before = store.read_manifest(cfg.sequence_dir)
    held = files(cfg.sequence_dir).keys()
    rows = day(DAYS, rows=1200)
    pq.write_table(
        rows.set_column(1, "item_id", pa.array(rows["item_id"].to_numpy() + 99)),
        built / "in" / "x.parquet",
    )
    with pytest.raises(
        UserError, match=r"(?s)nothing published \(checks.drift\)\n  drift.new_item_rows: limit 0.3"
    ) as refused:
        build_sequences(cfg, append=True)
    assert before.digest[:16] in str(refused.value)
    assert store.read_manifest(cfg.sequence_dir) == before
    more = files(cfg.sequence_dir).keys() - held
    assert all(str(name).startswith("parts/") for name in more)
    pq.write_table(day(DAYS), built / "in" / "x.parquet")
    assert build_sequences(cfg, append=True).num_rows > before.num_rows


RunJob = Callable[..., tuple[int, str]]


@pytest.fixture
def forget_user(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> RunJob:
    """Runs the job on `built` with these arguments; its exit code and what it said."""
    preset = built / "preset.yaml"
    preset.write_text(json.dumps(config.to_dict(run_in(built))))

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["forget_user", "--config", str(preset), *arguments])
        try:
            runpy.run_module("jobs.forget_user", run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().out

    return run


def write_predictions(cfg: RunConfig) -> list[Path]:
    """Those of two evaluations: of the run's own model, and of one beside it that was trained on
    the same sequences. Rows of users 3, 3 and 4 each.
    """
    own = cfg.run_dir / "evaluation" / "predictions" / "test.parquet"
    own.parent.mkdir(parents=True)
    pq.write_table(pa.table({"user_id": [3, 3, 4], "score.click": [0.1, 0.2, 0.3]}), own)

    beside = cfg.run_dir.parent / "beside"
    theirs = beside / "evaluation" / "predictions" / "val.parquet"
    theirs.parent.mkdir(parents=True)
    shutil.copy(own, theirs)
    (beside / "model").mkdir()
    settings = {"name": "beside", "sequences": {"from_run": cfg.name}}
    (beside / "model" / "config.json").write_text(json.dumps(settings))
    return [own, theirs]


def test_the_job_forgets_what_the_server_and_evaluations_hold(
    built: Path, forget_user: RunJob, caplog: pytest.LogCaptureFixture
):
    cfg = run_in(built)
    serving, predictions = cfg.run_dir / "serving", write_predictions(cfg)
    log = SqliteEvents(serving / "events.sqlite")
    for user in (3, 4, ABSENT + 1):  # of the last one there is no other row
        log.append([Event(user_id=user, item_id=1, event_time=START)])
    published = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, serving)
    assert published.sequence(3) is not None

    ids = built / "ids.txt"
    ids.write_text(f"8\n3\n{ABSENT + 2}\n")
    users = [f"--user={user}" for user in (3, ABSENT, ABSENT + 1)]
    code, out = forget_user(*users, "--users-file", str(ids), "--dry-run")
    assert (code, "not_in_sequences: 3" in out) == (0, True)

    code, out = forget_user(*users, "--users-file", str(ids))
    assert code == 0
    assert out.startswith("users=5 unknown=2 removed: sequences=")
    for what in ("posted_events=2", "copies_of_the_server=1", "predictions=4"):
        assert what in out
    said = f"posted events: --user '{ABSENT}', line 3 of {ids}. Is the id as the logs have it?"
    assert said in caplog.text

    assert (log.of_user(3), len(log.of_user(4))) == ([], 1)
    for file in predictions:
        assert pq.read_table(file)["user_id"].to_pylist() == [4]
    again = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, serving)
    assert (again.sequence(3), again.sequence(8)) == (None, None)
    assert again.sequence(4) is not None
    assert len(list(serving.glob("sequences-*"))) == 1

    # who was forgotten before is known, and nothing is left of them
    caplog.clear()
    code, out = forget_user("--user", "3")
    assert (code, out.startswith("users=1 unknown=0 "), caplog.text) == (0, True, "")


def test_no_export_reads_while_users_are_forgotten(
    built: Path, forget_user: RunJob, monkeypatch: pytest.MonkeyPatch
):
    """One that has read them would write them once more."""
    lock = live_log_dir(run_in(built).run_dir) / ".export.lock"
    forget = maintenance.forget_users
    may_export: list[bool] = []

    def forget_and_look(*arguments):
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                may_export.append(False)
            else:
                may_export.append(True)
        return forget(*arguments)

    monkeypatch.setattr(maintenance, "forget_users", forget_and_look)
    code, _ = forget_user("--user", "3")
    assert (code, may_export) == (0, [False])


def test_ids_that_the_job_cannot_read_are_named(built: Path, forget_user: RunJob):
    code, err = forget_user("--user", "x", "--dry-run")
    assert (code, err.startswith("error: a user_id must be an integer")) == (2, True)
    assert forget_user() == (2, "error: nobody to forget: give --user or --users-file\n")

    ids = built / "ids.txt"
    ids.write_text("8 x")
    rule = "a user_id must be an integer from 0 to 2**63 - 1, got 'x'"
    assert forget_user("--users-file", str(ids)) == (2, f"error: {rule}\n")

    code, err = forget_user("--users-file", str(built / "none.txt"))
    assert (code, "No such file" in err) == (2, True)
    ids.write_bytes(b"\xff\xfe3")
    code, err = forget_user("--users-file", str(ids))
    assert (code, "no text in UTF-8" in err) == (2, True)


def test_the_only_user_with_retired_rows_is_forgotten(tmp_path: Path):
    """The other users of the bucket stay as they are."""
    cfg = run_in(tmp_path, keep_days=2)
    write_logs(tmp_path, range(1))
    file = tmp_path / "in" / "0.parquet"
    pq.write_table(day(0).filter(pa.array(day(0)["user_id"].to_numpy() == USERS[0])), file)
    write_logs(tmp_path, range(DAYS, DAYS + 1))
    build_sequences(cfg)
    (retired,) = compact_sequences(cfg).retired.values()
    assert read_retired(cfg.sequence_dir, retired)["user_id"].to_pylist() == [USERS[0]]
    others = {row["user_id"]: row for row in store.read_sequences(cfg.sequence_dir).to_pylist()}
    assert forget_users(cfg, USERS[:1])["retired"] == 1
    assert not store.read_manifest(cfg.sequence_dir).retired
    left = {row["user_id"]: row for row in store.read_sequences(cfg.sequence_dir).to_pylist()}
    assert left == {user: row for user, row in others.items() if user != USERS[0]}


@pytest.mark.parametrize("job", ["compact", "forget"])
def test_where_the_days_begin_may_have_moved_since_the_build(built: Path, job: str):
    cfg = run_in(built)
    moved = replace(cfg, features=replace(cfg.features, hour_utc_offset=8.0))
    before = store.read_manifest(cfg.sequence_dir)
    shutil.copytree(built, built.with_name("same"))
    for settings in (moved, run_in(built.with_name("same"))):
        compact_sequences(settings) if job == "compact" else forget_users(settings, USERS)
    after, same = (
        store.read_manifest(c.sequence_dir) for c in (cfg, run_in(built.with_name("same")))
    )
    assert (after.digest, after.quarantined, after.rows_in) == (
        same.digest,
        same.quarantined,
        same.rows_in,
    )
    assert (after.digest == before.digest) == (job == "compact")


def test_a_missing_record_is_named(built: Path):
    cfg = run_in(built)
    manifest = store.read_manifest(cfg.sequence_dir)
    (cfg.sequence_dir / manifest.records[1]).unlink()
    for job in (compact_sequences, lambda cfg: forget_users(cfg, USERS)):
        with pytest.raises(
            UserError, match=rf"{manifest.records[1]} is missing or cut off: run .* --overwrite"
        ):
            job(cfg)
    assert store.read_manifest(cfg.sequence_dir) == manifest
