"""The page for people: what it is told, who may see it, and what a browser makes of it."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI
from PIL import Image
from playwright.sync_api import Browser, Locator, expect

from jobs.serve import open_page
from pipeline.config import ConfigError, ServeConfig, UserError
from pipeline.index.catalogue import PREFIX, Catalogue
from pipeline.model.artifact import load_model
from serve_app import deployment
from serve_app.page.catalogue import ItemCatalogue, check_columns
from serve_app.page.showcase import Showcase
from serve_app.ranking.ranker import Ranker
from serve_app.ranking.rollout import CANARY, CHAMPION, Rollout
from serve_app.schemas import Event, EventsRequest
from serve_app.web.api import make_api
from serve_app.web.page.routes import FILE_PATHS, PageSettings
from serve_app.web.protection import ApiKeys
from serve_app.web.settings import ApiAccess, ApiLimits
from tests.support.browser import Visit, listening, running_browser
from tests.worlds.recommender import Served
from tests.worlds.tiny import NOT_A_USER, save_tiny_model
from tests.worlds.web import Fixed, call, hashed

# Where pictures of the page are left: PAGE_SCREENSHOTS=docs/images, of a server that runs at
# PAGE_URL or of this module's own.
SCREENSHOTS = os.environ.get("PAGE_SCREENSHOTS")
HOSTILE = '<img src=x onerror="document.title=1">'
HOSTILE_ITEM = 2  # the most popular one


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    served = Served(tmp_path_factory.mktemp("page"))
    index = served.ranker.index
    assert index is not None
    table, name = index.catalogue.table, f"{PREFIX}name"
    titles = table[name].to_pylist()
    titles[index.catalogue.item_ids.tolist().index(HOSTILE_ITEM)] = HOSTILE
    table = table.set_column(table.column_names.index(name), name, pa.array(titles))
    served.ranker.index = replace(index, catalogue=Catalogue(table))
    return served


@pytest.fixture(scope="module")
def api(served: Served) -> FastAPI:
    return make_api(
        served, ApiLimits(max_body_bytes=100_000, max_wait_s=60, timeout_s=60), page=PageSettings()
    )


@pytest.fixture(scope="module")
def url(api: FastAPI) -> Iterator[str]:
    with listening(api) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens an address; at the end no visit may have had an error."""
    visits: list[Visit] = []

    def go(address: str, **options) -> Visit:
        visits.append(Visit(browser, **options))
        visits[-1].page.goto(address)
        return visits[-1]

    yield go
    for one in visits:
        one.close()


# What the page is told -----------------------------------------------------------


def test_it_begins_with_users_of_many_and_few_events(served: Served, api: FastAPI) -> None:
    start = call(api, "POST", "/page/start", json={}).json()
    rows = {row["user_id"]: row for row in served.table.to_pylist()}
    num_timed = {user: row["order_only"].count(False) for user, row in rows.items()}
    users = [user["user_id"] for user in start["users"]]
    chosen = [num_timed[user] for user in users]
    assert len(set(users)) == 5
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] == sorted(num_timed.values())[-2], "of 24 users the longest is too rare"
    totals = [len(rows[user]["item_id"]) + rows[user]["first_position"] for user in users]
    assert [user["num_events"] for user in start["users"]] == totals

    # the logs end in 2022, and so does the page's present
    newest = max(max(row) for row in served.table["event_time"].to_pylist())
    assert start["is_past"]
    assert 0 < start["clock_ms"] - newest <= 60_000
    assert len(set(start["candidates"])) == 20
    popular = served.ranker.maps.popular_items(10).tolist()
    assert start["candidates"][:10] == popular


def test_a_timeline_has_posted_events_and_order_only_rows_without_a_time(
    served: Served, api: FastAPI
) -> None:
    (row,) = [row for row in served.table.to_pylist() if row["user_id"] == 1]
    newest = max(row["event_time"])
    event = Event(user_id=1, item_id=7, event_time=newest + 5, actions={"is_like": True})
    served.rollout.append_events([EventsRequest(events=[event])])

    timeline = call(api, "POST", "/page/user", json={"user_id": 1}).json()
    assert [one["item_id"] for one in timeline["rows"]] == [*row["item_id"], 7]
    assert timeline["num_events"] == len(row["item_id"]) + 1 + row["first_position"]
    times = []
    for time, is_hidden in zip(row["event_time"], row["order_only"], strict=True):
        times.append(None if is_hidden else time)
    assert [one["event_time"] for one in timeline["rows"]] == [*times, newest + 5]
    assert timeline["rows"][-1]["actions"] == {"is_like": True}
    assert timeline["rows"][-1]["watch_ms"] is None
    assert {fact["item_id"] for fact in timeline["items"]} == {*row["item_id"], 7}

    nobody = call(api, "POST", "/page/user", json={"user_id": NOT_A_USER}).json()
    assert (nobody["unknown_user"], nobody["rows"], nobody["num_events"]) == (True, [], 0)
    refused = call(api, "POST", "/page/user", json={"user_id": "1"})
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["body", "user_id"]


def test_popularity_is_the_share_of_items_that_were_shown_less_often(served: Served) -> None:
    maps = replace(
        served.ranker.maps,
        item_ids=np.array([10, 11, 12, 13]),
        item_count=np.array([0, 1, 0, 5, 1]),
        item_codes=np.array([[0], [1], [0], [2], [3]], np.int32),
    )
    codes = np.array([10, 11, 12, 99])
    facts = ItemCatalogue(maps, None, None).describe(codes, codes.tolist())
    assert [fact.percentile for fact in facts] == [50, None, 87.5, None]
    assert [fact.num_shown for fact in facts] == [1, 0, 5, 0]
    assert [fact.is_known for fact in facts] == [True, False, True, False]


def test_columns_that_the_item_table_lacks_are_refused_before_the_start(served: Served) -> None:
    settings = ServeConfig(page_title_column="headline")
    with pytest.raises(UserError, match=r"serve\.page_title_column.*'headline'"):
        check_columns(served.cfg.sequence_dir, settings)


# Who may see it --------------------------------------------------------------------


def test_by_itself_it_is_there_for_this_machine_alone(tmp_path: Path) -> None:
    keys = {"api_keys_file": str(tmp_path / "keys")}
    assert deployment.has_page(ServeConfig())
    assert not deployment.has_page(ServeConfig(host="0.0.0.0"))
    assert not deployment.has_page(ServeConfig(**keys))
    assert deployment.has_page(ServeConfig(page="on", **keys))
    assert not deployment.has_page(ServeConfig(page="off"))

    api = make_api(Fixed(), ApiLimits(max_body_bytes=1000))
    assert [call(api, "GET", path).status_code for path in FILE_PATHS] == [404] * len(FILE_PATHS)
    assert call(api, "POST", "/page/start", json={}).status_code == 404


def test_with_keys_the_files_are_open_and_what_they_ask_for_is_not(
    served: Served, tmp_path: Path
) -> None:
    hashes = tmp_path / "keys"
    hashes.write_text(f"{hashed('a-key')} somebody\n")
    keys = ApiKeys(hashes)
    api = make_api(
        served, ApiLimits(max_body_bytes=1000), access=ApiAccess(keys=keys), page=PageSettings()
    )
    assert [call(api, "GET", path).status_code for path in FILE_PATHS] == [200] * len(FILE_PATHS)
    assert "<html data-keys " in call(api, "GET", "/").text
    assert call(api, "POST", "/page/start", json={}).status_code == 401
    assert call(api, "POST", "/page/start", "a-key", json={}).status_code == 200
    without_page = make_api(served, access=ApiAccess(keys=keys))
    assert call(without_page, "GET", "/").status_code == 401

    # nobody is shown as an example
    limits = replace(served.ranker.limits, api_keys_file=str(hashes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.ranker, "limits", limits)
        assert Showcase(served.rollout).start().users == []


def test_nothing_comes_from_elsewhere_but_pictures_from_named_hosts() -> None:
    host = "https://img.example.com"
    settings = ServeConfig(page_picture_column="cover", page_picture_hosts=(host,))
    for wrong in ({"page_picture_hosts": ("https://a.example/; script-src *",)}, {}):
        with pytest.raises(ConfigError, match=r"serve\.page_picture_hosts"):
            ServeConfig(page_picture_column="cover", **wrong)

    page = PageSettings.model_validate(deployment._page(settings))
    answer = call(make_api(Fixed(), ApiLimits(max_body_bytes=1000), page=page), "GET", "/")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert f"img-src 'self' {host};" in policy
    # the page itself names no other host, and has nothing inline
    assert "://" not in answer.text
    assert " style=" not in answer.text
    assert re.findall(r"<script(?![^>]* src=)", answer.text) == []


def test_the_job_opens_it_where_there_is_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    open_page("http://127.0.0.1:1")
    assert opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    open_page("http://127.0.0.1:1")
    assert opened == ["http://127.0.0.1:1"]


# In a browser ----------------------------------------------------------------------


def rows(visit: Visit) -> Locator:
    return visit.page.locator(".items > li")


def shown_items(visit: Visit, list_number: int = 0) -> list[int]:
    found = visit.page.locator(".items").nth(list_number).locator("> li")
    return [int(item) for item in found.evaluate_all("all => all.map(one => one.dataset.item)")]


def choose_user(visit: Visit, user_id: int) -> None:
    visit.page.fill("#user", str(user_id))
    visit.page.press("#user", "Enter")
    expect(visit.page.locator("#news")).to_contain_text(f"User {user_id}: 20 items ranked in")


def test_a_click_is_kept_and_the_list_sorts_itself_anew(served: Served, url: str, visit) -> None:
    here = visit(url)
    choose_user(here, 0)
    before = shown_items(here)
    item = before[2]
    rows(here).nth(2).get_by_role("button", name="click").click()
    news = here.page.locator("#news.moved")
    expect(news).to_contain_text("Event kept in")

    # in the store, as what was shown then
    (body,) = here.posted("/v1/events")
    (event,) = body["events"]
    assert (event["user_id"], event["item_id"]) == (0, item)
    assert event["actions"] == {"is_click": True, "is_like": False}
    shown_at = here.posted("/v1/rank")[-2]["request_time_ms"]
    assert here.posted("/v1/rank")[-2]["trial_key"] == "page-0"
    assert event["event_time"] == shown_at
    assert [one.item_id for one in served.ranker.store.log.of_user(0)] == [item]

    # the list is that of the server, and says what moved
    asked = here.posted("/v1/rank")[-1]
    answer = httpx.post(f"{url}/v1/rank", json=asked, timeout=60).json()
    after = shown_items(here)
    assert after == [answer["item_ids"][place] for place in answer["order"]]
    assert after != before
    moved = sum(one != other for one, other in zip(before, after, strict=True))
    assert f"{moved} of 20 changed places" in news.inner_text()
    place = after.index(item) + 1
    said = "It stays in place 3" if place == 3 else f"It went from place 3 to {place}"
    assert said in news.inner_text()
    changes = {}
    for place, change in enumerate(rows(here).locator(".change").all_inner_texts()):
        changes[after[place]] = int(change.replace("▲", "+").replace("▼", "-") or 0)
    assert changes == {one: before.index(one) - after.index(one) for one in before}

    # a like of the same item is added to the event, and both are on the timeline
    mine = here.page.locator(f'.items > li[data-item="{item}"]')
    mine.get_by_role("button", name="like").click()
    expect(mine.get_by_role("button", name="like")).to_have_attribute("aria-pressed", "true")
    (event,) = here.posted("/v1/events")[-1]["events"]
    assert event["event_time"] == shown_at
    assert len(served.ranker.store.log.of_user(0)) == 1
    newest = here.page.locator("#timeline li").first
    expect(newest.locator(".mark.done")).to_have_text(["click", "like"])


def test_it_is_usable_with_the_keyboard_alone(url: str, visit) -> None:
    here = visit(url)
    expect(here.page.locator("#news")).to_contain_text("20 items ranked in")
    keys = here.page.keyboard

    # past the controls by the link that Tab shows first, then tab, row and act
    keys.press("Tab")
    expect(here.page.locator(".skip")).to_be_focused()
    keys.press("Enter")
    expect(here.page.locator("#lists")).to_be_focused()
    keys.press("Tab")
    expect(here.page.get_by_role("tab", name="Ranked items")).to_be_focused()
    keys.press("ArrowRight")
    expect(here.page.get_by_role("tab", name="Recommended")).to_have_attribute(
        "aria-selected", "true"
    )
    keys.press("ArrowLeft")
    expect(here.page.locator("#panel h2")).to_contain_text("Ranked items, version 1")
    for key in ("Tab", "Tab", "ArrowDown"):
        keys.press(key)
    expect(rows(here).nth(1).get_by_role("button", name="like")).to_be_focused()

    # the focus goes along with the row that moves
    item = shown_items(here)[1]
    keys.press("Enter")
    expect(here.page.locator("#news.moved")).to_contain_text("Event kept in")
    mine = here.page.locator(f'.items > li[data-item="{item}"]')
    expect(mine.get_by_role("button", name="like")).to_be_focused()
    assert here.page.get_by_role("status").filter(has_text="Event kept in").count() == 1


def test_a_past_moment_is_ranked_as_it_was(served: Served, url: str, visit) -> None:
    here = visit(url)
    choose_user(here, 6)
    (row,) = [row for row in served.table.to_pylist() if row["user_id"] == 6]
    times = sorted(set(row["event_time"]))
    here.page.focus("#moment")
    here.page.keyboard.press("Home")
    expect(here.page.locator("#news")).to_contain_text("As of")
    asked = here.posted("/v1/rank")[-1]
    assert asked["request_time_ms"] == times[0]
    assert "0 events of history" in here.page.locator("#panel .list").inner_text()

    # with what was shown then, and nothing to do about it
    pairs = zip(row["item_id"], row["event_time"], strict=True)
    then = {item for item, time in pairs if time == times[0]}
    marked = here.page.locator(".items > li").filter(has_text="shown next")
    assert {int(one.get_attribute("data-item") or -1) for one in marked.all()} == then
    expect(here.page.locator(".items [data-act=skip]").first).to_be_hidden()
    assert here.page.locator("#timeline .later").count() == len(row["item_id"])

    here.page.keyboard.press("End")
    expect(here.page.locator("#news")).to_contain_text("Now:")
    expect(here.page.locator(".items [data-act=skip]").first).to_be_visible()


def test_a_typed_history_is_sent_along_and_kept_nowhere(url: str, visit) -> None:
    here = visit(url)
    here.page.click("#typed summary")
    here.page.fill("#rows", "5 click\n9")
    here.page.get_by_role("button", name="Rank for it").click()
    expect(here.page.locator("#panel .list")).to_contain_text("2 events of history")
    rows(here).nth(0).get_by_role("button", name="skip").click()
    expect(here.page.locator("#panel .list")).to_contain_text("3 events of history")
    asked = here.posted("/v1/rank")[-1]
    assert "user_id" not in asked
    assert [one["item_id"] for one in asked["history"][:2]] == [5, 9]
    assert [one["actions"]["is_click"] for one in asked["history"]] == [True, False, False]
    assert here.posted("/v1/events") == []

    here.page.fill("#rows", "5 bought")
    here.page.get_by_role("button", name="Rank for it").click()
    expect(here.page.locator("#news.error")).to_contain_text("“bought” is no action: click, like")


def test_recommended_items_say_why_they_are_there(served: Served, url: str, visit) -> None:
    here = visit(url)
    choose_user(here, 8)
    here.page.get_by_role("tab", name="Recommended").click()
    expect(here.page.locator("#panel h2")).to_contain_text("Recommended, version 1")
    (row,) = [row for row in served.table.to_pylist() if row["user_id"] == 8]
    assert set(shown_items(here)).isdisjoint(row["item_id"])
    first = rows(here).first
    first.get_by_role("button", name="why?").click()
    expect(first.locator(".why")).to_contain_text("Nearest in the history")
    expect(first.locator(".why")).to_contain_text("points of click.")
    expect(first.locator(".why")).to_contain_text("Rates of click that the model reads: item ")
    first.get_by_role("button", name="click").click()
    expect(here.page.locator("#news.moved")).to_contain_text("Event kept in")


def test_a_popular_list_shows_the_counts_that_it_is_in_the_order_of(
    served: Served, url: str, visit
) -> None:
    here = visit(url)
    choose_user(here, NOT_A_USER)
    here.page.get_by_role("tab", name="Recommended").click()
    expect(here.page.locator("#panel .list")).to_contain_text("the popular list")

    index = served.ranker.index
    assert index is not None
    counts = index.catalogue.popularity.tolist()
    by_item = dict(zip(index.catalogue.item_ids.tolist(), counts, strict=True))
    expected = [by_item[item] for item in shown_items(here)]
    columns = here.page.locator(".items > li .score.order")
    assert [int(text) for text in columns.locator(".number").all_inner_texts()] == expected
    assert expected == sorted(expected, reverse=True)
    assert set(columns.locator(".task").all_inner_texts()) == {"popularity"}


def test_what_an_item_is_called_is_text(url: str, visit) -> None:
    here = visit(url)
    choose_user(here, 10)
    mine = here.page.locator(f'.items > li[data-item="{HOSTILE_ITEM}"]')
    expect(mine.locator(".title")).to_have_text(HOSTILE)
    assert here.page.title() == "Ranking"


def test_champion_and_canary_stand_side_by_side(
    served: Served, tmp_path: Path, visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model(served.cfg, tmp_path / "second", seed=1)
    second = Ranker(load_model(folder), served.ranker.store, 2, "tiny", served.ranker.limits)
    rankers = {CHAMPION: served.ranker, CANARY: second}
    trial = Rollout(rankers, {CHAMPION: "", CANARY: ""}, 0.01, served.counts)
    monkeypatch.setattr(served, "rollout", trial)
    with listening(
        make_api(served, ApiLimits(max_body_bytes=100_000, max_wait_s=60), page=PageSettings())
    ) as url:
        here = visit(url)
        choose_user(here, 12)
        titles = here.page.locator("#panel h2").all_inner_texts()
        assert titles == ["champion, version 1", "canary, version 2"]
        assert set(shown_items(here, 0)) == set(shown_items(here, 1))
        assert shown_items(here, 0) != shown_items(here, 1)

        # one event for both
        rows(here).nth(1).get_by_role("button", name="skip").click()
        expect(here.page.locator("#news.moved")).to_contain_text("Event kept in")
        assert len(here.posted("/v1/events")) == 1
        notes = here.page.locator("#panel .list > p").all_inner_texts()
        assert notes[0].split(" ·")[0] == notes[1].split(" ·")[0]


def test_a_server_with_keys_is_asked_after_one_is_given(
    served: Served, tmp_path: Path, visit
) -> None:
    hashes = tmp_path / "keys"
    hashes.write_text(f"{hashed('a-key')} somebody\n")
    api = make_api(
        served,
        ApiLimits(max_body_bytes=100_000, max_wait_s=60),
        access=ApiAccess(keys=ApiKeys(hashes)),
        page=PageSettings(),
    )
    with listening(api) as url:
        here = visit(url)
        assert here.requests == []
        here.page.fill("#key", "a-key")
        here.page.keyboard.press("Enter")
        expect(here.page.locator("#news")).to_contain_text("items ranked in")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_400_pixels_are_enough(url: str, visit, scheme: str) -> None:
    here = visit(url, width=400, scheme=scheme)
    choose_user(here, 0)
    for summary in here.page.locator("summary").all():
        summary.click()
    rows(here).first.get_by_role("button", name="why?").click()
    assert here.page.evaluate("document.documentElement.scrollWidth") <= 400
    ground = here.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")


@pytest.mark.skipif(SCREENSHOTS is None, reason="PAGE_SCREENSHOTS is not set")
def test_pictures_for_the_documents(url: str, visit) -> None:
    """The page after a click, wide and narrow; small enough to be committed."""
    assert SCREENSHOTS is not None
    for name, width, scheme in (("page", 1280, "light"), ("page-narrow", 400, "dark")):
        here = visit(os.environ.get("PAGE_URL", url), width=width, scheme=scheme)
        expect(here.page.locator("#news")).to_contain_text("Now click, like or skip one")
        rows(here).nth(2).get_by_role("button", name="click").click()
        expect(here.page.locator("#news.moved")).to_contain_text("Event kept in")
        second = rows(here).nth(1)
        second.get_by_role("button", name="why?").click()
        expect(second.locator(".why")).to_contain_text("that the model reads")
        # a phone shows the list alone
        here.page.locator("body" if width > 400 else "#lists").evaluate(
            "one => one.scrollIntoView()"
        )
        path = Path(SCREENSHOTS) / f"{name}.png"
        here.page.screenshot(path=path)
        few_colours = Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        few_colours.save(path, optimize=True)  # a third of the bytes
        assert path.stat().st_size < 200_000
