"""Files and folders are there whole or not at all: after an error, a kill, and on a full disk."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import files
from tests.support.patience import PATIENCE_S

KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline import files
from tests.support.patience import PATIENCE_S

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

path = Path(sys.argv[1])
if sys.argv[2] == "file":
    os.fsync = die  # everything is written, nothing has its name yet
    files.write_atomically(path, "new")
else:
    with files.staged_folder(path) as stage:
        (stage / "weights").write_text("new")
        die()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_and_die(path: Path, what: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), what], timeout=PATIENCE_S)
    assert done.returncode == -signal.SIGKILL


def test_a_file_is_written_and_replaced(tmp_path: Path):
    path = tmp_path / "made" / "metrics.json"
    files.write_atomically(path, "old")
    files.write_atomically(path, "nëw")
    assert path.read_text() == "nëw"
    files.write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["metrics.json"]


def test_a_writer_killed_in_the_middle_leaves_the_old_content(tmp_path: Path):
    path, folder = tmp_path / "metrics.json", tmp_path / "model"
    path.write_text("old")
    folder.mkdir()
    (folder / "weights").write_text("old")
    write_and_die(path, "file")
    write_and_die(folder, "folder")
    assert path.read_text() == "old"
    assert (folder / "weights").read_text() == "old"
    visible = [name for name in names(tmp_path) if not name.startswith(".")]
    assert visible == ["metrics.json", "model"]


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        files.write_atomically(path, "new")
    with (
        pytest.raises(OSError, match="no space left"),
        files.staged_folder(tmp_path / "m") as stage,
    ):
        (stage / "weights").write_text("new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["metrics.json"]


def half_a_file(path: Path) -> None:
    with files.staged_file(path) as stage:
        stage.write_text("half")
        raise ZeroDivisionError


def half_a_folder(path: Path) -> None:
    with files.staged_folder(path) as stage:
        (stage / "weights").write_text("half")
        raise ZeroDivisionError


@pytest.mark.parametrize("write_half", [half_a_file, half_a_folder])
def test_a_block_that_raises_leaves_nothing(tmp_path: Path, write_half: Callable[[Path], None]):
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "one")
    assert names(tmp_path) == []


def test_bytes_are_on_the_disk_before_they_have_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[str] = []

    def listen(name: str) -> None:
        call = getattr(os, name)

        def told(*args: Any) -> None:
            done.append(name)
            call(*args)

        monkeypatch.setattr(files.os, name, told)

    for name in ("fsync", "rename", "replace"):
        listen(name)
    files.write_atomically(tmp_path / "file", "x")
    assert done == ["fsync", "replace"]
    done.clear()
    with files.staged_folder(tmp_path / "folder") as stage:
        (stage / "in").mkdir()
        (stage / "in" / "deep").write_text("x")
        (stage / "flat").write_text("x")
    assert done == ["fsync", "fsync", "rename"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path):
    folder = tmp_path / "model"
    for content in ("old", "new"):
        with files.staged_folder(folder) as stage:
            (stage / content).write_text(content)
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["model"]


def test_writers_at_once_leave_one_whole_file(tmp_path: Path):
    path = tmp_path / "note"
    texts = [str(number) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=files.write_atomically, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert names(tmp_path) == ["note"]


def test_a_name_known_only_afterwards(tmp_path: Path):
    with files.hidden_beside(tmp_path / "bucket") as stage:
        stage.write_bytes(b"rows")
        digest = files.sha256_of(stage)
        files.publish_file(stage, tmp_path / f"bucket-{digest[:8]}")
    assert digest == hashlib.sha256(b"rows").hexdigest()
    assert files.folder_digests(tmp_path) == {f"bucket-{digest[:8]}": digest}


def test_a_folder_that_cannot_be_published_once_is_an_error(tmp_path: Path) -> None:
    """Only a name that is taken is none."""
    stage, folder = tmp_path / "stage", tmp_path / "folder"
    stage.mkdir()
    (stage / "weights").write_text("new")
    with pytest.raises(FileNotFoundError):
        files.publish_folder_once(stage, tmp_path / "nowhere" / "folder")

    files.publish_folder_once(stage, folder)
    assert names(tmp_path) == ["folder"]
    stage.mkdir()
    (stage / "weights").write_text("newer")
    files.publish_folder_once(stage, folder)
    assert (folder / "weights").read_text() == "new"
    assert names(tmp_path) == ["folder", "stage"]
