"""Rows of some users taken out of what a store holds: one part, one table, one file at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import open_private, publish_file, sha256_of
from pipeline.logs.cleaning import REASON, LogRules, user_bucket
from pipeline.logs.ids import code_column
from pipeline.sequences import store
from pipeline.sequences.dictionary import copy_pairs
from pipeline.sequences.forgotten import read_forgotten
from pipeline.sequences.parts import Part, PartWriter, Source, find_part, open_part, part_name
from pipeline.sequences.store import Bucket, Manifest


@dataclass(frozen=True)
class Sweep:
    """A part to be made of another one's rows without those of the users."""

    part: Part
    name: str
    sources: tuple[Source, ...]

    @property
    def rows(self) -> int:
        return self.part.rows


@dataclass(frozen=True)
class Swept:
    part: Part  # the part as it was, where it had nothing of the users
    removed: dict[int, int]  # by bucket, where there were any: rows


def plan_sweep(parts: Sequence[Part], users: np.ndarray, digests: Mapping[str, str]) -> list[Sweep]:
    """A task for each part. `digests`, old to new, are of source files from which the users are
    taken out as well.
    """
    work = []
    for part in parts:
        sources = []
        for source in part.sources:
            digest = digests.get(source.digest, source.digest)
            sources.append(replace(source, digest=digest))

        what = ["without", part.name, users.tolist(), [source.digest for source in sources]]
        work.append(Sweep(part, part_name(what), tuple(sources)))
    return work


def sweep_part(work: Sweep, users: np.ndarray, rules: LogRules, folder: Path) -> Swept:
    """Write the part without the users; one that has nothing of them, and no source that changed,
    is left as it is.
    """
    done = find_part(folder, work.name) or _without(work, users, rules, folder)

    removed = {}
    for number, before in work.part.bucket_rows.items():
        rows = before - done.bucket_rows.get(number, 0)
        if rows:
            removed[number] = rows
    return Swept(done, removed)


def _without(work: Sweep, users: np.ndarray, rules: LogRules, folder: Path) -> Part:
    part = work.part
    suspects = set(user_bucket(users, rules.num_buckets).tolist())

    with open_part(folder, part.name) as reader:

        def read_rest(number: int, place: int) -> tuple[pa.RecordBatch, bool]:
            """The batch without the users, and whether it had any of them."""
            batch = reader.get_batch(place)
            # a row that broke a rule lies in a bucket of its own digest's, whoever's it is
            if number not in suspects and batch[REASON].null_count == batch.num_rows:
                return batch, False
            theirs = np.isin(batch["user_id"].fill_null(-1).to_numpy(), users)
            if not theirs.any():
                return batch, False
            return batch.filter(pa.array(~theirs)), True

        batches = []
        for number, places in part.batches.items():
            batches += [(number, place) for place in places]

        # only where they can be: in their own buckets, or among broken rows
        found = False
        for number, place in batches:
            if not found and (part.broken or number in suspects):
                _, found = read_rest(number, place)
        if not found and work.sources == part.sources:
            return part

        with PartWriter(folder, work.name, rules, with_ids=bool(part.ids)) as writer:
            for number, place in batches:
                rest, _ = read_rest(number, place)
                writer.write(number, rest)
            for column in part.ids:
                copy_pairs(folder / part.file, column, rules.num_buckets, users, writer.ids)
            return writer.close(work.sources)


def are_unknown(folder: Path, manifest: Manifest, users: np.ndarray) -> np.ndarray:
    """bool [n]: those of `users`, int64 [n], of whom the store has no row of any kind, and which
    it was not told to forget before.
    """
    files = [entry.file for entry in manifest.quarantine]
    if "users" in manifest.side_tables:
        files.append(manifest.side_tables["users"].file)
    for number in np.unique(user_bucket(users, manifest.num_buckets)).tolist():
        files.append(manifest.buckets[number].file)
        if str(number) in manifest.retired:
            files.append(manifest.retired[str(number)].file)

    known = read_forgotten(folder).has_users(users)
    for file in files:
        held = pq.read_table(folder / file, columns=["user_id"])["user_id"]
        known |= np.isin(users, held.drop_null().to_numpy())
    return ~known


def without_users(
    rows: pa.Table, users: np.ndarray, column: str = "user_id", *, text: bool = False
) -> pa.Table:
    """The rows of all others, and those without a user; `text`: the column has ids that are
    text.
    """
    coded = code_column(rows[column], text=text)
    owner = coded.codes.cast(pa.int64()).fill_null(-1).to_numpy()
    theirs = np.isin(owner, users)
    return rows.filter(pa.array(~theirs)) if theirs.any() else rows


def table_without(folder: Path, entry: Bucket, users: np.ndarray) -> tuple[Bucket, int]:
    """A table of the store, with a column user_id, without the users; and how many rows were
    theirs.
    """
    rows = pq.read_table(folder / entry.file)
    rest = without_users(rows, users)
    removed = rows.num_rows - rest.num_rows
    if not removed:
        return entry, 0

    stem = entry.file.removesuffix(".parquet").rpartition("-")[0]
    return store.write_table(rest, folder, stem), removed


@dataclass(frozen=True)
class Rewritten:
    """A file of rows that was written again beside itself; `publish_rest` puts it in its place."""

    path: Path
    staged: Path
    old_digest: str
    new_digest: str
    removed: int

    def publish_rest(self) -> None:
        publish_file(self.staged, self.path)


def stage_without(path: Path, users: np.ndarray, column: str, *, text: bool) -> Rewritten | None:
    """The Parquet file at `path` without the users, staged; None where they have no row in it."""
    staged = path.with_name(f".{path.name}.without")
    staged.unlink(missing_ok=True)  # of a run that was killed

    rows = pq.read_table(path)
    rest = without_users(rows, users, column, text=text)
    removed = rows.num_rows - rest.num_rows
    if not removed:
        return None

    with open(staged, "wb", opener=open_private) as file:
        pq.write_table(rest, file)
    return Rewritten(path, staged, sha256_of(path), sha256_of(staged), removed)
