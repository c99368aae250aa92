"""`top_k` and `explain` of a rank request, and what /v1/model says of a model's features."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI

from pipeline.batches.rates import rate_evidence, read_evidence
from serve_app.columns import MEDIA_TYPE
from serve_app.history.published import sequence_row
from serve_app.ranking.explain import affordable_rows, sequences_without_one
from serve_app.web.api import make_api
from serve_app.web.settings import ApiLimits
from tests.worlds.recommender import Served
from tests.worlds.tiny import NOT_A_USER
from tests.worlds.web import call

NOW = 1_651_500_000_000
TASKS = ("is_click", "is_like")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("options"))


@pytest.fixture(scope="module")
def api(served: Served) -> FastAPI:
    return make_api(served, ApiLimits(max_body_bytes=100_000))


def rank(api: FastAPI, **fields: object) -> dict:
    answer = call(api, "POST", "/v1/rank", json={"request_time_ms": NOW} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


# The best alone ------------------------------------------------------------------


def test_the_best_alone_best_first_ties_in_the_order_of_the_request(api: FastAPI):
    # an item twice has one score twice
    asked = [{"item_id": item} for item in (4, 9, 4, 17, 9)]
    full = rank(api, user_id=3, candidates=asked)
    for num in (1, 3, 5, 9):
        best = rank(api, user_id=3, candidates=asked, top_k=num)
        rows = full["order"][:num]
        assert best["candidates"] == rows
        assert best["item_ids"] == [full["item_ids"][row] for row in rows]
        assert best["order"] == list(range(len(rows)))
        for task in TASKS:
            expected = [full["scores"][task][row] for row in rows]
            np.testing.assert_allclose(best["scores"][task], expected, atol=1e-6)

    places = {item: [] for item in (4, 9)}
    for row in full["order"]:
        places.setdefault(full["item_ids"][row], []).append(row)
    assert places[4] == [0, 2]
    assert places[9] == [1, 4]
    assert "candidates" not in full


def test_the_best_alone_as_columns(api: FastAPI):
    head = {"user_id": 3, "request_time_ms": NOW, "top_k": 2, "order_by": "is_like"}
    table = pa.table({"item_id": pa.array([4, 9, 17], pa.int64())})
    table = table.replace_schema_metadata({"rank": json.dumps(head)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)

    headers = {"content-type": MEDIA_TYPE}
    body = sink.getvalue().to_pybytes()
    answer = call(api, "POST", "/v1/rank/arrow", content=body, headers=headers)
    found = pa.ipc.open_stream(answer.content).read_all()
    asked = [{"item_id": item} for item in (4, 9, 17)]
    expected = rank(api, candidates=asked, **head)
    assert found["item_id"].to_pylist() == expected["item_ids"]
    assert found["candidate"].to_pylist() == expected["candidates"]
    assert found["place"].to_pylist() == [0, 1]


@pytest.mark.parametrize(("field", "value"), [("top_k", 0), ("top_k", "2"), ("explain", "yes")])
def test_wrong_options_are_refused(api: FastAPI, field: str, value: object):
    body = {"user_id": 3, "candidates": [{"item_id": 1}], field: value}
    answer = call(api, "POST", "/v1/rank", json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", field]


# Reasons -------------------------------------------------------------------------

HISTORY = [
    {
        "item_id": 5 * place % 60,
        "event_time": NOW - 1000 * (9 - place),
        "actions": {"is_click": place % 2 == 0, "is_like": place % 3 == 0},
        "request_features": {"tab": place % 3},
        "watch_ms": 7000 * place,
    }
    for place in range(8)
]


def test_a_change_is_what_an_answer_without_the_row_shows(api: FastAPI):
    asked = {"user_id": 3, "candidates": [{"item_id": item} for item in (4, 9, 17)]}
    for order_by in TASKS:
        options = {"order_by": order_by, "first_position": 2}
        full = rank(api, history=HISTORY, explain=True, **asked, **options)
        changes = np.zeros((3, 8))
        for left_out in range(8):
            rest = HISTORY[:left_out] + HISTORY[left_out + 1 :]
            without = rank(api, history=rest, **asked, **options)["scores"][order_by]
            changes[:, left_out] = np.subtract(full["scores"][order_by], without)

        explained = full["explanation"]
        assert (explained["rows_tried"], explained["note"]) == (8, None)
        for place, reasons in enumerate(explained["candidates"]):
            rows = [effect["row"] for effect in reasons["history"]]
            found = [effect["change"] for effect in reasons["history"]]
            np.testing.assert_allclose(found, changes[place][rows], atol=2e-6)
            sizes = np.sort(np.abs(changes[place]))[::-1]
            np.testing.assert_allclose(np.abs(found), sizes[:5], atol=2e-6)
            for effect in reasons["history"]:
                row = HISTORY[effect["row"]]
                assert (effect["item_id"], effect["event_time"]) == (
                    row["item_id"],
                    row["event_time"],
                )


def test_reasons_are_of_the_answered_candidates(api: FastAPI):
    asked = [{"item_id": 4}, {"item_id": 10**9}, {"item_id": 9, "request_features": {"tab": 77}}]
    full = rank(api, user_id=3, candidates=asked, explain=True)
    assert [one["unknown"] for one in full["explanation"]["candidates"]] == [
        ["request.tab"],
        ["item_id", "request.tab"],
        ["request.tab"],
    ]
    assert full["explanation"]["rows_tried"] == full["history_length"] > 5

    best = rank(api, user_id=3, candidates=asked, explain=True, top_k=1)["explanation"][
        "candidates"
    ]
    assert len(best) == 1
    assert best[0]["unknown"] == full["explanation"]["candidates"][full["order"][0]]["unknown"]


def test_nobody_has_no_rows_to_leave_out(api: FastAPI):
    answer = rank(api, user_id=NOT_A_USER, candidates=[{"item_id": 4}], explain=True)
    assert answer["explanation"]["rows_tried"] == 0
    assert answer["explanation"]["note"] is None
    assert answer["explanation"]["candidates"][0]["history"] == []


def test_what_is_too_much_is_not_tried_and_said(served: Served, api: FastAPI, monkeypatch):
    assert affordable_rows(100, 20, 1000) == 8
    assert affordable_rows(3, 20, 1000) == 3
    assert affordable_rows(0, 20, 1000) == 0

    asked = {"user_id": 3, "history": HISTORY, "candidates": [{"item_id": 4}]}
    monkeypatch.setattr(
        served.ranker, "limits", replace(served.ranker.limits, max_explain_tokens=25)
    )
    some = rank(api, explain=True, **asked)["explanation"]
    assert some["rows_tried"] == 3
    assert some["note"] == "the newest 3 of 8 rows were tried (serve.max_explain_tokens)"
    monkeypatch.undo()
    every = rank(api, explain=True, **asked)["explanation"]["candidates"][0]["history"]
    changes = {effect["row"]: effect["change"] for effect in every}
    for effect in some["candidates"][0]["history"]:
        assert effect["row"] >= 5
        if effect["row"] in changes:
            assert effect["change"] == pytest.approx(changes[effect["row"]], abs=2e-6)


def test_rates_are_those_that_were_counted():
    known, positive = np.array([[0, 3], [8, 40]]), np.array([[0, 1], [6, 2]])
    base, prior = np.array([0.5, 0.1]), 2.0
    evidence = rate_evidence(np.concatenate([known, positive], axis=1), base, prior)
    rates, rows = read_evidence(evidence, base)
    np.testing.assert_allclose(rates, (positive + prior * base) / (known + prior))
    np.testing.assert_allclose(rows, [3, 40])


def test_an_older_row_moves_up_where_a_newer_one_is_left_out(served: Served):
    columns = served.ranker.store.columns
    flat = {"item_id": np.arange(5), "event_time": np.array([10, 20, 30, 40, 50])}
    row = sequence_row(flat, columns, first_position=7)
    shorter = sequences_without_one(row, 45, num_newest=2, max_history=3)
    assert shorter["item_id"].to_pylist() == [[0, 1, 3], [0, 1, 2]]
    assert shorter["first_position"].to_pylist() == [7, 7]
    shorter = sequences_without_one(row, 45, num_newest=2, max_history=2)
    assert shorter["item_id"].to_pylist() == [[1, 3], [1, 2]]
    assert shorter["first_position"].to_pylist() == [8, 8]


# The features --------------------------------------------------------------------


def test_the_model_page_says_what_the_model_reads(served: Served, api: FastAPI):
    said = {one["name"]: one for one in call(api, "GET", "/v1/model").json()["features"]}
    sizes = served.ranker.maps.vocab_sizes
    for name, size in sizes.items():
        assert said[name]["num_values"] == size - 1
    assert said["user.city"]["kind"] == "categorical"
    assert said["rates.item_tab"]["by"] == ["item_id", "tab"]
    assert said.keys() - sizes.keys() == {f"rates.{name}" for name in served.cfg.features.dense}
