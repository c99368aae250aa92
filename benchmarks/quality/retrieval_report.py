"""The retrieval section of RESULTS.md: next items of MovieLens-1M."""

from collections.abc import Sequence

import numpy as np

from benchmarks.report import table
from pipeline.figures import Figures

# name of a run → what it is
MODELS = {
    "popularity": "popularity",
    "item_knn": "ItemKNN",
    "sasrec": "SASRec, 2 layers",
    "hstu": "HSTU, 2 layers",
    "hstu_large": "HSTU, 8 layers",
    "hstu_wide": "HSTU, 8 layers, width 256",
    "fuxi_beta": "FuXi-β, 8 layers",
    "lares": "LARES, 2 + 4 × 2 layers",
    "lares_aligned": "LARES with its alignments",
    "ultra_200": "ULTRA-HSTU, 8 layers, length 200",
    "ultra_2000": "ULTRA-HSTU, 8 layers, length 2,000",
    "sampled_128": "HSTU, 8 layers, 128 sampled",
    "sampled_512": "HSTU, 8 layers, 512 sampled",
}


def section(ml1m: Figures) -> str:
    return f"""## Retrieval

Next item of MovieLens-1M among all 3,706, the user's earlier items left out, stable order, no
times: position only. The last item of each user is held out. Width, rates and dropout were chosen
with the second-to-last item held out instead (benchmarks/runs/retrieval_ml1m_val.json); then each
model was trained with it put back and scored once. One loss (full softmax over all items, but for
the last two rows) and 25 epochs; width 128, but 256 and 30 epochs in one row. A film's token tells
if its rating was 3 or more. Mean of the seeds ± standard deviation; the standard error of HR@10
over users is .006. One H200 that 8 to 14 trainings shared, so seconds are those of a part of it.

`python -m benchmarks.quality.retrieval_ml1m --data DATA --split test --seeds 0 1 2 --out FILE`

{_ml1m_table(ml1m["runs"])}

HSTU has a bias of relative position and FuXi a channel of it; ULTRA-HSTU, LARES and SASRec have
position embeddings alone. A row with fewer than three seeds was cut short by the time on the GPU;
FuXi-α was not finished. ULTRA-HSTU at length 2,000 is no better than at 200 here. The second pass
of LARES's alignments is not in its TFLOP."""


def _ml1m_table(runs: Sequence[Figures]) -> str:
    header = ("model", "seeds", "HR@10", "NDCG@10", "HR@50", "MRR", "coverage@10", "TFLOP", "s")
    rows = []
    for name, own in _by_name(runs):
        flops = own[0].get("train_tflop")
        seconds = _mean(own, "seconds") if flops else None
        rows.append(
            (
                MODELS[name],
                str(len(own)),
                _spread(own, "hr_10"),
                _spread(own, "ndcg_10"),
                _spread(own, "hr_50"),
                _spread(own, "mrr"),
                f"{_mean(own, 'coverage_10'):.2f}",
                "" if flops is None else f"{flops:,.0f}",
                "" if seconds is None else f"{seconds:,.0f}",
            )
        )
    return table(header, rows)


def _by_name(runs: Sequence[Figures]) -> list[tuple[str, list[Figures]]]:
    """The runs of each model, in the order of `MODELS`."""
    found = []
    for name in MODELS:
        own = [run for run in runs if run["name"] == name]
        if own:
            found.append((name, own))
    return found


def _mean(runs: Sequence[Figures], key: str) -> float:
    return float(np.mean([run[key] for run in runs]))


def _spread(runs: Sequence[Figures], key: str) -> str:
    """`.3471 ± .0038`, of one run its value."""
    values = [run[key] for run in runs]
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.4f}"
