"""Counts over the rows of a build, for its report: buckets count (`count_bucket`), the driver adds
up (`merge`).
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.logs.cleaning import REASON, SOURCE_ROW, LogRules, unit_hint
from pipeline.schema import DAY_MS

if TYPE_CHECKING:
    from pipeline.sequences.users import BuiltBucket

SAMPLES = 5  # quarantined rows shown per reason
HEAVIEST = 5  # users shown with their rows
DOUBLES = ("exact_duplicate", "key_duplicate")  # reasons of rows that are good by themselves


@dataclass
class Statistics:
    """Counts that add up over buckets. Keys of mappings are text, as JSON has them."""

    rows_in: int = 0
    rows_kept: int = 0
    rows_capped: int = 0
    users_capped: int = 0  # users who had more rows than are kept
    order_only_rows: int = 0
    requests: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)  # rows by reason
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # a few of those rows
    nulls: dict[str, int] = field(default_factory=dict)  # by LOG column
    lengths: dict[str, int] = field(default_factory=dict)  # users by number of rows
    # rows of the users with the most, before the cap
    heaviest: dict[str, int] = field(default_factory=dict)
    day_rows: dict[str, int] = field(default_factory=dict)  # rows with a real time, by day
    # "day action": rows where the action is known
    day_known: dict[str, int] = field(default_factory=dict)
    # "day action": rows where it happened
    day_positive: dict[str, int] = field(default_factory=dict)
    first_event_ms: int | None = None
    last_event_ms: int | None = None

    @property
    def rows_good(self) -> int:
        """Rows without a reason of their own: kept, capped, or a double of one that is."""
        doubles = sum(self.quarantined.get(reason, 0) for reason in DOUBLES)
        return self.rows_kept + self.rows_capped + doubles

    def of_action(self, action: str) -> tuple[int, int]:
        """Rows with a real time where the action is known, and where it happened."""
        known, positive = (
            sum(rows for key, rows in counts.items() if key.partition(" ")[2] == action)
            for counts in (self.day_known, self.day_positive)
        )
        return known, positive


def count_bucket(built: "BuiltBucket", rules: LogRules, utc_offset_ms: int) -> Statistics:
    """Of one bucket; days begin at midnight of the given offset from UTC."""
    lists = {
        name: built.sequences[name].combine_chunks() for name in built.sequences.column_names[3:]
    }
    flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in lists.items()}
    offsets = lists["item_id"].offsets.to_numpy()
    lengths = np.diff(offsets)
    dropped = built.sequences["first_position"].to_numpy()
    times, real = flat["event_time"], ~flat["order_only"]
    days, rows, known, positive = _by_day(flat, real, rules, utc_offset_ms)
    dates = days.astype("datetime64[D]").astype(str).tolist()
    return Statistics(
        rows_in=built.rows_in,
        rows_kept=len(times),
        rows_capped=built.rows_capped,
        users_capped=int((dropped > 0).sum()),
        order_only_rows=int((~real).sum()),
        requests=int((flat["request_index"][offsets[1:] - 1] + 1).sum()),
        quarantined=_counts(built.quarantine[REASON].to_numpy()),
        samples=_samples(built.quarantine),
        nulls=built.nulls,
        lengths=_counts(lengths),
        heaviest=_heaviest(built.sequences["user_id"].to_numpy(), lengths + dropped),
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
    days are sorted."""
    day = (flat["event_time"][real] + utc_offset_ms) // DAY_MS
    starts = np.flatnonzero(np.r_[True, day[1:] != day[:-1]][: len(day)])
    days, code = np.unique(day[starts], return_inverse=True)

    def total(counted: np.ndarray) -> np.ndarray:
        runs = (
            np.add.reduceat(counted, starts, dtype=np.int64)
            if len(starts)
            else np.zeros(0, np.int64)
        )
        return np.bincount(code, runs, len(days)).astype(np.int64)

    masks = [flat[name][real] for name in ("known_mask", "action_mask")]
    bits = range(len(rules.actions))
    known, positive = (np.array([total(mask >> bit & 1) for bit in bits]) for mask in masks)
    return days, total(np.ones(len(day), np.int64)), known, positive


def _per_action(dates: list[str], counts: np.ndarray, rules: LogRules) -> dict[str, int]:
    """[A, D] counts as {"day action": rows}, without those of 0."""
    return {
        f"{date} {action}": int(count)
        for action, row in zip(rules.actions, counts, strict=True)
        for date, count in zip(dates, row, strict=True)
        if count
    }


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
                reason: [row for value in values for row in value.get(reason, [])][:SAMPLES]
                for reason in reasons
            }
        elif name == "heaviest":
            rows = {int(user): rows for value in values for user, rows in value.items()}
            total.heaviest = _heaviest(
                np.array(list(rows), np.int64), np.array(list(rows.values()), np.int64)
            )
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


def length_quantiles(lengths: dict[str, int]) -> dict[str, int]:
    """min, p50, p90, p99, max of rows per user, from the histogram."""
    if not lengths:
        return {}
    size = np.array([int(key) for key in lengths])
    reached = np.cumsum(list(lengths.values()))
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: int(size[np.searchsorted(reached, share * reached[-1])])
        for name, share in shares.items()
    }


def _counts(values: np.ndarray) -> dict[str, int]:
    keys, counts = np.unique(
        values.astype(str) if values.dtype == object else values, return_counts=True
    )
    return {str(key): int(count) for key, count in zip(keys, counts, strict=True)}


def _heaviest(users: np.ndarray, rows: np.ndarray) -> dict[str, int]:
    """The users with the most rows, the largest first; equal ones by id."""
    order = np.lexsort((users, -rows))[:HEAVIEST]
    return {str(user): int(count) for user, count in zip(users[order], rows[order], strict=True)}


def _samples(quarantine: pa.Table) -> dict[str, list[dict[str, Any]]]:
    samples: dict[str, list[dict[str, Any]]] = {}
    for reason in quarantine[REASON].unique().to_pylist():
        rows = (
            quarantine.filter(pc.field(REASON) == reason).slice(0, SAMPLES).drop_columns([REASON])
        )
        samples[reason] = [_sample(row) for row in rows.to_pylist()]
    return samples


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the quarantine as the report shows it: the source's own row where it is kept."""
    source = (
        json.loads(row[SOURCE_ROW])
        if row[SOURCE_ROW]
        else {k: v for k, v in row.items() if k != SOURCE_ROW}
    )
    return {"event_time": row["event_time"], "row": source}


def _numbers_by_size(key: str) -> tuple[int, str]:
    return (int(key), "") if key.isdigit() else (0, key)
