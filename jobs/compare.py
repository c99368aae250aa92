"""Hold runs against the first of them, on the same rows: metrics with intervals, curves, slices and
costs, as one HTML page and as a run of MLflow.
"""

import argparse
from functools import partial

from jobs import cli
from pipeline.config import UserError

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="names of runs under runs_dir; that of a search of jobs.tune stands for its trials",
    )
    parser.add_argument(
        "--split", choices=["val", "test"], default="test", help="period whose rows are compared"
    )
    parser.add_argument(
        "--samples", type=int, default=300, help="bootstrap samples of users, for the intervals"
    )
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="first score those that have no predictions yet, as jobs.evaluate does",
    )
    parser.add_argument(
        "--item-rate",
        action="store_true",
        help="add the item's smoothed rate in the training period, a model without a user",
    )
    parser.add_argument(
        "--no-tracking", action="store_true", help="files under the first run only, no MLflow"
    )


def run_job(job: cli.Job) -> None:
    cfg, options = job.cfg, job.options
    refuse_wrong_options(options.runs, options.samples)

    from contextlib import nullcontext

    from pipeline import tracking
    from pipeline.batches.stored import StoredUsers
    from pipeline.evaluate import compared, comparison_page
    from pipeline.evaluate.comparison import item_rate_logits
    from pipeline.evaluate.spread import evaluation_cluster

    # mistakes are told before MLflow is started
    runs = compared.expand_searches(cfg.runs_dir, options.runs)
    comparison_page.require_runs(cfg.runs_dir, runs, options.split, scored=not options.evaluate)

    with nullcontext() if options.no_tracking else tracking.session(cfg) as tracker:
        if options.evaluate:
            tell = log_nothing if tracker is None else tracker.log_evaluation
            with evaluation_cluster(cfg.ray, cfg.runs_dir, cfg.sequence_dir):
                compared.evaluate_missing(cfg.runs_dir, runs, cfg.evaluate, options.split, tell)

        item_rate = None
        if options.item_rate:
            stored = StoredUsers(cfg.sequence_dir, cfg.source, cfg.features)
            item_rate = partial(item_rate_logits, stored, cfg.split)
        comparison = comparison_page.compare_runs(
            cfg.runs_dir, runs, options.split, options.samples, item_rate
        )
        print(comparison_page.console_table(comparison))
        page = comparison_page.write_page(cfg.run_dir / "comparison", comparison)
        if tracker is not None:
            tracker.log_comparison(comparison.models, comparison.run_ids, page.parent)
    print(f"comparison={page}")


def log_nothing(*_: object) -> None:
    """Without tracking the files of an evaluation are all there is."""


def refuse_wrong_options(runs: list[str], samples: int) -> None:
    """Raises UserError for a run that is named twice, or no samples."""
    if len(set(runs)) < len(runs):
        raise UserError(f"RUN: each run once, got {' '.join(runs)}")
    if samples < 1:
        raise UserError(f"--samples must be 1 or more, got {samples}")


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline.evaluate import compared, comparison_page

    cfg, options = job.cfg, job.options
    refuse_wrong_options(options.runs, options.samples)
    runs = compared.expand_searches(cfg.runs_dir, options.runs)
    comparison_page.require_runs(cfg.runs_dir, runs, options.split, scored=not options.evaluate)
    return {"runs": runs, "writes": str(cfg.run_dir / "comparison")}


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
