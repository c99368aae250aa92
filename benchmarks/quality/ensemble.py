"""The mean of a run's seeds as one more run: what several seeds together are worth, and so what one
model that they teach could reach.

    predictions of every seed → mean probability → AUC, NE → the line NAME-mean10 of ten

    python -m benchmarks.quality.ensemble preset --runs FILE --predictions FOLDER --split val

It costs as much as all its seeds together, which its line says.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.quality.report import logits_of, read_ours, read_seeds, same_rows
from pipeline.evaluate.metrics import auc, normalised_entropy
from pipeline.figures import Figures, append_run

COSTS = ("train/gflop_per_example", "forward_gflop_per_candidate", "train/step_ms")
SHARES = ("masked_pair_share", "truncated_token_share")


def mean_run(name: str, runs_file: Path, predictions: Path, split: str) -> Figures:
    """The line of the mean of all seeds of `name` that have predictions of `split`.

    Raises:
        SystemExit: fewer than two have any.
    """
    runs, tables = [], []
    for run in read_seeds(runs_file, name):
        path = predictions / f"{name}-{run['seed']}-{split}.parquet"
        if path.exists():
            runs.append(run)
            tables.append(read_ours(path))
            same_rows(tables[0], tables[-1], str(path))
    if len(runs) < 2:
        raise SystemExit(f"error: {predictions} has {len(runs)} seeds of {name!r} on {split}")

    first = runs[0]
    metrics: Figures = {f"{split}/rows": len(tables[0])}
    for task in first["config"]["tasks"]:
        known = tables[0][f"label.{task}"].is_valid().to_numpy()
        labels = tables[0][f"label.{task}"].fill_null(0).to_numpy()[known] > 0
        logits = np.stack([table[f"logit.{task}"].to_numpy()[known] for table in tables])
        chances = 1 / (1 + np.exp(-logits.astype(np.float64)))
        mean = logits_of(chances.mean(axis=0))
        metrics[f"{split}/auc/{task}"] = auc(mean, labels)
        metrics[f"{split}/ne/{task}"] = normalised_entropy(mean, labels)

    metrics |= {cost: len(runs) * first["metrics"][cost] for cost in COSTS}
    metrics |= {share: first["metrics"][share] for share in SHARES}
    command = f"python -m benchmarks.quality.ensemble {name}"
    own = {"name": f"{name}-mean{len(runs)}", "command": command, "metrics": metrics}
    # of no seed: a table does not take it off a single run
    return {**first, **own, "seed": None, "seeds": [run["seed"] for run in runs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("name", help="of the run whose seeds are taken together")
    parser.add_argument("--runs", type=Path, required=True, help="JSON Lines file of their figures")
    parser.add_argument("--predictions", type=Path, required=True, help="folder, of train_plan")
    parser.add_argument("--split", choices=["val", "test"], default="val")
    options = parser.parse_args()

    line = mean_run(options.name, options.runs, options.predictions, options.split)
    append_run(options.runs, line)
    aucs = [value for key, value in line["metrics"].items() if "/auc/" in key]
    print(f"name={line['name']} seeds={len(line['seeds'])} mean_auc={np.mean(aucs):.4f}")


if __name__ == "__main__":
    main()
