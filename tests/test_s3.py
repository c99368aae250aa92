"""Logs in a bucket of S3 or Google Cloud Storage: the same files, rows and digests as on a disk,
asked of local servers that speak their protocols.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.config import ConfigError, RunConfig, SideTable, UserError
from pipeline.logs import files, import_logs, open_logs
from pipeline.logs.parquet import find_logs
from pipeline.logs.rows import count_rows, read_schema
from pipeline.schema import LOG_OPTIONAL, ROW_DIGEST
from pipeline.sequences.build import build_sequences
from tests.support.gcs_server import gcs_storage
from tests.support.s3_server import Bucket, s3_bucket
from tests.worlds.logs import config_for, here, log

__all__ = ["here"]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with s3_bucket() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files in depth, one with a name that a URI would not allow, and one that is not
    Parquet.
    """
    folder = tmp_path_factory.mktemp("own")
    for number, name in enumerate(("day=1/a.parquet", "day=2/b c.parquet", "z.parquet")):
        (folder / name).parent.mkdir(exist_ok=True)
        table = pa.table({"user_id": range(number, number + 40), "what": ["x" * 50] * 40})
        pq.write_table(table, folder / name, row_group_size=10)
    (folder / "notes.txt").write_text("not a log")
    return folder


def relative(found: list[str], root: str) -> list[str]:
    assert all(file.startswith(f"{root}/") for file in found)
    return [file.removeprefix(f"{root}/").partition("?")[0] for file in found]


def test_a_prefix_has_the_files_of_the_folder(bucket: Bucket, folder: Path):
    place = bucket.upload(folder, "listed")
    there, here = files.list_files(place), files.list_files(folder)
    names = ["day=1/a.parquet", "day=2/b c.parquet", "z.parquet"]
    assert relative(there, "s3://logs/listed") == relative(here, str(folder)) == names
    assert all(file.endswith(bucket.options) for file in there)  # a name alone opens it
    assert files.list_files(there[1]) == [there[1]]
    assert files.path_inside(place, "z.parquet") == there[2]
    assert [files.base_name(file) for file in there] == ["a.parquet", "b c.parquet", "z.parquet"]


def test_what_is_said_of_a_file_is_the_same(bucket: Bucket, folder: Path):
    there, here = files.list_files(bucket.upload(folder, "said")), files.list_files(folder)
    assert [files.file_digest(file) for file in there] == [files.file_digest(file) for file in here]
    assert len({files.file_digest(file) for file in here}) == 3
    assert (
        files.total_bytes(there)
        == files.total_bytes(here)
        == sum(Path(file).stat().st_size for file in here)
    )
    stamps = [files.file_stamp(file) for file in there]
    assert [stamp.split()[0] for stamp in stamps] == [
        files.file_stamp(file).split()[0] for file in here
    ]
    time.sleep(1.1)
    bucket.upload(folder, "said")  # written again; S3 has whole seconds
    assert all(old != new for old, new in zip(stamps, map(files.file_stamp, there), strict=True))
    assert count_rows(there) == count_rows(here) == 120
    assert [read_schema(file) for file in there] == [read_schema(file) for file in here]


def test_a_file_is_read_by_row_groups(bucket: Bucket, folder: Path):
    file = files.list_files(bucket.upload(folder, "groups"))[1]
    with files.open_parquet(file) as parquet:
        assert parquet.num_row_groups == 4
        assert parquet.read_row_group(2)["user_id"].to_pylist() == list(range(21, 31))


def test_the_store_is_that_of_the_environment(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    bucket.upload(folder, "environment")
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
    files._s3.cache_clear()  # clients are kept; a process has one environment
    try:
        assert len(files.list_files("s3://logs/environment")) == 3
        assert files.list_files("s3://logs/environment/z.parquet") == [
            "s3://logs/environment/z.parquet"
        ]
    finally:
        files._s3.cache_clear()


def test_a_busy_store_is_asked_again(bucket: Bucket, folder: Path):
    place = bucket.upload(folder, "busy")
    bucket.refuse["GET"] = 1
    there = files.list_files(place)
    bucket.refuse["GET"] = 1
    assert files.file_digest(there[0]) == files.file_digest(folder / "day=1/a.parquet")
    assert bucket.refuse["GET"] == 0


def test_what_is_not_there(bucket: Bucket):
    with pytest.raises(UserError, match=r"source.path: no Parquet files at 's3://logs/none\?"):
        find_logs("source.path", f"s3://logs/none{bucket.options}")
    with pytest.raises(
        UserError, match=r"source.path: no Parquet files at 's3://no-such-bucket/x\?"
    ):
        find_logs("source.path", f"s3://no-such-bucket/x{bucket.options}")
    with pytest.raises(UserError, match=r"s3://logs/none.parquet\?.* cannot be read as Parquet"):
        read_schema(f"s3://logs/none.parquet{bucket.options}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://key:secret@logs/x", "source.path must be without credentials"),
        ("s3://logs/x?secret_key=1", "source.path must be without credentials"),
        ("s3:///x", "source.path must be s3://bucket/prefix, got 's3:///x'"),
        (
            "s3://logs/x?scheme=http",
            "source.path must be without the option 'scheme'; there are endpoint_override",
        ),
        (
            "hdfs://logs/x",
            "source.path must be a path of the file system, s3://bucket/prefix or "
            "gs://bucket/prefix, got 'hdfs://logs/x'",
        ),
    ],
)
def test_a_place_that_cannot_be_is_refused_with_the_configuration(path: str, message: str):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as refused:
        config.from_dict({"source": {"kind": "parquet", "path": path}})
    assert "key:secret" not in str(refused.value)


def test_google_cloud_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Listed, opened, read in ranges and digested over HTTP, and nothing read around it."""
    file = tmp_path / "my-bucket/logs/day=1/a b.parquet"
    file.parent.mkdir(parents=True)
    rows = pa.table({"user_id": range(40), "what": ["x" * 50] * 40})
    pq.write_table(rows, file, row_group_size=10)
    (file.parent / "_SUCCESS").touch()

    with gcs_storage(tmp_path) as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        files._gcs.cache_clear()  # a client is kept; a process has one environment
        try:
            found = find_logs("source.path", "gs://my-bucket/logs")
            assert found.files == ["gs://my-bucket/logs/day=1/a b.parquet"]
            assert list(found.left_out) == ["gs://my-bucket/logs/day=1/_SUCCESS"]
            assert find_logs("source.path", "gs://my-bucket/logs/day=*/*").files == found.files
            (there,) = found.files
            assert files.list_files(there) == [there]

            assert read_schema(there) == rows.schema
            with files.open_parquet(there) as parquet:
                assert parquet.read_row_group(2)["user_id"].to_pylist() == list(range(20, 30))
            assert files.file_digest(there) == files.file_digest(file)
            assert files.total_bytes([there]) == file.stat().st_size
            assert files.file_stamp(there).split()[0] == files.file_stamp(file).split()[0]
            with pytest.raises(UserError, match="no Parquet files at 'gs://my-bucket/none'"):
                find_logs("source.path", "gs://my-bucket/none")
        finally:
            files._gcs.cache_clear()


def test_a_build_from_google_cloud_storage_is_that_from_disk(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cfg = config_for(tmp_path, log(), log(seed=1))
    items = pa.table({"sku": range(50), "author": ["x", "y"] * 25})
    pq.write_table(items, tmp_path / "items.parquet")
    table = SideTable(path=str(tmp_path / "items.parquet"), id_column="sku")
    here_source = replace(cfg.source, items=table)
    wanted = build_sequences(replace(cfg, source=here_source))

    with gcs_storage(tmp_path) as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        files._gcs.cache_clear()
        try:
            there = replace(table, path="gs://in/items/items.parquet")
            (tmp_path / "in" / "items").mkdir()
            shutil.move(tmp_path / "items.parquet", tmp_path / "in" / "items")
            source = replace(cfg.source, path="gs://in/[01].parquet", items=there)
            found = build_sequences(replace(cfg, name="cloud", source=source))
        finally:
            files._gcs.cache_clear()
    assert found.digest == wanted.digest
    assert found.rows_in == 800


def test_a_side_table_is_checked_too():
    users = {"path": "s3://a:b@logs/users.parquet", "id_column": "uid"}
    with pytest.raises(ConfigError, match=r"source.users.path must be without credentials"):
        config.from_dict({"source": {"kind": "parquet", "path": "x", "users": users}})


@pytest.mark.cluster
def test_a_build_from_s3_publishes_what_a_build_from_disk_does(
    bucket: Bucket, tmp_path: Path, local_ray: None, smoke_logs: RunConfig
):
    sides = {"users": "user_id", "items": "item_id"}

    def build(name: str, root: str, options: str) -> str:
        raw = config.to_dict(smoke_logs)
        raw |= {"name": name, "runs_dir": str(tmp_path)}
        tables = {
            key: {"path": f"{root}/{key}.parquet{options}", "id_column": sides[key]}
            for key in sides
        }
        raw["source"] |= {"kind": "parquet", "path": f"{root}/log{options}", **tables}
        raw["source"]["columns"] = {name: name for name in (*LOG_OPTIONAL, ROW_DIGEST)}
        cfg = config.from_dict(raw)
        # a log that the server's events became, on disk as ever
        (tmp_path / name / "live_logs").mkdir(parents=True)
        shutil.copy(
            open_logs(smoke_logs.source, smoke_logs.run_dir).files[0],
            tmp_path / name / "live_logs" / "events-00000.parquet",
        )
        return build_sequences(cfg).digest

    bucket.upload(smoke_logs.log_dir, "smoke")
    assert build("from_s3", "s3://logs/smoke", bucket.options) == build(
        "from_disk", str(smoke_logs.log_dir), ""
    )


@pytest.fixture(scope="module")
def smoke_logs(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    few = ["source.synthetic.num_users=40", "source.synthetic.rows_per_file=400"]
    cfg = config.load(
        ROOT / "configs" / "smoke.yaml", [f"runs_dir={tmp_path_factory.mktemp('logs')}", *few]
    )
    import_logs(cfg)
    return cfg


def test_kuairand_is_imported_from_s3(bucket: Bucket, tmp_path: Path):
    data = tmp_path / "files"
    data.mkdir()
    for file in (ROOT / "data" / "kuairand_pure_subset").glob("*.parquet"):
        pq.write_table(pq.read_table(file).slice(0, 4000), data / file.name)
    place = bucket.upload(data, "kuairand")
    demo = ROOT / "configs" / "demo.yaml"
    there = import_logs(
        config.load(demo, [f"runs_dir={tmp_path / 'there'}", f"source.path={place}"])
    )
    here = import_logs(config.load(demo, [f"runs_dir={tmp_path / 'here'}", f"source.path={data}"]))
    assert there == here  # the fingerprint too: it is of the files' contents
