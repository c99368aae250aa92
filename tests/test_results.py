"""RESULTS.md says what was measured: tables are those of benchmarks/runs, prose cites them."""

import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import results
from benchmarks.gpu import NOT_RUN
from benchmarks.gpu_check import of_suite
from benchmarks.report import RESULTS, RUNS, parity_told, read_section, widest_interval
from pipeline.figures import append_run, read_runs

MARKS = re.compile(r"<!-- ([\w ]+): begin -->\n(.*?)\n<!-- \1: end -->", re.DOTALL)
DECIMAL = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.]*\w)")
# What the prose says beside the tables, and where each number is from.
SAID_BY_HAND = {
    "goals of the project for AUC and NE": (
        ".758 .762 .890 .738 .841 .844 .712 .926"  # is_click, long_view, is_like, is_profile_enter
    ),
    "LightGBM without regularisation, and its distance to the published figures": ".798 .003",
    "paired bootstrap against SASRec, predictions not committed": ".0044",
    "is_profile_enter: the ablation's .7354 less .7295": ".0059",
    "long histories: .899 less .849; .868 and .832 less .689 and .645": ".05 .19",
}


def decimals(text: str) -> list[str]:
    """Numbers with a decimal point, without their leading zero: `0.7534` and `.7534` are one."""
    return [number.lstrip("0") for number in DECIMAL.findall(text)]


def prose_of(text: str) -> Iterator[str]:
    """Lines outside the generated sections."""
    yield from MARKS.sub("", text).splitlines()


def rounded_metrics() -> Iterator[str]:
    """Metrics of all runs, their means over tasks and over seeds, to four and five digits."""
    for path in sorted(RUNS.glob("*.jsonl")):
        by_key: dict[tuple[str, str], list[float]] = defaultdict(list)
        for run in read_runs(path):
            for kind in ("auc", "ne"):
                for split in ("val", "test"):
                    prefix = f"{split}/{kind}/"
                    values = [v for key, v in run["metrics"].items() if key.startswith(prefix)]
                    if values:
                        by_key[run["name"], prefix].append(float(np.mean(values)))
            for key, value in run["metrics"].items():
                by_key[run["name"], key].append(value)

        for values in by_key.values():
            yield f"{np.mean(values):.4f}".lstrip("0")
            yield f"{np.mean(values):.5f}".lstrip("0")


@pytest.mark.parametrize("name", list(results.SECTIONS))
def test_a_section_is_what_its_figures_give(name: str):
    assert read_section(name) == results.SECTIONS[name]().strip(), (
        "run python -m benchmarks.results"
    )


def test_every_generated_section_has_a_command():
    marked = {name for name, _ in MARKS.findall(RESULTS.read_text())}
    assert marked == set(results.SECTIONS)


def test_prose_cites_figures_that_were_generated():
    text = RESULTS.read_text()
    generated = set(decimals("\n".join(block for _, block in MARKS.findall(text))))
    said = set(" ".join(SAID_BY_HAND.values()).split()) | set(rounded_metrics())
    unknown = [
        (number, line)
        for line in prose_of(text)
        for number in decimals(line)
        if number not in generated | said
    ]
    assert unknown == []


def test_a_changed_figure_is_found(tmp_path: Path):
    copy = tmp_path / "RESULTS.md"
    shutil.copy(RESULTS, copy)
    copy.write_text(copy.read_text().replace("0.7580 ±", "0.7680 ±"))
    assert read_section("quality", copy) != results.SECTIONS["quality"]().strip()


def test_runs_come_back_whole_and_share_what_is_equal(tmp_path: Path):
    path = tmp_path / "runs.jsonl"
    first = {"name": "a", "seed": 0, "config": {"model": {"window": 4, "towers": {}}, "lr": 0.1}}
    runs = [
        first,
        first | {"seed": 1},
        first | {"name": "b", "config": {"model": {"window": 0, "towers": {}}, "lr": 0.1}},
        first | {"name": "c", "config": {"model": {"window": 0}, "lr": 0.1}},  # a key less
    ]
    for run in runs:
        append_run(path, run)

    assert read_runs(path) == runs
    assert path.read_text().count('"config"') == 2
    assert read_runs(tmp_path / "none.jsonl") == []


def test_what_found_no_time_is_neither_right_nor_wrong():
    def check(number: int) -> None: ...

    checks = [(check, number) for number in range(4)]
    lines = ["check(1): error 3e-1", f"check(2): {NOT_RUN}60 s had passed", "check(9): another"]
    found = of_suite(checks, lines)
    assert found == {"cases": 3, "wrong": lines[:1], "not_run": 1}
    assert parity_told(found) == "3 parity cases (1 wrong, 1 not run)"
    assert parity_told({"cases": 5, "wrong": []}) == "5 parity cases (0 wrong)"


def test_the_widest_interval_is_a_share_of_its_median():
    narrow = {"forward_ms": 2.0, "forward_range_ms": [1.9, 2.05], "kept_mb": 3}
    assert widest_interval({"a": narrow}) == pytest.approx(0.05)
    assert widest_interval({"a": narrow, "b": {"ms": 1.0, "range_ms": [1, 1.2]}}) == pytest.approx(
        0.2
    )
