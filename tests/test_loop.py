"""A turn of the loop with people who do not exist, up to the logs that it adds."""

from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI

from pipeline.config import ExposureConfig, UserError
from pipeline.schema import DAY_MS, EventColumns
from pipeline.sequences import store
from serve_app.feedback import turn
from serve_app.feedback.exposures import ServedAnswers
from serve_app.feedback.served_log import ServedLogSettings
from serve_app.feedback.simulated import (
    Crowd,
    action_rates,
    click_chance,
    is_in_fashion,
    visit_server,
    wait_for_rows,
)
from serve_app.history.export import export_events
from serve_app.ranking.rollout import open_events
from serve_app.web.api import make_api
from serve_app.web.settings import ApiLimits
from tests.worlds.own_logs import own_logs
from tests.worlds.recommender import Served
from tests.worlds.web import call

VISITS = 6


def here(api: FastAPI) -> httpx.Client:
    """Posts to the API in this process."""
    return SimpleNamespace(  # pyright: ignore[reportReturnType]
        base_url="", post=lambda path, json: call(api, "POST", path, json=json)
    )


@pytest.mark.parametrize("by_rank", [False, True])
def test_what_is_shown_and_clicked_is_what_the_logs_get(tmp_path: Path, *, by_rank: bool) -> None:
    world = Served(tmp_path)
    folder = str(tmp_path / "served")
    api = make_api(
        world,
        ApiLimits(max_body_bytes=100_000),
        served_log=ServedLogSettings(folder=folder, flush_s=0.1),
    )
    users, items = np.array([3, 4, 5]), np.arange(30)
    rates = {"is_click": np.full(3, 0.3), "is_like": np.full(3, 0.1)}
    crowd = Crowd(users, items, rates, by_rank)
    start_ms = store.read_manifest(world.cfg.sequence_dir).last_event_ms + 1
    times_ms = start_ms + 1000 * np.arange(VISITS)
    visits, names = visit_server(here(api), crowd, times_ms, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    looked, _ = visit_server(here(api), crowd, times_ms[:1], rng, posts=False)
    wait_for_rows(folder, names, 60)
    assert (visits.answers, len(names), looked.clicks) == (VISITS, VISITS, 0)
    assert 0 < visits.clicks < visits.shown <= 10 * VISITS

    cfg = world.cfg
    served = ServedAnswers(folder, ExposureConfig(places=10, wait_h=0.0, max_age_s=1e12))
    log = open_events(cfg.serve, tmp_path)
    done = export_events(cfg.source, cfg.sequences, cfg.run_dir, log, served)
    assert done.num_events == visits.clicks
    assert done.path is not None

    rows = pq.read_table(done.path).to_pandas()
    events = rows.groupby(["user_id", "item_id", "event_time"])["is_click"].max()
    in_fashion = [is_in_fashion(item) for item in events.index.get_level_values("item_id")]
    assert (len(events), events.sum()) == (visits.shown, visits.clicks)
    assert sum(in_fashion) == visits.in_fashion


def test_fashion_moves_clicks_and_not_their_number() -> None:
    chances = [click_chance(item, 0.3) for item in range(5)]
    assert np.mean(chances) == pytest.approx(0.3)
    assert chances == pytest.approx([0.9, 0.15, 0.15, 0.15, 0.15])


def test_people_act_as_often_as_their_users_did() -> None:
    columns = EventColumns(actions=("is_like", "is_click"))
    masks = {"known_mask": [[3, 2], [2], []], "action_mask": [[2, 0], [2], []]}
    table = pa.table(masks, schema=pa.schema(dict.fromkeys(masks, pa.list_(pa.int32()))))
    rates = action_rates(table, columns, ("is_click", "is_like"))
    prior = 20 * 2 / 3
    assert rates["is_click"] == pytest.approx([(1 + prior) / 22, (1 + prior) / 21, 2 / 3])
    assert rates["is_like"] == pytest.approx([0, 0, 0])

    crowd = Crowd(np.arange(3), np.arange(5), rates)
    assert crowd.rates_of(1) == {"is_click": rates["is_click"][1], "is_like": 0}


def test_the_days_of_a_turn_follow_the_logs(tmp_path: Path) -> None:
    cfg = Served(tmp_path).cfg
    last_ms = store.read_manifest(cfg.sequence_dir).last_event_ms
    split, start_ms = turn.next_days(last_ms)
    assert start_ms - DAY_MS <= last_ms < start_ms
    assert (split.val_ms, split.test_ms) == (
        start_ms + 3 * DAY_MS,
        start_ms + 4 * DAY_MS,
    )
    with pytest.raises(UserError, match=r"docs/guide/loop\.md"):
        turn.refuse_real_logs(own_logs(tmp_path).source.kind)
