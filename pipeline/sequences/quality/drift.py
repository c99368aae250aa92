"""The distance of one version of the sequences from another: sizes, action rates, lengths, request
values and items.

    store, store → profile, profile → changes, each with its distance and its limit

A profile is counted from the published buckets, one bucket in memory at a time, so any two stores
can be compared.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config import DriftConfig, UserError
from pipeline.schema import DAY_MS
from pipeline.sequences import store
from pipeline.sequences.arrow_lists import flat_column, list_offsets
from pipeline.sequences.quality.newest import find_newest
from pipeline.sequences.store import Manifest

MAX_LOG_LENGTH = 63


@dataclass(frozen=True, slots=True)
class Counts:
    """The rows of each value: `values` int64, ascending and without repeats, `rows` int64."""

    values: np.ndarray
    rows: np.ndarray

    @classmethod
    def add_parts(cls, parts: Sequence["Counts"]) -> "Counts":
        """The rows of all parts together.

        values, rows        3: 5, 7: 1      and     1: 2, 7: 4
        together            1: 2, 3: 5, 7: 5
        """
        nothing = np.zeros(0, np.int64)
        values = np.concatenate([nothing, *(part.values for part in parts)])
        rows = np.concatenate([nothing, *(part.rows for part in parts)])

        unique, place = np.unique(values, return_inverse=True)
        total = np.zeros(len(unique), np.int64)
        np.add.at(total, place, rows)
        return cls(unique, total)

    @classmethod
    def count_values(cls, values: np.ndarray) -> "Counts":
        counted = pa.array(values, pa.int64()).value_counts()
        unsorted = cls(counted.field("values").to_numpy(), counted.field("counts").to_numpy())
        return cls.add_parts([unsorted])


@dataclass(frozen=True, slots=True)
class Profile:
    """Counts of a version, or of the newest days of it."""

    digest: str
    users: int
    rows: int
    first_event_ms: int
    last_event_ms: int
    timed: int  # rows with a real time; actions are counted over these
    known: dict[str, int]  # by action: rows where it is known
    positive: dict[str, int]  # by action: rows where it happened
    lengths: np.ndarray  # int64 [64], users with 2**i to 2**(i+1) - 1 rows
    request_values: dict[str, Counts]
    items: Counts
    text_ids: tuple[str, ...] = ()  # `items` counts codes where item_id is one of them


@dataclass(frozen=True, slots=True)
class Change:
    """One quantity in both versions."""

    quantity: str  # of `drift` in the configuration, with the column where it has several
    before: float | str
    after: float | str
    distance: float
    limit: float | None
    crossed: bool


def find_store(folder: str | Path) -> Path:
    """The store in a run's folder, or the folder itself where it is one."""
    inside = Path(folder) / "sequences"
    if (inside / store.MANIFEST).exists():
        return inside
    return Path(folder)


def version_before(folder: Path) -> Manifest:
    """The version that was published before the present one.

    Raises:
        UserError: its manifest is not kept.
    """
    published = store.read_manifest(folder)
    for manifest in store.versions(folder):
        if manifest.digest != published.digest:
            return manifest
    raise UserError(
        f"{folder} keeps no version before {published.digest[:16]}: say with --before what to "
        "compare with"
    )


def count_profile(folder: Path, manifest: Manifest, days: int | None = None) -> Profile:
    """Counts over a version; with `days`, over its rows of real time in so many days up to its
    newest event, which a few stray rows do not move (quality/newest.py).

    Raises:
        UserError: a bucket cannot be read, or no row is left.
    """
    span = None
    if days is not None:
        newest_ms = find_newest(folder, manifest, now_ms=int(time.time() * 1000))
        span = newest_ms - days * DAY_MS, newest_ms

    parts = []
    for index in range(len(manifest.buckets)):
        counted = _count_bucket(store.read_bucket(folder, manifest, index), manifest, span)
        if counted.rows:
            parts.append(counted)

    if not parts:
        within = f" in {days} days" if days else ""
        raise UserError(f"{folder}: version {manifest.digest[:16]} has no rows{within}")
    return _add_profiles(parts, manifest)


def _add_profiles(parts: Sequence[Profile], manifest: Manifest) -> Profile:
    known: Counter[str] = Counter()
    positive: Counter[str] = Counter()
    users = rows = timed = last = 0
    first = 2**62
    items = []
    lengths = np.zeros(MAX_LOG_LENGTH + 1, np.int64)
    for part in parts:
        users += part.users
        rows += part.rows
        timed += part.timed
        first = min(first, part.first_event_ms)
        last = max(last, part.last_event_ms)
        items.append(part.items)
        lengths += part.lengths
        known.update(part.known)
        positive.update(part.positive)

    request_values = {}
    for name in manifest.request_columns:
        request_values[name] = Counts.add_parts([part.request_values[name] for part in parts])

    return Profile(
        digest=manifest.digest,
        users=users,
        rows=rows,
        first_event_ms=first,
        last_event_ms=last,
        timed=timed,
        known=dict(known),
        positive=dict(positive),
        lengths=lengths,
        request_values=request_values,
        items=Counts.add_parts(items),
        text_ids=manifest.text_ids,
    )


def _count_bucket(sequences: pa.Table, manifest: Manifest, span: tuple[int, int] | None) -> Profile:
    """Counts over a bucket; with `span`, over its rows of real time after the first time and up to
    the second.
    """
    names = ["item_id", "event_time", "action_mask", "known_mask", "order_only"]
    names += manifest.request_columns
    flat = {name: flat_column(sequences, name) for name in names}
    owner = np.repeat(np.arange(sequences.num_rows), np.diff(list_offsets(sequences)))
    real = ~flat["order_only"]

    if span is not None:
        after, until = span
        recent = real & (flat["event_time"] > after) & (flat["event_time"] <= until)
        flat = {name: values[recent] for name, values in flat.items()}
        owner, real = owner[recent], real[recent]

    # users by the number of their rows
    lengths = np.bincount(owner, minlength=1)
    lengths = lengths[lengths > 0]
    log_lengths = np.log2(lengths).astype(np.int64)

    return Profile(
        digest=manifest.digest,
        users=len(lengths),
        rows=len(owner),
        first_event_ms=int(flat["event_time"].min(initial=2**62)),
        last_event_ms=int(flat["event_time"].max(initial=0)),
        timed=int(real.sum()),
        known=_count_bits(flat["known_mask"][real], manifest.actions),
        positive=_count_bits(flat["action_mask"][real], manifest.actions),
        lengths=np.bincount(log_lengths, minlength=MAX_LOG_LENGTH + 1),
        request_values={name: Counts.count_values(flat[name]) for name in manifest.request_columns},
        items=Counts.count_values(flat["item_id"]),
    )


def _count_bits(masks: np.ndarray, actions: Sequence[str]) -> dict[str, int]:
    """The masks that have the bit of each action."""
    return {action: int((masks >> bit & 1).sum()) for bit, action in enumerate(actions)}


def compare_profiles(before: Profile, after: Profile, limits: DriftConfig) -> list[Change]:
    """Every quantity, whether or not it has a limit; an action or column that one of the two lacks
    counts as empty.

    Raises:
        UserError: items are text in one and numbers in the other.
    """
    if ("item_id" in before.text_ids) != ("item_id" in after.text_ids):
        kinds = ("text", "numbers") if "item_id" in before.text_ids else ("numbers", "text")
        raise UserError(
            f"item_id: {kinds[0]} in version {before.digest[:16]}, {kinds[1]} in "
            f"{after.digest[:16]}: their items cannot be compared"
        )
    return [
        *_size_changes(before, after, limits),
        *_action_changes(before, after, limits),
        *_histogram_changes(before, after, limits),
        *_item_changes(before.items, after.items, limits),
    ]


def refuse_drift(
    folder: Path, before: Manifest | None, after: Manifest, limits: DriftConfig
) -> None:
    """Go on only if no limit is crossed between two versions of a store, or if there is no earlier
    one.

    Raises:
        UserError: one line per limit that was crossed.
    """
    if before is None:
        return

    lines = [
        f"the new version is too far from {before.digest[:16]}, nothing published (checks.drift)"
    ]
    was, now = count_profile(folder, before), count_profile(folder, after)
    for change in compare_profiles(was, now, limits):
        if change.crossed:
            lines.append(
                f"drift.{change.quantity}: limit {change.limit:g}, distance {change.distance:.4f} "
                f"({_text(change.before)} before, {_text(change.after)} now)"
            )
    if len(lines) > 1:
        raise UserError("\n  ".join(lines))


def _change(
    quantity: str, was: float | str, now: float | str, distance: float, limit: float | None
) -> Change:
    crossed = limit is not None and distance > limit
    return Change(quantity, was, now, distance, limit, crossed)


def _size_changes(before: Profile, after: Profile, limits: DriftConfig) -> Iterator[Change]:
    users = relative_change(before.users, after.users)
    rows = relative_change(before.rows, after.rows)
    yield _change("users", before.users, after.users, users, limits.users)
    yield _change("rows", before.rows, after.rows, rows, limits.rows)

    was, now = before.first_event_ms, after.first_event_ms
    yield _change("first_event_days", _moment(was), _moment(now), (now - was) / DAY_MS, None)
    was, now = before.last_event_ms, after.last_event_ms
    yield _change("last_event_days", _moment(was), _moment(now), (now - was) / DAY_MS, None)


def _action_changes(before: Profile, after: Profile, limits: DriftConfig) -> Iterator[Change]:
    for action in dict.fromkeys([*before.known, *after.known]):
        was, was_known = _rates(before, action)
        now, now_known = _rates(after, action)

        distance = relative_change(was, now)
        yield _change(f"action_rate.{action}", was, now, distance, limits.action_rate)
        distance = abs(now_known - was_known)
        yield _change(f"known_share.{action}", was_known, now_known, distance, limits.known_share)


def _histogram_changes(before: Profile, after: Profile, limits: DriftConfig) -> Iterator[Change]:
    was, now = before.rows / before.users, after.rows / after.users
    distance = histogram_divergence(before.lengths, after.lengths)
    yield _change("lengths", was, now, distance, limits.lengths)

    nothing = Counts.add_parts([])
    for name in dict.fromkeys([*before.request_values, *after.request_values]):
        was = before.request_values.get(name, nothing)
        now = after.request_values.get(name, nothing)
        yield _values_change(f"request_values.{name}", was, now, limits.request_values)


def _item_changes(was: Counts, now: Counts, limits: DriftConfig) -> Iterator[Change]:
    yield _values_change("items", was, now, limits.items)

    new = ~np.isin(now.values, was.values)
    share = float(now.rows[new].sum() / now.rows.sum())
    yield _change("new_item_rows", 0, int(new.sum()), share, limits.new_item_rows)

    gone = ~np.isin(was.values, now.values)
    share = float(was.rows[gone].sum() / was.rows.sum())
    yield _change("gone_item_rows", int(gone.sum()), 0, share, limits.gone_item_rows)


def _values_change(quantity: str, was: Counts, now: Counts, limit: float | None) -> Change:
    distance = _counts_divergence(was, now)
    return _change(quantity, len(was.values), len(now.values), distance, limit)


def _rates(version: Profile, action: str) -> tuple[float, float]:
    """The share of the known rows where it happened (0 where none is known), and the share that is
    known.
    """
    known = version.known.get(action, 0)
    positive = version.positive.get(action, 0)
    return positive / max(known, 1), known / max(version.timed, 1)


def relative_change(before: float, after: float) -> float:
    """|after - before| over the larger of the two: 0 for no change, .5 for half or double, 1 from
    or to nothing.
    """
    return abs(after - before) / (max(before, after) or 1)


def histogram_divergence(before: np.ndarray, after: np.ndarray) -> float:
    """Jensen-Shannon divergence, to base 2, of two histograms over the same bins (Lin 1991): from 0
    to 1.

    Two empty histograms are equal; an empty one has nothing in common with one that is not.
    """
    if not before.sum() or not after.sum():
        return float(bool(before.sum()) != bool(after.sum()))

    seen = (before > 0) | (after > 0)
    p, q = before[seen] / before.sum(), after[seen] / after.sum()
    middle = (p + q) / 2
    divergence = (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2
    return float(min(1.0, max(0.0, divergence)))


def _relative_entropy(part: np.ndarray, middle: np.ndarray) -> float:
    """Kullback-Leibler divergence in bits; a bin of 0 adds nothing."""
    logs = np.log2(part / middle, where=part > 0, out=np.zeros_like(middle))
    return (part * logs).sum()


def _counts_divergence(before: Counts, after: Counts) -> float:
    """`histogram_divergence` over the values that either has.

    before              3: 5, 7: 1      values      1   3   7
    after               1: 2, 7: 4      bins        0   5   1
                                                    2   0   4
    """
    values = np.union1d(before.values, after.values)
    bins = np.zeros((2, len(values)), np.int64)
    bins[0, np.searchsorted(values, before.values)] = before.rows
    bins[1, np.searchsorted(values, after.values)] = after.rows
    return histogram_divergence(bins[0], bins[1])


def format_table(changes: Sequence[Change]) -> str:
    """The changes as lines for a terminal; those that crossed their limit are marked."""
    rows = [("", "quantity", "before", "after", "distance", "limit")]
    for change in changes:
        mark = "!" if change.crossed else ""
        limit = "" if change.limit is None else f"{change.limit:g}"
        was, now = _text(change.before), _text(change.after)
        rows.append((mark, change.quantity, was, now, f"{change.distance:.4f}", limit))

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if place < 2 else cell.rjust(width))
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}"


def _moment(time_ms: int) -> str:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time_ms)
    return moment.strftime("%Y-%m-%d %H:%M")
