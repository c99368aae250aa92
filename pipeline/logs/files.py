"""Files of logs on a disk or in an S3 bucket, listed, opened and digested alike.

A file on a disk is named by its absolute path. An object is named
`s3://bucket/key?endpoint_override=...&region=...`, with the options that the configuration gave it,
so that any worker can open it by its name alone; the key is written as it is, without percent signs
for what a URI would not allow. Credentials are those that AWS' own tools find, in the environment,
a profile or the machine's role. They never stand in a name.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.config import UserError
from pipeline.config.reading import S3, split_s3

READ_BYTES = 8 * 2**20  # of one request, for a file that is read from beginning to end
CONNECTIONS = 16  # small requests under way at once: a footer is one round trip


def list_files(path: str | Path) -> list[str]:
    """The Parquet files at `path`, a file or a folder searched in depth, in a fixed order; none
    where there are none.

    Raises:
        UserError: the place cannot be looked at: no permission, no answer.
    """
    filesystem, inner, options = _locate(path)
    try:
        if filesystem.get_file_info(inner).type == fs.FileType.File:
            return [_name(inner, options)]
        found = filesystem.get_file_info(
            fs.FileSelector(inner, recursive=True, allow_not_found=True)
        )
    except OSError as error:
        raise UserError(f"{path} cannot be listed: {error}") from None

    files = []
    for info in found:
        if info.type == fs.FileType.File and info.path.endswith(".parquet"):
            files.append(_name(info.path, options))
    return sorted(files)


def open_parquet(file: str | Path) -> pq.ParquetFile:
    """The file, to be read by row groups; close it, or use it in a `with`.

    Raises:
        UserError: not there, not permitted, or not Parquet.
    """
    filesystem, inner, options = _locate(file)
    try:
        # of S3, the columns of a row group in few large requests instead of one each
        return pq.ParquetFile(inner, filesystem=filesystem, pre_buffer=options is not None)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from None


def file_digest(file: str | Path) -> str:
    """SHA-256 of the contents, wherever they lie, in hex."""
    filesystem, inner, _ = _locate(file)
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


def count_rows(files: list[str]) -> int:
    """Rows of all files by their own metadata, without reading them."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return sum(pool.map(_rows, files))


def path_inside(folder: str | Path, name: str) -> str:
    """`name` in `folder`, which may be a bucket with options behind it."""
    _, inner, options = _locate(folder)
    return _name(f"{inner.rstrip('/')}/{name}", options)


def base_name(file: str | Path) -> str:
    """The name in its folder, without the options behind it."""
    return Path(_locate(file)[1]).name


def _info(file: str | Path) -> fs.FileInfo:
    filesystem, inner, _ = _locate(file)
    return filesystem.get_file_info(inner)


def _size(file: str) -> int:
    return _info(file).size


def _rows(file: str) -> int:
    with open_parquet(file) as parquet:
        return parquet.metadata.num_rows


def _locate(path: str | Path) -> tuple[fs.FileSystem, str, str | None]:
    """The file system, the path as it calls it, and the options of the name (None: a disk)."""
    if not str(path).startswith(S3):
        # workers may have another working directory
        return fs.LocalFileSystem(), str(Path(path).absolute()), None

    inner, options = split_s3("path", str(path))
    return _s3(options), inner, str(path).partition("?")[2]


def _name(inner: str, options: str | None) -> str:
    if options is None:
        return inner
    if "?" in inner:
        raise UserError(f"{S3}{inner}: an object with '?' in its key cannot be named here")
    if options:
        return f"{S3}{inner}?{options}"
    return f"{S3}{inner}"


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
