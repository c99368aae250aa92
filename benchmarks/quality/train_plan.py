"""Quality of many configurations over seeds, without Ray and MLflow: one GPU or one CPU box carries
many small runs.

    plan (YAML) × seeds → train by `pipeline.train.loop` → evaluate → a line of
    runs/<file>.jsonl + predictions

`python -m benchmarks.quality.train_plan PLAN … --store FOLDER` trains what is not there yet;
`python -m benchmarks.quality.report` turns the lines into the table of RESULTS.md. A plan is

    config: configs/demo.yaml          # the preset that every run starts from
    set: {train.num_workers: 1}        # settings of all runs
    splits: [val]                      # test is scored once, when everything is chosen
    runs: {ultra_hstu: {}, hstu: {model.encoder: hstu}}
    served: {ultra_hstu: {int4: {int4_tables: true}}}  # scored once more, so served, as
    ultra_hstu-int4
    ablate: ultra_hstu                 # adds each of its variants (pipeline.evaluate.ablation) as
    ultra_hstu-window_0 …
    taught: {distilled: {by: ultra_hstu, seeds: [0, 1, 2, 3, 4], weight: 0.5}}  # a run whose labels
    are half those of other runs' mean (benchmarks.quality.distil); it waits for them, which are run
    with these seeds whatever `--seeds` says; with `unknown: 0.25` beside `weight` it learns their
    scores of rows whose label is not known too, which count a quarter
"""

import argparse
import copy
import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml

from benchmarks.machine import environment
from benchmarks.quality.distil import TaughtLoader, Teacher, score_training, write_scores
from benchmarks.report import RUNS
from pipeline import config
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import step_plan
from pipeline.config import ConfigError, RunConfig, ServeConfig, UserError
from pipeline.evaluate import ablation, evaluator
from pipeline.figures import append_run, read_runs
from pipeline.model.artifact import LoadedModel
from pipeline.model.encoders import check_model
from pipeline.model.inference.quantize import as_served
from pipeline.sequences import store
from pipeline.train import loop


@dataclass(frozen=True)
class Taught:
    """Whose mean takes part in a run's labels, and by how much."""

    by: str  # a run of the plan
    seeds: tuple[int, ...]
    weight: float
    unknown: float = 0.0  # what a row without a label counts, whose label is theirs alone
    scores: tuple[Path, ...] = ()  # where each of these leaves what it thinks of the training rows


@dataclass(frozen=True)
class PlannedRun:
    """One configuration and seed, both in `cfg`, and where what comes of it goes."""

    cfg: RunConfig
    plan: str
    store: str
    device: str
    splits: tuple[str, ...]
    out: Path
    predictions: Path | None
    served: dict[str, ServeConfig]  # ways to serve the same weights that are scored too
    taught: Taught | None = None
    teaches: Path | None = None  # where it leaves its scores of the training rows, for others

    @property
    def is_ready(self) -> bool:
        """False while a teacher of it has not finished."""
        return self.taught is None or all(path.exists() for path in self.taught.scores)

    @property
    def settings(self) -> dict[str, Any]:
        """What its figures depend on."""
        found = settings_of(self.cfg)
        if self.taught is not None:
            taught = self.taught
            found["taught"] = {
                "by": taught.by,
                "seeds": list(taught.seeds),
                "weight": taught.weight,
            }
            if taught.unknown > 0:
                found["taught"]["unknown"] = taught.unknown
        return found


# needed, allowed
PLAN_KEYS = {"config", "runs"}, {"config", "runs", "set", "splits", "served", "ablate", "taught"}


def read_plan(path: Path, overrides: Sequence[str] = ()) -> dict[str, RunConfig]:
    """The plan's configurations by name; `overrides` (a.b=c) go to all of them.

    Raises:
        ConfigError: the file is no plan, or a configuration of it is not valid.
    """
    plan = read_plan_file(path)
    shared = plan.get("set", {})
    configs = {}
    for name, changes in plan["runs"].items():
        settings = [
            f"{key}={json.dumps(value)}" for key, value in (shared | (changes or {})).items()
        ]
        configs[name] = replace(config.load(plan["config"], [*settings, *overrides]), name=name)
        check_model(configs[name].model)
    for key, names in (
        ("ablate", [plan["ablate"]] if "ablate" in plan else []),
        ("served", plan.get("served", {})),
        ("taught", plan.get("taught", {})),
    ):
        for name in names:
            if name not in configs:
                raise ConfigError(
                    f"plan {path}: {key} names {name!r}, not one of runs {list(configs)}"
                )
    if "ablate" in plan:
        whole = plan["ablate"]
        for name, variant in ablation.ablated_variants(configs[whole]).items():
            if name != ablation.WHOLE:
                configs[f"{whole}-{name}"] = replace(variant, name=f"{whole}-{name}")
    return configs


def plan_splits(path: Path) -> tuple[str, ...]:
    """Which split the plan's runs are scored on; validation where it does not say."""
    splits = tuple(read_plan_file(path).get("splits", ["val"]))
    if not set(splits) <= {"val", "test"}:
        raise ConfigError(f"plan {path}: splits must be of val and test, got {list(splits)}")
    return splits


def plan_served(path: Path) -> dict[str, dict[str, ServeConfig]]:
    """By run, the further ways in which its weights are scored: what `serve` would be there."""
    found = {}
    for name, ways in read_plan_file(path).get("served", {}).items():
        found[name] = {
            way: config.from_dict({"serve": settings}).serve for way, settings in ways.items()
        }
    return found


def plan_taught(path: Path, runs: Sequence[str]) -> dict[str, Taught]:
    """By run, who teaches it.

    Raises:
        ConfigError: a teacher is not in the plan or is taught itself, or a weight is not within 0
        and 1.
    """
    found = {}
    plan = read_plan_file(path).get("taught", {})
    for name, said in plan.items():
        needed = {"by", "seeds", "weight"}
        if not needed <= said.keys() <= needed | {"unknown"} or not said["seeds"]:
            raise ConfigError(
                f"plan {path}: taught.{name} needs by, seeds and weight, and may hold unknown, got "
                f"{said}"
            )
        if said["by"] not in runs or said["by"] in plan:
            raise ConfigError(
                f"plan {path}: taught.{name}.by must be a run that is not taught, got {said['by']}"
            )
        if not 0 < said["weight"] <= 1:
            raise ConfigError(
                f"plan {path}: taught.{name}.weight must be above 0 and at most 1, got "
                f"{said['weight']}"
            )
        unknown = said.get("unknown", 0.0)
        if not 0 <= unknown <= 1:
            raise ConfigError(
                f"plan {path}: taught.{name}.unknown must be within 0 and 1, got {unknown}"
            )
        found[name] = Taught(said["by"], tuple(said["seeds"]), said["weight"], unknown)
    return found


def read_plan_file(path: Path) -> dict[str, Any]:
    """The plan as it is written.

    Raises:
        ConfigError: the file is no plan.
    """
    try:
        plan = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"plan {path}: {error}") from None
    needed, allowed = PLAN_KEYS
    if not isinstance(plan, dict) or not needed <= plan.keys() <= allowed:
        raise ConfigError(
            f"plan {path} must hold {sorted(needed)} and may hold {sorted(allowed - needed)}"
        )
    return plan


def finished(run: PlannedRun) -> bool:
    """Whether `run.out` has the run, with these settings and these sequences; settings that its
    line lacks, of an earlier version, are at their defaults.

    Raises:
        UserError: it has one of this name and seed with others.
    """
    named = [
        saved
        for saved in read_runs(run.out)
        if (saved["name"], saved["seed"]) == (run.cfg.name, run.cfg.seed)
    ]
    if not named:
        return False

    (saved,) = named
    try:
        same_settings = filled_settings(saved["config"]) == run.settings
    except ConfigError:  # of a setting that there is no more
        same_settings = False
    same = same_settings and saved["sequences"] == store.read_manifest(run.store).digest
    if not same or not {f"{split}/rows" for split in run.splits} <= saved["metrics"].keys():
        raise UserError(
            f"{run.out}: {run.cfg.name} of seed {run.cfg.seed} was made with other settings, "
            "sequences or splits: remove its line, or use another name"
        )
    return True


def filled_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A line's settings as `PlannedRun.settings` has them now: those that were added since it was
    written are at their defaults.

    Raises:
        ConfigError: it has settings that there are no more.
    """
    taught = {"taught": saved["taught"]} if "taught" in saved else {}
    sections = {key: value for key, value in saved.items() if key != "taught"}
    return settings_of(config.from_dict(sections)) | taught


def settings_of(cfg: RunConfig) -> dict[str, Any]:
    """What a run's figures depend on; sections that are as they come are left out, but for those
    that older lines have.
    """
    saved, plain = config.to_dict(cfg), config.to_dict(RunConfig())
    keys = ["source", "split", "tasks", "features", "model", "train", "evaluate"]
    keys += [key for key in ("retrieval", "examples") if saved[key] != plain[key]]
    return {key: saved[key] for key in keys}


@dataclass(frozen=True)
class TrainedRun:
    """What a planned run has become."""

    model: LoadedModel
    digest: str  # of the sequences
    lines: list[dict[str, float]]  # that training logged
    parameters: dict[str, int]  # dense and of the tables
    seconds: dict[str, float]  # prepare and train


def carry_out(run: PlannedRun) -> list[dict[str, Any]]:
    """Train and evaluate one run, in a process of its own; appends its lines and returns
    them, the run itself first.
    """
    torch.set_num_threads(1)  # the other cores have their own runs
    evaluate = replace(run.cfg.evaluate, device=run.device)
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(run.cfg, runs_dir=folder, evaluate=evaluate)
        trained = train_run(run, cfg)
        scores = {}  # name -> metrics and seconds
        for way, limits in {"": ServeConfig(), **run.served}.items():
            name = f"{cfg.name}-{way}" if way else cfg.name
            begin = time.perf_counter()
            metrics = score(run, as_served_copy(trained.model, limits), name)
            scores[name] = metrics, time.perf_counter() - begin

    results = []
    for name, (metrics, seconds) in scores.items():
        result = describe_run(run, trained, name, metrics, seconds)
        append_run(run.out, result)
        results.append(result)
    return results


def train_run(run: PlannedRun, cfg: RunConfig) -> TrainedRun:
    """Train `cfg`, the run's with a folder of its own. A teacher leaves its scores of the training
    rows.
    """
    began = time.perf_counter()
    cfg.run_dir.mkdir()
    cfg.sequence_dir.symlink_to(Path(run.store).absolute())
    digest = store.read_manifest(cfg.sequence_dir).digest
    maps = fit_features(cfg)
    loader = run_loader(run, cfg, maps)
    prepared = time.perf_counter()

    lines: list[dict[str, float]] = []
    log = lambda step, values: lines.append({"step": step} | values)
    model = loop.train(cfg, maps, loader, digest, device=run.device, log=log)
    trained = time.perf_counter()

    of_tables = sum(table.numel() for table in tables(model))
    of_all = sum(parameter.numel() for parameter in model.parameters())
    model.zero_grad(set_to_none=True)
    loaded = LoadedModel(model.eval(), cfg, maps, {})
    if run.teaches is not None:
        plain = TrainLoader(cfg, maps, loader.plan)
        write_scores(score_training(model, plain, cfg.tasks, run.device), run.teaches)
    return TrainedRun(
        model=loaded,
        digest=digest,
        lines=lines,
        parameters={"dense": of_all - of_tables, "tables": of_tables},
        seconds={"prepare": prepared - began, "train": trained - prepared},
    )


def as_served_copy(loaded: LoadedModel, limits: ServeConfig) -> LoadedModel:
    """The model as a server with these limits has it; `loaded` stays as it is."""
    served = replace(loaded, model=copy.deepcopy(loaded.model))
    int4_tables = limits.int4_tables or loaded.cfg.evaluate.int4_tables
    as_served(served.model, replace(limits, int4_tables=int4_tables))
    return served


def describe_run(
    run: PlannedRun, trained: TrainedRun, name: str, metrics: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """A line of the plan's file; `seconds` is what the evaluation took."""
    lines = trained.lines
    means = {}
    for logged in ("train/gflop_per_example", "train/step_ms"):
        means[logged] = mean_over_steps(lines, logged)

    some = lines[:: max(len(lines) // 20, 1)]
    took = trained.seconds | {"evaluate": seconds}
    return {
        "name": name,
        "seed": run.cfg.seed,
        "command": f"python -m benchmarks.quality.train_plan {run.plan}",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(run.device),
        "sequences": trained.digest,
        "seconds": {of: round(value, 2) for of, value in took.items()},
        "parameters": trained.parameters,
        "metrics": {**metrics, **means},
        "losses": {line["step"]: round(line["train/loss"], 5) for line in some},
        "config": run.settings,
    }


def run_loader(run: PlannedRun, cfg: RunConfig, maps: FeatureMaps) -> TrainLoader:
    """The loader of a run, of one that is taught with the teachers' mean in its labels."""
    if run.taught is None:
        return TrainLoader(cfg, maps, step_plan(cfg))
    teacher = Teacher.of(run.taught.scores, cfg.tasks)
    taught = run.taught
    return TaughtLoader(cfg, maps, step_plan(cfg), teacher, taught.weight, taught.unknown)


def score(run: PlannedRun, loaded: LoadedModel, name: str) -> dict[str, float]:
    """The metrics of the plan's splits and what a candidate cost; the predictions where they are
    wanted.
    """
    found, metrics = evaluator.score_store(loaded.cfg, loaded, run.splits), {}
    for split, scores in found.splits.items():
        predictions = scores.predictions
        metrics |= scores.named_metrics(split) | {f"{split}/rows": len(predictions)}
        if run.predictions is not None:
            run.predictions.mkdir(parents=True, exist_ok=True)
            pq.write_table(predictions, run.predictions / f"{name}-{run.cfg.seed}-{split}.parquet")
    return metrics | evaluator.work_shares(evaluator.total_work(found.work))


def mean_over_steps(lines: list[dict[str, float]], name: str) -> float:
    """Of lines that each sum up the steps since the one before."""
    steps = np.diff([0, *(line["step"] for line in lines)])
    return float(np.average([line[name] for line in lines], weights=steps))


def tables(model: torch.nn.Module) -> list[torch.Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]


def line(result: dict[str, Any], split: str, tasks: Sequence[str]) -> str:
    """A run in one line: AUC of each task, their mean, the mean NE, and what it cost."""
    metrics, seconds = result["metrics"], result["seconds"]
    aucs, nes = (
        [metrics[f"{split}/{metric}/{task}"] for task in tasks] for metric in ("auc", "ne")
    )
    return (
        f"{result['name']:28}{result['seed']:3} {split:5}"
        + "".join(f"{auc:8.4f}" for auc in aucs)
        + f" | mean auc {sum(aucs) / len(aucs):.4f} ne {sum(nes) / len(nes):.4f} | "
        f"{metrics['train/gflop_per_example'] * 1e3:.2f} MFLOP | {metrics['train/step_ms']:.1f} "
        "ms a step | "
        f"train {seconds['train']:.0f} s, evaluate {seconds['evaluate']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "plans",
        type=Path,
        nargs="+",
        metavar="PLAN",
        help="YAML: config, set, splits, runs, ablate",
    )
    parser.add_argument("--store", required=True, help="published sequences, runs/<name>/sequences")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="runs of the plans, all seeds of one before the next; if absent all of them, by seed",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for all runs",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument(
        "--out", type=Path, default=RUNS / "quality.jsonl", help="JSON Lines file of the figures"
    )
    parser.add_argument(
        "--predictions",
        type=Path,
        default=None,
        help="folder of the predictions, if they are wanted",
    )
    parser.add_argument(
        "--teachers",
        type=Path,
        default=Path("runs/teachers"),
        help="folder of what the runs that teach others think of the training rows",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="no run begins that would end later, by the longest so far",
    )
    options = parser.parse_args()
    try:
        runs = chosen_runs(options.plans, options)
        waiting = [run for run in runs if not finished(run)]
        refuse_lost_teachers(waiting)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before", flush=True)
    sys.exit(min(run_all(waiting, options.processes, options.budget), 1))


def planned(plan: Path, options: argparse.Namespace) -> list[PlannedRun]:
    """Seed by seed: a call cut short leaves whole seeds of every configuration. Runs that teach
    have the seeds of which somebody learns as well.
    """
    configs, splits = read_plan(plan, options.overrides), plan_splits(plan)
    where = str(plan), options.store, options.device, splits, options.out, options.predictions
    served, taught = plan_served(plan), plan_taught(plan, list(configs))
    digest = store.read_manifest(options.store).digest if taught else ""

    def scores_path(name: str, seed: int) -> Path:
        facts = [settings_of(configs[name]), digest]
        made_of = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        return options.teachers / f"{name}-{seed}-{made_of}.parquet"

    teaching = {(one.by, seed) for one in taught.values() for seed in one.seeds}
    found = []
    further = sorted({seed for _, seed in teaching} - set(options.seeds))
    for seed in (*options.seeds, *further):
        for name, cfg in configs.items():
            if seed in further and (name, seed) not in teaching:
                continue
            run = PlannedRun(replace(cfg, seed=seed), *where, served.get(name, {}))
            if name in taught:
                paths = [scores_path(taught[name].by, one) for one in taught[name].seeds]
                run = replace(run, taught=replace(taught[name], scores=tuple(paths)))
            if (name, seed) in teaching:
                run = replace(run, teaches=scores_path(name, seed))
            found.append(run)
    return found


def chosen_runs(plans: Sequence[Path], options: argparse.Namespace) -> list[PlannedRun]:
    """The runs of the plans that `--only` names, in its order; all of them where it is absent.

    Raises:
        ConfigError: it names one that no plan has.
    """
    runs = [run for plan in plans for run in planned(plan, options)]
    if not options.only:
        return runs
    names = {run.cfg.name for run in runs}
    unknown = set(options.only) - names
    if unknown:
        raise ConfigError(f"--only {sorted(unknown)}: the plans have {sorted(names)}")
    return [run for name in options.only for run in runs if run.cfg.name == name]


def refuse_lost_teachers(waiting: Sequence[PlannedRun]) -> None:
    """Raises UserError where a run would wait for a teacher that is not to come."""
    coming = {run.teaches for run in waiting}
    for run in waiting:
        scores = () if run.taught is None else run.taught.scores
        for path in scores:
            if not path.exists() and path not in coming:
                raise UserError(
                    f"{run.cfg.name}: what its teacher thinks, {path}, is not there and no run of "
                    "this call writes it: name the teacher and all its seeds too, and remove its "
                    f"lines from {run.out}"
                )


def run_all(runs: Sequence[PlannedRun], processes: int, budget_s: float | None = None) -> int:
    """All runs, `processes` at a time, each when its teachers have finished; one that fails does
    not stop the others. None begins that would end after `budget_s` seconds if it took as long as
    the longest so far.

    Returns the number that failed or did not begin.
    """
    begin, longest, failed = time.monotonic(), 0.0, 0
    waiting = list(runs)
    running: dict[Future, tuple[PlannedRun, float]] = {}
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        while True:
            now = time.monotonic()
            in_time = budget_s is None or now - begin + longest < budget_s
            ready = [run for run in waiting if in_time and run.is_ready]
            for run in ready[: processes - len(running)]:
                waiting.remove(run)
                running[pool.submit(carry_out, run)] = run, now
            if not running:
                break

            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run, began = running.pop(future)
                longest = max(longest, time.monotonic() - began)
                failed += not tell_end(run, future)

    for run in waiting:
        print(f"{run.cfg.name} seed {run.cfg.seed} did not begin", flush=True)
    return failed + len(waiting)


def tell_end(run: PlannedRun, future: Future) -> bool:
    """Print what a run came to; False where it failed."""
    error = future.exception()
    if error is None:
        for result in future.result():
            print(line(result, run.splits[-1], run.cfg.tasks), flush=True)
        return True
    print(f"{run.cfg.name} seed {run.cfg.seed} failed:", flush=True)
    traceback.print_exception(error)
    return False


if __name__ == "__main__":
    main()
