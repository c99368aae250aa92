"""What the ranker's number formats cost in AUC: a trained model scores every test row in each of
them.

    python -m benchmarks.quality.number_formats --model runs/demo/model --store runs/demo/sequences
    [--device cuda] [--out FILE]

Each request goes the ranker's way, history encoded and candidates scored against its keys and
values. float32 is the measure; INT4 is of the embedding tables, bf16 and FP8 of the layers.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import environment
from benchmarks.report import table, write_run, write_section
from benchmarks.serving.ranker import RUNS, parts_of
from pipeline.batches.loader import EvaluationBatch, evaluation_batches
from pipeline.config import RunConfig, ServeConfig
from pipeline.evaluate.metrics import auc
from pipeline.model.artifact import LoadedModel, load_model
from pipeline.model.inference.cached_scoring import encode_history, score_candidates
from pipeline.model.inference.quantize import as_served

GOAL = 0.0005  # of AUC that a format may lose
FORMATS = {
    "fp32": ServeConfig(),
    "fp32, INT4 tables": ServeConfig(int4_tables=True),
    "bf16": ServeConfig(precision="bf16"),
    "FP8": ServeConfig(precision="bf16", fp8=True),
    "FP8, INT4 tables": ServeConfig(precision="bf16", fp8=True, int4_tables=True),
}


@torch.no_grad()
def score(
    loaded: LoadedModel, batch: EvaluationBatch, device: str, limits: ServeConfig
) -> np.ndarray:
    """Logits, float32 [C, tasks]."""
    history, candidates = parts_of(batch.batch)
    with torch.autocast(device, torch.bfloat16, limits.precision == "bf16"):
        cache = encode_history(loaded.model, history.to(device))
        return (
            score_candidates(loaded.model, cache, candidates.to(device), limits.micro_batch)
            .cpu()
            .numpy()
        )


def measure(model: Path, cfg: RunConfig, limits: ServeConfig, device: str) -> dict[str, float]:
    """AUC of each task over all rows of the test period, and the number of rows."""
    loaded = load_model(model, device)
    as_served(loaded.model, limits)
    logits, labels, known = [], [], []
    for batch in evaluation_batches(cfg, loaded.maps, "test"):
        logits.append(score(loaded, batch, device, limits))
        labels.append(batch.labels)
        known.append(batch.known)
    scores, labels, known = (np.concatenate(parts) for parts in (logits, labels, known))
    found = {
        task: auc(scores[known[:, i], i], labels[known[:, i], i])
        for i, task in enumerate(cfg.tasks)
    }
    return found | {"rows": len(scores)}


def section(runs: list[dict]) -> str:
    parts = [
        "## Number formats of the ranker",
        f"AUC of all {runs[0]['formats']['fp32']['rows']:,} test rows, and in brackets its change "
        "against float32 of "
        f"the same machine; a format may lose {GOAL}. FP8 has bf16 around it; a CPU emulates it.",
    ]
    for run in runs:
        found, machine = run["formats"], run["environment"]
        tasks = [name for name in found["fp32"] if name != "rows"]
        rows = [
            [
                name,
                *(f"{aucs[task]:.4f} ({aucs[task] - found['fp32'][task]:+.5f})" for task in tasks),
            ]
            for name, aucs in found.items()
        ]
        parts.append(f"`{run['command']}`, {machine['device']}, torch {machine['torch']}:")
        parts.append(table(["format", *tasks], rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--store", type=Path, default=Path("runs/demo/sequences"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--tokens", type=int, default=16_384, help="of one pass over several requests"
    )
    parser.add_argument(
        "--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS), metavar="NAME"
    )
    parser.add_argument("--out", type=Path, default=RUNS / "formats.json")
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="write RESULTS.md from them and end"
    )
    options = parser.parse_args()
    if options.report:
        write_section("formats", section([json.loads(file.read_text()) for file in options.report]))
        return
    torch.set_num_threads(1)
    command = "python -m benchmarks.quality.number_formats" + " --device cuda" * (
        options.device == "cuda"
    )
    found: dict[str, dict[str, float]] = {}
    run = {"command": command, "environment": environment(options.device), "formats": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_model(options.model).cfg
        cfg = replace(
            cfg, runs_dir=folder, evaluate=replace(cfg.evaluate, batch_tokens=options.tokens)
        )
        cfg.run_dir.mkdir()
        cfg.sequence_dir.symlink_to(options.store.absolute())
        for name in options.formats:
            begin = time.perf_counter()
            found[name] = measure(options.model, cfg, FORMATS[name], options.device)
            print(
                f"{name:20}{json.dumps(found[name])} {time.perf_counter() - begin:.1f} s",
                flush=True,
            )
            write_run(options.out, run)


if __name__ == "__main__":
    main()
