"""The README's commands for a user's own logs run as they stand, on small Parquet files with a
user's own names.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
NUM_USERS, NUM_ITEMS, ROWS_PER_USER = 60, 80, 40


def commands(heading: str) -> str:
    """The ```bash block under a heading of the README."""
    section = re.search(
        rf"^## {heading}\n(.*?)(?=^## |\Z)",
        (ROOT / "README.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert section, f"README.md has no heading {heading!r}"
    (block,) = re.findall(r"^```bash\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    return block


def write_own_logs(folder: Path) -> None:
    """Two weeks from 1 January 2026; a user likes what is of the genre that their country prefers."""
    rng = np.random.default_rng(0)
    uid = np.repeat(np.arange(NUM_USERS), ROWS_PER_USER)
    video = rng.integers(0, NUM_ITEMS, len(uid))
    clicked = rng.random(len(uid)) < np.where(video % 4 == uid % 4, 0.7, 0.2)
    start = pd.Timestamp("2026-01-01T00:00:00Z").value // 1_000_000
    log = {
        "uid": uid,
        "video": video,
        "shown_at": start + rng.integers(0, 14 * 86_400_000, len(uid)),
        "clicked": clicked.astype("int8"),
        "liked": (clicked & (rng.random(len(uid)) < 0.3)).astype("int8"),
        "surface": rng.integers(0, 3, len(uid)).astype("int32"),
        "played_ms": rng.integers(0, 60_000, len(uid)),
    }
    users = {
        "uid": np.arange(NUM_USERS),
        "country": [f"country_{user % 4}" for user in range(NUM_USERS)],
    }
    items = {
        "video": np.arange(NUM_ITEMS),
        "genre": np.arange(NUM_ITEMS) % 4,
        "length_s": rng.integers(5, 300, NUM_ITEMS),
    }
    (folder / "log").mkdir(parents=True)
    for path, columns in (
        ("log/part-0.parquet", log),
        ("users.parquet", users),
        ("items.parquet", items),
    ):
        pd.DataFrame(columns).to_parquet(folder / path)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_your_own_logs(tmp_path):
    for folder in ("pipeline", "kernels", "jobs", "serve_app", "configs"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tmp_path / ".venv").symlink_to(sys.prefix)
    write_own_logs(tmp_path / "data" / "own_logs")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MLFLOW_"))
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands("Your own logs")],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "own_logs"
    for path in ("sequences/manifest.json", "report/validation.html", "model/model.safetensors"):
        assert (run / path).is_file(), path
