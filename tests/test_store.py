"""The published store: read as written, and a clear word where it is missing, broken or cut off."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config import UserError
from pipeline.schema import EventColumns
from pipeline.sequences import store
from pipeline.sequences.store import Manifest, write_table

EVENTS = EventColumns(actions=("click",), request=("tab",))


def sequences(first_user: int) -> pa.Table:
    lists = {name: [[1, 0], [1]] for name in EVENTS.sequence_lists()} | {
        "order_only": [[True, False], [False]]
    }
    scalars = {
        "user_id": [first_user, first_user + 1],
        "user_bucket": [0, 0],
        "first_position": [0, 7],
    }
    return pa.table(scalars | lists, schema=EVENTS.sequence_schema())


@pytest.fixture
def published(tmp_path: Path) -> Path:
    buckets = tuple(
        write_table(sequences(first), tmp_path, f"buckets/bucket-{first}", users=2)
        for first in (0, 10)
    )
    users = write_table(
        pa.table({"user_id": [0, 1], "country": ["x", "y"]}), tmp_path, "tables/users"
    )
    manifest = Manifest(
        digest="v",
        num_users=4,
        num_rows=6,
        rows_in=9,
        rows_merged=0,
        rows_capped=1,
        users_capped=1,
        quarantined={"key_duplicate": 2},
        counts={},
        first_event_ms=0,
        last_event_ms=1,
        actions=("click",),
        request_columns=("tab",),
        num_buckets=2,
        buckets=buckets,
        side_tables={"users": users},
        quarantine=(),
        parts=(),
        records=(),
        config={"sequences": {"num_buckets": 2}},
        inputs="abc",
    )
    store.write_manifest(tmp_path, manifest)
    return tmp_path


def test_what_was_written_is_read(published: Path):
    manifest = store.read_manifest(published)
    assert [(bucket.users, bucket.rows) for bucket in manifest.buckets] == [(2, 3), (2, 3)]
    assert sum(manifest.quarantined.values()) == 2
    assert store.read_bucket(published, manifest, 1).equals(sequences(10))
    assert store.read_sequences(published).equals(pa.concat_tables([sequences(0), sequences(10)]))
    users = store.read_side_table(published, "users")
    assert users is not None and users["country"].to_pylist() == ["x", "y"]
    assert store.read_side_table(published, "items") is None
    before = (published / store.MANIFEST).read_bytes()
    store.write_manifest(published, manifest)
    assert (published / store.MANIFEST).read_bytes() == before


def test_nothing_published(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"no sequences are published at .*run jobs.build_sequences first"
    ):
        store.read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"buckets": [{"name": 1}]}'])
def test_a_broken_manifest(published: Path, text: str):
    (published / store.MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"manifest.json is broken .*--overwrite"):
        store.read_manifest(published)


def test_a_manifest_of_another_time(published: Path):
    raw = json.loads((published / store.MANIFEST).read_text())
    (published / store.MANIFEST).write_text(json.dumps(raw | {"schema_version": 99}))
    with pytest.raises(
        UserError, match=f"has schema version 99, this code reads {store.SCHEMA_VERSION}"
    ):
        store.read_manifest(published)


def test_files_that_are_gone_cut_off_or_damaged(published: Path):
    manifest = store.read_manifest(published)
    file = published / manifest.buckets[1].file
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"bucket-10-.*.parquet is missing or cut off"):
        store.read_sequences(published)
    file.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match=r"bucket-10-.*.parquet cannot be read"):
        store.read_sequences(published)
    file.unlink()
    with pytest.raises(UserError, match=r"bucket-10-.*.parquet is missing or cut off"):
        store.read_manifest(published)


def test_a_manifest_is_replaced_in_one_step(published: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = store.read_manifest(published)

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(store.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        store.write_manifest(published, dataclasses.replace(manifest, num_rows=0))
    assert store.read_manifest(published) == manifest
