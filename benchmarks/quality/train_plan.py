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
"""

import argparse
import copy
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml

from benchmarks.machine import environment
from benchmarks.report import RUNS
from pipeline import config
from pipeline.batches.features import fit_features
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


# needed, allowed
PLAN_KEYS = {"config", "runs"}, {"config", "runs", "set", "splits", "served", "ablate"}


def read_plan(path: Path, overrides: Sequence[str] = ()) -> dict[str, RunConfig]:
    """The plan's configurations by name; `overrides` (a.b=c) go to all of them.

    Raises:
        ConfigError: the file is no plan, or a configuration of it is not valid.
    """
    plan = _read(path)
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
    splits = tuple(_read(path).get("splits", ["val"]))
    if not set(splits) <= {"val", "test"}:
        raise ConfigError(f"plan {path}: splits must be of val and test, got {list(splits)}")
    return splits


def plan_served(path: Path) -> dict[str, dict[str, ServeConfig]]:
    """By run, the further ways in which its weights are scored: what `serve` would be there."""
    found = {}
    for name, ways in _read(path).get("served", {}).items():
        found[name] = {
            way: config.from_dict({"serve": settings}).serve for way, settings in ways.items()
        }
    return found


def _read(path: Path) -> dict[str, Any]:
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
    """Whether `run.out` has the run, with these settings and these sequences.

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
    same = (
        saved["config"] == settings_of(run.cfg)
        and saved["sequences"] == store.read_manifest(run.store).digest
    )
    if not same or not {f"{split}/rows" for split in run.splits} <= saved["metrics"].keys():
        raise UserError(
            f"{run.out}: {run.cfg.name} of seed {run.cfg.seed} was made with other settings, "
            "sequences or splits: remove its line, or use another name"
        )
    return True


def settings_of(cfg: RunConfig) -> dict[str, Any]:
    """What a run's figures depend on."""
    saved = config.to_dict(cfg)
    return {
        key: saved[key]
        for key in ("source", "split", "tasks", "features", "model", "train", "evaluate")
    }


def carry_out(run: PlannedRun) -> list[dict[str, Any]]:
    """Train and evaluate one run, in a process of its own; appends its lines and returns
    them, the run itself first.
    """
    torch.set_num_threads(1)  # the other cores have their own runs
    began = time.perf_counter()
    lines: list[dict[str, float]] = []
    results = []
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(
            run.cfg, runs_dir=folder, evaluate=replace(run.cfg.evaluate, device=run.device)
        )
        cfg.run_dir.mkdir()
        cfg.sequence_dir.symlink_to(Path(run.store).absolute())
        digest = store.read_manifest(cfg.sequence_dir).digest
        maps = fit_features(cfg)
        loader = TrainLoader(cfg, maps, step_plan(cfg))
        prepared = time.perf_counter()
        model = loop.train(
            cfg,
            maps,
            loader,
            digest,
            device=run.device,
            log=lambda step, values: lines.append({"step": step} | values),
        )
        trained = time.perf_counter()
        parameters = {
            "dense": sum(p.numel() for p in model.parameters())
            - sum(t.numel() for t in tables(model)),
            "tables": sum(t.numel() for t in tables(model)),
        }
        model.zero_grad(set_to_none=True)
        loaded = LoadedModel(model.eval(), cfg, maps, {})
        scores = {}  # by name
        for way, limits in {"": ServeConfig(), **run.served}.items():
            scored = replace(loaded, model=copy.deepcopy(loaded.model))
            as_served(
                scored.model,
                replace(limits, int4_tables=limits.int4_tables or cfg.evaluate.int4_tables),
            )
            name = f"{cfg.name}-{way}" if way else cfg.name
            begin = time.perf_counter()
            scores[name] = score(run, scored, name), time.perf_counter() - begin
    for name, (metrics, seconds) in scores.items():
        result = {
            "name": name,
            "seed": cfg.seed,
            "command": f"python -m benchmarks.quality.train_plan {run.plan}",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(run.device),
            "sequences": digest,
            "seconds": {
                "prepare": round(prepared - began, 2),
                "train": round(trained - prepared, 2),
                "evaluate": round(seconds, 2),
            },
            "parameters": parameters,
            "metrics": metrics
            | {
                name: mean_over_steps(lines, name)
                for name in ("train/gflop_per_example", "train/step_ms")
            },
            "losses": {
                line["step"]: round(line["train/loss"], 5)
                for line in lines[:: max(len(lines) // 20, 1)]
            },
            "config": settings_of(run.cfg),
        }
        append_run(run.out, result)
        results.append(result)
    return results


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
        "--only", nargs="+", metavar="NAME", help="runs of the plans; all of them if absent"
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
    options = parser.parse_args()
    try:
        runs = [run for plan in options.plans for run in planned(plan, options)]
        unknown = set(options.only or ()) - {run.cfg.name for run in runs}
        if unknown:
            raise ConfigError(
                f"--only {sorted(unknown)}: the plans have {sorted({run.cfg.name for run in runs})}"
            )
        runs = [run for run in runs if not options.only or run.cfg.name in options.only]
        waiting = [run for run in runs if not finished(run)]
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before", flush=True)
    sys.exit(run_all(waiting, options.processes))


def planned(plan: Path, options: argparse.Namespace) -> list[PlannedRun]:
    """Seed by seed: a call cut short leaves whole seeds of every configuration."""
    configs, splits = read_plan(plan, options.overrides), plan_splits(plan)
    where = str(plan), options.store, options.device, splits, options.out, options.predictions
    served = plan_served(plan)
    return [
        PlannedRun(replace(cfg, seed=seed), *where, served.get(name, {}))
        for seed in options.seeds
        for name, cfg in configs.items()
    ]


def run_all(runs: Sequence[PlannedRun], processes: int) -> int:
    """All runs, `processes` at a time; one that fails does not stop the others.

    Returns the number that failed.
    """
    failed = 0
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        futures = {pool.submit(carry_out, run): run for run in runs}
        for future in as_completed(futures):
            run, error = futures[future], future.exception()
            if error is None:
                for result in future.result():
                    print(line(result, run.splits[-1], run.cfg.tasks), flush=True)
            else:
                failed += 1
                print(f"{run.cfg.name} seed {run.cfg.seed} failed:", flush=True)
                traceback.print_exception(error)
    return failed


if __name__ == "__main__":
    main()
