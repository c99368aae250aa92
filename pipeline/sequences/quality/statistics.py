"""Counts over the rows of a build, for its report: buckets count (`count_bucket`), the driver adds
up (`merge`).
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.logs.cleaning import REASON, SOURCE_FILE, SOURCE_ROW, LogRules, unit_hint
from pipeline.logs.ids import as_text_advice
from pipeline.schema import DAY_MS, NAMED_IDS

if TYPE_CHECKING:
    from pipeline.sequences.users import BuiltBucket

SAMPLES = 5  # quarantined rows shown per reason
HEAVIEST = 5  # users shown with their rows
MANY_HASHES = 0.2  # share of rows with a negative or too large id, from which it looks like a hash
# reasons of rows that are good by themselves
DOUBLES = ("exact_duplicate", "key_duplicate", "contradicts_its_event")


@dataclass
class Statistics:
    """Counts that add up over buckets. Keys of mappings are text, as JSON has them."""

    rows_in: int = 0
    rows_kept: int = 0
    rows_merged: int = 0  # into another row of their event
    rows_capped: int = 0
    users_capped: int = 0  # users who had more rows than are kept
    order_only_rows: int = 0
    requests: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)  # rows by reason
    # the same by "source_file reason"
    quarantined_files: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # a few of those rows
    nulls: dict[str, int] = field(default_factory=dict)  # by LOG column
    lengths: dict[str, int] = field(default_factory=dict)  # users by number of rows
    # rows of the users with the most, before the cap
    heaviest: dict[str, int] = field(default_factory=dict)
    # rows with a real time, by day; by "day action", those where the action is known and where it
    # happened
    day_rows: dict[str, int] = field(default_factory=dict)
    day_known: dict[str, int] = field(default_factory=dict)
    day_positive: dict[str, int] = field(default_factory=dict)
    first_event_ms: int | None = None
    last_event_ms: int | None = None

    @property
    def rows_good(self) -> int:
        """Rows without a reason of their own: kept, merged, capped, or a double of one that is."""
        doubles = sum(self.quarantined.get(reason, 0) for reason in DOUBLES)
        return self.rows_kept + self.rows_merged + self.rows_capped + doubles

    def count_action(self, action: str) -> tuple[int, int]:
        """Rows with a real time where the action is known, and where it happened."""
        return _over_days(self.day_known, action), _over_days(self.day_positive, action)


def _over_days(counts: dict[str, int], action: str) -> int:
    """The rows of one action, from counts by "day action"."""
    return sum(rows for key, rows in counts.items() if key.partition(" ")[2] == action)


def count_bucket(built: "BuiltBucket", rules: LogRules, utc_offset_ms: int) -> Statistics:
    """Counts over one bucket; days begin at midnight of the given offset from UTC."""
    users, flat = built.sequences, {}
    for name in users.column_names[3:]:  # behind the scalar columns
        flat[name] = users[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)

    offsets = users["item_id"].combine_chunks().offsets.to_numpy()
    lengths = np.diff(offsets)
    last_rows = offsets[1:] - 1
    dropped = users["first_position"].to_numpy()

    times, real = flat["event_time"], ~flat["order_only"]
    days, rows, known, positive = _by_day(flat, real, rules, utc_offset_ms)
    dates = days.astype("datetime64[D]").astype(str).tolist()

    return Statistics(
        rows_in=built.rows_in,
        rows_kept=len(times),
        rows_merged=built.rows_merged,
        rows_capped=built.rows_capped,
        users_capped=int((dropped > 0).sum()),
        order_only_rows=int((~real).sum()),
        requests=int((flat["request_index"][last_rows] + 1).sum()),
        quarantined=_counts(built.quarantine[REASON].to_numpy()),
        quarantined_files=_counts_by_file(built.quarantine),
        samples=_samples(built.quarantine),
        nulls=built.nulls,
        lengths=_counts(lengths),
        heaviest=_heaviest(users["user_id"].to_numpy(), lengths + dropped),
        day_rows=dict(zip(dates, rows.tolist(), strict=True)),
        day_known=_per_action(dates, known, rules),
        day_positive=_per_action(dates, positive, rules),
        first_event_ms=int(times.min()) if len(times) else None,
        last_event_ms=int(times.max()) if len(times) else None,
    )


def _by_day(
    flat: dict[str, np.ndarray], real: np.ndarray, rules: LogRules, utc_offset_ms: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The days that have rows, int64 [D], their rows [D], and where each action is known and where
    it happened [A, D].

    Rows of a user lie in the order of time, so a day is a few runs of rows: those are summed before
    days are sorted.

        day of each row     1  1  2  2  2  1  2         two users
        starts              0     2        5  6
        runs                2     3        1  1
        by day              day 1: 2 + 1, day 2: 3 + 1
    """
    day = (flat["event_time"][real] + utc_offset_ms) // DAY_MS
    starts = np.flatnonzero(np.r_[True, day[1:] != day[:-1]][: len(day)])
    days, code = np.unique(day[starts], return_inverse=True)

    def sum_by_day(counted: np.ndarray) -> np.ndarray:
        runs = np.zeros(0, np.int64)
        if len(starts):
            runs = np.add.reduceat(counted, starts, dtype=np.int64)
        return np.bincount(code, runs, len(days)).astype(np.int64)

    known, positive = [], []
    for bit in range(len(rules.actions)):
        known.append(sum_by_day(flat["known_mask"][real] >> bit & 1))
        positive.append(sum_by_day(flat["action_mask"][real] >> bit & 1))

    rows = sum_by_day(np.ones(len(day), np.int64))
    return days, rows, np.array(known), np.array(positive)


def _per_action(dates: list[str], counts: np.ndarray, rules: LogRules) -> dict[str, int]:
    """[A, D] counts as {"day action": rows}, without those of 0."""
    found = {}
    for action, row in zip(rules.actions, counts.tolist(), strict=True):
        for date, count in zip(dates, row, strict=True):
            if count:
                found[f"{date} {action}"] = count
    return found


def merge_statistics(parts: Sequence[Statistics]) -> Statistics:
    """All buckets together."""
    total = Statistics()
    for name, start in asdict(total).items():
        values = [getattr(part, name) for part in parts]
        if name in ("first_event_ms", "last_event_ms"):
            merged = _merge_times(values, min if name == "first_event_ms" else max)
        elif name == "samples":
            merged = _merge_samples(values)
        elif name == "heaviest":
            merged = _merge_heaviest(values)
        elif isinstance(start, dict):
            merged = _add_counts(values)
        else:
            merged = sum(values)
        setattr(total, name, merged)
    return total


def _merge_times(values: Sequence[int | None], choose: Callable[..., int | None]) -> int | None:
    times = [value for value in values if value is not None]
    return choose(times, default=None)


def _merge_samples(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """The first few rows of each reason, the reasons in the order of their names."""
    samples: dict[str, list[Any]] = {}
    for part in parts:
        for reason, rows in part.items():
            samples.setdefault(reason, []).extend(rows)
    return {reason: samples[reason][:SAMPLES] for reason in sorted(samples)}


def _merge_heaviest(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    """Buckets share no user."""
    rows: dict[str, int] = {}
    for part in parts:
        rows.update(part)
    users = np.array(list(map(int, rows)), np.int64)
    return _heaviest(users, np.array(list(rows.values()), np.int64))


def _add_counts(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    """The sums by key, numbers by their size and then texts."""
    added: Counter[str] = Counter()
    for part in parts:
        added.update(part)
    return {key: added[key] for key in sorted(added, key=_numbers_by_size)}


def log_hints(totals: Statistics, rules: LogRules) -> list[str]:
    """Likely mistakes in the logs as a whole, where the bad rows show them."""
    found = []
    for reason, rows in totals.samples.items():
        times = [row["event_time"] for row in rows if row["event_time"] is not None]
        hint = unit_hint(reason, times, rules)
        if hint:
            found.append(hint)
    for name in NAMED_IDS:
        bad = sum(totals.quarantined.get(reason, 0) for reason in reasons_of_hashes(name))
        if hint := hash_hint(name, bad, totals.rows_in, rules):
            found.append(hint)

    for action in positives_only(totals, rules):
        found.append(
            f"{action} is true wherever it is known: logs of positives only, without what was "
            "shown and not chosen. To train on it set examples.negatives"
        )
    return found


def positives_only(totals: Statistics, rules: LogRules) -> list[str]:
    """The actions that are false in no row with a real time."""
    found = []
    for action in rules.actions:
        known, positive = totals.count_action(action)
        if 0 < known == positive:
            found.append(action)
    return found


def hash_hint(name: str, bad: int, rows: int, rules: LogRules) -> str | None:
    """What to set where so many of the rows have an id below 0, or above what int64 holds."""
    if bad <= MANY_HASHES * rows:
        return None
    advice = as_text_advice(name, rules.columns[name])
    return f"if {name} is a hash of 64 bits, signed or not: {advice}"


def reasons_of_hashes(name: str) -> tuple[str, str]:
    """Why rows are left out whose id is below 0, or above what int64 holds."""
    return f"negative_{name}", f"{name}_unreadable"


def length_quantiles(lengths: dict[str, int]) -> dict[str, int]:
    """min, p50, p90, p99, max of rows per user, from the histogram."""
    if not lengths:
        return {}

    size = np.array(list(map(int, lengths)))
    reached = np.cumsum(list(lengths.values()))

    quantiles = {}
    for name, share in (("min", 0.0), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)):
        place = np.searchsorted(reached, share * reached[-1])
        quantiles[name] = int(size[place])
    return quantiles


def _counts(values: np.ndarray) -> dict[str, int]:
    if values.dtype == object:
        values = values.astype(str)
    keys, counts = np.unique(values, return_counts=True)
    return _as_text_keys(keys, counts)


def _counts_by_file(quarantine: pa.Table) -> dict[str, int]:
    """Rows by "source_file reason"."""
    if quarantine.num_rows == 0:
        return {}
    counted = quarantine.group_by([SOURCE_FILE, REASON]).aggregate([([], "count_all")])
    found = {}
    for row in counted.sort_by([(SOURCE_FILE, "ascending"), (REASON, "ascending")]).to_pylist():
        found[f"{row[SOURCE_FILE]} {row[REASON]}"] = row["count_all"]
    return found


def _as_text_keys(keys: np.ndarray, counts: np.ndarray) -> dict[str, int]:
    return dict(zip(map(str, keys.tolist()), counts.tolist(), strict=True))


def _heaviest(users: np.ndarray, rows: np.ndarray) -> dict[str, int]:
    """The users with the most rows, the largest first; equal ones by id."""
    order = np.lexsort((users, -rows))[:HEAVIEST]
    return _as_text_keys(users[order], rows[order])


def _samples(quarantine: pa.Table) -> dict[str, list[dict[str, Any]]]:
    samples: dict[str, list[dict[str, Any]]] = {}
    for reason in quarantine[REASON].unique().to_pylist():
        rows = quarantine.filter(pc.field(REASON) == reason).slice(0, SAMPLES)
        samples[reason] = list(map(_sample, rows.drop_columns([REASON]).to_pylist()))
    return samples


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the quarantine as the report shows it: the source's own row where it is kept."""
    time, file = row["event_time"], row[SOURCE_FILE]
    if row[SOURCE_ROW]:
        return {"event_time": time, "file": file, "row": json.loads(row[SOURCE_ROW])}

    checked = {name: value for name, value in row.items() if name not in (SOURCE_ROW, SOURCE_FILE)}
    return {"event_time": time, "file": file, "row": checked}


def _numbers_by_size(key: str) -> tuple[int, str]:
    return (int(key), "") if key.isdigit() else (0, key)
