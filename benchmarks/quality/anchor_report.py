"""The section "KuaiRand subset" of RESULTS.md: the anchors, and the demo on the same rows."""

from benchmarks.report import table
from pipeline.figures import Figures

NAMES = {
    "rates_to_30_april": "smoothed rates, fitted to 30 April",
    "demo": "ULTRA-HSTU, `configs/demo.yaml`, trained to 30 April, seed 0",
    "rates_to_2_may": "smoothed rates, fitted to 2 May",
    "lightgbm": "LightGBM on prequential rates, to 2 May",
    "lightgbm_history": "LightGBM with history features, to 2 May",
}


def section(anchor: Figures, demo: Figures) -> str:
    """The table, from `benchmarks.quality.kuairand_anchor` and the demo's summary."""
    tasks = list(demo["test_auc"])
    ours = {task: {"auc": demo["test_auc"][task], "ne": demo["test_ne"][task]} for task in tasks}
    measured = anchor["measured"] | {"demo": ours}

    rows = []
    for name, what in NAMES.items():
        cells = [f"{by['auc']:.4f} / {by['ne']:.4f}" for by in map(measured[name].get, tasks)]
        rows.append([what, *cells])

    return f"""## KuaiRand subset

`{anchor["command"]}` (figures in `benchmarks/runs/kuairand_anchor.json`, LightGBM as the mean of
{len(anchor["seeds"])} seeds) and `{demo["command"]}` (seed 0, `benchmarks/runs/demo.json`, the
run's summary.json), {anchor["rows"]["test"]:,} test rows of 3–5 May, {demo["environment"]["cores"]}
cores of an {demo["environment"]["device"]}.

{table(["AUC / NE", *tasks], rows)}"""
