"""A scaling study: encoders × sizes × lengths of history, each a training; what quality costs, laws
that say what more would give, and the largest size predicted before it is run.

Each point is a run of its own, NAME-study-ENCODER-SIZE-LENGTH-s0 and so on, on the sequences of
this preset's run. The same command goes on with a study that was ended or killed.
"""

import argparse
from pathlib import Path

from jobs import cli
from pipeline.config import Outage

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--study", type=Path, required=True, help="YAML: encoders, sizes, lengths and seeds"
    )
    parser.add_argument(
        "--restart", action="store_true", help="forget the study of this name, with its points"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="the page of the points so far; run nothing"
    )
    parser.add_argument("--no-tracking", action="store_true", help="files only, no MLflow")


def run_job(job: cli.Job) -> None:
    from pipeline.study import plan as plans

    base = job.cfg
    plan = plans.read_plan(job.options.study, base.tasks)
    points = plans.plan_points(base, plan)

    from pipeline import tracking
    from pipeline.search.tracked import TrialRuns
    from pipeline.sequences import store
    from pipeline.study import opening, page, running
    from pipeline.study.figures import study_figures
    from pipeline.train.one_at_a_time import only_training

    opening.check_study(points)
    own = plans.study_config(base)
    if job.options.report_only:
        figures = study_figures(base, plan, {})
        print(page.console_table(figures))
        print(f"page={page.write_study(own.run_dir, figures)}")
        return

    running.check_room(base.ray, base.train)
    manifest = store.read_manifest(own.sequence_dir)
    with only_training(own.runs_dir, own.name):
        if job.options.restart:
            running.forget_study(own.run_dir)
        opening.open_study(base, plan)

        if job.options.no_tracking:
            failed = running.run_study(base, plan, log_nothing)
            figures = study_figures(base, plan, failed)
            written = page.write_study(own.run_dir, figures)
        else:
            trials = [point.trial for point in points]
            with tracking.session(own) as tracker, tracker.training_run(manifest) as parent:
                with TrialRuns(tracker, manifest, parent, trials) as runs:
                    failed = running.run_study(base, plan, runs.note_trial)
                figures = study_figures(base, plan, failed)
                written = page.write_study(own.run_dir, figures)
                running.log_study(parent, figures, own.run_dir)

    print(page.console_table(figures))
    print(f"page={written}")
    if failed:
        reasons = "; ".join(f"{name} {why}" for name, why in failed.items())
        raise Outage(f"{len(failed)} points did not come to their ends: {reasons}")


def log_nothing(_: str) -> None:
    """Without tracking the files of a point are all there is."""


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline.study import plan as plans

    plan = plans.read_plan(job.options.study, job.cfg.tasks)
    points = plans.plan_points(job.cfg, plan)

    from pipeline.study import opening, running

    opening.check_study(points)
    running.check_room(job.cfg.ray, job.cfg.train)
    return {
        "points": [point.trial.name for point in points],
        "writes": str(plans.study_config(job.cfg).run_dir),
    }


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
