"""The way back from codes to ids that are text: a dictionary per id column, beside the sequences.

    parts/<part>.user_id.arrow            the distinct ids of a part, by chunk
    ids/user_id-00003-<sha256>.parquet    chunk 3: code and id, by code; every id that was ever read

A chunk holds the codes of one range; there are as many as buckets, so that one of them, like a
bucket, fits a worker's memory. A chunk is made of the published one, the parts that are new and the
side table, each a task of its own. Two texts of one code are found where ids are merged: a build
with such ids ends with a message, never with two users in one.

Codes are made in pipeline/logs/ids.py. Ids that are integers are their own codes and have no
dictionary.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import UserError
from pipeline.files import hidden_beside, publish_file
from pipeline.logs.columns import flat_array
from pipeline.logs.ids import PAIRS
from pipeline.schema import NAMED_IDS
from pipeline.sequences import store
from pipeline.sequences.forgotten import Forgotten, read_forgotten
from pipeline.sequences.packed_keys import argsort_hashes
from pipeline.sequences.store import Bucket, Manifest

if TYPE_CHECKING:  # reading a dictionary needs no Ray
    from pipeline.sequences.workers import Workers

IDS = "ids"
NUM_CODES = 2**63
TASK_BYTES = 64 * 2**20  # of files with new ids: a task writes as many chunks as it reads of those
MEMORY_PER_BYTE = 4  # of such a file: ids unpacked, and those of a chunk in order
Dictionaries = Mapping[str, Mapping[str, Bucket]]  # by column, by number of the chunk


def has_dictionary(text_ids: Sequence[str]) -> list[str]:
    """The columns that have one, of those that are text."""
    return [name for name in NAMED_IDS if name in text_ids]


# The distinct ids of a part --------------------------------------------------


class IdWriter:
    """The distinct ids of a part under way, a file per column; as of `PartWriter`."""

    def __init__(self, path: Path, columns: Sequence[str], num_chunks: int) -> None:
        """`path` is the part's own, whose ending makes room for those of the columns."""
        self.columns = columns
        self._num_chunks = num_chunks
        self._stack = ExitStack()
        self._paths: dict[str, Path] = {}
        self._staged: dict[str, Path] = {}
        self._files: dict[str, pa.OSFile] = {}
        self._writers: dict[str, pa.ipc.RecordBatchFileWriter] = {}
        options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        for name in columns:
            self._paths[name] = pairs_path(path, name)
            self._staged[name] = self._stack.enter_context(hidden_beside(self._paths[name]))
            file = self._stack.enter_context(pa.OSFile(str(self._staged[name]), "wb"))
            self._writers[name] = pa.ipc.new_file(file, PAIRS, options=options)
            self._files[name] = file

    def __enter__(self) -> "IdWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, name: str, pairs: Sequence[pa.RecordBatch], forgotten: Forgotten) -> None:
        """PAIRS of a column, in any order and with repeats: a batch for each chunk.

        Raises:
            UserError: two ids have one code.
        """
        merged = merge_pairs(name, pa.Table.from_batches(pairs, PAIRS))
        if name == "user_id" and forgotten.hashes:
            theirs = forgotten.has_users(merged["code"].to_numpy())
            merged = merged.filter(pa.array(~theirs))

        codes = merged["code"].to_numpy()
        chunk = chunk_of(codes, self._num_chunks)
        begin = np.searchsorted(chunk, np.arange(self._num_chunks + 1))
        for number in range(self._num_chunks):
            size = begin[number + 1] - begin[number]
            self._writers[name].write_batch(_as_batch(merged.slice(begin[number], size)))

    def close(self) -> dict[str, int]:
        """Put the files in their places; returns the bytes of each, by column."""
        sizes = {}
        for name, writer in self._writers.items():
            writer.close()
            self._files[name].close()
            sizes[name] = self._staged[name].stat().st_size
            publish_file(self._staged[name], self._paths[name])
        return sizes


def write_pairs(
    folder: Path,
    stem: str,
    column: str,
    pairs: pa.RecordBatch,
    num_chunks: int,
    forgotten: Forgotten,
) -> dict[str, int]:
    """A file of its own for ids that no part has: its name in the store's folder, and its bytes."""
    path = folder / f"{stem}.arrow"
    with IdWriter(path, [column], num_chunks) as writer:
        writer.write(column, [pairs], forgotten)
        sizes = writer.close()
    return {str(pairs_path(path, column).relative_to(folder)): sizes[column]}


def _as_batch(pairs: pa.Table) -> pa.RecordBatch:
    """One batch, of no rows as well."""
    return pa.record_batch([flat_array(column) for column in pairs.columns], PAIRS)


def pairs_path(path: Path, name: str) -> Path:
    """Where the ids of a column lie, beside the file `path` of a part."""
    return path.with_name(f"{path.stem}.{name}.arrow")


def chunk_of(codes: np.ndarray, num_chunks: int) -> np.ndarray:
    """int64 [n]: the chunk of each code. Chunks are ranges of codes, in their order."""
    width = np.uint64(NUM_CODES // num_chunks + 1)
    return (codes.astype(np.uint64) // width).astype(np.int64)


def read_pairs(path: Path, numbers: Iterable[int], num_chunks: int) -> list[pa.Table]:
    """The ids of each of these chunks in a file of `IdWriter`, in no order and with repeats."""
    found = []
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(use_threads=False))
        for number in numbers:
            # each write was one batch for every chunk
            places = range(number, reader.num_record_batches, num_chunks)
            batches = [reader.get_batch(place) for place in places]
            found.append(pa.Table.from_batches(batches, PAIRS))
    return found


def copy_pairs(path: Path, name: str, num_chunks: int, users: np.ndarray, to: IdWriter) -> None:
    """Write the ids of the part at `path` once more, without the users of these codes."""
    pairs = pa.concat_tables(read_pairs(pairs_path(path, name), range(num_chunks), num_chunks))
    if name == "user_id":
        pairs = pairs.filter(pa.array(~np.isin(pairs["code"].to_numpy(), users)))
    to.write(name, pairs.to_batches(), Forgotten())


# Chunks ----------------------------------------------------------------------


@dataclass(frozen=True)
class ChunkWork:
    """Chunks of a dictionary to be written, neighbours in one task."""

    column: str
    numbers: tuple[int, ...]
    num_chunks: int
    pairs: tuple[str, ...]  # files of `IdWriter`, relative to the store's folder
    published: Mapping[int, Bucket]  # by number
    rows: int  # bytes of the new ids, which stand for their number: repeats count


def plan_chunks(
    column: str,
    pairs: Mapping[str, int],
    published: Mapping[str, Bucket],
    num_chunks: int,
) -> list[ChunkWork]:
    """All chunks of a column's dictionary. `pairs`: the files with new ids, and the bytes of
    each.

    A chunk may be a moment's work, less than what a task and opening every file cost, so that a
    task has several.

        40 MB of new ids in 100 chunks       one task
        1 GB                                 17 tasks of 6 chunks
    """
    if not pairs:
        return []
    bytes_per_chunk = max(1, sum(pairs.values()) // num_chunks)
    together = max(1, TASK_BYTES // bytes_per_chunk)

    work = []
    for first in range(0, num_chunks, together):
        numbers = tuple(range(first, min(first + together, num_chunks)))
        known = {n: published[str(n)] for n in numbers if str(n) in published}
        rows = bytes_per_chunk * len(numbers)
        work.append(ChunkWork(column, numbers, num_chunks, tuple(pairs), known, rows))
    return work


def write_chunks(
    work: ChunkWork, folder: Path, forgotten: Forgotten
) -> tuple[ChunkWork, dict[int, Bucket]]:
    """The file of each chunk that has ids.

    Raises:
        UserError: two ids have one code.
    """
    pieces: dict[int, list[pa.Table]] = {number: [] for number in work.numbers}
    for number, entry in work.published.items():
        pieces[number].append(_read_chunk(folder, entry))
    for file in work.pairs:
        found = read_pairs(folder / file, work.numbers, work.num_chunks)
        for number, pairs in zip(work.numbers, found, strict=True):
            pieces[number].append(pairs)

    written = {}
    for number in work.numbers:
        pairs = merge_pairs(work.column, pa.concat_tables(pieces.pop(number)))
        if work.column == "user_id" and forgotten.hashes:
            pairs = pairs.filter(pa.array(~forgotten.has_users(pairs["code"].to_numpy())))
        entry = _write_chunk(folder, work.column, number, pairs)
        if entry is not None:
            written[number] = entry
    return work, written


def _write_chunk(folder: Path, column: str, number: int, pairs: pa.Table) -> Bucket | None:
    if pairs.num_rows == 0:
        return None
    return store.write_table(pairs, folder, f"{IDS}/{column}-{number:05d}")


def merge_pairs(column: str, pairs: pa.Table) -> pa.Table:
    """PAIRS by code, each id once.

    code    7    3    7          3    7
    id      b    a    b          a    b

    Raises:
        UserError: one code stands for two ids.
    """
    codes = pairs["code"].to_numpy()
    order = argsort_hashes(codes)
    codes = codes[order]
    ordered = pairs.combine_chunks().take(pa.array(order))
    texts = ordered["id"]

    # each row beside the one before it
    same_code = codes[1:] == codes[:-1]
    same_text = pc.call_function("equal", [texts[1:], texts[:-1]]).to_numpy()
    if (same_code & ~same_text).any():
        place = int(np.flatnonzero(same_code & ~same_text)[0])
        raise UserError(
            f"{column}: {texts[place].as_py()!r} and {texts[place + 1].as_py()!r} have the same "
            "code of 63 bits and would count as one; rename one of them in the logs and side tables"
        )
    return ordered.filter(pa.array(np.r_[True, ~same_code][: len(codes)]))


def chunks_without(
    folder: Path, column: str, chunks: Mapping[str, Bucket], codes: np.ndarray, num_chunks: int
) -> tuple[dict[str, Bucket], int]:
    """A dictionary without these codes, and how many ids were taken out."""
    rest, removed = dict(chunks), 0
    for number in np.unique(chunk_of(codes, num_chunks)).tolist():
        entry = rest.pop(str(number), None)
        if entry is None:
            continue
        pairs = _read_chunk(folder, entry)
        kept = pairs.filter(pa.array(~np.isin(pairs["code"].to_numpy(), codes)))
        removed += pairs.num_rows - kept.num_rows
        written = entry
        if kept.num_rows < pairs.num_rows:
            written = _write_chunk(folder, column, number, kept)
        if written is not None:
            rest[str(number)] = written
    return _in_order(rest), removed


def write_dictionaries(
    folder: Path,
    pairs: Mapping[str, Mapping[str, int]],
    published: Dictionaries,
    num_chunks: int,
    run: "Workers",
) -> dict[str, dict[str, Bucket]]:
    """The chunks of every dictionary, by column and number: the published ones and new ids.

    `pairs`: by column, the files of `IdWriter` with new ids, and the bytes of each.
    """
    work: list[ChunkWork] = []
    for column, files in pairs.items():
        work += plan_chunks(column, files, published.get(column, {}), num_chunks)
    if not work:
        return {column: dict(chunks) for column, chunks in published.items()}

    found = {column: dict(chunks) for column, chunks in published.items()}
    write = partial(write_chunks, folder=folder, forgotten=read_forgotten(folder))
    memory = MEMORY_PER_BYTE * max(task.rows for task in work)
    for task, written in run("writing the dictionaries of ids", write, work, memory):
        chunks = found.setdefault(task.column, {})
        for number, entry in written.items():
            chunks[str(number)] = entry
    return {column: _in_order(chunks) for column, chunks in sorted(found.items())}


def _in_order(chunks: Mapping[str, Bucket]) -> dict[str, Bucket]:
    return {number: chunks[number] for number in sorted(chunks, key=int)}


# The way back ----------------------------------------------------------------


def own_ids(folder: str | Path, manifest: Manifest, column: str, codes: np.ndarray) -> pa.Array:
    """The ids that people have, of codes in any order and with repeats; one chunk in memory at a
    time.

    Args:
        column: "user_id" or "item_id".
        codes: int64 [n].

    Returns:
        string [n] where the column is text, null for a code that was never published; else the
        codes themselves, int64 [n].
    """
    if column not in manifest.text_ids:
        return pa.array(codes, pa.int64())
    chunks = manifest.dictionaries.get(column, {})
    return texts_of(folder, chunks, codes, manifest.num_buckets)


def name_rows(folder: str | Path, manifest: Manifest, rows: pa.Table) -> pa.Table:
    """A table for people: its columns user_id and item_id as people have those ids."""
    for column in NAMED_IDS:
        if column in manifest.text_ids and column in rows.column_names:
            named = own_ids(folder, manifest, column, rows[column].to_numpy())
            rows = rows.set_column(rows.column_names.index(column), column, named)
    return rows


def texts_of(
    folder: str | Path, chunks: Mapping[str, Bucket], codes: np.ndarray, num_chunks: int
) -> pa.Array:
    """string [n], null for a code that the dictionary lacks; `chunks` by number."""
    # the pairs that are wanted, by code as the chunks are
    wanted = np.unique(codes)
    pieces = [PAIRS.empty_table()]
    for number in np.unique(chunk_of(wanted, num_chunks)).tolist():
        if str(number) in chunks:
            pairs = _read_chunk(Path(folder), chunks[str(number)])
            pieces.append(pairs.filter(pa.array(np.isin(pairs["code"].to_numpy(), wanted))))
    known, texts = _as_arrays(pa.concat_tables(pieces))
    if len(known) == 0:
        return pa.nulls(len(codes), pa.string())

    at = np.searchsorted(known, codes).clip(0, len(known) - 1)
    return texts.take(pa.array(at, mask=known[at] != codes))


def read_dictionary(
    folder: str | Path, manifest: Manifest, column: str
) -> tuple[np.ndarray, pa.Array]:
    """A whole dictionary in memory: the codes, int64 [n] ascending, and their ids, string [n].

    Empty where the column is not text: there a code is the id. For a few codes, or for many that
    need not be held at once, `own_ids` is enough.

        codes, ids = read_dictionary(folder, store.read_manifest(folder), "item_id")
        ids[np.searchsorted(codes, code)]       the id of a code that is there
    """
    chunks = manifest.dictionaries.get(column, {})
    pieces = [PAIRS.empty_table()]
    for entry in _in_order(chunks).values():
        pieces.append(_read_chunk(Path(folder), entry))
    return _as_arrays(pa.concat_tables(pieces))


def _as_arrays(pairs: pa.Table) -> tuple[np.ndarray, pa.Array]:
    """Codes and ids as one array each."""
    return pairs["code"].to_numpy(), pa.concat_arrays(pairs["id"].chunks)


def _read_chunk(folder: Path, entry: Bucket) -> pa.Table:
    path = folder / entry.file
    try:
        return pq.read_table(path, schema=PAIRS)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): run jobs.build_sequences with --overwrite"
        ) from None
