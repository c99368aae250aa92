"""A model kept up to date day by day: trained from nothing on all rows so far, or from the day
before's model on the newest day's.

    sequences of the demo, once
    each day of 28 April to 5 May, each way, each seed
        → train on what lies before it → score its requests → a line of runs/day_by_day.jsonl

`python -m benchmarks.quality.day_by_day --runs-dir runs --store demo --seeds 0 1 2` trains what is
not there yet, in one thread without Ray, by the functions that `jobs.pipeline --append` calls:
`start_from`, `own_checkpoint`, `load_start`, `loop.train`. `python -m benchmarks.results daily`
writes the table and the plot.

The first day's model is one for all ways, trained from nothing. Each way then goes on from its own
model of the day before. The store holds later rows too; a training reads none of them, and an
evaluation only those of its day.
"""

import argparse
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import torch

from benchmarks.machine import environment
from benchmarks.quality.train_plan import settings_of
from benchmarks.report import RUNS
from pipeline import config
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import StepPlan, step_plan
from pipeline.config import RunConfig, UserError
from pipeline.evaluate import evaluator
from pipeline.figures import append_run, read_runs
from pipeline.model.artifact import LoadedModel, load_model, save_model
from pipeline.model.ranker import RankingModel
from pipeline.sequences import store
from pipeline.train import loop
from pipeline.train.checkpoint import CheckpointFolder
from pipeline.train.trainee import Trainee
from pipeline.train.warm_start import load_start, own_checkpoint, start_from, with_start

OFFSET = "+08:00"  # a day of KuaiRand begins at midnight there
DAYS = tuple(f"2022-04-{day}" for day in (28, 29, 30)) + tuple(
    f"2022-05-0{day}" for day in range(1, 6)
)
VALIDATION_DAYS = DAYS[:5]  # what was chosen was chosen on these

# Ways to come to a day's model, with the settings that they change where they go on from a model.
FROM_NOTHING, STALE = "from_nothing", "stale"
REPLAY, HALF_REPLAY, NO_REPLAY = (f"train.replay_share={share}" for share in (0.1, 0.05, 0))
# long histories are mostly cut to their newest 21 rows, in training alone
SHORT = ("train.stochastic_length.max_len=256", "train.stochastic_length.alpha=1.1")
LARGE = ("train.batch_users=128",)  # the preset has 64
SLOW = ("train.lr=0.001", "train.embedding_lr=0.001")  # half of the preset's
WAYS: dict[str, tuple[str, ...]] = {
    FROM_NOTHING: (),
    "replay": (REPLAY,),
    "newest": (NO_REPLAY,),
    "half_replay_short_slow": (HALF_REPLAY, *SHORT, *LARGE, *SLOW),
    STALE: (),  # the first day's model, never trained again
    # tried on the way to that
    "replay_short": (REPLAY, *SHORT),
    "half_replay_short": (HALF_REPLAY, *SHORT),
    "newest_short": (NO_REPLAY, *SHORT),
    "half_replay_128": (HALF_REPLAY, *LARGE),
    "half_replay_short_128": (HALF_REPLAY, *SHORT, *LARGE),
}
SHOWN = tuple(WAYS)[:5]  # what is run for every day and seed


@dataclass
class Seconds:
    """Time of the parts of a day's work: on the clock, and of processors."""

    clock: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        clock, cpu = time.perf_counter(), cpu_seconds()
        yield
        self.clock[part] = round(time.perf_counter() - clock, 2)
        self.cpu[part] = round(cpu_seconds() - cpu, 2)


def cpu_seconds() -> float:
    """Seconds of processors that this process and its ended children have used."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    return total


@dataclass(frozen=True)
class Day:
    """One model of one day: `cfg` trains on what lies before the day, and validates on it."""

    way: str
    date: str
    seed: int
    cfg: RunConfig
    before: RunConfig | None  # of the day before, whose model it goes on from

    @property
    def key(self) -> tuple[str, str, int]:
        return self.way, self.date, self.seed


def plan_days(
    anew: RunConfig, going_on: RunConfig, way: str, seed: int, dates: Sequence[str] = DAYS
) -> list[Day]:
    """The days of a way, first to last.

    `anew` are the settings of a training from nothing, as the first day's always is; `going_on`
    those of a training that goes on from the day before.
    """
    days = []
    before = None
    for date in dates:
        begins_anew = before is None or way == FROM_NOTHING
        of_way = FROM_NOTHING if before is None else way
        cfg = on_day(anew if begins_anew else going_on, date, seed)
        cfg = replace(cfg, name=f"{of_way}-{date}-{seed}")
        days.append(Day(of_way, date, seed, cfg, None if begins_anew else before))
        before = cfg
    return days


def on_day(cfg: RunConfig, date: str, seed: int) -> RunConfig:
    """The settings with a training period that ends where the day begins."""
    midnight = datetime.fromisoformat(f"{date}T00:00:00{OFFSET}")
    next_midnight = midnight + timedelta(days=1)
    split = replace(cfg.split, t_val=midnight.isoformat(), t_test=next_midnight.isoformat())
    return replace(cfg, seed=seed, split=split)


def carry_out(day: Day, out: Path, predictions: Path) -> dict[str, float]:
    """Train and score one day's model; appends its line, and returns its metrics."""
    cfg, seconds = day.cfg, Seconds()
    digest = store.read_manifest(cfg.sequence_dir).digest
    if day.way == STALE and day.before is not None:
        loaded, steps = replace(load_model(first_model(day)), cfg=cfg), 0
    else:
        loaded, steps = train_day(day, digest, seconds)

    with seconds.measure("evaluate"):
        scores = evaluator.score_store(cfg, loaded, ["val"]).splits["val"]
    metrics = scores.named_metrics("val") | {"val/rows": float(len(scores.predictions))}
    predictions.mkdir(parents=True, exist_ok=True)
    pq.write_table(scores.predictions, predictions / f"{cfg.name}.parquet")

    append_run(
        out,
        {
            "name": day.way,
            "day": day.date,
            "seed": day.seed,
            "command": "python -m benchmarks.quality.day_by_day",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment("cpu"),
            "sequences": digest,
            "steps": steps,
            "seconds": seconds.clock,
            "cpu_seconds": seconds.cpu,
            "metrics": metrics,
            "config": settings_of(cfg),
        },
    )
    return metrics


def first_model(day: Day) -> Path:
    name = f"{FROM_NOTHING}-{DAYS[0]}-{day.seed}"
    return replace(day.cfg, name=name).model_dir


def train_day(day: Day, digest: str, seconds: Seconds) -> tuple[LoadedModel, int]:
    """The day's model and its steps; it is published, with the checkpoint that the next day's
    moments go on from, and the checkpoint of the day before is removed.
    """
    cfg, start = day.cfg, None
    with seconds.measure("prepare"):
        if day.before is not None:
            model = day.before.model_dir
            kept = own_checkpoint(day.before.train_dir, model)
            assert kept is not None, f"{day.before.train_dir}: the checkpoint of {model} is gone"
            start = replace(start_from(cfg, model), checkpoint=str(kept))
            cfg = replace(cfg, train=with_start(cfg.train, start))
        maps = fit_features(cfg)
        steps = step_plan(cfg)

    def begin_with(trainee: Trainee) -> None:
        if start is not None:
            load_start(trainee, start, maps, cfg.features)

    with seconds.measure("train"):
        shutil.rmtree(cfg.train_dir, ignore_errors=True)
        checkpoints = CheckpointFolder(cfg.train_dir / "checkpoints", keep=1)
        model = loop.train(
            cfg,
            maps,
            TrainLoader(cfg, maps, steps),
            digest,
            checkpoints=checkpoints,
            begin_with=begin_with,
        )
    return publish_day(day, cfg, maps, model, steps, digest), total_steps(cfg, steps)


def total_steps(cfg: RunConfig, steps: StepPlan) -> int:
    return steps.steps_per_epoch * cfg.train.epochs


def publish_day(
    day: Day,
    cfg: RunConfig,
    maps: FeatureMaps,
    model: RankingModel,
    steps: StepPlan,
    digest: str,
) -> LoadedModel:
    facts = {"steps": total_steps(cfg, steps), "sequences": digest}
    save_model(cfg.model_dir, model, cfg, maps, facts)
    if day.before is not None and day.before.name != first_model(day).parent.name:
        shutil.rmtree(day.before.train_dir, ignore_errors=True)
    return load_model(cfg.model_dir)


def read_preset(path: str, overrides: Sequence[str], runs_dir: str, run: str) -> RunConfig:
    """The preset as it is trained here: one worker, no validation on the way, a checkpoint at the
    end.
    """
    cfg = config.load(path, list(overrides))
    train = replace(cfg.train, num_workers=1, validate_every=0, checkpoint_every=10**6)
    sequences = replace(cfg.sequences, from_run=run)
    return replace(cfg, runs_dir=runs_dir, train=train, sequences=sequences)


def finished_days(out: Path) -> set[tuple[str, str, int]]:
    return {(run["name"], run["day"], run["seed"]) for run in read_runs(out)}


def tell_day(day: Day, metrics: dict[str, float]) -> None:
    aucs = [metrics[f"val/auc/{task}"] for task in day.cfg.tasks]
    nes = [metrics[f"val/ne/{task}"] for task in day.cfg.tasks]
    shown = " ".join(f"{auc:.4f}" for auc in aucs)
    mean = f"mean auc {sum(aucs) / len(aucs):.4f} ne {sum(nes) / len(nes):.4f}"
    print(f"{day.way:14}{day.date} seed {day.seed} | {shown} | {mean}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", default="configs/demo.yaml", help="preset that is trained")
    parser.add_argument("--runs-dir", default="runs", help="where the models go")
    parser.add_argument("--store", default="demo", help="run whose published sequences are read")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=SHOWN)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--days", nargs="+", choices=DAYS, default=list(DAYS))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--out", type=Path, default=RUNS / "day_by_day.jsonl", help="JSON Lines file of the figures"
    )
    options = parser.parse_args()

    torch.set_num_threads(1)  # other processors may have other seeds

    def read(*settings: str) -> RunConfig:
        overrides = [*options.overrides, *settings]
        return read_preset(options.config, overrides, options.runs_dir, options.store)

    try:
        anew = read()
        going_on = {way: read("train.init=champion", *WAYS[way]) for way in options.ways}
        store.read_manifest(anew.sequence_dir)
    except UserError as error:
        sys.exit(f"error: {error}")

    predictions = Path(options.runs_dir) / "predictions"
    for seed in options.seeds:
        plans = []
        for way in options.ways:
            plans.append(plan_days(anew, going_on[way], way, seed, options.days))
        for same_day in zip(*plans, strict=True):  # a call cut short leaves whole days
            for day in same_day:
                if day.key not in finished_days(options.out):
                    tell_day(day, carry_out(day, options.out, predictions))


if __name__ == "__main__":
    main()
