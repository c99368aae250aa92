"""A canary's trial on a run: what was served and posted, judged, and the canary promoted by it.

served log, posted events → verdict → report/verdict.html, .json → gate → champion
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config import ServeConfig, UserError
from pipeline.files import json_text, write_atomically
from pipeline.tracking import Decision, RowsAtHand, Tracker
from serve_app.deployment import served_folder
from serve_app.feedback.served_log import read_served
from serve_app.feedback.verdict import Verdict, judge_trial, render_page
from serve_app.history.live import EventLog
from serve_app.ranking.rollout import CANARY, open_events
from serve_app.schemas import Event

COLUMNS = ("request_id", "unit", "served_at", "place", "version", "role", "ranker_ms", "failure")


def judge_canary(
    serve: ServeConfig, tasks: Sequence[str], run_dir: Path, version: int, max_slower: float
) -> Verdict:
    """The verdict on a version from all that the run's server has kept; writes it into `report/`.

    Raises:
        UserError: the served log has no answers of this version beside the champion's.
    """
    folder = served_folder(serve, run_dir)
    trial, share = serve.canary, None
    if trial is not None and trial.version == version:
        share = trial.share

    served = read_served(folder, COLUMNS)
    posted = posted_events(open_events(serve, run_dir / "serving"))
    verdict = judge_trial(served, posted, tasks, version, max_slower, share)
    if verdict is None:
        raise UserError(f"{folder} has no answers of the canary {version} beside the champion's")

    report = run_dir / "report"
    write_atomically(report / "verdict.json", json_text(verdict.as_figures()))
    write_atomically(report / "verdict.html", render_page(verdict))
    return verdict


def posted_events(log: EventLog) -> Iterator[Event]:
    """What was posted and is not pruned yet."""
    for user in log.users():
        yield from log.of_user(user)


def log_verdict(tracker: Tracker, verdict: Verdict) -> None:
    """Keep its figures in MLflow."""
    name = f"verdict-{verdict.versions[CANARY]}"
    # of few users an interval has no ends, which JSON has no number for
    tracker.import_result(name, json.loads(json_text(verdict.as_figures())))


def promote_canary(tracker: Tracker, verdict: Verdict, task: str, rows: RowsAtHand) -> Decision:
    """Make the canary champion, if users did more of `task` with it and the gate lets it pass.

    `rows` are those that the gate scores versions of different rows on.
    """
    version = verdict.versions[CANARY]
    reason = verdict.reason_against(task)
    if reason is not None:
        return Decision(False, f"refused: by what users did, version {version} {reason}")
    return tracker.promote_version(version, rows=rows)
