"""Train and evaluate the model once more without each of its innovations: a table, and child runs
of one MLflow run.
"""

import argparse
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import cli
from pipeline import config
from pipeline.config import ConfigError, RunConfig, RunFolders, UserError
from pipeline.files import json_text, write_atomically

if TYPE_CHECKING:
    from pipeline import tracking

# what takes seconds to import is imported where it is used, after the settings were read

logger = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", nargs="+", metavar="VARIANT", help="some of the variants that --dry-run lists"
    )
    parser.add_argument("--split", choices=["val", "test"], default="val", help="period to score")


def run_job(job: cli.Job) -> None:
    from pipeline import tracking
    from pipeline.cluster import ray_cluster
    from pipeline.evaluate import ablation
    from pipeline.sequences import store
    from pipeline.train.one_at_a_time import only_training

    cfg, split = job.cfg, job.options.split
    chosen = choose_variants(cfg, job.options.only)
    manifest = store.read_manifest(cfg.sequence_dir)
    found: dict[str, dict[str, float]] = {}
    whole = replace(cfg, name=f"{cfg.name} ablation")

    with (
        only_training(whole.runs_dir, whole.name),
        tracking.session(cfg) as tracker,
        ray_cluster(cfg.ray, runs_dir=cfg.runs_dir),
        tracker.start_run(whole, manifest) as parent,
    ):
        for name, variant in chosen.items():
            logger.info("variant %s", name)
            with tracker.start_run(variant, manifest, parent) as run:
                link_sequences(variant.folders, cfg.sequence_dir)
                found[name] = train_and_evaluate(variant, tracker, run, split)

        path = cfg.run_dir / "ablation" / "ablation.md"
        write_atomically(path, ablation.markdown_table(found, cfg.tasks, split))
        write_atomically(path.with_suffix(".json"), json_text(found))
        parent.log_artifacts(path)
        print(path.read_text())

        unmoved = ablation.find_unmoved(found, split)
        if unmoved:
            raise UserError("; ".join(unmoved))
    print(f"table={path}")


def choose_variants(cfg: RunConfig, only: list[str] | None) -> dict[str, RunConfig]:
    """The variants, each with a folder of its own under the run's that reads the run's sequences.

    Raises:
        ConfigError: `only` names one that this configuration does not have.
    """

    from pipeline.evaluate import ablation

    found = ablation.ablated_variants(cfg)
    unknown = set(only or ()) - found.keys()
    if unknown:
        raise ConfigError(f"--only {sorted(unknown)}: this configuration has {list(found)}")

    folder = cfg.run_dir / "ablation"
    chosen = {}
    for name, variant in found.items():
        if not only or name in (ablation.WHOLE, *only):
            # whosever they are, each variant finds them in its own folder
            own = replace(variant.sequences, from_run=None)
            chosen[name] = replace(variant, name=name, runs_dir=str(folder), sequences=own)
    return chosen


def link_sequences(folders: RunFolders, sequence_dir: Path) -> None:
    """Folders of a variant, with these sequences and nothing of an earlier training."""
    shutil.rmtree(folders.run_dir, ignore_errors=True)
    folders.run_dir.mkdir(parents=True)
    folders.sequence_dir.symlink_to(sequence_dir.absolute())


def train_and_evaluate(
    variant: RunConfig, tracker: "tracking.Tracker", run: "tracking.Run", split: str
) -> dict[str, float]:
    """The metrics of an evaluation, and the training FLOP per example."""

    from pipeline.evaluate import evaluator
    from pipeline.train import trainer

    model_dir = trainer.fit_model(variant, run)
    metrics = evaluator.evaluate_model(variant, model_dir, [split])
    folder = evaluator.evaluation_folder(variant.run_dir, variant.evaluate)
    tracker.log_evaluation(model_dir, metrics, folder)

    text = (variant.train_dir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    gflop = [line["train/gflop_per_example"] for line in lines]
    metrics["train/gflop_per_example"] = sum(gflop) / len(gflop)
    key = "train/gflop_per_example"
    run.log_metrics({key: metrics[key]}, lines[-1]["step"])
    return metrics


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline.evaluate import ablation
    from pipeline.train import trainer

    cfg = job.cfg
    base = config.flatten(config.to_dict(cfg))
    changes = {}
    for name, variant in ablation.ablated_variants(cfg).items():
        flat = config.flatten(config.to_dict(variant))
        changes[name] = {}
        for key in base.keys() | flat.keys():
            if flat.get(key) != base.get(key):
                changes[name][key] = flat.get(key)
    return {"variants": changes, **trainer.plan_training(cfg)}


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
