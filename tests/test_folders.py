"""What lies in a folder of logs is what is read of it, on a disk and in S3; the rest is named."""

import gzip
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import UserError
from pipeline.logs.files import find_files, list_files
from pipeline.logs.parquet import find_logs
from pipeline.sequences import build
from pipeline.sequences.build import build_sequences, plan_build
from tests.support.s3_server import Bucket, s3_bucket
from tests.worlds.logs import config_for, here, log

__all__ = ["here"]  # a fixture


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with s3_bucket() as found:
        yield found


@pytest.fixture(params=["disk", "S3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], str]:
    """place(folder): the same files on a disk, or in a bucket."""
    if request.param == "disk":
        return str
    found: Bucket = request.getfixturevalue("bucket")
    return lambda folder: found.upload(folder, f"{tmp_path.name}/logs")


def write_file(file: Path, number: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        pq.write_table(pa.table({"user_id": [number]}), opened)


def names(files: list[str]) -> list[str]:
    return [file.partition("?")[0].rpartition("/logs/")[2] for file in files]


READ = ["_day=1/d.parquet", "a.parquet", "b.pq", "c.PARQ", "no_ending", "x/e.snappy"]
HIDDEN = [
    "_SUCCESS",
    "_common_metadata",
    "_temporary/0/attempt_1/part-0.parquet",
    ".spark-staging/part-1.parquet",
    "x/.part-2.parquet",
    "x/_old.parquet",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files to read, files that a writer hides, and three that are not Parquet."""
    folder = tmp_path / "logs"
    for number, name in enumerate([*READ, *HIDDEN]):
        write_file(folder / name, number)
    (folder / "notes.txt").write_text("not a log")
    (folder / "nothing").touch()
    (folder / "half.parquet.tmp").write_bytes((folder / "a.parquet").read_bytes()[:-3])
    return folder


def test_hidden_files_are_left_out_and_any_ending_is_read(
    folder: Path, place: Callable[[Path], str]
):
    found = find_files(place(folder))
    assert names(found.files) == sorted(READ)
    left_out = dict(zip(names(list(found.left_out)), found.left_out.values(), strict=True))
    assert left_out == {
        **dict.fromkeys(HIDDEN, "a name that begins with _ or ."),
        "half.parquet.tmp": "Parquet that is cut off, or being written",
        "notes.txt": "not Parquet",
        "nothing": "empty, 0 bytes",
    }


def test_a_folder_whose_own_name_is_hidden_is_read(tmp_path: Path):
    write_file(tmp_path / "_logs" / "a.parquet")
    write_file(tmp_path / ".b")
    assert len(list_files(tmp_path / "_logs")) == 1
    assert list_files(tmp_path / ".b") == [str(tmp_path / ".b")]


def test_a_folder_of_hidden_files_is_told(tmp_path: Path):
    write_file(tmp_path / "_temporary" / "a.parquet")
    told = r"source.path: no Parquet files at .*; left out: 1 \(a name that .*_temporary/a.parquet"
    with pytest.raises(UserError, match=told):
        find_logs("source.path", tmp_path)


def test_parquet_that_was_compressed_as_a_whole_is_refused(
    folder: Path, place: Callable[[Path], str]
):
    packed = gzip.compress((folder / "a.parquet").read_bytes())
    (folder / "more.parquet.gz").write_bytes(packed)
    told = r"source.path: .*more.parquet.gz.* was compressed as a whole: unpack it"
    with pytest.raises(UserError, match=told):
        find_logs("source.path", place(folder))


TABLES = {
    "Delta": "_delta_log/00000000000000000000.json",
    "Iceberg": "metadata/v1.metadata.json",
    "Iceberg, packed": "metadata/00000-1f.gz.metadata.json",
    "Hudi": ".hoodie/hoodie.properties",
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_with_a_log_of_its_own_is_refused(
    folder: Path, place: Callable[[Path], str], kind: str
):
    at = folder / "one" / TABLES[kind]
    at.parent.mkdir(parents=True)
    at.write_text("{}")
    write_file(folder / "one" / "data" / "day=1" / "a.parquet")
    there = place(folder)
    inside = ["", "/one", "/one/data", "/one/data/day=1", "/one/data/day=1/a.parquet"]
    for path in inside:
        root, question, options = there.partition("?")
        told = (
            rf"source.path: .* is of a table of {kind.split(',')[0]}, .*Export the table to plain"
        )
        with pytest.raises(UserError, match=told):
            find_logs("source.path", f"{root}{path}{question}{options}")


def test_metadata_of_ones_own_is_no_table(tmp_path: Path):
    write_file(tmp_path / "metadata" / "a.parquet")
    (tmp_path / "metadata" / "about.json").write_text("{}")
    assert len(list_files(tmp_path)) == 1


def test_two_endings_are_one_table_and_the_report_names_every_file(
    tmp_path: Path, here: None, caplog: pytest.LogCaptureFixture
):
    cfg = config_for(tmp_path, log(seed=1), log(seed=2))
    plain = build_sequences(cfg)
    logs = tmp_path / "in"
    (logs / "1.parquet").rename(logs / "1.pq")
    (logs / "_temporary").mkdir()
    pq.write_table(log(seed=3), logs / "_temporary" / "2.parquet")
    (logs / "copy.parquet").write_bytes((logs / "0.parquet").read_bytes())
    assert plan_build(cfg)["files_left_out"] == 1
    with caplog.at_level(logging.WARNING):
        assert build_sequences(cfg, overwrite=True).digest == plain.digest
    assert f"left out of the logs: 1 (a name that begins with _ or .: {logs}" in caplog.text

    report = json.loads((cfg.run_dir / "report" / "validation.json").read_text())["input_files"]
    assert set(report.pop("paths").values()) == set(report["rows"])
    assert report == {
        "rows": {str(logs / "0.parquet"): 400, str(logs / "1.pq"): 400},
        "left_out": {
            str(logs / "_temporary" / "2.parquet"): "a name that begins with _ or .",
            str(logs / "copy.parquet"): "the same bytes as another file",
        },
        "gone": 0,
        "gone_rows": 0,
    }
    page = (cfg.run_dir / "report" / "validation.html").read_text()
    assert all(file in page for file in (*report["rows"], *report["left_out"]))


def test_files_that_are_gone_are_counted_in_the_report(tmp_path: Path, here: None):
    cfg = config_for(tmp_path, log(seed=1))
    build_sequences(cfg)
    logs = tmp_path / "in"
    (logs / "0.parquet").unlink()
    pq.write_table(log(seed=2, rows=70), logs / "1.parquet")
    build.build_sequences(cfg, append=True)
    report = json.loads((cfg.run_dir / "report" / "validation.json").read_text())["input_files"]
    assert (report["gone"], report["gone_rows"]) == (1, 400)
    assert report["rows"] == {str(logs / "1.parquet"): 70}
