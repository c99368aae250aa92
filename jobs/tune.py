"""Search for settings: trainings with values drawn from a space, as many at once as the cluster has
room for, the worse ones ended early (Ray Tune, ASHA); a table, a page, and the best as a preset.

Each trial is a run of its own, NAME-tune-00 and so on, on the sequences of this preset's run. The
same command goes on with a search that was ended or killed.
"""

import argparse
from pathlib import Path

from jobs import cli
from pipeline.search import space as spaces

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--space", type=Path, required=True, help="YAML: the settings to draw, and how many trials"
    )
    parser.add_argument(
        "--restart", action="store_true", help="forget the search of this name, with its trials"
    )
    parser.add_argument("--no-tracking", action="store_true", help="files only, no MLflow")
    parser.add_argument(
        "--trials-per-gpu",
        type=int,
        default=1,
        metavar="N",
        help="with train.use_gpu: trials that share a GPU and its memory",
    )


def run_job(job: cli.Job) -> None:
    base = job.cfg
    space = spaces.read_space(job.options.space, base)
    trials = spaces.draw_trials(base, space)

    from pipeline.train.one_at_a_time import only_training

    own = spaces.search_config(base)
    with only_training(own.runs_dir, own.name):
        search_alone(job, space, trials)


def search_alone(job: cli.Job, space: spaces.SearchSpace, trials: list[spaces.Trial]) -> None:
    """Search while no other job does under this name."""
    from pipeline import tracking
    from pipeline.search import results, tuning
    from pipeline.search.tracked import TrialRuns
    from pipeline.sequences import store

    base = job.cfg
    tuning.check_search(base, trials)
    resources = tuning.trial_resources(base.train, job.options.trials_per_gpu)
    own = spaces.search_config(base)
    manifest = store.read_manifest(own.sequence_dir)
    if job.options.restart:
        tuning.forget_search(own.run_dir)
    tuning.open_search(base, space, trials)

    if job.options.no_tracking:
        found = tuning.run_search(base, space, trials, resources)
    else:
        with tracking.session(own) as tracker, tracker.training_run(manifest) as parent:
            with TrialRuns(tracker, manifest, parent, trials) as runs:
                found = tuning.run_search(base, space, trials, resources, [runs])
            tuning.log_search(parent, found, own.run_dir)

    print(results.results_table(found))
    print(f"page={own.run_dir / 'search.html'}")
    best = results.require_best(found)
    print(f"best={best.trial.name} model={best.trial.cfg.model_dir}")
    print(f"preset={own.run_dir / 'best.yaml'}")


def plan_job(job: cli.Job) -> dict[str, object]:
    space = spaces.read_space(job.options.space, job.cfg)
    trials = spaces.draw_trials(job.cfg, space)

    from pipeline.search import tuning

    tuning.check_search(job.cfg, trials)
    tuning.trial_resources(job.cfg.train, job.options.trials_per_gpu)
    return {
        "trials": {trial.name: trial.settings for trial in trials},
        "writes": str(spaces.search_config(job.cfg).run_dir),
    }


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
