"""Figures of a benchmark on disk, and sections of RESULTS.md between two marks."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.figures import Figures

RESULTS = Path(__file__).parent / "RESULTS.md"
RUNS = Path(__file__).parent / "runs"


def write_run(path: Path, run: Figures) -> None:
    """Write a run that has a file to itself: one line, in place of what was there."""
    path.write_text(json.dumps(run) + "\n")


def read_run(path: Path) -> Figures:
    """The run of a file of one."""
    return json.loads(path.read_text())


def merge_runs(*paths: Path) -> Figures:
    """Sections of a benchmark that was run in parts: those of later files replace earlier ones."""
    merged: Figures = {}
    for path in paths:
        merged |= read_run(path)
    return merged


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Replace the section `name`, or add it at the end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = path.read_text()
    if begin not in whole:
        whole += f"\n{begin}\n{end}\n"
    before, rest = whole.split(begin)
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}")


def read_section(name: str, path: Path = RESULTS) -> str:
    """What stands between the marks of the section `name`."""
    rest = path.read_text().split(f"<!-- {name}: begin -->\n")[1]
    return rest.split(f"\n<!-- {name}: end -->")[0]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parity_told(parity: Figures) -> str:
    """
    72 cases (0 wrong), or with what found no time: 55 cases (0 wrong, 17 not run)
    """
    not_run = parity.get("not_run", 0)
    more = f", {not_run} not run" if not_run else ""
    return f"{parity['cases']} parity cases ({len(parity['wrong'])} wrong{more})"


def widest_interval(numbers: Figures) -> float:
    """The largest distance of a `…range_ms` from its `…ms`, as a share of that.

    median 2.0, from 1.9 to 2.2   →   .1
    """
    widest = 0.0
    for name, value in numbers.items():
        if isinstance(value, dict):
            widest = max(widest, widest_interval(value))
        elif name.endswith("range_ms"):
            median = numbers[f"{name.removesuffix('range_ms')}ms"]
            widest = max(widest, *(abs(end / median - 1) for end in value))
    return widest
