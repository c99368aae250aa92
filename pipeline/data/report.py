"""The validation report of a build: what came in, what was left out and why, and what the kept rows look like.

Buckets count (`statistics`), the driver adds up (`merge`) and writes JSON and one HTML page that needs no other file.
"""

import html
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.config import RunConfig
from pipeline.data.cleaning import REASON, SOURCE_ROW, LogRules, unit_hint
from pipeline.data.store import Manifest

if TYPE_CHECKING:
    from pipeline.data.sequences import BuiltBucket

DAY_MS = 24 * 3600 * 1000
SAMPLES = 5  # quarantined rows shown per reason


@dataclass
class Statistics:
    """Counts that add up over buckets. Keys of mappings are text, as JSON has them."""

    rows_in: int = 0
    rows_kept: int = 0
    rows_capped: int = 0
    order_only_rows: int = 0
    requests: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)  # rows by reason
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # a few of those rows
    nulls: dict[str, int] = field(default_factory=dict)  # by LOG column
    lengths: dict[str, int] = field(default_factory=dict)  # users by number of rows
    day_rows: dict[str, int] = field(default_factory=dict)  # rows with a real time, by day
    day_known: dict[str, int] = field(default_factory=dict)  # "day action": rows where the action is known
    day_positive: dict[str, int] = field(default_factory=dict)  # "day action": rows where it happened
    first_event_ms: int | None = None
    last_event_ms: int | None = None


def statistics(built: "BuiltBucket", rules: LogRules, utc_offset_ms: int) -> Statistics:
    """Of one bucket; days begin at midnight of the given offset from UTC."""
    lists = {name: built.sequences[name].combine_chunks() for name in built.sequences.column_names[3:]}
    flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in lists.items()}
    lengths = np.diff(lists["item_id"].offsets.to_numpy())
    times, real = flat["event_time"], ~flat["order_only"]
    days = (times[real] + utc_offset_ms) // DAY_MS
    result = Statistics(
        rows_in=built.rows_in,
        rows_kept=len(times),
        rows_capped=built.rows_capped,
        order_only_rows=int((~real).sum()),
        requests=int(sum(column[-1].as_py() for column in lists["request_index"]) + len(lengths)),
        quarantined=_counts(built.quarantine[REASON].to_numpy()),
        samples=_samples(built.quarantine),
        nulls=built.nulls,
        lengths=_counts(lengths),
        day_rows=_counts(_dates(days)),
        first_event_ms=int(times.min()) if len(times) else None,
        last_event_ms=int(times.max()) if len(times) else None,
    )
    for bit, action in enumerate(rules.actions):
        known, positive = (flat[name][real] >> bit & 1 == 1 for name in ("known_mask", "action_mask"))
        result.day_known |= {f"{day} {action}": rows for day, rows in _counts(_dates(days[known])).items()}
        result.day_positive |= {f"{day} {action}": rows for day, rows in _counts(_dates(days[positive])).items()}
    return result


def merge(parts: Sequence[Statistics]) -> Statistics:
    """All buckets together."""
    total = Statistics()
    for name, start in asdict(total).items():
        values = [getattr(part, name) for part in parts]
        if name in ("first_event_ms", "last_event_ms"):
            times = [value for value in values if value is not None]
            setattr(total, name, (min if name == "first_event_ms" else max)(times, default=None))
        elif name == "samples":
            reasons = sorted({reason for value in values for reason in value})
            total.samples = {
                reason: [row for value in values for row in value.get(reason, [])][:SAMPLES] for reason in reasons
            }
        elif isinstance(start, dict):
            added = sum((Counter(value) for value in values), Counter())
            keys = sorted({key for value in values for key in value}, key=_numbers_by_size)
            setattr(total, name, {key: added[key] for key in keys})
        else:
            setattr(total, name, sum(values))
    return total


def hints(totals: Statistics, rules: LogRules) -> list[str]:
    """What might be wrong with the logs as a whole, where the bad rows show it."""
    found = []
    for reason, rows in totals.samples.items():
        times = [row["event_time"] for row in rows if row["event_time"] is not None]
        found.append(unit_hint(reason, times, rules))
    return [hint for hint in found if hint]


def write(cfg: RunConfig, manifest: Manifest, totals: Statistics, rules: LogRules) -> Path:
    """validation.json and validation.html in the run's report folder; returns the page."""
    folder = cfg.run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "run": cfg.name,
        "digest": manifest.digest,
        "users": manifest.num_users,
        "quarantined_all": manifest.quarantined,
        "import_counts": manifest.counts,
        "hints": hints(totals, rules),
        "length_quantiles": length_quantiles(totals.lengths),
        **asdict(totals),
    }
    (folder / "validation.json").write_text(json.dumps(content, indent=1) + "\n")
    page = folder / "validation.html"
    page.write_text(_page(content, rules))
    return page


def length_quantiles(lengths: dict[str, int]) -> dict[str, int]:
    """min, p50, p90, p99, max of rows per user, from the histogram."""
    if not lengths:
        return {}
    size = np.array([int(key) for key in lengths])
    reached = np.cumsum(list(lengths.values()))
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: int(size[np.searchsorted(reached, share * reached[-1])]) for name, share in shares.items()}


def _counts(values: np.ndarray) -> dict[str, int]:
    keys, counts = np.unique(values.astype(str) if values.dtype == object else values, return_counts=True)
    return {str(key): int(count) for key, count in zip(keys, counts, strict=True)}


def _dates(days: np.ndarray) -> np.ndarray:
    return days.astype("datetime64[D]")


def _samples(quarantine: pa.Table) -> dict[str, list[dict[str, Any]]]:
    samples: dict[str, list[dict[str, Any]]] = {}
    for reason in pc.unique(quarantine[REASON]).to_pylist():
        rows = quarantine.filter(pc.equal(quarantine[REASON], reason)).slice(0, SAMPLES).drop_columns([REASON])
        samples[reason] = [_sample(row) for row in rows.to_pylist()]
    return samples


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the quarantine as the report shows it: the source's own row where it is kept."""
    source = json.loads(row[SOURCE_ROW]) if row[SOURCE_ROW] else {k: v for k, v in row.items() if k != SOURCE_ROW}
    return {"event_time": row["event_time"], "row": source}


def _numbers_by_size(key: str) -> tuple[int, str]:
    return (int(key), "") if key.isdigit() else (0, key)


def _page(content: dict[str, Any], rules: LogRules) -> str:
    left_out = sum(content["quarantined"].values())
    overview = {
        "rows read": content["rows_in"],
        "rows kept": content["rows_kept"],
        "rows quarantined": left_out,
        "older rows beyond the cap": content["rows_capped"],
        "rows with an order but no time": content["order_only_rows"],
        "requests": content["requests"],
        "users": content["users"],
        "first event": _moment(content["first_event_ms"]),
        "last event": _moment(content["last_event_ms"]),
        **{f"rows per user, {name}": value for name, value in content["length_quantiles"].items()},
        **{f"import: {name}": value for name, value in content["import_counts"].items()},
    }
    samples = "".join(
        f"<h3>{html.escape(reason)}</h3><pre>"
        + html.escape("\n".join(json.dumps(row["row"]) for row in rows))
        + "</pre>"
        for reason, rows in content["samples"].items()
    )
    nulls = {
        name: "absent" if count == content["rows_in"] - left_out and count else count
        for name, count in content["nulls"].items()
    }
    warnings = "".join(f"<p class=hint>{html.escape(hint)}</p>" for hint in content["hints"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Validation of {html.escape(content["run"])}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }}
td {{ padding: .15em 1.2em .15em 0; border-bottom: 1px solid #ddd }} td + td {{ text-align: right }}
pre {{ overflow-x: auto; background: #f5f5f5; padding: .6em }} .hint {{ background: #fff3cd; padding: .6em }}
svg {{ max-width: 100%; height: auto }}
</style></head><body>
<h1>Validation of {html.escape(content["run"])}</h1>
{warnings}
{_table(overview)}
<h2>Quarantined rows by reason</h2>{_table(content["quarantined_all"] or {"none": 0})}
<h2>Rows per user</h2>{_length_plot(content["lengths"])}
<h2>Rows and action rates per day</h2>{_day_plot(content, rules.actions)}
<h2>Nulls per column</h2>{_table(nulls)}
<h2>Samples of quarantined rows</h2>{samples or "<p>none</p>"}
</body></html>
"""


def _table(rows: dict[str, Any]) -> str:
    cells = (
        f"<tr><td>{html.escape(name)}</td><td>{f'{value:,}' if isinstance(value, int) else html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def _length_plot(lengths: dict[str, int]) -> str:
    if not lengths:
        return "<p>no users</p>"
    size, users = np.array([int(key) for key in lengths]), np.array(list(lengths.values()))
    edges = np.unique(np.geomspace(1, size.max() + 1, 33).round())
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.hist(size, bins=edges.tolist(), weights=users)
    axes.set(xscale="log", xlabel="rows", ylabel="users")
    return _svg(figure)


def _day_plot(content: dict[str, Any], actions: Sequence[str]) -> str:
    days = list(content["day_rows"])
    if not days:
        return "<p>no rows with a real time</p>"
    figure = Figure(figsize=(8, 5), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    top.bar(days, list(content["day_rows"].values()))
    top.set(ylabel="rows")
    for action in actions:
        known = np.array([content["day_known"].get(f"{day} {action}", 0) for day in days])
        positive = np.array([content["day_positive"].get(f"{day} {action}", 0) for day in days])
        rate = np.divide(positive, known, out=np.full(len(days), np.nan), where=(known > 0) & (positive > 0))
        bottom.plot(days, rate, marker="o", markersize=3, label=action)
    bottom.set(ylabel="share of known rows", yscale="log")
    bottom.set_xticks(days[:: max(1, len(days) // 12)])
    bottom.tick_params(axis="x", rotation=45)
    bottom.legend(fontsize="small", ncols=4)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "report"}):  # the same page from the same counts
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _moment(event_time: int | None) -> str:
    if event_time is None:
        return "none"
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=event_time)).isoformat(timespec="seconds")
