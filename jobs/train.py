"""Train the model of a configuration on its published sequences, with Ray Train; the same name goes
on where it was.
"""

import argparse
from pathlib import Path

from jobs import cli
from pipeline.config import UserError

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restart", action="store_true", help="forget what the run of this name has trained"
    )
    parser.add_argument(
        "--no-tracking", action="store_true", help="metrics to train/metrics.jsonl only, no MLflow"
    )


def run_job(job: cli.Job) -> None:
    from pipeline.train.one_at_a_time import only_training

    with only_training(job.cfg.runs_dir, job.cfg.name):
        folder = train_alone(job)
    print(f"model={folder}")


def train_alone(job: cli.Job) -> Path:
    """Train while no other job does under this name; returns the model's folder."""
    from pipeline import tracking
    from pipeline.model.encoders import check_run
    from pipeline.sequences import store
    from pipeline.train import supervision, trainer

    cfg, restart = job.cfg, job.options.restart
    check_run(cfg.model, cfg.train, retrieval=cfg.retrieval.enabled)

    # mistakes are told before the MLflow run is touched
    supervision.refuse_impossible_size(cfg.ray, cfg.train)
    manifest = store.read_manifest(cfg.sequence_dir)
    if not restart:
        trainer.earlier_checkpoint(cfg)

    if job.options.no_tracking:
        if cfg.train.init == "champion":
            raise UserError("--no-tracking: train.init=champion asks the registry")
        return trainer.fit_model(cfg, restart=restart)

    with tracking.session(cfg) as tracker:
        champion = None
        if cfg.train.init == "champion":
            champion, _ = tracker.download_champion()
        with tracker.training_run(manifest, restart=restart) as run:
            return trainer.fit_model(cfg, run, restart=restart, champion=champion)


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline.train import trainer

    return trainer.plan_training(job.cfg)


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
