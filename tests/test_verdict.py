"""A canary judged on simulated users: no false alarms however often one looks, and a planted
difference is found.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import RunConfig, RunFolders, ServeConfig, UserError
from pipeline.tracking import Decision, RowsAtHand
from serve_app import deployment
from serve_app.feedback import turn
from serve_app.feedback.served_rows import FIXED
from serve_app.feedback.verdict import UnitCounts, compare_counts, judge_trial, render_page
from serve_app.ranking.rollout import in_share, open_events
from serve_app.schemas import Event
from tests.worlds.tiny import tiny_config

NUM_USERS, NUM_DAYS = 400, 25


def simulate(rng: np.random.Generator, gain: float, num_users: int = NUM_USERS) -> list[str]:
    """What the verdict says on each day of a trial: users come back and differ in how much they
    click; a fifth of them has the canary.
    """
    tastes = rng.beta(2, 8, num_users)
    habits = rng.gamma(1.0, 1.0, num_users)
    has_canary = rng.random(num_users) < 0.2
    rates = np.minimum(np.where(has_canary, tastes * (1 + gain), tastes), 1.0)
    answers, clicks = np.zeros(num_users), np.zeros(num_users)

    said = []
    for _ in range(NUM_DAYS):
        today = rng.poisson(habits)
        answers += today
        clicks += rng.binomial(today, rates)
        counts = []
        for role in (~has_canary, has_canary):
            seen = role & (answers > 0)
            counts.append(UnitCounts(answers[seen], clicks[seen]))
        said.append(compare_counts("click", *counts).says)
    return said


def test_no_more_than_one_false_alarm_in_twenty_trials_that_are_read_every_day() -> None:
    rng = np.random.default_rng(0)
    trials = [simulate(rng, 0.0) for _ in range(200)]  # 5,000 days of peeking
    alarmed = sum(set(said) != {"undecided"} for said in trials)
    assert alarmed <= 0.05 * len(trials)


def test_a_planted_difference_is_found_with_its_sign() -> None:
    rng = np.random.default_rng(1)
    assert sum(simulate(rng, 0.8, 2000)[-1] == "better" for _ in range(20)) >= 18
    assert sum(simulate(rng, -0.7, 2000)[-1] == "worse" for _ in range(20)) >= 18


def test_an_outcome_that_few_units_have_not_had_yet_is_no_alarm() -> None:
    """One like in a thousand answers, and a twentieth of the users has the canary."""
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(200):
        champion = UnitCounts(np.ones(19_000), rng.binomial(1, 0.001, 19_000).astype(float))
        canary = UnitCounts(np.ones(1_000), rng.binomial(1, 0.001, 1_000).astype(float))
        alarms += compare_counts("like", champion, canary).says != "undecided"
    assert alarms <= 0.05 * 200

    # what is not chance is seen
    none = UnitCounts(np.ones(20_000), np.zeros(20_000))
    some = UnitCounts(np.ones(20_000), rng.binomial(1, 0.005, 20_000).astype(float))
    assert compare_counts("like", some, none).says == "worse"
    assert compare_counts("like", none, some).says == "better"


def served_rows(answers: list[tuple[int, str, str, int, int]], ms: dict[str, float]) -> pa.Table:
    rows = []
    for request_id, unit, role, version, served_at in answers:
        for place in range(2):
            row = {"request_id": str(request_id), "unit": unit, "role": role, "version": version}
            rows.append(row | {"served_at": served_at, "place": place, "ranker_ms": ms[role]})
    return pa.Table.from_pylist(rows, schema=FIXED)


def test_outcomes_find_the_answer_that_they_came_of() -> None:
    ms = {"champion": 5.0, "canary": 6.0}
    answers = [(0, "old", "champion", 1, 10), (1, "early", "champion", 2, 20)]
    for i in range(40):
        answers += [(100 + i, f"a{i}", "champion", 2, 50), (200 + i, f"b{i}", "canary", 3, 50)]
    answers.append((300, "a0", "champion", 2, 50))

    events = []
    for request_id in [1, *range(100, 110), *range(200, 235), 300, 999]:
        did = {"click": True, "like": request_id == 300}
        said = {"request_id": str(request_id), "actions": did}
        events.append(Event(user_id=1, item_id=1, event_time=1, **said))
    events.append(Event(user_id=1, item_id=2, event_time=1, actions={"click": True}))

    verdict = judge_trial(served_rows(answers, ms), events, ("click", "like"), 3, 0.5)
    assert verdict is not None
    assert verdict.versions == {"champion": 2, "canary": 3}
    assert verdict.answers == {"champion": 41, "canary": 40}
    assert verdict.units == {"champion": 40, "canary": 40}
    click, like = verdict.tasks
    assert click.champion == pytest.approx(11 / 41)
    assert click.canary == pytest.approx(35 / 40)
    assert (click.says, like.says) == ("better", "undecided")
    assert verdict.reason_against("click") is None
    assert verdict.reason_against("like") == "is not (yet) better at like"
    assert "Canary version 3" in render_page(verdict)
    assert verdict.as_figures()["canary_share"] == pytest.approx(40 / 81)

    assert (verdict.failures.canary, verdict.fails_more) == (0, False)

    # asked again when it is over, whoever is champion since
    later = answers.copy()
    for i in range(40):
        later += [(400 + i, f"b{i}", "champion", 2, 80), (500 + i, f"b{i}", "champion", 3, 90)]
    again = judge_trial(served_rows(later, ms), events, ("click", "like"), 3, 0.5)
    assert again is not None
    assert (again.versions, again.tasks) == (verdict.versions, verdict.tasks)

    # every request of half of the canary's users fails, of some before they saw one answer
    failing = [f"b{i}" for i in range(20)] + [f"c{i}" for i in range(400)]
    drawn = [unit for unit in failing if unit[0] == "b" or in_share(unit, 3, 0.5)]
    rows = [{"unit": unit, "served_at": 70, "failure": "Unavailable"} for unit in drawn]
    early = {"unit": "b0", "served_at": 5, "failure": "Unavailable"}  # before the trial
    failed = pa.Table.from_pylist([*rows, early], schema=FIXED)
    both = pa.concat_tables([served_rows(answers, ms), failed])
    half = judge_trial(both, events, ("click",), 3, 0.5)
    assert half is not None
    assert half.failures.canary == pytest.approx(20 / 60)
    drawn_too = judge_trial(both, events, ("click",), 3, 0.5, share=0.5)
    assert drawn_too is not None
    assert drawn_too.failures.canary > 0.7
    assert drawn_too.reason_against("click") == "leaves more requests without an answer"
    assert "without an answer" in render_page(drawn_too)

    slow = served_rows(answers, ms | {"canary": 9.0})
    verdict = judge_trial(slow, events, ("click",), 3, 0.5)
    assert verdict is not None
    assert verdict.reason_against("click") == "is too slow: p99 9.0 ms, 5.0 ms"
    assert judge_trial(served_rows(answers, ms), events, ("click",), 4, 0.5) is None


@pytest.mark.parametrize(("clicks", "promoted"), [(35, True), (11, False)])
def test_a_version_on_trial_is_promoted_by_clicks_and_then_by_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, clicks: int, promoted: bool
) -> None:
    """The next version answers half of the people; the gate is asked only if they do more."""
    cfg = tiny_config(tmp_path)
    asked, logged, deployed = [], [], []

    def promote_version(version: int, *, rows: RowsAtHand) -> Decision:
        asked.append((version, rows))
        return Decision(True, "promoted: by the gate")

    tracker = SimpleNamespace(
        find_champion=lambda: SimpleNamespace(version=2),
        promote_version=promote_version,
        import_result=lambda name, figures: logged.append(name),
    )

    def deploy_model(
        folders: RunFolders, serve: ServeConfig, url: str, model: SimpleNamespace
    ) -> str:
        deployed.append((model.version, serve.canary))
        return url

    def simulate_days(cfg: RunConfig, url: str, start_ms: int, days: int, visits: int) -> None:
        answers, events = [], []
        for i in range(40):
            answers += [(i, f"a{i}", "champion", 2, 50), (100 + i, f"b{i}", "canary", 3, 50)]
        for request_id in [*range(10), *range(100, 100 + clicks)]:
            key = {"user_id": request_id, "item_id": 1, "event_time": 1}
            said = {"request_id": str(request_id), "actions": {"is_click": True}}
            events.append(Event(**key, **said))
        open_events(cfg.serve, cfg.run_dir / "serving").append(events)

        folder = Path(deployment.served_folder(cfg.serve, cfg.run_dir))
        folder.mkdir(parents=True)
        rows = served_rows(answers, {"champion": 5.0, "canary": 6.0})
        pq.write_table(rows, folder / "ingress-1-0.parquet")

    monkeypatch.setattr(deployment, "deploy_model", deploy_model)
    monkeypatch.setattr(turn, "simulate_days", simulate_days)
    monkeypatch.setattr(turn, "export_answers", lambda *told: None)
    rows = RowsAtHand({}, lambda folder: {})
    where = {"tracker": tracker, "dashboard_url": "", "start_ms": 0, "visits": 80}
    decision = turn.try_version(cfg, 3, rows, task="is_click", **where)

    ((champion, canary),) = deployed
    assert (champion, canary.version, canary.share) == (2, 3, 0.5)
    assert logged == ["verdict-3"]
    assert (cfg.run_dir / "report" / "verdict.html").exists()
    assert decision.promoted == promoted
    if promoted:
        assert asked == [(3, rows)]
    else:
        assert not asked
        assert decision.reason.endswith("version 3 is not (yet) better at is_click")

    with pytest.raises(UserError, match="no answers of the canary 4"):
        turn.judge_canary(cfg.serve, cfg.tasks, cfg.run_dir, 4, 0.5)
