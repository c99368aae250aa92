"""One turn of the loop on a demo's run, with people who do not exist.

    served → clicked → exported → appended → trained from the champion → gate → served
                                                              └ on trial, judged by clicks ┘

One item in five is in fashion, which no earlier log says. At the end the lists of both champions
are held against each other.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np

from pipeline.config import (
    CanaryConfig,
    ExposureConfig,
    RunConfig,
    SequenceConfig,
    ServeConfig,
    SourceConfig,
    SplitConfig,
    UserError,
)
from pipeline.logs import live_log_dir
from pipeline.schema import DAY_MS, EventColumns
from pipeline.sequences import store
from pipeline.tracking import Decision, PinnedModel, RowsAtHand, Tracker
from serve_app import deployment
from serve_app.feedback.exposures import ServedAnswers, write_mark
from serve_app.feedback.simulated import (
    SHOWN,
    Crowd,
    Visits,
    action_rates,
    visit_server,
    wait_for_rows,
)
from serve_app.feedback.trial import judge_canary, log_verdict, promote_canary
from serve_app.feedback.verdict import verdict_lines
from serve_app.history.export import export_events
from serve_app.load_test import known_ids
from serve_app.ranking.rollout import open_events
from serve_app.replay import open_client

TRAINED, DAYS = 3, 5  # three days are learned, the fourth decides, the fifth is the test
FLUSH_S = 2.0
WRITTEN_S = 60.0  # longest wait for the served log

TRIAL_SHARE = 0.5
MAX_SLOWER = 5.0  # both versions share two cores with the people who do not exist

# whether a registered version becomes champion, by the settings of the turn and its rows
Decide = Callable[[RunConfig, int, RowsAtHand], Decision]


class NextChampion(Protocol):
    """The chain from the logs to a served champion, by the settings of the turn; its summary."""

    def __call__(self, cfg: RunConfig, *, decide: Decide | None) -> dict[str, Any]: ...


def run_turn(
    cfg: RunConfig,
    tracker: Tracker,
    dashboard_url: str,
    visits: int,
    find_next: NextChampion,
    promote_if: str | None = None,
) -> dict[str, Any]:
    """Serve the champion to `visits` visitors, and `find_next` from what came of it; returns the
    summary of that, with the share of what was recommended that is in fashion, before and after.

    With `promote_if`, a task, the next version is on trial for a day first.

    Raises:
        UserError: the run has logs of its user's own, or no champion.
    """
    split, start_ms = next_days(store.read_manifest(cfg.sequence_dir).last_event_ms)
    cfg = replace(cfg, split=split, serve=note_all(cfg.serve, cfg.tasks))
    champion: PinnedModel = tracker.find_champion()
    _print_step(1, f"version {champion.version} recommends")
    url = deployment.deploy_model(cfg.folders, cfg.serve, dashboard_url, champion)
    before = simulate_days(cfg, url, start_ms, DAYS, visits)
    print(f"answers={before.answers} shown={before.shown} clicks={before.clicks}")

    _print_step(2, "what was served and clicked goes into the logs")
    export_answers(cfg.source, cfg.sequences, cfg.serve, cfg.run_dir)

    _print_step(3, "the next champion")
    days_end = start_ms + DAYS * DAY_MS
    decide = None
    if promote_if is not None:
        trial = partial(try_version, tracker=tracker, dashboard_url=dashboard_url)
        decide = partial(trial, start_ms=days_end, visits=visits, task=promote_if)
        days_end += DAY_MS
    summary = find_next(cfg, decide=decide)

    _print_step(4, f"version {tracker.find_champion().version} recommends")
    by_rank = not cfg.index.enabled
    crowd = find_crowd(cfg.sequence_dir, cfg.source.events, cfg.tasks, by_rank=by_rank)
    with open_client(cfg.serve, url) as client:
        after = look_at_lists(client, crowd, days_end, visits // DAYS, cfg.seed)
    print(
        f"in fashion, of what was recommended: {before.fashion_share:.3f} before, "
        f"{after.fashion_share:.3f} after (.2 by chance)"
    )
    return summary | {
        "fashion_before": before.fashion_share,
        "fashion_after": after.fashion_share,
    }


def try_version(
    cfg: RunConfig,
    version: int,
    rows: RowsAtHand,
    *,
    tracker: Tracker,
    dashboard_url: str,
    start_ms: int,
    visits: int,
    task: str,
) -> Decision:
    """Let a version answer half of the people for a day, and make it champion if they do more of
    `task` with it and the gate lets it pass, as `jobs.verdict --promote-if` does it.
    """
    champion = tracker.find_champion()
    if champion.version == version:
        return tracker.promote_version(version)  # it has nothing to be tried beside

    print(f"== trial of version {version} beside {champion.version}", flush=True)
    canary = CanaryConfig(version=version, share=TRIAL_SHARE)
    cfg = replace(cfg, serve=replace(cfg.serve, canary=canary))
    url = deployment.deploy_model(cfg.folders, cfg.serve, dashboard_url, champion)
    simulate_days(cfg, url, start_ms, 1, visits)
    export_answers(cfg.source, cfg.sequences, cfg.serve, cfg.run_dir)  # for the next turn

    verdict = judge_canary(cfg.serve, cfg.tasks, cfg.run_dir, version, MAX_SLOWER)
    print("\n".join(verdict_lines(verdict)))
    log_verdict(tracker, verdict)
    return promote_canary(tracker, verdict, task, rows)


def _print_step(number: int, what: str) -> None:
    print(f"== loop {number}/4 {what}", flush=True)


def refuse_real_logs(kind: str) -> None:
    """Simulated clicks among a user's own logs would be false for good."""
    if kind == "parquet":
        raise UserError(
            "source.kind: these are logs of your own, and --loop would add simulated clicks to "
            "them; docs/guide/loop.md has the same turn for a server with real users"
        )


def next_days(last_event_ms: int) -> tuple[SplitConfig, int]:
    """The periods of a turn over the days after the logs' last event, and their beginning (ms).

    logs end on        day 6, 14:00
    turn begins on     day 7, 00:00     trained 7 8 9, t_val 10, t_test 11
    """
    start_ms = (last_event_ms // DAY_MS + 1) * DAY_MS
    split = SplitConfig(
        t_val=_iso_time(start_ms + TRAINED * DAY_MS),
        t_test=_iso_time(start_ms + (TRAINED + 1) * DAY_MS),
    )
    return split, start_ms


def note_all(serve: ServeConfig, tasks: tuple[str, ...]) -> ServeConfig:
    """The server of a turn: every answer goes to the served log, and what was shown is exported."""
    # simulated people act at once, at a time that is long over or to come
    exposures = ExposureConfig(places=SHOWN, wait_h=0.0, max_age_s=1e12, actions=tasks)
    return replace(
        serve,
        served_log=True,
        served_share=1.0,
        served_places=max(SHOWN, serve.served_places),
        served_flush_s=FLUSH_S,
        exposures=exposures,
    )


def _iso_time(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat()


def simulate_days(cfg: RunConfig, url: str, start_ms: int, days: int, visits: int) -> Visits:
    """Some days of visits; all that was served is in the served log when it returns."""
    # what was asked before, to compare or to look, was shown to nobody
    write_mark(live_log_dir(cfg.run_dir), int(time.time() * 1000))

    rng = np.random.default_rng(cfg.seed)
    times_ms = start_ms + np.sort(rng.choice(days * DAY_MS, visits, replace=False))
    by_rank = not cfg.index.enabled
    crowd = find_crowd(cfg.sequence_dir, cfg.source.events, cfg.tasks, by_rank=by_rank)
    with open_client(cfg.serve, url) as client:
        done, names = visit_server(client, crowd, times_ms, rng)
    wait_for_rows(deployment.served_folder(cfg.serve, cfg.run_dir), names, WRITTEN_S)
    return done


def look_at_lists(
    client: httpx.Client, crowd: Crowd, start_ms: int, visits: int, seed: int
) -> Visits:
    """What is recommended on the day after."""
    rng = np.random.default_rng(seed)
    times_ms = start_ms + np.sort(rng.choice(DAY_MS, visits, replace=False))
    done, _ = visit_server(client, crowd, times_ms, rng, posts=False)
    return done


def find_crowd(
    sequence_dir: Path, columns: EventColumns, tasks: Sequence[str], *, by_rank: bool
) -> Crowd:
    """The users of the published sequences, who do the `tasks` as often as they did."""
    users, items = known_ids(sequence_dir)
    rates = action_rates(store.read_sequences(sequence_dir), columns, tasks)
    return Crowd(users, items, rates, by_rank=by_rank)


def export_answers(
    source: SourceConfig, sequences: SequenceConfig, serve: ServeConfig, run_dir: Path
) -> None:
    """As `jobs.export_events` does it."""
    assert serve.exposures is not None
    served = ServedAnswers(deployment.served_folder(serve, run_dir), serve.exposures)
    log = open_events(serve, run_dir / "serving")
    done = export_events(source, sequences, run_dir, log, served)
    print(
        f"file={done.path} events={done.num_events} exposures={done.num_exposures} "
        f"left_out={json.dumps(done.left_out)}"
    )
