"""The newest event of a version, by hand."""

import numpy as np
import pytest

from pipeline.sequences.quality.newest import HOUR_MS, HourCounts, newest_of_hours


def newest_hour(*hours_and_rows: tuple[int, int]) -> int:
    hours, rows = np.array(hours_and_rows).T
    return newest_of_hours(HourCounts.count_times(np.repeat(hours * HOUR_MS, rows))) // HOUR_MS


@pytest.mark.parametrize(
    ("hours_and_rows", "expected"),
    [
        ([(0, 1)], 0),
        ([(0, 900), (1, 1)], 1),  # it follows on the others
        ([(0, 900), (24, 1), (48, 1)], 48),
        ([(0, 900), (25, 1)], 0),
        ([(0, 900), (9999, 1)], 0),
        ([(0, 900), (9998, 1), (9999, 1)], 9999),  # more than 0.1 % of the rows
        ([(0, 900), (5000, 1), (9999, 1)], 5000),  # two of 902: one is a suspect
        ([(0, 5000), (9, 3), (7000, 2), (9999, 3)], 9),
        ([(day * 24, 1) for day in range(4000)], 3999 * 24),  # a row a day, for years
    ],
)
def test_a_few_stray_rows_are_not_the_newest(hours_and_rows: list, expected: int):
    assert newest_hour(*hours_and_rows) == expected


def test_the_time_is_that_of_the_last_row_of_its_hour_and_buckets_add_up():
    times = np.array([5, HOUR_MS + 7, HOUR_MS + 900, HOUR_MS + 30, 2 * HOUR_MS + 1])
    whole = HourCounts.count_times(times)
    assert newest_of_hours(whole) == 2 * HOUR_MS + 1
    assert newest_of_hours(HourCounts.count_times(times[:-1])) == HOUR_MS + 900
    parts = [HourCounts.count_times(times[::2]), HourCounts.count_times(times[1::2])]
    added = HourCounts.add_parts(parts)
    for name in HourCounts.__slots__:
        assert getattr(added, name).tolist() == getattr(whole, name).tolist()
