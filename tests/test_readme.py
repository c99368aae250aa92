"""The README keeps its promises: it is short, its figures were measured, its commands run.

The commands for a user's own logs run as they stand on docs/start/own-logs.md, on small Parquet
files with a user's own names.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.report import RUNS, read_run
from benchmarks.training import feeding
from pipeline.figures import Figures, read_runs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OWN_LOGS = (ROOT / "docs/start/own-logs.md").read_text()
COMPARE = (ROOT / "docs/start/compare.md").read_text()
NUM_USERS, NUM_ITEMS, ROWS_PER_USER = 600, 80, 40

NUMBER = re.compile(r"(?<![\w.,])\.?\d+(?:,\d{3})*(?:\.\d+)?")
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


@cache
def measured(name: str) -> Figures | list[Figures]:
    """The committed figures benchmarks/runs/`name`: one run of a .json, all of a .jsonl."""
    path = RUNS / name
    return read_runs(path) if path.suffix == ".jsonl" else read_run(path)


def section(document: str, heading: str) -> str:
    """What stands under a heading of a document, up to the next one."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", document, flags=re.MULTILINE | re.DOTALL)
    assert found, f"there is no heading {heading!r}"
    return found[1]


def commands(document: str, heading: str) -> str:
    """The ```bash block under a heading."""
    (block,) = re.findall(
        r"^```bash\n(.*?)^```", section(document, heading), re.MULTILINE | re.DOTALL
    )
    return block


# The form


def test_a_visitor_reads_it_in_minutes():
    assert len(README.splitlines()) <= 130

    prose = BLOCK.sub("", README)
    prose = re.sub(r"^[|#!].*$", "", prose, flags=re.MULTILINE)
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    paragraphs = re.split(r"\n\s*\n|^- ", prose, flags=re.MULTILINE)
    sentences = []
    for paragraph in paragraphs:
        sentences += re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))
    lengths = [len(sentence.split()) for sentence in sentences if sentence]
    assert np.mean(lengths) <= 16


# The figures


def mean_auc(encoder: str) -> float:
    """Mean over seeds of the test AUC of clicks."""
    runs = [run for run in measured("quality.jsonl") if run["name"] == encoder]
    assert len(runs) == 3
    return float(np.mean([run["metrics"]["test/auc/is_click"] for run in runs]))


def expected_numbers() -> dict[str, list[str]]:
    """The numbers that each row of the table of results may cite, in their order."""
    anchor = measured("kuairand_anchor.json")["measured"]["lightgbm_history"]["is_click"]["auc"]
    quality = [f"{auc:.4f}".lstrip("0") for auc in (mean_auc("ultra_hstu"), anchor)]

    attention = measured("attention_h200.json")
    ours = attention["ours"]["semi-local 16384"]["forward_ms"]
    theirs = attention["softmax"]["cuDNN causal 16384"]["forward_ms"]

    whole = measured("model_h200.json")
    causal_ms = whole["models"]["HSTU, merged"]["16384"]["train_ms"]
    times = causal_ms / whole["models"]["ULTRA-HSTU, FP8"]["16384"]["train_ms"]

    build = measured("build.json")["speed"]["build"]
    reference = measured("serving.json")["reference"]
    load = reference["load"]
    waiting = [case["waiting"] for case in measured("feeding.json")["feeding"].values()]

    return {
        "Quality": [*quality, "3"],
        "Attention": [f"{theirs / ours:.1f}", "16,384"],
        "Model": [f"{times:.1f}", f"{whole['sizes']['layers']}", "16,384"],
        "Build": [f"{build['rows'] / 1e6:.0f}", f"{np.median(build['seconds']):.0f}"],
        "Serving": [
            f"{reference['latency_ms']['p99']:.0f}",
            f"{load['rate']:.0f}",
            f"{load['candidates']}",
        ],
        "Data path": [
            f"{100 * min(waiting):.1f}",
            f"{100 * max(waiting):.1f}",
            f"{feeding.STEP_TOKENS:,}",
            f"{1000 * feeding.STEP_SECONDS:.0f}",
        ],
    }


def rows_of_results() -> dict[str, str]:
    """The cell "measured" by the name of the row."""
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+?) \| `", section(README, "Results"), re.MULTILINE)
    return dict(rows)


def test_the_table_of_results_cites_what_was_measured():
    rows, expected = rows_of_results(), expected_numbers()
    assert rows.keys() == expected.keys()
    for name, cell in rows.items():
        assert NUMBER.findall(cell) == expected[name], name


@pytest.mark.parametrize("document", ["README.md", "docs/start/demo.md"])
def test_what_the_demo_prints_was_printed(document: str):
    """Each line of output as it was, or cut short by `...`; the answer's numbers may be rounded."""
    printed = (RUNS / "demo_output.txt").read_text()
    answer = json.loads(printed.splitlines()[-1])
    scores = {f"{x:.3f}" for of_task in answer["scores"].values() for x in of_task}

    blocks = BLOCK.findall((ROOT / document).read_text())
    shown = [block for block in blocks if block.startswith(("==", "$ curl"))]
    assert shown
    for line in "".join(shown).splitlines():
        if line.startswith(('{"request_id"', ' "order"')):
            rounded = set(re.findall(r"0\.\d+", line))
            assert rounded <= scores, line
            assert set(re.findall(r'"(\w+)":', line)) <= {*answer, *answer["scores"]}, line
        elif not line.startswith("step "):  # a worker's line: its speed is that of the moment
            assert line.strip().removesuffix("...") in printed, line


def test_the_demo_printed_what_its_figures_say():
    printed = (RUNS / "demo_output.txt").read_text()
    demo = measured("demo.json")
    for name in ("val_auc", "val_ne", "test_auc", "test_ne"):
        assert [f"{x:.4f}" for x in demo[name].values()] == re.findall(
            r"\d\.\d{4}", re.findall(rf"^{name} .*$", printed, re.MULTILINE)[0]
        )


def test_the_comparison_cites_what_was_measured():
    runs = [measured("demo.json"), *measured("demo_changes.json")["runs"].values()]
    rows = [line for line in COMPARE.splitlines() if re.match(r"\| .* \| \.\d", line)]
    assert len(rows) == len(runs)
    for row, run in zip(rows, runs, strict=True):
        found = re.findall(r"\| (\.\d{4}) ", row)
        assert found == [f"{x:.4f}".lstrip("0") for x in run["test_auc"].values()]
        change = re.search(r"[+-]0\.\d{4}", row)
        assert change is None or change[0] in run["promotion"]


# Decimals of the documents that are no measurement of ours.
NOT_MEASURED = {
    "versions of Python and Kubernetes": "3.11 3.12 1.37",
    "the authors' layer, as they publish it": "3.43 22.4",
    "goals of AUC": "0.760 0.764 0.894 0.739",
}
DECIMAL = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.]*\w)")


def decimals(text: str) -> set[str]:
    """Numbers with a decimal point, without their leading zero: `0.7534` and `.7534` are one."""
    return {number.lstrip("0") for number in DECIMAL.findall(text)}


@pytest.mark.parametrize("pattern", ["limits.md", "how-it-works/*.md", "start/demo.md"])
def test_documents_cite_figures_of_the_results(pattern: str):
    """RESULTS and NOTES, which tests hold to the committed runs, have them all."""
    results = [(ROOT / "benchmarks" / name).read_text() for name in ("RESULTS.md", "NOTES.md")]
    known = decimals("\n".join([*results, (RUNS / "demo_output.txt").read_text()]))
    known |= decimals(" ".join(NOT_MEASURED.values()))

    for path in (ROOT / "docs").glob(pattern):
        prose = BLOCK.sub("", path.read_text())
        prose = re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv:[\d.]+", "", prose)
        assert decimals(prose) <= known, path.name


# The commands


def test_the_readme_has_the_commands_of_the_page():
    """The page has them all; the README leaves out one or two."""
    page = _bare(commands(OWN_LOGS, "The commands"))
    readme = _bare(commands(README, "Your own logs"))
    assert len(readme) <= 6
    assert set(readme) <= set(page)


def _bare(block: str) -> list[str]:
    """Commands without their comments."""
    return [line.partition("  #")[0].strip() for line in block.splitlines()]


def write_own_logs(folder: Path) -> None:
    """Two weeks from 1 January 2026; users like what is of the genre that their country prefers.

    People of two countries click more than the others. An item's rate does not know that, so that
    few steps of training are enough to pass the gate.
    """
    rng = np.random.default_rng(0)
    uid = np.repeat(np.arange(NUM_USERS), ROWS_PER_USER)
    video = rng.integers(0, NUM_ITEMS, len(uid))
    eager = np.where(uid % 2 == 0, 0.6, 0.0)
    clicked = rng.random(len(uid)) < eager + np.where(video % 4 == uid % 4, 0.3, 0.1)
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
def test_your_own_logs(local_ray: None, mlflow_runs: Path, tmp_path: Path):
    """With a Ray cluster and an MLflow server there, which each job would start and end."""
    for folder in ("pipeline", "kernels", "jobs", "serve_app", "configs"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "runs").symlink_to(mlflow_runs)
    write_own_logs(tmp_path / "data" / "own_logs")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands(OWN_LOGS, "The commands")],
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
