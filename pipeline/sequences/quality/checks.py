"""The limits that a build must keep to be published: `checks` in the configuration, held against
its counts.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import CheckConfig, UserError
from pipeline.schema import LOG_REQUIRED
from pipeline.sequences.quality.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Check:
    """One limit and what was found."""

    key: str  # in the configuration
    value: float | None  # None: there were no rows to take it from
    limit: float | tuple[float, ...]
    passed: bool
    found: str  # the value in words, with what led to it


def run_checks(
    limits: CheckConfig,
    totals: Statistics,
    new_rows: int = 0,
    new_broken: Mapping[str, int] | None = None,
) -> list[Check]:
    """Every limit that is set, in the order of the configuration.

    `new_broken`: by reason, those of the `new_rows` that were added to a version: a broken day must
    not hide behind a year of good ones.
    """
    return [*_checks(limits, totals), *_quarantined(new_broken or {}, new_rows, limits, new=True)]


def refuse_failed(checks: Sequence[Check], hints: Sequence[str], page: Path) -> None:
    """Go on only if everything has passed.

    Raises:
        UserError: one line per limit that was broken.
    """
    broken = [check for check in checks if not check.passed]
    if not broken:
        return

    what = "1 check fails" if len(broken) == 1 else f"{len(broken)} checks fail"
    lines = [f"{what}, nothing published; samples and counts in {page}"]
    for check in broken:
        lines.append(f"{check.key} is {_text(check.limit)}, found {check.found}")
    for hint in hints:
        lines.append(f"hint: {hint}")
    raise UserError("\n  ".join(lines))


def _checks(limits: CheckConfig, totals: Statistics) -> Iterator[Check]:
    # sizes
    users, kept, good = sum(totals.lengths.values()), totals.rows_kept, totals.rows_good
    yield _at_least("min_users", users, limits.min_users, f"{users} users")
    yield _at_least("min_rows", kept, limits.min_rows, f"{kept} rows kept")

    # rows that are left out
    yield from _quarantined(totals.quarantined, totals.rows_in, limits)
    beyond = f"good rows are beyond sequences.max_rows_per_user: {totals.rows_capped}"
    yield _share("max_capped_share", totals.rows_capped, good, limits.max_capped_share, beyond)

    # the user with the most rows comes first
    user, rows = next(iter(totals.heaviest.items()), ("", 0))
    heaviest = (
        f"good rows are of user {user}: {rows} (taken out by jobs.forget_user once published)"
    )
    yield _share("max_user_share", rows, good, limits.max_user_share, heaviest)

    # missing values
    for name, limit in limits.max_null_share.items():
        whole = totals.rows_in if name in LOG_REQUIRED else good
        nulls = totals.nulls.get(name, 0)
        yield _share(f"max_null_share.{name}", nulls, whole, limit, f"rows have no {name}: {nulls}")

    # actions, over the rows with a real time
    timed = sum(totals.day_rows.values())
    for name, limit in limits.max_unknown_share.items():
        known, _ = totals.count_action(name)
        unknown = timed - known
        found = f"rows do not know {name}: {unknown}"
        yield _share(f"max_unknown_share.{name}", unknown, timed, limit, found)

    for name, bounds in limits.action_rate.items():
        known, positive = totals.count_action(name)
        yield _rate(name, bounds, known, positive)


def _quarantined(
    bad: Mapping[str, int], whole: int, limits: CheckConfig, *, new: bool = False
) -> Iterator[Check]:
    if whole == 0:
        return
    name, rows = "max_quarantined_share", "rows"
    if new:
        name, rows = "max_quarantined_share of new rows", "new rows"

    reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(bad).most_common())
    found = f"{rows} are bad: {reasons or 'none'}"
    yield _share(name, sum(bad.values()), whole, limits.max_quarantined_share, found)


def _at_least(name: str, value: int, limit: int, found: str) -> Check:
    return Check(f"checks.{name}", value, limit, value >= limit, found)


def _share(name: str, part: int, whole: int, limit: float, of_what: str) -> Check:
    if whole == 0:
        return Check(f"checks.{name}", None, limit, True, "no rows")  # min_rows says so

    share = part / whole
    return Check(f"checks.{name}", share, limit, share <= limit, f"{share:.2%}: {of_what}")


def _rate(action: str, bounds: tuple[float, ...], known: int, positive: int) -> Check:
    key = f"checks.action_rate.{action}"
    if known == 0:
        return Check(key, None, bounds, False, "no row with a real time where it is known")

    rate = positive / known
    lowest, highest = bounds
    found = f"{rate:.4f}: {positive} of {known} known rows"
    return Check(key, rate, bounds, lowest <= rate <= highest, found)


def _text(limit: float | tuple[float, ...]) -> str:
    if isinstance(limit, tuple):
        return f"[{limit[0]:g}, {limit[1]:g}]"
    return f"{limit:g}"
