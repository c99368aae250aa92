"""The rows of the logs on disk, checked and by user bucket: the first half of a build, and what the
next one keeps.

    parts/<name>.arrow   rows as `normalise` gives them, without the bucket; a record batch holds
                         rows of one bucket
    parts/<name>.user_id.arrow, …   the distinct ids, where they are text (dictionary.py)
    parts/<name>.json    written last: the batches of each bucket, and the files they were made from

A part is named by what it is made of: the digests of its files, and the settings that rows are
checked by. So a build that was killed finds the parts it has finished, and one with more logs makes
parts of the new files only. Rows that broke a rule travel with the others, reason and all, to the
bucket that counts them.

A task holds RUN_ROWS rows at a time: it writes them out bucket by bucket and goes on, so that its
memory does not depend on the size of files and row groups, and a bucket may have several batches in
a part.

Parts are Arrow files, not Parquet: a bucket's rows are found by their place in the file, while a
Parquet footer, which describes every column of every row group, would be parsed for each pair of a
part and a bucket. They are also written twice as fast, and read once.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import FileFormat
from pipeline.files import hidden_beside, publish_file
from pipeline.logs.arrow_errors import reading_file
from pipeline.logs.cleaning import REASON, USER_BUCKET, LogRules, normalise
from pipeline.logs.files import CONNECTIONS, PLAIN
from pipeline.logs.rows import open_rows
from pipeline.sequences import store
from pipeline.sequences.dictionary import IdWriter, has_dictionary
from pipeline.sequences.forgotten import Forgotten

PARTS = store.PARTS
# a task's share of the logs: files are gathered, or split by row groups, to about this many rows
PART_ROWS = 2**20
RUN_ROWS = 2**20  # rows in memory at a time
# rows checked and sorted at a time, in the processor's cache as far as that goes
BATCH_ROWS = 2**17


@dataclass(frozen=True)
class Source:
    """Row groups `first` to `end - 1` of the file of that digest."""

    digest: str
    first: int
    end: int
    rows: int
    path: str  # where the file lay when it was read
    key: int  # stands for the file in its rows, and stays when users are taken out of it


@dataclass(frozen=True)
class PartTask:
    """A part to be made."""

    name: str
    files: tuple[str, ...]  # where the sources lie
    sources: tuple[Source, ...]

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)


@dataclass(frozen=True)
class Part:
    """The index of a part: the rows it holds, and where."""

    name: str
    sources: tuple[Source, ...]
    rows: int
    bytes: int
    broken: dict[str, int]  # rows by the rule that they broke; repeats are found later
    batches: dict[int, tuple[int, ...]]  # each bucket's, by their place in the file
    bucket_rows: dict[int, int]
    # of ids that are text, by column: the bytes of their file; a compaction leaves none
    ids: dict[str, int] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return f"{PARTS}/{self.name}.arrow"

    def ids_file(self, column: str) -> str:
        return f"{PARTS}/{self.name}.{column}.arrow"


def plan_parts(
    files: Mapping[str, str], settings: Mapping[str, Any], form: FileFormat = PLAIN
) -> list[PartTask]:
    """The parts that files make, given as digest -> path; `settings` is what `normalise` depends
    on.

    Small files share a part, large ones are split. The digests alone decide, not names or the order
    of arrival.

        rows of the files   300    400    900    2500       PART_ROWS = 1000, row groups of 500
        parts               [300   400]  [900]  [1000] [1000] [500]
    """
    digests = sorted(files)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        sizes = list(pool.map(partial(_group_sizes, form=form), map(files.__getitem__, digests)))

    shares: list[list[Source]] = []
    rows = 0
    for digest, groups in zip(digests, sizes, strict=True):
        for source in _pieces(digest, files[digest], groups):
            if not shares or rows + source.rows > PART_ROWS:
                shares.append([])
                rows = 0
            shares[-1].append(source)
            rows += source.rows

    return [_part_task(share, files, settings) for share in shares]


def _part_task(
    share: Sequence[Source], files: Mapping[str, str], settings: Mapping[str, Any]
) -> PartTask:
    # files are known by their contents, wherever they lie
    groups = [[source.digest, source.first, source.end] for source in share]
    name = part_name([store.SCHEMA_VERSION, settings, groups])
    paths = tuple(files[source.digest] for source in share)
    return PartTask(name, paths, tuple(share))


def _group_sizes(path: str, form: FileFormat) -> list[int]:
    """Rows of each row group; a text file is one."""
    with open_rows(path, form, count=True) as file:
        return file.group_rows()


def _pieces(digest: str, path: str, groups: Sequence[int]) -> Iterator[Source]:
    """A file in row groups of about PART_ROWS rows together."""
    key = file_key(digest)
    first, rows = 0, 0
    for group, size in enumerate(groups):
        if rows and rows + size > PART_ROWS:
            yield Source(digest, first, group, rows, path, key)
            first, rows = group, 0
        rows += size

    yield Source(digest, first, len(groups), rows, path, key)


def file_key(digest: str) -> int:
    """The first 63 bits of a file's digest."""
    return int(digest[:16], 16) >> 1


def write_part(work: PartTask, rules: LogRules, folder: Path, forgotten: Forgotten) -> Part:
    """Read, check and sort by bucket what `work` names; the part is there when this returns."""
    left_out = 0
    with PartWriter(folder, work.name, rules, with_ids=True) as writer:
        run, rows = [], 0
        pairs: dict[str, list[pa.RecordBatch]] = {}
        for source, block in _blocks(work, rules):
            with reading_file(source.path):
                cleaned = normalise(block, rules, source.key, pairs)
            if forgotten.hashes:
                users = cleaned["user_id"].fill_null(-1).to_numpy()
                cleaned = cleaned.filter(pa.array(~forgotten.has_users(users)))
                left_out += block.num_rows - cleaned.num_rows

            run.append(_by_bucket(cleaned, rules.num_buckets))
            rows += block.num_rows
            if rows >= RUN_ROWS:
                _write_run(run, writer)
                writer.write_ids(pairs, forgotten)
                run, rows, pairs = [], 0, {}

        _write_run(run, writer)
        writer.write_ids(pairs, forgotten)
        part = writer.close(work.sources)

    assert part.rows + left_out == work.rows, (
        f"{part.rows} rows read of {work.files}, their metadata say {work.rows}"
    )
    return part


def _blocks(work: PartTask, rules: LogRules) -> Iterator[tuple[Source, pa.Table]]:
    """The rows that the task names, in tables of at most BATCH_ROWS of one file."""
    open_file = partial(
        open_rows,
        form=rules.format,
        ids=rules.number_ids,
        columns=rules.named_columns,
        texts=rules.text_columns,
    )
    for path, source in zip(work.files, work.sources, strict=True):
        with open_file(path) as file:
            for block in file.blocks(BATCH_ROWS, range(source.first, source.end)):
                yield source, block


def _by_bucket(rows: pa.Table, num_buckets: int) -> tuple[pa.RecordBatch, np.ndarray]:
    """The rows of a block by bucket, and where each bucket begins, int64 [num_buckets + 1].

    row             a  b  c  d  e       num_buckets = 3
    bucket          2  0  2  2  0
    by bucket       b  e  a  c  d       begin: 0, 2, 2, 5
    """
    bucket = rows[USER_BUCKET].to_numpy()
    small = bucket
    if num_buckets < 2**15:
        small = bucket.astype(np.int16)  # NumPy has a radix sort for 16 bits
    order = np.argsort(small, kind="stable")

    sizes = np.bincount(bucket, minlength=num_buckets)
    begin = np.r_[0, np.cumsum(sizes)]

    (batch,) = rows.drop_columns([USER_BUCKET]).combine_chunks().to_batches()
    in_order = pa.array(order)
    columns = []
    for column in batch.columns:
        is_empty = column.null_count == len(column)  # most of the optional ones are
        columns.append(column if is_empty else column.take(in_order))
    return pa.record_batch(columns, schema=batch.schema), begin


def _write_run(run: Sequence[tuple[pa.RecordBatch, np.ndarray]], writer: "PartWriter") -> None:
    """Write the blocks of a run bucket by bucket: one batch for each bucket that has rows."""
    if not run:
        return
    num_buckets = len(run[0][1]) - 1

    for number in range(num_buckets):
        pieces = []
        for rows, begin in run:
            size = begin[number + 1] - begin[number]
            pieces.append(rows.slice(begin[number], size))
        writer.write(number, pa.concat_batches(pieces))


class PartWriter:
    """A part under way. Nothing is seen of it before `close`, and nothing remains of it without.

    `with_ids`: its ids go into files beside it, where they are text.
    """

    def __init__(self, folder: Path, name: str, rules: LogRules, *, with_ids: bool = False) -> None:
        self.name = name
        self._path = folder / PARTS / f"{name}.arrow"

        self._stack = ExitStack()
        self._staged = self._stack.enter_context(hidden_beside(self._path))
        self._file = self._stack.enter_context(pa.OSFile(str(self._staged), "wb"))
        options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        self._writer = pa.ipc.new_file(self._file, part_schema(rules), options=options)
        columns = has_dictionary(rules.events.text_ids) if with_ids else []
        self.ids = self._stack.enter_context(IdWriter(self._path, columns, rules.num_buckets))

        self._num_batches = 0
        self._batches: dict[int, list[int]] = {}
        self._rows: Counter[int] = Counter()
        self._broken: Counter[str] = Counter()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, bucket: int, rows: pa.RecordBatch) -> None:
        """Rows of one bucket; a bucket may come several times, in any order."""
        if rows.num_rows == 0:
            return

        self._writer.write_batch(rows)
        self._batches.setdefault(bucket, []).append(self._num_batches)
        self._num_batches += 1
        self._rows[bucket] += rows.num_rows

        reason = rows[REASON]
        if reason.null_count < rows.num_rows:
            self._broken.update(reason.drop_null().to_pylist())

    def write_ids(
        self, pairs: Mapping[str, Sequence[pa.RecordBatch]], forgotten: Forgotten
    ) -> None:
        """Ids that are text, by column, without those of users who were forgotten."""
        for column, found in pairs.items():
            if column in self.ids.columns:
                self.ids.write(column, found, forgotten)

    def close(self, sources: Sequence[Source]) -> Part:
        """Put the part in its place, then its index."""
        self._writer.close()
        self._file.close()
        batches = {bucket: tuple(found) for bucket, found in sorted(self._batches.items())}

        part = Part(
            name=self.name,
            sources=tuple(sources),
            rows=self._rows.total(),
            bytes=self._staged.stat().st_size,
            broken=dict(sorted(self._broken.items())),
            batches=batches,
            bucket_rows=dict(sorted(self._rows.items())),
            ids=self.ids.close(),
        )
        publish_file(self._staged, self._path)
        index = asdict(part)
        if not part.ids:
            del index["ids"]
        store.write_json(self._path.with_suffix(".json"), index)
        return part


def part_schema(rules: LogRules) -> pa.Schema:
    return rules.schema.remove(rules.schema.get_field_index(USER_BUCKET))


def find_part(folder: Path, name: str) -> Part | None:
    """The index of a finished part; None where there is none, or where its file is not the one that
    was indexed.
    """
    path = folder / PARTS / f"{name}.json"
    try:
        part = _part_from_json(json.loads(path.read_text()))
        whole = path.with_suffix(".arrow").stat().st_size == part.bytes
        for column, size in part.ids.items():
            whole &= (folder / part.ids_file(column)).stat().st_size == size
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        # TypeError: fields of another version
        return None
    return part if whole else None


def _part_from_json(raw: dict[str, Any]) -> Part:
    """JSON has neither tuples nor numbers as keys."""
    batches = {int(bucket): tuple(places) for bucket, places in raw["batches"].items()}
    bucket_rows = {int(bucket): rows for bucket, rows in raw["bucket_rows"].items()}

    return Part(
        name=raw["name"],
        sources=tuple(Source(**source) for source in raw["sources"]),
        rows=raw["rows"],
        bytes=raw["bytes"],
        broken=raw["broken"],
        batches=batches,
        bucket_rows=bucket_rows,
        ids=raw.get("ids", {}),
    )


@contextmanager
def open_part(folder: Path, name: str) -> Iterator[pa.ipc.RecordBatchFileReader]:
    with pa.OSFile(str(folder / PARTS / f"{name}.arrow")) as file:
        yield pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(use_threads=False))


def read_rows(
    folder: Path, batches: Mapping[str, Sequence[int]], bucket: int, rules: LogRules
) -> pa.Table:
    """The rows of a bucket as `normalise` gave them, in no order: `batches` are its batches by the
    name of the part.
    """
    pieces = []
    for name, of_bucket in batches.items():
        with open_part(folder, name) as reader:
            pieces += map(reader.get_batch, of_bucket)
    rows = pa.Table.from_batches(pieces, part_schema(rules))

    # the bucket, which the parts do not repeat for each row
    place = rules.schema.get_field_index(USER_BUCKET)
    numbers = pa.array(np.full(rows.num_rows, bucket, np.int32))
    return rows.add_column(place, rules.schema.field(USER_BUCKET), numbers)


def batches_of(parts: Sequence[Part], bucket: int) -> dict[str, list[int]]:
    """The batches of a bucket by part, of the parts that have any, in the order of their names."""
    found = {part.name: list(part.batches[bucket]) for part in parts if bucket in part.batches}
    return dict(sorted(found.items()))


def part_name(what: object) -> str:
    """The name of a part from all that it is made of, as JSON."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
