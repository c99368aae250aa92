"""What a build must show to be published: the limits of `checks` in the configuration, held against
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

    key: str  # of the configuration
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


def refuse(checks: Sequence[Check], hints: Sequence[str], page: Path) -> None:
    """Go on only if everything has passed.

    Raises:
        UserError: one line per limit that was broken.
    """
    broken = [check for check in checks if not check.passed]
    if not broken:
        return
    lines = [f"{check.key} is {_text(check.limit)}, found {check.found}" for check in broken]
    lines += [f"hint: {hint}" for hint in hints]
    what = "1 check fails" if len(broken) == 1 else f"{len(broken)} checks fail"
    raise UserError(
        "\n  ".join([f"{what}, nothing published; samples and counts in {page}", *lines])
    )


def _checks(limits: CheckConfig, totals: Statistics) -> Iterator[Check]:
    users = sum(totals.lengths.values())
    yield Check(
        "checks.min_users", users, limits.min_users, users >= limits.min_users, f"{users} users"
    )
    kept = totals.rows_kept
    yield Check(
        "checks.min_rows", kept, limits.min_rows, kept >= limits.min_rows, f"{kept} rows kept"
    )
    yield from _quarantined(totals.quarantined, totals.rows_in, limits)
    good = totals.rows_good
    beyond = f"good rows are beyond sequences.max_rows_per_user: {totals.rows_capped}"
    yield _share("max_capped_share", totals.rows_capped, good, limits.max_capped_share, beyond)
    user, rows = next(iter(totals.heaviest.items()), ("", 0))
    yield _share(
        "max_user_share", rows, good, limits.max_user_share, f"good rows are of user {user}: {rows}"
    )
    for name, limit in limits.max_null_share.items():
        of = totals.rows_in if name in LOG_REQUIRED else good
        nulls = totals.nulls.get(name, 0)
        yield _share(f"max_null_share.{name}", nulls, of, limit, f"rows have no {name}: {nulls}")
    timed = sum(totals.day_rows.values())
    for name, limit in limits.max_unknown_share.items():
        unknown = timed - totals.of_action(name)[0]
        yield _share(
            f"max_unknown_share.{name}",
            unknown,
            timed,
            limit,
            f"rows do not know {name}: {unknown}",
        )
    for name, bounds in limits.action_rate.items():
        yield _rate(name, bounds, *totals.of_action(name))


def _quarantined(
    bad: Mapping[str, int], of: int, limits: CheckConfig, *, new: bool = False
) -> Iterator[Check]:
    if of:
        reasons = ", ".join(f"{reason} {rows}" for reason, rows in Counter(bad).most_common())
        name, rows = (
            ("max_quarantined_share of new rows", "new rows")
            if new
            else ("max_quarantined_share", "rows")
        )
        yield _share(
            name, sum(bad.values()), of, limits.max_quarantined_share, f"{rows} are bad: {reasons}"
        )


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
    return Check(
        key,
        rate,
        bounds,
        lowest <= rate <= highest,
        f"{rate:.4f}: {positive} of {known} known rows",
    )


def _text(limit: float | tuple[float, ...]) -> str:
    return f"[{limit[0]:g}, {limit[1]:g}]" if isinstance(limit, tuple) else f"{limit:g}"
