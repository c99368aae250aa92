"""Judge a canary by what users did: rates of each task by version, of failures too, and their
difference with an interval that may be read every day.

It reads the served log and the posted events, writes `report/verdict.html` and `.json`, and logs
the figures to MLflow. With `--promote-if TASK` the canary becomes champion if it is better at TASK,
worse at none, not slower than it may be and not failing more; exit code 1 if not (yet)."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import cli
from pipeline.config import CanaryConfig, RunConfig, UserError
from pipeline.files import write_atomically

if TYPE_CHECKING:
    from pipeline import tracking
    from serve_app.schemas import Event

# what takes seconds to import is imported where it is used, after the settings were read

COLUMNS = ("request_id", "unit", "served_at", "place", "version", "role", "ranker_ms", "failure")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--canary", type=int, help="its version; default: serve.canary.version")
    parser.add_argument("--promote-if", metavar="TASK", help="make it champion if TASK is better")
    parser.add_argument(
        "--max-slower",
        type=float,
        default=0.5,
        help="by how much the p99 of its passes may exceed the champion's, as a share",
    )


def run_job(job: cli.Job) -> None:
    from pipeline import tracking
    from serve_app.deployment import served_folder
    from serve_app.feedback.served_log import read_served
    from serve_app.feedback.verdict import judge_trial, render_page

    cfg, task = job.cfg, job.options.promote_if
    version = find_canary(cfg.serve.canary, job.options.canary)
    if task is not None and task not in cfg.tasks:
        raise UserError(f"--promote-if: one of the tasks {list(cfg.tasks)}, got {task!r}")

    served = read_served(served_folder(cfg), COLUMNS)
    trial, share = cfg.serve.canary, None
    if trial is not None and trial.version == version:
        share = trial.share
    slower = job.options.max_slower
    verdict = judge_trial(served, all_events(cfg), cfg.tasks, version, slower, share)
    if verdict is None:
        raise UserError(
            f"{served_folder(cfg)} has no answers of the canary {version} beside the champion's"
        )

    figures = verdict.as_figures()
    write_atomically(cfg.run_dir / "report" / "verdict.json", json.dumps(figures))
    write_atomically(cfg.run_dir / "report" / "verdict.html", render_page(verdict))
    for one in [*verdict.tasks, verdict.failures]:
        print(
            f"{one.task}: champion {one.champion:.5f}, canary {one.canary:.5f}, difference "
            f"{one.difference:+.5f} in [{one.low:+.5f}, {one.high:+.5f}]: {one.says}"
        )

    with tracking.session(cfg) as tracker:
        tracker.import_result(f"verdict-{version}", json.loads(json.dumps(figures)))
        if task is None:
            return
        if not verdict.may_promote(task):
            print(f"version {version} is not promoted")
            sys.exit(1)
        decision = tracker.promote_version(version, rows=rows_at_hand(cfg))
    print(f"version={version} {decision.reason}")
    if not decision.promoted:
        sys.exit(1)


def rows_at_hand(cfg: RunConfig) -> "tracking.RowsAtHand":
    """The run's validation rows, for a champion that was validated on others."""
    from pipeline import tracking
    from pipeline.evaluate import evaluator
    from pipeline.evaluate.spread import evaluation_cluster

    def score(model_dir: Path) -> Mapping[str, float]:
        with evaluation_cluster(cfg):
            return evaluator.score_champion(cfg, model_dir)

    return tracking.RowsAtHand(evaluator.row_tags(cfg.sequence_dir, cfg.split), score)


def find_canary(canary: CanaryConfig | None, given: int | None) -> int:
    """The version on trial."""
    if given is not None:
        return given
    if canary is None:
        raise UserError("which version is on trial? give --canary, or set serve.canary")
    return canary.version


def all_events(cfg: RunConfig) -> "Iterator[Event]":
    """What was posted and is not pruned yet."""

    from serve_app.ranking.rollout import open_events

    log = open_events(cfg.serve, cfg.run_dir / "serving")
    for user in log.users():
        yield from log.of_user(user)


def plan_job(job: cli.Job) -> dict[str, object]:
    from serve_app.deployment import served_folder

    version = find_canary(job.cfg.serve.canary, job.options.canary)
    return {"canary": version, "reads": served_folder(job.cfg)}


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
