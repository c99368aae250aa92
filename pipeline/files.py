"""Files and folders that a reader finds whole or not at all, and their digests.

Whatever is written lies beside its place, under a hidden name, until it is complete:

    .metrics.json.3f2a…   written → synced to disk → renamed to   metrics.json

The rule of fsync, the same everywhere: *a name that others look for is given only to bytes that are
on the disk.* A power cut then leaves the old content or the new, never an empty file under a good
name. Folders are not synced: a rename that the cut took back leaves the old content, and everybody
here can make the new one again.

Nearly all that is written has users in it or comes of them, so a file is its owner's alone from its
first byte on (mode 0600), and a staged folder too (0700). Who wants to share one changes that.

A process that is killed in between leaves its hidden file. Nobody reads it. Where there can be rows
of users in it, the next writer removes it, and whoever forgets users (`sweep_staged`).
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put `content` (text in UTF-8) at `path` in one step; makes its folder.

    Raises:
        OSError: it could not be written, on a full disk for example; the old content stays.
    """
    raw = content.encode() if isinstance(content, str) else content
    with staged_file(path) as stage:
        stage.write_bytes(raw)


def json_text(values: Any) -> str:
    """JSON of plain values. It has no NaN and no infinity: such a number is null.

    >>> json_text({"ne": float("nan"), "auc": [0.5]}).split()
    ['{', '"ne":', 'null,', '"auc":', '[', '0.5', ']', '}']
    """
    return json.dumps(_without_nan(values), indent=2, allow_nan=False, ensure_ascii=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what is there when the block ends takes its place.

    A block that raises leaves nothing, and the old content.
    """
    with hidden_beside(path) as stage:
        yield stage
        publish_file(stage, path)


@contextmanager
def hidden_beside(path: Path) -> Iterator[Path]:
    """A hidden name of its own beside `path`; what still bears it after the block is removed.

    For a file whose own name is known only when it is written, by its digest say; `publish_file`
    ends the block.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # two writers do not meet
    os.close(open_private(stage, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        yield stage
    finally:
        stage.unlink(missing_ok=True)


def open_private(path: str | Path, flags: int) -> int:
    """`opener` of the built-in `open`: a file that it makes is its owner's alone."""
    return os.open(path, flags, 0o600)


def sweep_staged(folder: Path, pattern: str, min_age_s: float = 0.0) -> int:
    """Remove what killed writers of files `pattern` left in the folder; returns how many there
    were.

    A younger one than `min_age_s` may be of a writer that is at work.
    """
    removed = 0
    for stage in folder.glob(f".{pattern}.*"):
        try:
            if time.time() - stage.stat().st_mtime >= min_age_s:
                stage.unlink()
                removed += 1
        except FileNotFoundError:  # published, or swept by another
            continue
    return removed


def publish_file(stage: Path, path: Path) -> None:
    """Give a complete file of the same folder the name `path`, once its bytes are on the disk."""
    sync_to_disk(stage)
    os.replace(stage, path)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield stage
        publish_folder(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish_folder(stage: Path, folder: Path) -> None:
    """Give a complete folder the name `folder`, once its files are on the disk.

    A folder that is there makes way first. Renaming a folder onto another is not possible, so a
    kill between the two renames leaves none at that name, never half of one.
    """
    _sync_files(stage)
    old = stage.with_name(f".{stage.name.lstrip('.')}-old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(stage, folder)
    shutil.rmtree(old, ignore_errors=True)


def publish_folder_once(stage: Path, folder: Path) -> None:
    """As `publish_folder`, unless the name is taken: then what is there stays, and `stage` too.

    For writers of the same content: of several at once one publishes, and nobody who reads it
    already finds it gone for a moment.
    """
    _sync_files(stage)
    try:
        os.rename(stage, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            sync_to_disk(path)


def sync_to_disk(path: Path) -> None:
    """Return when the bytes of the file at `path` are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below `folder`, by its path within it, in the order of the paths."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def make_private_folder(folder: Path) -> None:
    """A folder that its user alone may enter, what is in it included.

    One that is there already is closed to others too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # of another user, or on a file system without modes
    with contextlib.suppress(PermissionError):
        folder.chmod(0o700)


def make_private_file(path: Path) -> None:
    """An empty file that its user alone may read; one that is there is closed to others too."""
    path.touch(mode=0o600)
    with contextlib.suppress(PermissionError):
        path.chmod(0o600)
