"""The published sequences: a folder with Parquet files and, written last, the manifest that names
them.

    sequences/
      manifest.json                                the published version; replaced in one step
      versions/<digest>.json                       its manifest again, and the one before
      buckets/bucket-00003-<sha256>.parquet …      SEQUENCE rows, sorted by user_id
      tables/users-<sha256>.parquet, items-…       the side tables, by user_id and item_id
      ids/user_id-00003-<sha256>.parquet …         codes and texts of ids, where they are text
      quarantine/bucket-00003-<sha256>.parquet …   rows that were left out, with the reason
      retired/bucket-00003-<sha256>.parquet …      how many rows of users were dropped for their age
      forgotten.json                               users whose rows are taken in no more
      parts/, records/                             what the next build need not do again
                                                   (pipeline/sequences/parts.py)

Files are named by their contents and never change, so versions share those that are the same in
both. What neither the published version nor the one before names is removed after publishing.
Training, evaluation and serving read buckets, side tables and ids only.
"""

import dataclasses
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import SequenceConfig, UserError
from pipeline.files import open_private
from pipeline.schema import EventColumns, outcome_column

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 3
MANIFEST, VERSIONS, PARTS = "manifest.json", "versions", "parts"
# of a build: who has the folder, and the digests of the logs' files
LOCK, DIGESTS = ".lock", ".digests.json"
FORGOTTEN = "forgotten.json"


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
    """What a store holds. It says nothing of when or where it was built: the same logs give the
    same manifest.
    """

    digest: str  # over the contents of all files; names the version
    num_users: int
    num_rows: int
    # LOG rows read: num_rows + rows_merged + rows_capped + what the builder quarantined
    rows_in: int
    rows_merged: int  # into another row of the same user, item and time
    rows_capped: int  # older rows beyond sequences.max_rows_per_user
    users_capped: int  # the users who had such rows
    quarantined: dict[str, int]  # rows by reason, those of the import's own tables included
    counts: dict[str, int]  # whatever else the import noticed
    first_event_ms: int
    last_event_ms: int
    actions: tuple[str, ...]
    request_columns: tuple[str, ...]
    num_buckets: int
    buckets: tuple[Bucket, ...]
    side_tables: dict[str, Bucket]  # "users", "items": rows of the table, no users
    quarantine: tuple[Bucket, ...]  # no users
    # by name: the rows as they were read, from which any bucket can be built again
    parts: tuple[str, ...]
    # files, one per bucket that has rows: what it was built from, and its statistics
    records: tuple[str, ...]
    config: dict[str, Any]  # the settings that the sequences depend on
    inputs: str  # digest of the source files and these settings
    # by bucket number: users' rows dropped for their age
    retired: dict[str, Bucket] = field(default_factory=dict)
    # rows from before were dropped when the parts were last compacted
    kept_since_ms: int | None = None
    # as in `source.outcome_columns`
    outcome_columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    # of user_id, item_id and request_id those that are text in the logs; the rows have their codes
    text_ids: tuple[str, ...] = ()
    # by column: by number of the chunk, the codes and texts of ids (dictionary.py)
    dictionaries: dict[str, dict[str, Bucket]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def events(self) -> EventColumns:
        """The columns of the events that the store was built from."""
        declared = [
            outcome_column(name, column["type"], column["at_least"])
            for name, column in self.outcome_columns.items()
        ]
        text_request = []
        columns = self.config.get("source", {}).get("columns", {})
        for name in self.request_columns:
            reading = columns.get(name)
            if isinstance(reading, dict) and reading.get("text"):
                text_request.append(name)
        return EventColumns(
            self.actions,
            self.request_columns,
            tuple(declared),
            self.text_ids,
            tuple(text_request),
        )

    @property
    def dictionary_files(self) -> list[Bucket]:
        """The files of all dictionaries."""
        found: list[Bucket] = []
        for chunks in self.dictionaries.values():
            found += chunks.values()
        return found


def require_own(sequences: SequenceConfig) -> None:
    """Refuse to change sequences that belong to another run.

    Raises:
        UserError: `sequences.from_run` is set.
    """
    if sequences.from_run is not None:
        raise UserError(
            f"sequences.from_run is {sequences.from_run!r}: its sequences are only read here, and "
            "changed by a job of that name"
        )


def read_manifest(folder: str | Path) -> Manifest:
    """The published version at `folder`.

    Raises:
        UserError: nothing is published there, or what is there is broken.
    """
    path = Path(folder) / MANIFEST
    manifest = _read_manifest(path)
    for entry in (
        *manifest.buckets,
        *manifest.side_tables.values(),
        *manifest.dictionary_files,
    ):
        file = Path(folder) / entry.file
        if not file.is_file() or file.stat().st_size != entry.bytes:
            raise UserError(
                f"{file} is missing or cut off: run jobs.build_sequences with --overwrite"
            )
    return manifest


def _read_manifest(path: Path) -> Manifest:
    try:
        raw = json.loads(path.read_text())
        version = raw.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version}, this code reads {SCHEMA_VERSION}: "
                "run jobs.build_sequences with --overwrite"
            )
        return _from_json(raw)
    except FileNotFoundError:
        raise UserError(
            f"no sequences are published at {path.parent}: run jobs.build_sequences first"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is broken ({error!r}): run jobs.build_sequences with --overwrite"
        ) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish: from the second rename on, readers see this version."""
    content = dataclasses.asdict(manifest)
    # without them, earlier versions of this code read such a manifest too
    for name in ("outcome_columns", "text_ids", "dictionaries"):
        if not content[name]:
            del content[name]
    for path in (folder / VERSIONS / f"{manifest.digest[:16]}.json", folder / MANIFEST):
        write_json(path, content)


def versions(folder: Path) -> list[Manifest]:
    """The versions whose manifests are kept, the newest first; those that another schema wrote are
    left out.
    """
    files = sorted(
        (folder / VERSIONS).glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True
    )
    found = []
    for file in files:
        try:
            found.append(_read_manifest(file))
        except UserError as error:
            logger.warning("%s", error)
    return found


def remove_unnamed(folder: Path, kept: Iterable[Manifest], parts: Collection[str] = ()) -> None:
    """Remove all files that none of the versions `kept` names, nor `parts`: those of older
    versions, and of builds that were given up.

    Who has an older version open keeps what is open; who reads it by name must be done within the
    life of two versions."""
    named = {MANIFEST, LOCK, DIGESTS, FORGOTTEN}
    for manifest in kept:
        entries = (
            *manifest.buckets,
            *manifest.quarantine,
            *manifest.side_tables.values(),
            *manifest.retired.values(),
            *manifest.dictionary_files,
        )
        named |= {entry.file for entry in entries} | set(manifest.records)
        endings = ("arrow", "json", *(f"{name}.arrow" for name in manifest.text_ids))
        named |= {f"parts/{name}.{ending}" for name in manifest.parts for ending in endings}
        named.add(f"{VERSIONS}/{manifest.digest[:16]}.json")

    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.parent.name == PARTS and path.name.partition(".")[0] in parts:
            continue
        elif str(path.relative_to(folder)) not in named:
            path.unlink(missing_ok=True)


def write_json(path: Path, content: object, indent: int | None = 1) -> None:
    """In one step, and durable before it is seen; dataclasses inside are written as their fields.

    Without an indent Python's encoder of C writes it, in a twentieth of the time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(staged, "w") as file:
            file.write(json.dumps(content, indent=indent, sort_keys=True, default=vars))
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def write_table(table: pa.Table, folder: Path, stem: str, users: int = 0) -> Bucket:
    """Write `folder/<stem>-<sha256>.parquet` in one step; `users` is given for SEQUENCE, whose
    events are counted.
    """
    target = folder / stem
    target.parent.mkdir(parents=True, exist_ok=True)
    # a second attempt may run beside a lost first one
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(staged, "w+b", opener=open_private) as file:
            pq.write_table(
                table,
                file,
                compression="zstd",
                row_group_size=2**16,
                **(_encodings(table) if users else {}),
            )
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        name = f"{stem}-{sha256[:16]}.parquet"
        size = staged.stat().st_size
        os.replace(staged, folder / name)
    finally:
        staged.unlink(missing_ok=True)
    rows = (
        int(table["item_id"].combine_chunks().value_lengths().sum().as_py())
        if users
        else table.num_rows
    )
    return Bucket(file=name, users=users, rows=rows, bytes=size, sha256=sha256)


def _encodings(sequences: pa.Table) -> dict[str, Any]:
    """How Parquet is to store SEQUENCE: as differences where values are many, by a dictionary where
    they are few.

    Many are the values of `request_index` and of whatever has 64 bits. Against a dictionary for
    everything, its default: half the time to write, two thirds of the bytes.
    """
    by_dictionary, as_differences = [], []
    for column in sequences.schema:
        if pa.types.is_large_list(column.type):
            many = pa.types.is_int64(column.type.value_type) or column.name == "request_index"
            chosen = as_differences if many else by_dictionary
            chosen.append(f"{column.name}.list.element")
    return {
        "use_dictionary": by_dictionary,
        "column_encoding": dict.fromkeys(as_differences, "DELTA_BINARY_PACKED"),
    }


def read_bucket(folder: str | Path, manifest: Manifest, index: int) -> pa.Table:
    """The SEQUENCE rows of one bucket, sorted by user_id."""
    schema = manifest.events.sequence_schema()
    return _read(Path(folder) / manifest.buckets[index].file).cast(schema)


def read_sequences(folder: str | Path) -> pa.Table:
    """All SEQUENCE rows, bucket after bucket."""
    manifest = read_manifest(folder)
    return pa.concat_tables(
        [read_bucket(folder, manifest, index) for index in range(len(manifest.buckets))]
    )


def read_side_table(folder: str | Path, name: str) -> pa.Table | None:
    """The table called "users" or "items", sorted by its id column user_id or item_id; None where
    there is none.
    """
    entry = read_manifest(folder).side_tables.get(name)
    return None if entry is None else _read(Path(folder) / entry.file)


def _read(path: Path) -> pa.Table:
    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): run jobs.build_sequences with --overwrite"
        ) from None


def _from_json(raw: dict[str, Any]) -> Manifest:
    raw = dict(raw)
    for name in ("buckets", "quarantine"):
        raw[name] = tuple(Bucket(**entry) for entry in raw[name])
    for name in ("side_tables", "retired"):
        raw[name] = {key: Bucket(**entry) for key, entry in raw[name].items()}
    for name in ("actions", "request_columns", "parts", "records"):
        raw[name] = tuple(raw[name])
    raw["text_ids"] = tuple(raw.get("text_ids", ()))
    raw["dictionaries"] = {
        column: {number: Bucket(**entry) for number, entry in chunks.items()}
        for column, chunks in raw.get("dictionaries", {}).items()
    }
    return Manifest(**raw)
