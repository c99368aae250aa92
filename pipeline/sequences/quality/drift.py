"""How far one version of the sequences is from another: sizes, action rates, lengths, request
values and items.

    store, store → profile, profile → compare → a list of changes, each with its distance and its
    limit

A profile is counted from the published buckets, one bucket in memory at a time, so any two stores
can be compared.
"""

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
from pipeline.sequences.store import Manifest

MAX_LOG_LENGTH = 63


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each value occurs: `values` int64, ascending and without repeats, `rows` int64."""

    values: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, parts: Sequence["Counts"]) -> "Counts":
        values = np.concatenate([part.values for part in parts] or [np.zeros(0, np.int64)])
        rows = np.concatenate([part.rows for part in parts] or [np.zeros(0, np.int64)])
        unique, place = np.unique(values, return_inverse=True)
        total = np.zeros(len(unique), np.int64)
        np.add.at(total, place, rows)
        return cls(unique, total)

    @classmethod
    def count(cls, values: np.ndarray) -> "Counts":
        counted = pa.array(values, pa.int64()).value_counts()
        return cls.of([cls(counted.field("values").to_numpy(), counted.field("counts").to_numpy())])


@dataclass(frozen=True, slots=True)
class Profile:
    """What a version holds, or the newest days of it."""

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
    return inside if (inside / store.MANIFEST).exists() else Path(folder)


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


def profile(folder: Path, manifest: Manifest, days: int | None = None) -> Profile:
    """Counts over a version; with `days`, over its rows of real time later than so many days before
    its newest one.

    Raises:
        UserError: a bucket cannot be read, or no row is left.
    """
    since = None if days is None else manifest.last_event_ms - days * DAY_MS
    buckets = (store.read_bucket(folder, manifest, index) for index in range(len(manifest.buckets)))
    parts = [part for part in (_count(bucket, manifest, since) for bucket in buckets) if part.rows]
    if not parts:
        raise UserError(
            f"{folder}: version {manifest.digest[:16]} has no rows"
            + (f" in {days} days" if days else "")
        )
    return Profile(
        digest=manifest.digest,
        users=sum(part.users for part in parts),
        rows=sum(part.rows for part in parts),
        first_event_ms=min(part.first_event_ms for part in parts),
        last_event_ms=max(part.last_event_ms for part in parts),
        timed=sum(part.timed for part in parts),
        known={action: sum(part.known[action] for part in parts) for action in manifest.actions},
        positive={
            action: sum(part.positive[action] for part in parts) for action in manifest.actions
        },
        lengths=np.sum([part.lengths for part in parts], axis=0),
        request_values={
            name: Counts.of([part.request_values[name] for part in parts])
            for name in manifest.request_columns
        },
        items=Counts.of([part.items for part in parts]),
    )


def _count(sequences: pa.Table, manifest: Manifest, since: int | None) -> Profile:
    """Of one bucket."""
    names = (
        "item_id",
        "event_time",
        "action_mask",
        "known_mask",
        "order_only",
        *manifest.request_columns,
    )
    flat = {name: flat_column(sequences, name) for name in names}
    owner = np.repeat(np.arange(sequences.num_rows), np.diff(list_offsets(sequences)))
    real = ~flat["order_only"]
    if since is not None:
        recent = real & (flat["event_time"] > since)
        flat = {name: values[recent] for name, values in flat.items()}
        owner, real = owner[recent], real[recent]
    lengths = np.bincount(owner, minlength=1)
    lengths = lengths[lengths > 0]
    known, happened = flat["known_mask"][real], flat["action_mask"][real]
    return Profile(
        digest=manifest.digest,
        users=len(lengths),
        rows=len(owner),
        first_event_ms=int(flat["event_time"].min(initial=2**62)),
        last_event_ms=int(flat["event_time"].max(initial=0)),
        timed=len(known),
        known={
            action: int((known >> bit & 1).sum()) for bit, action in enumerate(manifest.actions)
        },
        positive={
            action: int((happened >> bit & 1).sum()) for bit, action in enumerate(manifest.actions)
        },
        lengths=np.bincount(np.log2(lengths).astype(np.int64), minlength=MAX_LOG_LENGTH + 1),
        request_values={name: Counts.count(flat[name]) for name in manifest.request_columns},
        items=Counts.count(flat["item_id"]),
    )


def compare(before: Profile, after: Profile, limits: DriftConfig) -> list[Change]:
    """Every quantity, whether or not it has a limit; an action or column that one of the two lacks
    counts as empty.
    """
    return [
        Change(quantity, was, now, distance, limit, limit is not None and distance > limit)
        for quantity, was, now, distance, limit in _distances(before, after, limits)
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
    changes = compare(profile(folder, before), profile(folder, after), limits)
    lines = [
        f"drift.{change.quantity}: limit {change.limit:g}, distance {change.distance:.4f} "
        f"({_text(change.before)} before, {_text(change.after)} now)"
        for change in changes
        if change.crossed
    ]
    if lines:
        what = (
            f"the new version is too far from {before.digest[:16]}, nothing published "
            "(checks.drift)"
        )
        raise UserError("\n  ".join([what, *lines]))


def _distances(
    before: Profile, after: Profile, limits: DriftConfig
) -> Iterator[tuple[str, float | str, float | str, float, float | None]]:
    yield (
        "users",
        before.users,
        after.users,
        relative_change(before.users, after.users),
        limits.users,
    )
    yield "rows", before.rows, after.rows, relative_change(before.rows, after.rows), limits.rows
    for quantity in ("first_event_ms", "last_event_ms"):
        was, now = getattr(before, quantity), getattr(after, quantity)
        name = quantity.removesuffix("_ms") + "_days"
        yield name, _moment(was), _moment(now), (now - was) / DAY_MS, None
    for action in dict.fromkeys([*before.known, *after.known]):
        (was, was_known), (now, now_known) = _rates(before, action), _rates(after, action)
        yield f"action_rate.{action}", was, now, relative_change(was, now), limits.action_rate
        yield (
            f"known_share.{action}",
            was_known,
            now_known,
            abs(now_known - was_known),
            limits.known_share,
        )
    was, now = (version.rows / version.users for version in (before, after))
    yield "lengths", was, now, divergence(before.lengths, after.lengths), limits.lengths
    nothing = Counts.of([])
    for name in dict.fromkeys([*before.request_values, *after.request_values]):
        was, now = (version.request_values.get(name, nothing) for version in (before, after))
        yield (
            f"request_values.{name}",
            len(was.values),
            len(now.values),
            _of_counts(was, now),
            limits.request_values,
        )
    was, now = before.items, after.items
    yield "items", len(was.values), len(now.values), _of_counts(was, now), limits.items
    new, gone = ~np.isin(now.values, was.values), ~np.isin(was.values, now.values)
    yield (
        "new_item_rows",
        0,
        int(new.sum()),
        float(now.rows[new].sum() / now.rows.sum()),
        limits.new_item_rows,
    )
    yield (
        "gone_item_rows",
        int(gone.sum()),
        0,
        float(was.rows[gone].sum() / was.rows.sum()),
        limits.gone_item_rows,
    )


def _rates(version: Profile, action: str) -> tuple[float, float]:
    """The share of the known rows where it happened (0 where none is known), and the share that is
    known.
    """
    known = version.known.get(action, 0)
    return version.positive.get(action, 0) / max(known, 1), known / max(version.timed, 1)


def relative_change(before: float, after: float) -> float:
    """|after - before| over the larger of the two: 0 for no change, .5 for half or double, 1 from
    or to nothing.
    """
    return abs(after - before) / (max(before, after) or 1)


def divergence(before: np.ndarray, after: np.ndarray) -> float:
    """Jensen-Shannon divergence, to base 2, of two histograms over the same bins (Lin 1991): from 0
    to 1.

    Two empty histograms are equal; an empty one has nothing in common with one that is not.
    """
    if not before.sum() or not after.sum():
        return float(bool(before.sum()) != bool(after.sum()))
    seen = (before > 0) | (after > 0)
    p, q = before[seen] / before.sum(), after[seen] / after.sum()
    middle = (p + q) / 2
    kept = [
        part * np.log2(part / middle, where=part > 0, out=np.zeros_like(middle)) for part in (p, q)
    ]
    return float(min(1.0, max(0.0, (kept[0].sum() + kept[1].sum()) / 2)))


def _of_counts(before: Counts, after: Counts) -> float:
    values = np.union1d(before.values, after.values)
    bins = np.zeros((2, len(values)), np.int64)
    for row, counts in zip(bins, (before, after), strict=True):
        row[np.searchsorted(values, counts.values)] = counts.rows
    return divergence(*bins)


def table(changes: Sequence[Change]) -> str:
    """For a terminal; what has crossed its limit is marked."""
    rows = [("", "quantity", "before", "after", "distance", "limit")]
    for change in changes:
        limit = "" if change.limit is None else f"{change.limit:g}"
        was, now = _text(change.before), _text(change.after)
        rows.append(
            (
                "!" if change.crossed else "",
                change.quantity,
                was,
                now,
                f"{change.distance:.4f}",
                limit,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in cells
        )
        for cells in (enumerate(zip(row, widths, strict=True)) for row in rows)
    )


def _text(value: float | str) -> str:
    return (
        value
        if isinstance(value, str)
        else f"{value:,}"
        if isinstance(value, int)
        else f"{value:.4f}"
    )


def _moment(time_ms: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time_ms)).strftime(
        "%Y-%m-%d %H:%M"
    )
