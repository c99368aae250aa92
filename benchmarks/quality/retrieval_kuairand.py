"""Retrieval on the KuaiRand subset: the items that a user likes or watches long in the test period,
by global time, beside popularity, ItemKNN and SASRec.

    python -m jobs.build_sequences --config configs/kuairand.yaml
    python -m benchmarks.quality.retrieval_kuairand --runs-dir runs --name kuairand --seeds 0 1 2 \
        --out runs.jsonl

It reads published sequences and trains without Ray: the pipeline's own loader, loop and evaluation.
Settings are those of configs/kuairand.yaml but for the encoder, its width and `retrieval`.
"""

import argparse
import json
import logging
from pathlib import Path

import torch

from pipeline import config
from pipeline.batches.features import fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import step_plan
from pipeline.config import RunConfig
from pipeline.evaluate.retrieval import evaluate_retrieval
from pipeline.model.artifact import LoadedModel
from pipeline.sequences import store
from pipeline.train import loop

CAUSAL = ["model.attention={window: null, scaling_seq_len: 16}"]
SEMI_LOCAL = [
    "model.attention={window: 8, full_rows: 8, scaling_seq_len: 16}",
    "model.truncate_after_layer=1",
    "model.truncate_to=64",
]
ENCODERS = {
    "ultra_hstu": SEMI_LOCAL,
    "hstu_merged": [*CAUSAL, "model.relative_bias=true"],
    "sasrec": CAUSAL,
}
SETTINGS = [
    "tasks=[]",
    "features.dense={}",
    "model.channels={}",
    "model.task_towers=false",
    "model.num_layers=2",
    "retrieval.enabled=true",
    "retrieval.positives=[is_like, long_view]",
    "train.task_weights={}",
    "train.validate_every=0",
    "train.patience=null",
    "train.publish=last",
    "train.average_from=null",
    "train.batch_tokens=null",
    "train.batch_users=64",
    "train.epochs=8",
    "tracking.gate_max_ne={}",
    "split.refit=true",
]


def make_config(options: argparse.Namespace, encoder: str, seed: int) -> RunConfig:
    changes = [*SETTINGS, *ENCODERS[encoder], f"model.encoder={encoder}", f"seed={seed}"]
    changes += [f"runs_dir={options.runs_dir}", f"name={options.name}"]
    return config.load(options.config, [*changes, *options.set])


def train_and_score(options: argparse.Namespace, encoder: str, seed: int) -> dict[str, object]:
    cfg = make_config(options, encoder, seed)
    maps = fit_features(cfg)
    loader = TrainLoader(cfg, maps, step_plan(cfg))
    digest = store.read_manifest(cfg.sequence_dir).digest
    model = loop.train(cfg, maps, loader, digest, device=options.device).eval()
    loaded = LoadedModel(model.requires_grad_(False), cfg, maps, {})
    found = evaluate_retrieval(cfg, loaded, ["test"], options.device)
    return {"name": encoder, "seed": seed, "epochs": cfg.train.epochs, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/kuairand.yaml"))
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--name", default="kuairand")
    parser.add_argument("--encoders", nargs="+", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], help="settings, a.b=c")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="file that lines are added to")
    options = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for seed in options.seeds:
        for encoder in options.encoders:
            line = json.dumps(train_and_score(options, encoder, seed))
            print(line, flush=True)
            with options.out.open("a") as out:
                out.write(line + "\n")


if __name__ == "__main__":
    main()
