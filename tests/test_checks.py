"""The limits of a build: each by itself, and all broken ones in one message."""

from pathlib import Path

import pytest

from pipeline.config import CheckConfig, UserError
from pipeline.sequences.quality.checks import refuse_failed, run_checks
from pipeline.sequences.quality.statistics import Statistics

TOTALS = Statistics(
    rows_in=100,
    rows_kept=70,
    rows_capped=10,
    quarantined={"click_not_0_1": 15, "exact_duplicate": 5},
    nulls={"user_id": 2, "tab": 17},
    lengths={"2": 5, "12": 5},
    heaviest={"7": 22, "3": 12},
    day_rows={"2022-04-15": 30, "2022-04-16": 30},
    day_known={"2022-04-15 click": 20, "2022-04-16 click": 30, "2022-04-16 click twice": 60},
    day_positive={"2022-04-15 click": 4, "2022-04-16 click": 6},
)


@pytest.mark.parametrize(
    ("limits", "value", "passes"),
    [
        ({"min_users": 10}, 10, True),
        ({"min_users": 11}, 10, False),
        ({"min_rows": 71}, 70, False),
        ({"max_quarantined_share": 0.2}, 0.2, True),
        ({"max_quarantined_share": 0.19}, 0.2, False),
        ({"max_capped_share": 0.11}, 10 / 85, False),  # 70 kept, 10 capped, 5 doubles
        ({"max_user_share": 0.25}, 22 / 85, False),
        ({"max_null_share": {"user_id": 0.01}}, 0.02, False),  # of the rows read
        ({"max_null_share": {"tab": 0.2}}, 0.2, True),  # of the good ones
        ({"max_null_share": {"tab": 0.19}}, 0.2, False),
        ({"max_unknown_share": {"click": 0.16}}, 10 / 60, False),
        ({"action_rate": {"click": (0.1, 0.2)}}, 0.2, True),
        ({"action_rate": {"click": (0.1, 0.19)}}, 0.2, False),
        ({"action_rate": {"click": (0.21, 1.0)}}, 0.2, False),
        ({"action_rate": {"like": (0.0, 1.0)}}, None, False),  # never known
    ],
)
def test_each_limit(limits: dict, value: float | None, passes: bool):
    found = run_checks(CheckConfig(**{"max_quarantined_share": 1.0} | limits), TOTALS)
    ((name, limit),) = limits.items()
    key = f"checks.{name}" + (f".{next(iter(limit))}" if isinstance(limit, dict) else "")
    (check,) = [check for check in found if check.key == key]
    assert check.value == pytest.approx(value)
    assert check.passed == passes
    assert all(other.passed for other in found if other != check)


def test_all_that_is_broken_is_one_message():
    limits = CheckConfig(min_users=20, max_user_share=0.1, action_rate={"click": (0.3, 0.4)})
    with pytest.raises(UserError) as refused:
        refuse_failed(run_checks(limits, TOTALS), ["look at the clock"], Path("page.html"))
    assert str(refused.value).splitlines() == [
        "4 checks fail, nothing published; samples and counts in page.html",
        "  checks.min_users is 20, found 10 users",
        "  checks.max_quarantined_share is 0.1, found 20.00%: rows are bad: click_not_0_1 15, "
        "exact_duplicate 5",
        "  checks.max_user_share is 0.1, found 25.88%: good rows are of user 7: 22 (taken out "
        "by jobs.forget_user once published)",
        "  checks.action_rate.click is [0.3, 0.4], found 0.2000: 10 of 50 known rows",
        "  hint: look at the clock",
    ]
    refuse_failed(run_checks(CheckConfig(max_quarantined_share=0.5), TOTALS), [], Path("page.html"))


def test_bad_new_rows_do_not_hide_behind_good_old_ones():
    found = run_checks(CheckConfig(max_quarantined_share=0.3), TOTALS, 10, {"null_user_id": 4})
    quarantined = [
        (check.key, check.value, check.passed) for check in found if "quarantined" in check.key
    ]
    assert quarantined == [
        ("checks.max_quarantined_share", 0.2, True),
        ("checks.max_quarantined_share of new rows", 0.4, False),
    ]


def test_logs_without_a_row():
    found = run_checks(
        CheckConfig(max_null_share={"tab": 0.0}),
        Statistics(rows_in=3, quarantined={"null_user_id": 3}),
    )
    assert [check.key for check in found if not check.passed] == [
        "checks.min_users",
        "checks.min_rows",
        "checks.max_quarantined_share",
    ]
