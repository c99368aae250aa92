"""The validation report of a build: the rows that came in, those left out and why, and the shape of
those kept.

JSON for machines, and one HTML page that needs no other file.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import write_atomically
from pipeline.logs.cleaning import LogRules
from pipeline.logs.imported import ImportReport
from pipeline.sequences.quality.charts import day_chart, length_chart
from pipeline.sequences.quality.checks import Check
from pipeline.sequences.quality.statistics import Statistics, length_quantiles, log_hints

STYLE = """body { font: 15px/1.45 system-ui, sans-serif; max-width: 62em; margin: 2em auto; \
padding: 0 1em; color: #222 }
td { padding: .15em 1.2em .15em 0; border-bottom: 1px solid #ddd } td + td { text-align: right }
pre { overflow-x: auto; background: #f5f5f5; padding: .6em } \
.hint { background: #fff3cd; padding: .6em }
svg { max-width: 100%; height: auto }"""


FILES_SHOWN = 200  # on the page; validation.json has all


@dataclass(frozen=True)
class InputFiles:
    """The files that a version was built from."""

    rows: dict[str, int] = field(default_factory=dict)  # of each file that is there
    left_out: dict[str, str] = field(default_factory=dict)  # file beside them -> why
    gone: int = 0  # files that were read for an earlier version and are there no more
    gone_rows: int = 0
    # by `source_file`, as text: where the file lay when it was read
    paths: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PeriodReport:
    """What the periods of the split hold, and the items of all rows."""

    periods: dict[str, dict[str, int]] = field(default_factory=dict)  # as PeriodCounts.by_name
    items: int = 0
    items_known: int | None = None  # of those in the item table; None: there is none


def read_inputs(run_dir: Path) -> InputFiles:
    """Files that the run's last report names; none where there is no report, or an older one."""
    try:
        content = json.loads((run_dir / "report" / "validation.json").read_text())
        return InputFiles(**content["input_files"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return InputFiles()


def write_report(
    run_dir: Path,
    name: str,
    totals: Statistics,
    rules: LogRules,
    imported: ImportReport | None,
    checks: Sequence[Check],
    inputs: InputFiles,
    periods: PeriodReport,
) -> Path:
    """validation.json and validation.html in the report folder of the run called `name`; returns
    the page.
    """
    folder = run_dir / "report"
    content = {
        "run": name,
        "users": sum(totals.lengths.values()),
        "import_quarantined": imported.quarantined if imported else {},
        "import_counts": imported.counts if imported else {},
        "checks": list(map(asdict, checks)),
        "hints": log_hints(totals, rules),
        "input_files": asdict(inputs),
        "split": asdict(periods),
        "length_quantiles": length_quantiles(totals.lengths),
        **asdict(totals),
        "quarantined_files": _name_files(totals.quarantined_files, inputs.paths),
    }
    write_atomically(folder / "validation.json", json.dumps(content, indent=1) + "\n")

    page = folder / "validation.html"
    write_atomically(page, _page(content, rules))
    return page


def _name_files(counts: dict[str, int], paths: dict[str, str]) -> dict[str, dict[str, int]]:
    """Rows by file and reason, from counts by "source_file reason".

    The file with the most comes first.
    """
    by_file: dict[str, dict[str, int]] = {}
    for key, rows in counts.items():
        file, _, reason = key.partition(" ")
        by_file.setdefault(paths.get(file, file), {})[reason] = rows
    return dict(sorted(by_file.items(), key=lambda entry: -sum(entry[1].values())))


def _page(content: dict[str, Any], rules: LogRules) -> str:
    run = html.escape(content["run"])
    left_out = content["quarantined"] | content["import_quarantined"]
    samples = _samples(content["samples"], content["input_files"]["paths"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Validation of {run}</title><style>
{STYLE}
</style></head><body>
<h1>Validation of {run}</h1>
{_hints(content["hints"])}
{_table(_overview(content))}
<h2>Files</h2>{_files(content["input_files"])}
<h2>Checks</h2>{_table(_verdicts(content["checks"]))}
<h2>Quarantined rows by reason</h2>{_table(left_out or {"none": 0})}
{_bad_files(content["quarantined_files"])}
<h2>Periods of the split</h2>{_period_table(content["split"]["periods"])}
<h2>Rows per user</h2>{_length_chart(content["lengths"])}
<h2>Rows and action rates per day</h2>{_day_chart(content, rules.actions)}
<h2>Nulls per column</h2>{_table(_nulls(content))}
<h2>Samples of quarantined rows</h2>{samples or "<p>none</p>"}
</body></html>
"""


def _overview(content: dict[str, Any]) -> dict[str, Any]:
    rows = {
        "rows read": content["rows_in"],
        "rows kept": content["rows_kept"],
        "rows merged into others of their user, item and time": content["rows_merged"],
        "rows quarantined": sum(content["quarantined"].values()),
        "older rows beyond the cap": content["rows_capped"],
        "users beyond the cap": content["users_capped"],
        "rows with an order but no time": content["order_only_rows"],
        "requests": content["requests"],
        "users": content["users"],
        **_item_lines(content["split"]),
        "first event": _moment(content["first_event_ms"]),
        "last event": _moment(content["last_event_ms"]),
    }
    for name, value in content["length_quantiles"].items():
        rows[f"rows per user, {name}"] = value
    for user, count in content["heaviest"].items():
        rows[f"rows of user {user}"] = count
    for name, value in content["import_counts"].items():
        rows[f"import: {name}"] = value
    return rows


def _item_lines(split: dict[str, Any]) -> dict[str, Any]:
    lines: dict[str, Any] = {"items": split["items"]}
    if split["items_known"] is not None:
        lines["items that the item table knows"] = split["items_known"]
    return lines


def _period_table(periods: dict[str, dict[str, int]]) -> str:
    """Rows of each period, and for each action its positives among the known labels."""
    lines = {}
    for period, counts in periods.items():
        for name, count in counts.items():
            if name == "rows":
                lines[f"{period}: rows"] = count
            elif f"{name} known" in counts:
                lines[f"{period}: {name}"] = f"{count:,} of {counts[f'{name} known']:,}"
    return _table(lines)


def _files(inputs: dict[str, Any]) -> str:
    """The rows of each file, and why others are left out."""
    lines: dict[str, Any] = {
        "files read": len(inputs["rows"]),
        "files left out": len(inputs["left_out"]),
    }
    if inputs["gone"]:
        lines["files read before, gone by now"] = inputs["gone"]
        lines["rows of those"] = inputs["gone_rows"]

    shown = _first_lines(inputs["rows"]) | _first_lines(inputs["left_out"], "left out: ")
    return f"{_table(lines)}<details><summary>each file</summary>{_table(shown)}</details>"


def _bad_files(by_file: dict[str, dict[str, int]]) -> str:
    """The quarantined rows of each file."""
    lines = {}
    for file, reasons in by_file.items():
        lines[file] = ", ".join(f"{reason} {rows}" for reason, rows in reasons.items())
    if not lines:
        return ""
    return f"<details><summary>by file</summary>{_table(_first_lines(lines))}</details>"


def _first_lines(lines: dict[str, Any], before: str = "") -> dict[str, Any]:
    shown = {}
    for name, value in list(lines.items())[:FILES_SHOWN]:
        shown[f"{before}{name}"] = value
    if len(lines) > FILES_SHOWN:
        shown[f"{before}more in validation.json"] = len(lines) - FILES_SHOWN
    return shown


def _verdicts(checks: Sequence[dict[str, Any]]) -> dict[str, str]:
    verdicts = {}
    for check in checks:
        verdict = "" if check["passed"] else f"FAILS, limit {check['limit']}: "
        verdicts[check["key"]] = verdict + check["found"]
    return verdicts


def _nulls(content: dict[str, Any]) -> dict[str, Any]:
    num_good = content["rows_in"] - sum(content["quarantined"].values())
    nulls = {}
    for name, count in content["nulls"].items():
        nulls[name] = "all" if count == num_good else count
    return nulls


def _hints(hints: Sequence[str]) -> str:
    return "".join(f"<p class=hint>{html.escape(hint)}</p>" for hint in hints)


def _samples(samples: dict[str, list[dict[str, Any]]], paths: dict[str, str]) -> str:
    text = ""
    for reason, rows in samples.items():
        lines = "\n".join(_sample_line(row, paths) for row in rows)
        text += f"<h3>{html.escape(reason)}</h3><pre>{html.escape(lines)}</pre>"
    return text


def _sample_line(row: dict[str, Any], paths: dict[str, str]) -> str:
    file = paths.get(str(row["file"]))
    return json.dumps(row["row"]) + (f"   {Path(file).name}" if file else "")


def _table(rows: dict[str, Any]) -> str:
    cells = ""
    for name, value in rows.items():
        text = f"{value:,}" if isinstance(value, int) else str(value)
        cells += f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>"
    return f"<table>{cells}</table>"


def _length_chart(lengths: dict[str, int]) -> str:
    return length_chart(lengths) if lengths else "<p>no users</p>"


def _day_chart(content: dict[str, Any], actions: Sequence[str]) -> str:
    days = list(content["day_rows"])
    if not days:
        return "<p>no rows with a real time</p>"

    rates = {}
    for action in actions:
        known = np.array([content["day_known"].get(f"{day} {action}", 0) for day in days])
        positive = np.array([content["day_positive"].get(f"{day} {action}", 0) for day in days])
        some = (known > 0) & (positive > 0)
        rates[action] = np.divide(positive, known, out=np.full(len(days), np.nan), where=some)
    return day_chart(days, list(content["day_rows"].values()), rates)


def _moment(event_time: int | None) -> str:
    if event_time is None:
        return "none"
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=event_time)
    return moment.isoformat(timespec="seconds")
