"""Files of logs on a disk or in a bucket, listed, opened and digested alike.

A file on a disk is named by its absolute path. An object is named
`s3://bucket/key?endpoint_override=...&region=...`, with the options that the configuration gave it,
so that any worker can open it by its name alone; the key is written as it is, without percent signs
for what a URI would not allow. Credentials are those that AWS' own tools find, in the environment,
a profile or the machine's role. They never stand in a name.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.config import FileFormat, UserError
from pipeline.config.reading import GCS, S3, split_s3
from pipeline.logs.text_files import has_text_ending, text_kind

PLAIN = FileFormat()
READ_BYTES = 8 * 2**20  # of one request, for a file that is read from beginning to end
CONNECTIONS = 16  # small requests under way at once: a footer is one round trip

ENDINGS = (".parquet", ".parq", ".pq")  # a file that has one and is not Parquet is an error
MAGICS = (b"PAR1", b"PARE")  # at both ends of a file; the second: with an encrypted footer
PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"PK\x03\x04")  # gzip, zstd, …
HIDDEN = "a name that begins with _ or ."
NOT_PARQUET = "not Parquet"
NO_BYTES = "empty, 0 bytes"
CUT_OFF = "Parquet that is cut off, or being written"
DELTA_LOG, HUDI_LOG, ICEBERG_LOG = "_delta_log", ".hoodie", "metadata"


@dataclass(frozen=True)
class FoundFiles:
    """The files of a place, and what else lies there: file -> why it is left out."""

    files: list[str]
    left_out: dict[str, str]


def list_files(path: str | Path) -> list[str]:
    """The files that `find_files` finds."""
    return find_files(path).files


def find_files(path: str | Path, form: FileFormat = PLAIN) -> FoundFiles:
    """The files of `form` at `path`, a file, a folder searched in depth or a pattern, in a fixed
    order; none where there are none. Without a form they are Parquet, or else CSV or JSON lines by
    their endings.

    Names count as they do for Spark and Hive: what begins with `_` or `.`, file or folder, is left
    out, but for a partition's folder such as `_day=1`. A file of an unknown ending is looked into.

        logs/day=1/part-0.parquet       read
        logs/day=1/part-1.pq            read
        logs/day=1/part-2               read if it begins and ends with PAR1
        logs/_temporary/0/part-3.parquet, logs/.part-4.parquet     left out
        logs/notes.txt                                             left out

    Raises:
        UserError: the place cannot be looked at: no permission, no answer. It is a table of Delta,
            Iceberg or Hudi. A Parquet file is compressed as a whole.
    """
    filesystem, inner, options = locate(path)
    pattern = None
    try:
        there = filesystem.get_file_info(inner).type
        if there == fs.FileType.NotFound:
            inner, pattern = _split_pattern(inner)
        is_file = there == fs.FileType.File
        _refuse_inside_table(filesystem, inner, is_file, path)
        if is_file:
            return FoundFiles([_name(inner, options)], {})
        found = filesystem.get_file_info(
            fs.FileSelector(inner, recursive=True, allow_not_found=True)
        )
    except OSError as error:
        raise UserError(f"{path} cannot be listed: {error}") from None

    names, left_out = [], {}
    for info in found:
        parts = info.path.removeprefix(inner).strip("/").split("/")
        _refuse_table(path, parts)
        is_wanted = pattern is None or pattern.fullmatch(info.path)
        if info.type != fs.FileType.File or not is_wanted:
            continue

        name = _name(info.path, options)
        is_parquet = name.partition("?")[0].lower().endswith(ENDINGS)
        if any(map(_is_hidden, parts)):
            left_out[name] = HIDDEN
        elif info.size == 0 and not is_parquet:
            left_out[name] = NO_BYTES
        else:
            names.append(name)

    if form.text_kind is not None:
        known = _text_files_by_form(names, left_out, form, any_ending=pattern is not None)
    else:
        known = _parquet_files(names, left_out)
        if not known and form.kind is None:
            known = _text_files(path, left_out, form)
    return FoundFiles(sorted(known), dict(sorted(left_out.items())))


def _text_files_by_form(
    names: Sequence[str], left_out: dict[str, str], form: FileFormat, *, any_ending: bool
) -> list[str]:
    """The files that the form calls CSV or JSON lines; the others go to `left_out`.

    `any_ending`: a pattern has chosen them, whatever their endings.
    """
    kind = form.text_kind
    assert kind is not None, "the caller has asked for it"
    found = []
    for name in names:
        usual = any_ending or has_text_ending(name, kind)
        if usual and text_kind(name, form) is not None:
            found.append(name)
        else:
            left_out[name] = f"not {kind} by its name"
    return found


def _parquet_files(names: Sequence[str], left_out: dict[str, str]) -> list[str]:
    """Those of the files that are Parquet by their endings, or else by their contents; the others
    go to `left_out`.
    """
    found, unknown = [], []
    for name in names:
        ending_tells = base_name(name).lower().endswith(ENDINGS)
        (found if ending_tells else unknown).append(name)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for name, reason in zip(unknown, pool.map(_why_no_parquet, unknown), strict=True):
            if reason is None:
                found.append(name)
            else:
                left_out[name] = reason
    return found


def _text_files(path: str | Path, left_out: dict[str, str], form: FileFormat) -> list[str]:
    """Files that are CSV or JSON lines by their endings, taken out of those left out in place.

    Raises:
        UserError: there are both.
    """
    kinds = {}
    for name, reason in left_out.items():
        kind = text_kind(name, form)
        if reason == NOT_PARQUET and kind is not None:
            kinds[name] = kind
    if len(set(kinds.values())) > 1:
        raise UserError(
            f"{path} has files of CSV and of JSON lines, and none of Parquet: name those of one "
            f"table, as {path}/**/*.csv, or set the format's kind to csv or json"
        )
    for name in kinds:
        del left_out[name]
    return list(kinds)


def _split_pattern(inner: str) -> tuple[str, re.Pattern[str] | None]:
    """The folder before the first wildcard, and the pattern of the whole path; None without one.

    *, ? and [ab] stay within a folder's or a file's name, ** does not.

    /logs/day=*/part-?.csv      /logs, and /logs/day=[^/]*/part-[^/].csv
    """
    parts = inner.split("/")
    wild = [place for place, part in enumerate(parts) if any(sign in part for sign in "*?[")]
    if not wild:
        return inner, None

    words = []
    for piece in re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", inner):
        known = {"**": ".*", "**/": "(.*/)?", "*": "[^/]*", "?": "[^/]"}
        if piece.startswith("["):
            words.append(piece)
        else:
            words.append(known.get(piece) or re.escape(piece))
    return "/".join(parts[: wild[0]]) or "/", re.compile("".join(words))


def _is_hidden(part: str) -> bool:
    """True for a part of a path that Spark and Hive pass over; `_day=1` is a partition."""
    return part.startswith(".") or (part.startswith("_") and "=" not in part)


def _why_no_parquet(file: str) -> str | None:
    """The reason to leave out a file whose ending says nothing; None: it is Parquet.

    Raises:
        UserError: it cannot be read, or it is Parquet that was compressed as a whole.
    """
    filesystem, inner, _ = locate(file)
    try:
        with filesystem.open_input_file(inner) as opened:
            size = opened.size()
            head = opened.read_at(min(size, 8), 0)
            tail = opened.read_at(min(size, 4), max(size - 4, 0))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from None

    if head.startswith(MAGICS):
        return None if size > 8 and tail.startswith(MAGICS) else CUT_OFF

    endings = PurePosixPath(inner.lower()).suffixes
    if head.startswith(PACKED) and any(ending in ENDINGS for ending in endings):
        raise UserError(
            f"{file} is a Parquet file that was compressed as a whole: unpack it (gunzip, for "
            "instance; Parquet compresses its columns itself), or take it out of the folder"
        )
    return NOT_PARQUET


def _refuse_inside_table(
    filesystem: fs.FileSystem, inner: str, is_file: bool, path: str | Path
) -> None:
    """A partition, a file or the data folder of a table is no more than its folder is.

    path                    looked at above it
    table/day=1/x.parquet   table/day=1, table
    table/data              table
    """
    above = []
    place = PurePosixPath(inner)
    while len(place.parts) > 1 and (is_file or "=" in place.name or place.name == "data"):
        place, is_file = place.parent, False
        above.append(place)

    for folder in above:
        logs = [str(folder / DELTA_LOG), str(folder / HUDI_LOG)]
        inside = fs.FileSelector(str(folder / ICEBERG_LOG), allow_not_found=True)
        try:
            found = [*filesystem.get_file_info(logs), *filesystem.get_file_info(inside)]
        except OSError:
            return  # who may read one file need not be allowed to look around it
        for info in found:
            if info.type != fs.FileType.NotFound:
                _refuse_table(path, PurePosixPath(info.path).parts[-2:])


def _refuse_table(path: str | Path, parts: Sequence[str]) -> None:
    """Go on only if the parts of a path are not those of a table's own log.

    Raises:
        UserError: they are, with how to get at the rows.
    """
    if DELTA_LOG in parts:
        kind = "Delta"
    elif HUDI_LOG in parts:
        kind = "Hudi"
    elif ICEBERG_LOG in parts[:-1] and ".metadata.json" in parts[-1]:
        kind = "Iceberg"
    else:
        return

    raise UserError(
        f"{path} is of a table of {kind}, whose own log says which files hold its rows; others lie "
        "there still, with rows that were deleted or replaced. Export the table to plain Parquet "
        f"and read that, for instance with Spark: spark.read.format('{kind.lower()}')"
        ".load(TABLE).write.parquet(FOLDER)"
    )


def open_parquet(
    file: str | Path,
    as_dictionaries: Sequence[str] = (),
    metadata: pq.FileMetaData | None = None,
) -> pq.ParquetFile:
    """The file, to be read by row groups; close it, or use it in a `with`.

    Args:
        as_dictionaries: columns of text that are read as Arrow dictionaries.
        metadata: the file's, where they have been read.

    Raises:
        UserError: not there, not permitted, or not Parquet.
    """
    filesystem, inner, options = locate(file)
    try:
        # of S3, the columns of a row group in few large requests instead of one each
        return pq.ParquetFile(
            inner,
            filesystem=filesystem,
            pre_buffer=options is not None,
            read_dictionary=list(as_dictionaries),
            metadata=metadata,
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from None


def file_digest(file: str | Path) -> str:
    """SHA-256 of the contents, wherever they lie, in hex."""
    filesystem, inner, _ = locate(file)
    with filesystem.open_input_stream(inner, compression=None, buffer_size=READ_BYTES) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_stamp(file: str | Path) -> str:
    """The file's size and time of modification (in S3 in whole seconds), which change when it is
    written again.
    """
    info = _info(file)
    return f"{info.size} {info.mtime_ns}"


def total_bytes(files: list[str]) -> int:
    """Bytes of all files together, asked many at a time."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return sum(pool.map(_size, files))


def path_inside(folder: str | Path, name: str) -> str:
    """`name` in `folder`, which may be a bucket with options behind it."""
    _, inner, options = locate(folder)
    return _name(f"{inner.rstrip('/')}/{name}", options)


def base_name(file: str | Path) -> str:
    """The name in its folder, without the options behind it."""
    return Path(locate(file)[1]).name


def _info(file: str | Path) -> fs.FileInfo:
    filesystem, inner, _ = locate(file)
    return filesystem.get_file_info(inner)


def _size(file: str) -> int:
    return _info(file).size


def locate(path: str | Path) -> tuple[fs.FileSystem, str, str | None]:
    """The file system, the path as it calls it, and the options of the name (None: a disk)."""
    if str(path).startswith(GCS):
        return _gcs(), str(path).removeprefix(GCS).rstrip("/"), GCS
    if not str(path).startswith(S3):
        # workers may have another working directory, and another home
        return fs.LocalFileSystem(), str(Path(path).expanduser().absolute()), None

    inner, options = split_s3("path", str(path))
    return _s3(options), inner, str(path).partition("?")[2]


def _name(inner: str, options: str | None) -> str:
    if options is None:
        return inner
    if options == GCS:
        return f"{GCS}{inner}"
    if "?" in inner:
        raise UserError(f"{S3}{inner}: an object with '?' in its key cannot be named here")
    if options:
        return f"{S3}{inner}?{options}"
    return f"{S3}{inner}"


@lru_cache
def _gcs() -> fs.GcsFileSystem:
    """Google's own service, or the store that Google's client libraries ask where this is set."""
    patience = timedelta(seconds=20)
    other = os.environ.get("STORAGE_EMULATOR_HOST")  # http://host:port
    if not other:
        return fs.GcsFileSystem(retry_time_limit=patience)

    scheme, _, host = other.rpartition("://")
    return fs.GcsFileSystem(
        anonymous=True,
        scheme=scheme or "http",
        endpoint_override=host.rstrip("/"),
        retry_time_limit=patience,
    )


@lru_cache
def _s3(options: tuple[tuple[str, str], ...]) -> fs.S3FileSystem:
    """One client for all files of a place: it holds the connections.

    Made here for its patience: as pyarrow itself reads such URIs, refused requests are repeated
    every 0.2 s, for 6 s."""
    given = dict(options)
    return fs.S3FileSystem(
        # None: AWS itself
        endpoint_override=given.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL"),
        region=given.get("region"),  # None: AWS_REGION, AWS_DEFAULT_REGION or the profile's
        # pauses that grow, 10 to 20 s in all
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=6),
        connect_timeout=10,
        request_timeout=60,
    )
