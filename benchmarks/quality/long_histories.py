"""The section "Histories of 4,096 in which what counts is old" of RESULTS.md, from its runs."""

from pathlib import Path

import numpy as np

from benchmarks.quality.report import read_seeds, spread
from benchmarks.report import table

NAMES = {
    "whole": "whole: window 256, full rows 256, the newest 1,024 after layer 1 of 2",
    "causal": "causal, no truncation",
    "no_truncation": "without truncation",
    "full_rows_0": "without full rows",
    "window_0": "without window",
    "stochastic_length": "trained on stochastic lengths (alpha 1.7)",
    "newest_1024": "the newest 1,024 events only",
    "newest_2048": "the newest 2,048 only",
    "mixture": "mixture: the newest 1,024, and the rows with a taste in a channel of their own",
    "no_merge": "item and action as two tokens",
}


def section(runs_file: Path) -> str:
    rows = []
    for name, what in NAMES.items():
        runs = read_seeds(runs_file, name)
        found = {key: [float(run["metrics"][key]) for run in runs] for key in runs[0]["metrics"]}
        auc, ne = found["val/auc/lasting"], found["val/ne/lasting"]
        work = [np.mean(found[key]) * 1e3 for key in WORK]
        shares = [f"{np.mean(found[key]):.0%}" for key in SHARES]
        row = [
            what,
            " ".join(f"{value:.3f}" for value in auc),
            f"{spread(auc, digits=3)} / {spread(ne, digits=3)}",
            " / ".join(f"{value:.1f}" for value in work),
            " / ".join(shares),
            f"{np.median(found['train/step_ms']):.0f}",
        ]
        rows.append(row)

    header = [
        "",
        "AUC, each seed",
        "AUC / NE",
        "MFLOP an example, training / inference",
        "pairs masked / tokens cut",
        "ms a step",
    ]
    return f"""## Histories of 4,096 in which what counts is old

`python -m benchmarks.quality.train_plan benchmarks/plans/long_histories.yaml --device cuda --seeds
0 1 2` (`configs/long_histories.yaml`), NVIDIA H200, bfloat16, three seeds: 512 generated users of
4,096 rows, 335 steps. A user likes or dislikes four categories; the first 1,024 rows show it, the
next 1,280 do not, and each category is asked for once after them (about 290 tastes in validation,
so a standard error of some .03). Thirty runs trained at once on four GPUs: a step's time is a hint.
Mean ± standard deviation over seeds; figures in `benchmarks/runs/long_histories.jsonl`.

{table(header, rows)}"""


WORK = ("train/gflop_per_example", "forward_gflop_per_candidate")
SHARES = ("masked_pair_share", "truncated_token_share")
