"""Retrieval on the KuaiRand subset: the items that a user likes or watches long in the test period,
by global time; and ranking and retrieval trained together, beside each alone.

    python -m jobs.pipeline --config configs/kuairand.yaml    # or import_logs and build_sequences
    python -m benchmarks.quality.retrieval_kuairand --runs-dir runs --name kuairand --split test \
        --seeds 0 1 2 --processes 9 --device cuda --set train.precision=bf16 --out runs.jsonl

It reads published sequences and trains without Ray, by the pipeline's own step (`Trainee`). Side by
side on one GPU trainings want CUDA's multi-process service (`nvidia-cuda-mps-control -d`) and a
core each. Nine took two minutes on an H200; without it 14 stepped eight times slower than one.

`ultra_hstu`, `hstu_merged`, `fuxi_beta`, `sasrec`: retrieval alone, one transducer of two layers,
trained up to the validation period. Every second epoch is scored on that period, and the best of
them, once, on the test period. Settings are chosen by `benchmarks.quality.retrieval_choice`;
`--choice FILE` takes what each encoder came to there.

`ranking`, `retrieval`, `joint`, `joint_light`: the model of configs/kuairand.yaml with its tasks,
with retrieval, and with both, at two weights of the next item's loss, trained up to the test period
for as many epochs as the file says.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.quality.retrieval_draws import read_choice
from benchmarks.quality.side_by_side import run_side_by_side
from pipeline import config
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import step_plan
from pipeline.config import RunConfig
from pipeline.evaluate.evaluator import score_store
from pipeline.evaluate.retrieval import AskedRows, evaluate_retrieval
from pipeline.model.artifact import LoadedModel
from pipeline.model.ranker import RankingModel
from pipeline.train.meter import prefetch_batches
from pipeline.train.trainee import Trainee

CAUSAL = ["model.attention={window: null, scaling_seq_len: 16}"]
SEMI_LOCAL = [
    "model.attention={window: 8, full_rows: 8, scaling_seq_len: 16}",
    "model.truncate_after_layer=1",
    "model.truncate_to=64",
]
NO_TASKS = ["tasks=[]", "features.dense={}", "train.task_weights={}", "tracking.gate_max_ne={}"]
NEXT_ITEMS = ["retrieval.enabled=true", "retrieval.positives=[is_like, long_view]"]
ALONE = [
    *NO_TASKS,
    *NEXT_ITEMS,
    "model.channels={}",
    "model.task_towers=false",
    "model.num_layers=2",
    "train.average_from=null",
    "train.embedding_lr=8e-3",
    # nothing but next items: a user is one sequence
    "train.max_targets_per_sequence=512",
    "train.epochs=8",
]
SETTINGS = ["train.batch_users=256", "train.embedding_lr=4e-3", "train.num_workers=1"]
RUNS = {
    "ultra_hstu": [*ALONE, *SEMI_LOCAL, "model.encoder=ultra_hstu"],
    "hstu_merged": [*ALONE, *CAUSAL, "model.encoder=hstu_merged", "model.relative_bias=true"],
    "fuxi_beta": [*ALONE, *CAUSAL, "model.encoder=fuxi_beta"],
    "sasrec": [*ALONE, *CAUSAL, "model.encoder=sasrec"],
    "ranking": [],
    "retrieval": [*NO_TASKS, *NEXT_ITEMS],
    "joint": NEXT_ITEMS,
    "joint_light": [*NEXT_ITEMS, "retrieval.weight=0.1"],
}
ENCODERS = ("ultra_hstu", "hstu_merged", "fuxi_beta", "sasrec")
CHOSEN = "val/ndcg_10"  # by which an epoch is


def make_config(options: argparse.Namespace, name: str, seed: int, *, refit: bool) -> RunConfig:
    changes = [*SETTINGS, *RUNS[name], f"seed={seed}", f"split.refit={json.dumps(refit)}"]
    changes += [f"runs_dir={options.runs_dir}", f"name={options.name}"]
    return config.load(options.config, [*changes, *options.set])


def trained_epochs(
    cfg: RunConfig, maps: FeatureMaps, device: str
) -> Iterator[tuple[int, RankingModel]]:
    """Epochs behind it, and the model, after each epoch; the schedule is that of `train.epochs`."""
    torch.manual_seed(cfg.seed)
    trainee = Trainee(cfg, maps, device, 0, 1)
    loader = TrainLoader(cfg, maps, step_plan(cfg))
    total, step = loader.steps_per_epoch * cfg.train.epochs, 0
    for epoch in range(cfg.train.epochs):
        for batch in prefetch_batches(loader.batches(epoch)):
            trainee.step(batch.to(device), step, total)
            step += 1
            trainee.update_average(step, total)
        yield epoch + 1, trainee.model


def score_model(
    cfg: RunConfig, maps: FeatureMaps, model: RankingModel, split: str, device: str
) -> dict[str, float]:
    """Metrics of what the model was trained for: `test/ndcg_10`, `test/auc/is_click`."""
    training = model.training
    loaded = LoadedModel(model.eval(), cfg, maps, {})
    found: dict[str, float] = {}
    if cfg.tasks:
        found |= score_store(cfg, loaded, [split]).splits[split].named_metrics(split)
    if cfg.retrieval.enabled:
        rows = AskedRows(cfg.sequence_dir, cfg.split, cfg.evaluate)
        found |= evaluate_retrieval(rows, loaded, [split], device)
    model.train(training)
    return found


def keep_best_epoch(
    cfg: RunConfig, maps: FeatureMaps, device: str
) -> tuple[RankingModel, dict[int, dict[str, float]]]:
    """The model as it was after the best of every second epoch, and all their metrics on the
    validation period.
    """
    found: dict[int, dict[str, float]] = {}
    best: dict[str, torch.Tensor] = {}
    model = None
    for done, model in trained_epochs(cfg, maps, device):
        if done % 2 == 0:
            found[done] = score_model(cfg, maps, model, "val", device)
            if best_epoch(found) == done:
                best = copy.deepcopy(model.state_dict())
    assert model is not None
    model.load_state_dict(best)
    return model, found


def best_epoch(found: Mapping[int, Mapping[str, float]]) -> int:
    """The epoch with the best metric, of equal ones the first."""
    return max(found, key=lambda number: found[number][CHOSEN])


def train_and_score(options: argparse.Namespace, name: str, seed: int) -> dict[str, object]:
    begin = time.perf_counter()
    by_epoch = name in ENCODERS
    refit = options.split == "test" and not by_epoch
    cfg = make_config(options, name, seed, refit=refit)
    maps = fit_features(cfg)

    validation: dict[int, float] = {}
    epochs = cfg.train.epochs
    if by_epoch:
        model, scored = keep_best_epoch(cfg, maps, options.device)
        epochs = best_epoch(scored)
        validation = {number: metrics[CHOSEN] for number, metrics in scored.items()}
        found = scored[epochs]
        if options.split == "test":
            found = score_model(cfg, maps, model, "test", options.device)
    else:
        *_, (_, model) = trained_epochs(cfg, maps, options.device)
        found = score_model(cfg, maps, model, options.split, options.device)

    facts: dict[str, object] = {"name": name, "seed": seed, "split": options.split}
    facts |= {"epochs": epochs, "validation": validation, "set": options.set}
    return facts | {"seconds": time.perf_counter() - begin} | found


def command_of(
    options: argparse.Namespace, name: str, seed: int, settings: Sequence[str] = ()
) -> list[str]:
    """One run in a process of its own, as what stands behind `python -m`; `settings` are more than
    those of all runs.
    """
    command = ["benchmarks.quality.retrieval_kuairand", "--one", "--names", name]
    command += ["--seeds", str(seed), "--config", str(options.config), "--split", options.split]
    command += ["--runs-dir", options.runs_dir, "--name", options.name]
    command += ["--device", options.device]
    return [*command, "--set", *options.set, *settings]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that the choice of settings has, too."""
    parser.add_argument("--config", type=Path, default=Path("configs/kuairand.yaml"))
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--name", default="kuairand", help="of the run with the sequences")
    parser.add_argument("--set", nargs="*", default=[], help="settings of all runs, a.b=c")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--budget", type=float, default=3600, help="seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="file that the lines of JSON are added to")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--names", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--choice", type=Path, help="lines of benchmarks.quality.retrieval_choice")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        (name,), (seed,) = options.names, options.seeds
        print(json.dumps(train_and_score(options, name, seed)), flush=True)
        return

    chosen: Mapping[str, tuple[str, ...]] = {}
    if options.choice is not None:
        with_choice = [name for name in options.names if name in ENCODERS]
        chosen = read_choice(options.choice, with_choice)
    # seed by seed: what is cut off by the time are the last seeds of all
    commands = []
    for seed in options.seeds:
        for name in options.names:
            commands.append(command_of(options, name, seed, chosen.get(name, ())))
    run_side_by_side(commands, options.out, options.processes, options.budget)


if __name__ == "__main__":
    main()
