"""The published sequences: a folder with Parquet files and, written last, the manifest that names them.

    sequences/manifest.json              the published version; replaced in one step
    sequences/<version>/bucket-00000.parquet …   SEQUENCE rows, sorted by user_id
    sequences/<version>/users.parquet, items.parquet   the side tables, id columns user_id and item_id
    sequences/<version>/quarantine/…     rows that were left out, with the reason

Training, evaluation and serving need nothing but this folder.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import UserError
from pipeline.schema import sequence_schema

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Bucket:
    """One file of users."""

    file: str  # relative to the store's folder
    users: int
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a store holds. It says nothing of when or where it was built: the same logs give the same manifest."""

    digest: str  # over the contents of all files; names the version
    num_users: int
    num_rows: int
    rows_in: int  # LOG rows read: num_rows + rows_capped + what the builder quarantined
    rows_capped: int  # older rows beyond sequences.max_rows_per_user
    quarantined: dict[str, int]  # rows by reason, those of the import's own tables included
    counts: dict[str, int]  # whatever else the import noticed
    first_event_ms: int
    last_event_ms: int
    actions: tuple[str, ...]
    request_columns: tuple[str, ...]
    num_buckets: int
    buckets: tuple[Bucket, ...]
    side_tables: dict[str, Bucket]  # "users", "items": rows of the table, no users
    config: dict[str, Any]  # the settings that the sequences depend on
    inputs: str  # digest of the source files and these settings
    schema_version: int = SCHEMA_VERSION

    @property
    def quarantined_rows(self) -> int:
        return sum(self.quarantined.values())


def read_manifest(folder: str | Path) -> Manifest:
    """The published version at `folder`.

    Raises:
        UserError: nothing is published there, or what is there is broken.
    """
    path = Path(folder) / MANIFEST
    try:
        raw = json.loads(path.read_text())
        manifest = _from_json(raw)
    except FileNotFoundError:
        raise UserError(f"no sequences are published at {folder}: run jobs.build_sequences first") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is broken ({error!r}): run jobs.build_sequences with --overwrite") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {manifest.schema_version}, this code reads {SCHEMA_VERSION}")
    for entry in (*manifest.buckets, *manifest.side_tables.values()):
        file = Path(folder) / entry.file
        if not file.is_file() or file.stat().st_size != entry.bytes:
            raise UserError(f"{file} is missing or cut off: run jobs.build_sequences with --overwrite")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish: from the moment of the rename on, readers see this version."""
    staged = folder / f".{MANIFEST}.staged"
    with open(staged, "w") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, folder / MANIFEST)


def read_bucket(folder: str | Path, manifest: Manifest, index: int) -> pa.Table:
    """The SEQUENCE rows of one bucket, sorted by user_id."""
    schema = sequence_schema(manifest.request_columns)
    return _read(Path(folder) / manifest.buckets[index].file).cast(schema)


def read_sequences(folder: str | Path) -> pa.Table:
    """All SEQUENCE rows, bucket after bucket."""
    manifest = read_manifest(folder)
    return pa.concat_tables([read_bucket(folder, manifest, index) for index in range(len(manifest.buckets))])


def read_side_table(folder: str | Path, name: str) -> pa.Table | None:
    """The table called "users" or "items", sorted by its id column user_id or item_id; None where there is none."""
    entry = read_manifest(folder).side_tables.get(name)
    return None if entry is None else _read(Path(folder) / entry.file)


def _read(path: Path) -> pa.Table:
    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): run jobs.build_sequences with --overwrite") from None


def _from_json(raw: dict[str, Any]) -> Manifest:
    raw = dict(raw)
    raw["buckets"] = tuple(Bucket(**entry) for entry in raw["buckets"])
    raw["side_tables"] = {name: Bucket(**entry) for name, entry in raw["side_tables"].items()}
    for name in ("actions", "request_columns"):
        raw[name] = tuple(raw[name])
    return Manifest(**raw)
