"""Logs with drifting tastes and with chains over sessions: what is planted, and that the best score
is the best.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.config import ConfigError, RunConfig, UserError
from pipeline.evaluate.metrics import auc, normalised_entropy
from pipeline.evaluate.reachable import Reachable, reachable_task
from pipeline.logs import chains, drifting, import_logs, open_logs
from pipeline.logs.planted import best_log_odds
from pipeline.logs.shown import ShownRows

DRIFTING = {"interests": 12, "categories_per_interest": 6, "phase_rows": 8}
CHAINS = {"categories": 96, "session_rows": 8}
ACTIONS = {"drifting": "taste", "chains": "taken"}


def planted_config(folder: Path, kind: str, **changes: object) -> RunConfig:
    settings = {
        "num_users": 60,
        "num_items": 2000,
        "num_categories": 10,
        "max_history": 400,
        "min_history": 400,
        kind: DRIFTING if kind == "drifting" else CHAINS,
    }
    source = {
        "kind": "synthetic",
        "actions": [ACTIONS[kind]],
        "synthetic": settings | changes,
    }
    return config.from_dict({"runs_dir": str(folder), "source": source, "tasks": [ACTIONS[kind]]})


@pytest.fixture(scope="module", params=["drifting", "chains"])
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    cfg = planted_config(tmp_path_factory.mktemp("planted"), request.param)
    import_logs(cfg)
    return cfg


def read_log(cfg: RunConfig) -> pd.DataFrame:
    """The log with its planted categories from 0, a user's rows in their order."""
    log = pq.read_table(cfg.log_dir / "log").to_pandas()
    category = pq.read_table(cfg.log_dir / "items.parquet")["category"].to_numpy()
    log["category"] = category[log["item_id"]] - cfg.source.synthetic.num_categories
    return log.sort_values(["user_id", "tie_breaker"], ignore_index=True)


def score(cfg: RunConfig, log: pd.DataFrame, newest: int | None) -> np.ndarray:
    action = log[cfg.tasks[0]].to_numpy()
    columns = (log[name].to_numpy() for name in ("user_id", "tie_breaker", "category"))
    return best_log_odds(cfg.source.synthetic, ShownRows(*columns, action), newest)


def test_the_same_seed_gives_the_same_logs(planted: RunConfig, tmp_path: Path) -> None:
    log = read_log(planted)
    assert reachable_task(planted.source, planted.tasks) == planted.tasks[0]
    again, other = (
        replace(planted, runs_dir=str(tmp_path), name=f"seed{n}", seed=n) for n in (0, 1)
    )
    for cfg in (again, other):
        import_logs(cfg)
    assert read_log(again).equals(log)
    assert not read_log(other).equals(log)


def test_no_build_reads_the_best_score(planted: RunConfig) -> None:
    files = open_logs(planted.source, planted.run_dir)
    (best,) = [name for name in pq.read_schema(files.files[0]).names if name.startswith("best.")]
    assert best not in files.columns.values()


def test_rows_have_planted_categories_and_requests_stay_in_a_phase(planted: RunConfig) -> None:
    log, cfg = read_log(planted), planted.source.synthetic
    assert log["category"].between(0, cfg.planted_categories - 1).all()
    assert log["category"].nunique() == cfg.planted_categories
    assert log[planted.tasks[0]].notna().all()
    assert cfg.rows_between_breaks is not None
    phase = log["tie_breaker"] // cfg.rows_between_breaks
    assert (phase.groupby([log["user_id"], log["request_id"]]).nunique() == 1).all()


def test_the_best_score_beats_those_of_shorter_histories(planted: RunConfig) -> None:
    """The longer the history that it reads, the better it is; and it knows how sure it may be."""
    log = read_log(planted)
    late = (log["tie_breaker"] >= 300).to_numpy()
    label = log.loc[late, planted.tasks[0]].to_numpy() > 0
    scores = {newest: score(planted, log, newest)[late] for newest in (16, 64, None)}
    reached = [auc(found, label) for found in scores.values()]
    entropies = [normalised_entropy(found, label) for found in scores.values()]
    assert reached == sorted(reached) and reached[0] < reached[-1] - 0.05
    assert entropies == sorted(entropies, reverse=True)

    chance = 1 / (1 + np.exp(-scores[None]))
    for part in np.array_split(np.argsort(chance), 5):
        spread = np.sqrt((chance[part] * (1 - chance[part])).sum()) / len(part)
        assert abs(chance[part].mean() - label[part].mean()) < 4 * spread


def test_scores_stand_in_the_log_and_are_found_by_their_rows(planted: RunConfig) -> None:
    log = read_log(planted)
    written = log[f"best.{planted.tasks[0]}"].to_numpy()
    np.testing.assert_allclose(score(planted, log, None), written, rtol=1e-9)

    reachable = Reachable(planted.source.synthetic, planted.log_dir)
    wanted = pq.read_table(planted.log_dir / "log").take(np.arange(0, len(log), 7)[::-1])
    np.testing.assert_allclose(
        reachable.scores(wanted), wanted[f"best.{planted.tasks[0]}"].to_numpy(), rtol=1e-9
    )
    shuffled = log.sample(frac=1, random_state=0)
    np.testing.assert_allclose(
        score(planted, shuffled, 32), score(planted, log, 32)[shuffled.index], rtol=1e-9
    )


@pytest.mark.parametrize("newest", [None, 40])
def test_drifting_scores_equal_those_of_a_plain_filter(tmp_path: Path, newest: int | None) -> None:
    cfg = planted_config(tmp_path, "drifting", num_users=2)
    import_logs(cfg)
    log, plan = read_log(cfg), cfg.source.synthetic.drifting
    assert plan is not None
    found = score(cfg, log, newest)
    keep = 1 - 2 * plan.changed_share
    for row in range(350, 400):
        mine = log[log["user_id"] == log["user_id"][row]]
        interest = mine["category"] // plan.categories_per_interest
        phase = mine["tie_breaker"] // plan.phase_rows
        phases = sorted(set(phase[interest == interest[row]]))

        begin = log["tie_breaker"][row] // 4 * 4
        oldest = 0 if newest is None else begin - newest
        liked, at = 0.5, phases[0]
        for _, seen in mine[mine["tie_breaker"].between(oldest, begin - 1)].iterrows():
            if seen["category"] != log["category"][row]:
                continue
            now = seen["tie_breaker"] // plan.phase_rows
            liked = 0.5 + (liked - 0.5) * keep ** (phases.index(now) - phases.index(at))
            told = 0.9 if seen["taste"] else 0.1
            liked, at = liked * told / (liked * told + (1 - liked) * (1 - told)), now
        passed = phases.index(phase[row]) - phases.index(at)
        chance = 0.1 + 0.8 * (0.5 + (liked - 0.5) * keep**passed)
        assert found[row] == pytest.approx(np.log(chance / (1 - chance)))


def test_interests_return_after_short_and_long_times(tmp_path: Path) -> None:
    cfg = planted_config(tmp_path, "drifting", max_history=2000, min_history=2000, num_users=20)
    import_logs(cfg)
    log = read_log(cfg)
    interest = log["category"] // 6
    phases = log.assign(interest=interest, phase=log["tie_breaker"] // 8).drop_duplicates(
        ["user_id", "phase"]
    )
    assert (interest.groupby([log["user_id"], log["tie_breaker"] // 8]).nunique() == 1).all()
    gap = phases.groupby(["user_id", "interest"])["tie_breaker"].diff().dropna()
    assert (gap <= 24).mean() > 0.1
    assert (gap >= 300).mean() > 0.05


def test_tastes_of_an_interest_change_at_its_returns_as_often_as_is_said() -> None:
    plan = config.DriftingConfig(interests=2, categories_per_interest=50, changed_share=0.2)
    owner = np.repeat([0, 1], 300)
    interest = np.tile([0, 1, 1], 200)
    tastes = drifting._tastes(plan, owner, interest, np.random.default_rng(0))
    for user in (0, 1):
        for which in (0, 1):
            mine = tastes[(owner == user) & (interest == which)]
            assert np.mean(mine[1:] != mine[:-1]) == pytest.approx(0.2, abs=0.03)
    assert 0.2 < tastes[0].mean() < 0.8


def test_a_chain_leads_through_all_categories() -> None:
    before = chains.chain_before(96)
    at, seen = 0, []
    for _ in range(96):
        seen.append(at)
        at = before[at]
    assert at == 0 and len(set(seen)) == 96


def test_what_was_taken_in_an_earlier_session_leads_on(tmp_path: Path) -> None:
    cfg = planted_config(tmp_path, "chains", num_users=150)
    import_logs(cfg)
    log, before = read_log(cfg), chains.chain_before(96)
    session = log["tie_breaker"] // 8
    assert not log.assign(session=session).duplicated(["user_id", "session", "category"]).any()

    newest: dict[tuple[int, int], tuple[int, int]] = {}
    outcomes: dict[int, list[int]] = {0: [], 1: []}
    pending: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for row, own in zip(log.itertuples(), session, strict=True):
        ready = [entry for entry in pending if entry[1][0] != own or entry[0][0] != row.user_id]
        newest.update(ready)
        pending = [entry for entry in pending if entry not in ready]
        led = newest.get((row.user_id, int(before[row.category])))
        if led is not None:
            outcomes[led[1]].append(row.taken)
        pending.append(((row.user_id, row.category), (own, row.taken)))
    assert np.mean(outcomes[1]) == pytest.approx(0.8, abs=0.02)
    assert np.mean(outcomes[0]) == pytest.approx(0.2, abs=0.02)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"drifting\.phase_rows must be a multiple of candidates"):
        planted_config(tmp_path, "drifting", drifting=DRIFTING | {"phase_rows": 10})
    with pytest.raises(ConfigError, match=r"alone: at most one of"):
        planted_config(tmp_path, "drifting", chains=CHAINS)
    with pytest.raises(
        ConfigError, match=r"session_rows must be at most source\.synthetic\.chains"
    ):
        planted_config(tmp_path, "chains", chains={"categories": 4, "session_rows": 8})
    with pytest.raises(UserError, match=r"num_items: .* have no item from the start, got 60"):
        import_logs(planted_config(tmp_path, "chains", num_items=60))
