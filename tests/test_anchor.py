"""The anchors' cheap part: cleaning, split and the published figures of the smoothed rates."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import kuairand_anchor as anchor

DATA = Path(__file__).parent.parent / "data" / "kuairand_pure_subset"


@pytest.fixture(scope="module")
def events():
    return anchor.read_events(DATA)


def test_the_split_has_the_published_rows(events):
    time_ms = events["time_ms"]
    assert (time_ms < anchor.T_VAL).sum() == 91_989
    assert time_ms.between(anchor.T_VAL, anchor.T_TEST, inclusive="left").sum() == 39_363
    assert (time_ms >= anchor.T_TEST).sum() == 48_777


@pytest.mark.parametrize(
    ("method", "end"), [("rates_to_30_april", anchor.T_VAL), ("rates_to_2_may", anchor.T_TEST)]
)
def test_smoothed_rates_agree_with_the_published_figures(events, method, end):
    test = events[events["time_ms"] >= anchor.T_TEST]
    scores = anchor.smoothed_rates(events[events["time_ms"] < end], test)
    assert anchor.worst_difference({method: anchor.measure(test, scores)}) < 0.003


def test_strictly_earlier_counts_no_row_of_the_same_time():
    rng = np.random.default_rng(0)
    entity, time_ms = rng.integers(0, 5, 200), rng.integers(0, 12, 200)
    values = rng.integers(0, 2, (200, 3)).astype(float)
    count, sums = anchor.strictly_earlier(entity, time_ms, values)
    for row in range(200):
        earlier = (entity == entity[row]) & (time_ms < time_ms[row])
        assert count[row] == earlier.sum()
        np.testing.assert_array_equal(sums[row], values[earlier].sum(axis=0))


def test_frozen_rates_do_not_move_in_the_test_period(events):
    live = anchor.rate_features(events, [("item_id", 20)])
    frozen = anchor.rate_features(events, [("item_id", 20)], frozen_from=anchor.T_TEST)
    before = (events["time_ms"] < anchor.T_TEST).to_numpy()
    np.testing.assert_array_equal(live[before], frozen[before])
    assert frozen[~before].groupby(events.loc[~before, "item_id"]).nunique().to_numpy().max() == 1
