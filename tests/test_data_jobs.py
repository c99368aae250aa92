"""Jobs as the command line sees them: plans, messages and exit codes."""

import logging
import runpy
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.pipeline import remove_run
from pipeline.config import UserError
from pipeline.sequences import store
from pipeline.sequences.build import build_sequences
from pipeline.tracking import server
from tests.worlds.logs import config_for, here, log

__all__ = ["here"]  # a fixture

ROOT = Path(__file__).parents[1]
T = 1_767_600_000_000
DEMO = str(ROOT / "configs" / "demo.yaml")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """run(job, arguments...) -> (exit code, stdout, stderr), all files under tmp_path."""

    def run_job(job: str, *arguments: str) -> tuple[int, str, str]:
        sets = ["--set", f"runs_dir={tmp_path / 'runs'}"]
        monkeypatch.setattr(sys, "argv", [job, *arguments, *sets])
        code = 0
        try:
            runpy.run_module(f"jobs.{job}", run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run_job


def plan_of(out: str) -> dict:
    return yaml.safe_load(out[out.index("\nplan:") :])["plan"]


def own_logs(tmp_path: Path, **columns: object) -> list[str]:
    """Logs that configs/own_logs.yaml describes, and the arguments that read them."""
    rows = {
        "uid": [1, 2],
        "video": [3, 4],
        "shown_at": [T] * 2,
        "clicked": [0, 1],
        "liked": [0, 0],
    }
    (tmp_path / "log").mkdir()
    pq.write_table(
        pa.table(rows | {"surface": [0, 1], "played_ms": [10, 20]} | columns),
        tmp_path / "log" / "a.parquet",
    )
    pq.write_table(pa.table({"uid": [1], "country": ["x"]}), tmp_path / "users.parquet")
    pq.write_table(
        pa.table({"video": [3], "genre": [1], "length_s": [9.0]}), tmp_path / "items.parquet"
    )
    sets = [f"source.path={tmp_path}/log", f"source.users.path={tmp_path}/users.parquet"]
    sets.append(f"source.items.path={tmp_path}/items.parquet")
    return [
        "--config",
        str(ROOT / "configs" / "own_logs.yaml"),
        *(word for text in sets for word in ("--set", text)),
    ]


def test_the_plan_of_an_import(run, tmp_path: Path):
    code, out, _ = run(
        "import_logs",
        "--config",
        DEMO,
        "--dry-run",
        "--set",
        f"source.path={ROOT}/data/kuairand_pure_subset",
    )
    assert code == 0
    assert plan_of(out)["source_rows"] == {
        "events": 185_177,
        "user_history": 26_469,
        "items": 7583,
        "users": 27_285,
    }
    assert not (tmp_path / "runs").exists()


def test_an_import_prints_what_it_did_and_does_it_once(run):
    small = [
        "--config",
        str(ROOT / "configs" / "synthetic.yaml"),
        "--set",
        "source.synthetic.num_users=20",
    ]
    code, out, _ = run("import_logs", *small)
    assert code == 0
    assert out.startswith("rows=")
    assert run("import_logs", *small)[:2] == (0, out)
    code, _, err = run("import_logs", *small, "--set", "seed=1")
    assert code == 2
    assert "--overwrite" in err
    assert run("import_logs", *small, "--set", "seed=1", "--overwrite")[0] == 0


def test_the_plan_of_own_logs(run, tmp_path: Path):
    code, out, _ = run("build_sequences", "--dry-run", *own_logs(tmp_path))
    assert code == 0
    assert plan_of(out)["rows"] == 2
    assert plan_of(out)["buckets"] == 1


@pytest.mark.parametrize(
    ("columns", "sets", "message"),
    [
        (
            {},
            ["source.columns.user_id=user"],
            "no column 'user' for user_id (source.columns.user_id: user); found ['uid'",
        ),
        (
            {},
            ["source.actions=[clicked, bought]", "tasks=[clicked]"],
            "no column 'bought' for bought",
        ),
        (
            {"liked": ["no", "no"]},
            [],
            "column 'liked' must be an integer, boolean or float of 0 and 1, or have a rule, the "
            "value that means yes: source.actions={liked: {column: liked, equals: VALUE}}, found "
            "string",
        ),
        ({}, ["source.path=/nowhere"], "JSON lines: there is no such file or folder"),
        ({}, ["source.colums={}"], "unknown configuration key 'source.colums'"),
        (
            {"request_id": [5, 5]},
            [],
            "column 'request_id' has a name that changes how rows are read (docs/guide/data.md, "
            "LOG), and source.columns does not speak of it: set source.columns.request_id="
            "request_id if it is meant, source.columns.request_id='' if not",
        ),
        ({"row_digest": [1, 1]}, [], "column 'row_digest' has a name that changes how rows are"),
        (
            {},
            ["source.columns.item_id=''"],
            "source.columns.item_id: only an optional column can be left out, by ''",
        ),
        (
            {"watch_ms": [1, 1]},
            ["source.request_columns=[watch_ms]", "features.request={}"],
            "source.actions + source.request_columns must be free of names that LOG has",
        ),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_mistake_is_one_message_and_exit_code_2(
    run, tmp_path: Path, columns: dict, sets: list, message: str, dry: bool
):
    arguments = [
        *own_logs(tmp_path, **columns),
        *(word for text in sets for word in ("--set", text)),
    ]
    code, _, err = run("build_sequences", *arguments, *["--dry-run"] * dry)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("promote", [], "no model at"),
        ("compare", ["demo", "other"], "run 'demo': there is no folder"),
        ("compare", ["demo", "--evaluate"], "run 'demo': there is no folder"),
        ("recommend", [], "jobs.build_sequences"),
        ("serve", ["--no-browser"], "jobs.build_sequences"),
        ("deploy", ["--set", "ray.address=auto"], "jobs.build_sequences"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_a_job_lacks_is_told_before_mlflow_is_started(
    run, monkeypatch: pytest.MonkeyPatch, job: str, arguments: list[str], message: str, dry: bool
):
    for start in ("mlflow_server", "plan_server"):
        monkeypatch.setattr(server, start, lambda *_, **__: pytest.fail("MLflow was asked"))
    code, _, err = run(job, *arguments, "--config", DEMO, *["--dry-run"] * dry)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("made_by", ["run.json", "sequences/manifest.json"])
def test_fresh_removes_the_folder_of_a_run_and_no_other(tmp_path: Path, made_by: str):
    folder = tmp_path / "demo"
    (folder / "sequences").mkdir(parents=True)
    (folder / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"--fresh: .* no run was started there"):
        remove_run(folder)
    assert (folder / "notes.txt").exists()

    (folder / made_by).write_text("")
    remove_run(folder)
    assert not folder.exists()


def test_a_reserved_name_is_read_or_not_as_the_mapping_says(tmp_path: Path, here: None):
    """A known_mask of 0 says that no action is known, or is a column like any other."""
    rows = log().append_column("known_mask", pa.array([0] * 400, pa.int32()))
    found = {}
    for name in ("", "known_mask"):
        (tmp_path / f"as{name}").mkdir()
        cfg = config_for(tmp_path / f"as{name}", rows, columns={"known_mask": name})
        manifest = build_sequences(cfg)
        table = store.read_sequences(cfg.sequence_dir)
        found[name] = {mask for masks in table["known_mask"].to_pylist() for mask in masks}
        named = manifest.config["source"]["columns"]
        assert named == ({} if name else {"known_mask": ""})  # its own name is as none
    assert found == {"": {3}, "known_mask": {0}}


def test_the_line_of_a_build_accounts_for_every_row(
    run, tmp_path: Path, here: None, caplog: pytest.LogCaptureFixture
):
    arguments = own_logs(tmp_path, uid=[1, 1], video=[3, 4], shown_at=[T, T + 1])
    few = ["--set", "sequences.max_rows_per_user=1", "--set", "checks.max_user_share=1"]
    with caplog.at_level(logging.INFO):
        code, out, _ = run("build_sequences", *arguments, *few, "--set", "checks.action_rate={}")
    assert code == 0
    assert "users=1 rows=1 rows_in=2 merged=0 capped=1 quarantined={}" in out
    assert "1 older rows of 1 users are beyond sequences.max_rows_per_user (1)" in caplog.text
