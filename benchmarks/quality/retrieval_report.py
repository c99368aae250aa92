"""The retrieval section of RESULTS.md: next items of MovieLens-1M, the memory of item vectors,
KuaiRand, ranking and retrieval together, and the losses alone.

What has not been measured has no part in it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.quality.retrieval_draws import (
    DRAWS,
    DROPOUT,
    EMBEDDING_LR,
    ID_DROPOUT,
    LAYERS,
    LR,
    NUM_FINALISTS,
    TEMPERATURE,
    chosen_draw,
    draw_of,
    tried_draws,
)
from benchmarks.quality.retrieval_ml1m import MEMORIES, MEMORY_BATCHES, MEMORY_STEPS
from benchmarks.report import RUNS, read_run, table
from pipeline.figures import Figures

# name of a run → what it is
MODELS = {
    "popularity": "popularity",
    "item_knn": "ItemKNN",
    "sasrec": "SASRec, 2 layers",
    "hstu": "HSTU, 2 layers",
    "hstu_large": "HSTU, 8 layers",
    "hstu_wide": "HSTU, 8 layers, width 256",
    "fuxi_alpha": "FuXi-α, 8 layers",
    "fuxi_beta": "FuXi-β, 8 layers",
    "lares": "LARES, 2 + 4 × 2 layers",
    "lares_aligned": "LARES with its alignments",
    "ultra_200": "ULTRA-HSTU, 8 layers, length 200",
    "ultra_2000": "ULTRA-HSTU, 8 layers, length 2,000",
    "sampled_128": "HSTU, 8 layers, 128 sampled",
    "sampled_512": "HSTU, 8 layers, 512 sampled",
}
KUAIRAND = {
    "sasrec": "SASRec",
    "hstu_merged": "HSTU, merged actions",
    "fuxi_beta": "FuXi-β",
    "ultra_hstu": "ULTRA-HSTU",
}
JOINT = {
    "ranking": "ranking alone",
    "retrieval": "retrieval alone",
    "joint": "both",
    "joint_light": "both, a next item's loss × 0.1",
}
# what a draw may set, and what it is without
SETTINGS = {
    ID_DROPOUT: ("dropout of ids", "0.5"),
    DROPOUT: ("dropout", "0.05"),
    TEMPERATURE: ("temperature", "0.05"),
    LR: ("rate", "2e-3"),
    EMBEDDING_LR: ("rate of tables", "8e-3"),
    LAYERS: ("layers", "2"),
}
TASKS = ("is_click", "long_view", "is_like", "is_profile_enter")


def measured_section(folder: Path = RUNS) -> str:
    """The section from the files of `folder`."""
    parts = [section(read_run(folder / "retrieval_ml1m.json"))]
    more = {
        "retrieval_ml1m_val": lengths_part,
        "retrieval_memory": memory_part,
        "retrieval_kuairand_choice": choice_part,
        "retrieval_kuairand": kuairand_part,
        "retrieval_softmax": softmax_part,
    }
    for name, part in more.items():
        path = folder / f"{name}.json"
        if path.exists():
            parts.append(part(read_run(path)))
    return "\n\n".join(parts)


def section(ml1m: Figures) -> str:
    return f"""## Retrieval

Next item of MovieLens-1M among all 3,706, the user's earlier items left out, stable order, no
times: position only. The last item of each user is held out. Width, rates and dropout were chosen
with the second-to-last item held out instead (benchmarks/runs/retrieval_ml1m_val.json); then each
model was trained with it put back and scored once. One loss (full softmax over all items, but for
the last two rows) and 25 epochs; width 128, but 256 and 30 epochs in one row. A film's token tells
if its rating was 3 or more. Mean of the seeds ± standard deviation; the standard error of HR@10
over users is .006. One H200 that 5 to 14 trainings shared, so seconds are those of a part of it.

`python -m benchmarks.quality.retrieval_ml1m --data DATA --split test --seeds 0 1 2 --out FILE`

{_ml1m_table(ml1m["runs"])}

HSTU has a bias of relative position and FuXi a channel of it; ULTRA-HSTU, LARES and SASRec have
position embeddings alone. ULTRA-HSTU at length 2,000 is no better than at 200 here. The second pass
of LARES's alignments is not in its TFLOP. With 512 sampled the loss is that of CCE−
(arXiv:2509.09682), of cosines."""


def lengths_part(validation: Figures) -> str:
    """What was tried for ULTRA-HSTU's length of 2,000, on validation."""
    runs = [run for run in validation["runs"] if run["end"] and _of_lengths(run)]
    rows = []
    for run in sorted(runs, key=lambda run: -run["ndcg_10"]):
        model = run["set"].get("model", {})
        attention = model.get("attention", {"window": 200, "full_rows": 200})
        cells = [run["name"].removeprefix("ultra_"), model.get("position_buckets", 200)]
        cells += [attention["window"], attention["full_rows"]]
        quality = [f"{run[key]:.4f}" for key in ("hr_10", "ndcg_10")]
        rows.append((*(f"{cell}" for cell in cells), *quality))
    header = ("length", "positions", "window", "rows that see all", "HR@10", "NDCG@10")
    return f"""### ULTRA-HSTU at length 2,000

On the second-to-last item, 20 epochs, rate of tables .004, one seed: more positions with embeddings
of their own, and a window without rows that see everything.

{table(header, rows)}"""


def _of_lengths(run: Figures) -> bool:
    """Whether it is one of the trainings of both lengths at one budget."""
    chosen = run["set"]
    rate = chosen.get("train", {}).get("embedding_lr")
    return run["name"].startswith("ultra_") and chosen.get("epochs") == 20 and rate == 0.004


def memory_part(memory: Figures) -> str:
    runs = memory["runs"]
    return f"""### Memory of item vectors

MovieLens-1M again, NDCG@10 on the last items: a small SASRec (2 layers, width 64, length 50) whose
steps have one next item of each of 64 or 512 windows, {MEMORY_STEPS:,} steps. Negatives are the
step's other items, corrected for popularity, and the newest 4,096 or 65,536 vectors of earlier
steps, after a quarter of the steps without. Settings are those of the table above, none was chosen
here. `all items` is the full softmax, which a memory of all items without drift would come to.

`python -m benchmarks.quality.retrieval_ml1m --data DATA --split test --seeds 0 1 2 --names
memory_none_64 … --out FILE`

{_memory_table(runs)}

{_memory_verdict(runs)}

Mean cosine, at the end, of a vector in memory and the one that the model would make of its item by
then, both less the mean of the latter:

{_drift_table(runs)}"""


def _memory_cells() -> list[tuple[str, int, dict[str, str]]]:
    """Size of the memory, next items of a step, and the run's name by kind of memory."""
    cells = []
    for batch in MEMORY_BATCHES:
        for size in MEMORIES:
            names = {kind: f"memory_{kind}_{batch}" for kind in ("full", "none")}
            names |= {kind: f"memory_{kind}_{size}_{batch}" for kind in ("xbm", "xbn", "axbn")}
            cells.append((size, batch, names))
    return cells


def _memory_table(runs: Sequence[Figures]) -> str:
    rows = []
    for size, batch, names in _memory_cells():
        columns = []
        for name in names.values():
            own = [run for run in runs if run["name"] == name]
            columns.append(f"{_spread(own, 'ndcg_10')} ({len(own)})" if own else "")
        rows.append((str(batch), size, *columns))
    header = ("next items of a step", "memory", "all items", "none", "XBM", "XBN", "AXBN")
    return table(header, rows)


def _drift_table(runs: Sequence[Figures]) -> str:
    rows = []
    for size, batch, names in _memory_cells():
        columns = []
        for kind in ("xbm", "xbn", "axbn"):
            own = [run for run in runs if run["name"] == names[kind]]
            columns.append(f"{_mean(own, 'memory_cosine'):.2f}" if own else "")
        rows.append((str(batch), size, *columns))
    return table(("next items of a step", "memory", "XBM", "XBN", "AXBN"), rows)


def _memory_verdict(runs: Sequence[Figures]) -> str:
    """In how many of the settings each memory is at least as good as none."""
    said = []
    for kind, title in (("xbm", "XBM"), ("xbn", "XBN"), ("axbn", "AXBN")):
        better, measured = 0, 0
        for _, _, names in _memory_cells():
            own = [run for run in runs if run["name"] == names[kind]]
            without = [run for run in runs if run["name"] == names["none"]]
            if own and without:
                measured += 1
                better += _mean(own, "ndcg_10") >= _mean(without, "ndcg_10")
        said.append(f"{title} in {better} of {measured}")
    return f"Seeds in brackets. At least as good as no memory: {', '.join(said)}."


def choice_part(choice: Figures) -> str:
    runs = choice["runs"]
    return f"""### Settings for the next items of KuaiRand

NDCG@10 on the validation period at the best of every second epoch, at width 64 and in bfloat16.
Every encoder was trained with the same draws of settings, and with a second seed with
the {NUM_FINALISTS} draws that were best: their mean, and the number of seeds in brackets. Four
layers were drawn last, after those second seeds, and had time for one. **Bold** is what an encoder
has in the next table: of the draws with two seeds the best.

`python -m benchmarks.quality.retrieval_choice --set train.precision=bf16 --out FILE`

{_choice_table(runs)}"""


def _choice_table(runs: Sequence[Figures]) -> str:
    tried = {name: tried_draws(runs, name) for name in KUAIRAND}
    tried = {name: draws for name, draws in tried.items() if draws}
    chosen = {name: chosen_draw(draws) for name, draws in tried.items()}
    rows = []
    for draw in DRAWS:
        cells = []
        for name, draws in tried.items():
            values = list(draws.get(draw, {}).values())
            cell = f"{np.mean(values):.4f} ({len(values)})" if values else ""
            cells.append(f"**{cell}**" if chosen[name] == draw else cell)
        if any(cells):
            rows.append((*_draw_cells(draw), *cells))
    titles = [title for title, _ in SETTINGS.values()]
    return table((*titles, *(KUAIRAND[name] for name in tried)), rows)


def _draw_cells(draw: Sequence[str]) -> list[str]:
    """The value of each setting with a draw."""
    cells = []
    for key, (_, usual) in SETTINGS.items():
        given = [part.removeprefix(key) for part in draw if part.startswith(key)]
        cells.append(given[0] if given else usual)
    return cells


def kuairand_part(kuairand: Figures) -> str:
    runs = kuairand["runs"]
    parts = []
    if any(run["name"] in KUAIRAND for run in runs):
        parts.append(_kuairand_alone(runs))
    if any(run["name"] in JOINT for run in runs):
        parts.append(_kuairand_joint(runs))
    return "\n\n".join(parts)


def _kuairand_alone(runs: Sequence[Figures]) -> str:
    first = next(run for run in runs if run["name"] in KUAIRAND)
    users, hits = first["test/users"], first["test/hr_10"]
    error = (hits * (1 - hits) / users) ** 0.5
    return f"""### Next liked or long-viewed items of KuaiRand

The items that a user likes or watches long in the test period, among all of the subset, from the
history before that period; those seen before are left out. Width 64, trained up to the validation
period in bfloat16; of 8 epochs every second one was scored there, and the best on the test period,
once. `validation` is NDCG@10 there at the epochs chosen. Of a model with several rows the best of
these counts. The standard error of HR@10 over the {users:,.0f} users is {error:.4f}.

`python -m benchmarks.quality.retrieval_kuairand --split test --seeds 0 1 2 --names ultra_hstu
hstu_merged fuxi_beta sasrec --choice CHOICE --set train.precision=bf16 --out FILE`

{_kuairand_table(runs)}

{_kuairand_verdict(runs)}"""


def _by_draw(runs: Sequence[Figures], name: str) -> dict[tuple[str, ...], list[Figures]]:
    """The runs of a model by their settings, the best on validation first."""
    found: dict[tuple[str, ...], list[Figures]] = {}
    for run in runs:
        if run["name"] == name:
            found.setdefault(draw_of(run), []).append(run)
    return dict(sorted(found.items(), key=lambda item: -_validation(item[1])))


def _validation(runs: Sequence[Figures]) -> float:
    """Mean NDCG@10 of the validation period at the epochs that were chosen by it."""
    return float(np.mean([max(run["validation"].values()) for run in runs]))


def _kuairand_table(runs: Sequence[Figures]) -> str:
    keys = ("hr_10", "ndcg_10", "recall_50", "mrr")
    first = next(run for run in runs if run["name"] in KUAIRAND)
    nothing = [""] * (len(SETTINGS) + 2)
    rows = []
    for name, title in (("popularity", "popularity"), ("item_knn", "ItemKNN")):
        cells = [f"{first[f'test/{name}/{key}']:.4f}" for key in keys]
        coverage = f"{first[f'test/{name}/coverage_10']:.2f}"
        rows.append((title, *nothing, *cells, coverage, "", ""))
    for name, title in KUAIRAND.items():
        for draw, own in _by_draw(runs, name).items():
            cells = [_spread(own, f"test/{key}") for key in keys]
            epochs = ", ".join(str(run["epochs"]) for run in own)
            coverage = f"{_mean(own, 'test/coverage_10'):.2f}"
            seconds = f"{_mean(own, 'seconds'):,.0f}"
            head = (title, *_draw_cells(draw), f"{_validation(own):.4f}", str(len(own)))
            rows.append((*head, *cells, coverage, epochs, seconds))
    titles = [title for title, _ in SETTINGS.values()]
    header = ("model", *titles, "validation", "seeds", "HR@10", "NDCG@10", "recall@50", "MRR")
    return table((*header, "coverage@10", "epochs chosen", "s"), rows)


def _kuairand_verdict(runs: Sequence[Figures]) -> str:
    """Where our best encoder stands beside SASRec, each with the settings that validation chose."""
    chosen = {}
    for name in KUAIRAND:
        groups = list(_by_draw(runs, name).values())
        if groups:
            chosen[name] = groups[0]

    ours = [name for name in chosen if name != "sasrec"]
    best = max(ours, key=lambda name: _validation(chosen[name]), default=None)
    names = [name for name in (best, "sasrec") if name in chosen]
    figures = [f"{KUAIRAND[name]} {_spread(chosen[name], 'test/ndcg_10')}" for name in names]
    told = f"NDCG@10 as chosen on validation: {', '.join(figures)}."
    if len(names) < 2 or any(len(chosen[name]) < 2 for name in names):
        return told

    squares = 0.0
    for name in names:
        values = [run["test/ndcg_10"] for run in chosen[name]]
        squares += np.var(values, ddof=1) / len(values)
    first, second = (_mean(chosen[name], "test/ndcg_10") for name in names)
    return f"{told} The difference is {first - second:+.4f}, its standard error {squares**0.5:.4f}."


def _kuairand_joint(runs: Sequence[Figures]) -> str:
    return f"""### Ranking and retrieval with one encoder

configs/kuairand.yaml at 256 sequences a step and three epochs, trained up to the test period: its
four tasks alone, next items alone, and both, which share tokens, tables and encoder, in bfloat16.
AUC of ranking, HR and NDCG of retrieval, all on the test period.

`python -m benchmarks.quality.retrieval_kuairand --split test --seeds 0 1 2 --names ranking
retrieval joint joint_light --set train.precision=bf16 --out FILE`

{_joint_table(runs)}"""


def _joint_table(runs: Sequence[Figures]) -> str:
    keys = [f"test/auc/{task}" for task in TASKS] + ["test/hr_10", "test/ndcg_10"]
    rows = []
    for name, title in JOINT.items():
        own = [run for run in runs if run["name"] == name]
        if not own:
            continue
        cells = [_spread(own, key) if key in own[0] else "" for key in keys]
        rows.append((title, str(len(own)), *cells, f"{_mean(own, 'seconds'):,.0f}"))
    header = ["trained", "seeds", *(f"AUC {task}" for task in TASKS), "HR@10", "NDCG@10", "s"]
    return table(header, rows)


def softmax_part(softmax: Figures) -> str:
    machine = softmax["machine"]
    return f"""### Losses of a next item

65,536 next items of width 64 and 100,000 items, forward and backward, on one {machine["device"]}
(torch {machine["torch"]}, triton {machine["triton"]}). `sampled`: 512 negatives each. The Triton
cross entropy is ours after CCE−. Where TF32 is allowed, ours reads vectors in float16, which
keeps as many bits; the last form gives such vectors to the cross entropy too. The error is that of
the loss and its gradients against float64, relative, at 3,000 next items.

`python -m benchmarks.kernels.softmax --out FILE`

{_softmax_table(softmax)}

{_softmax_verdict(softmax)}"""


def _softmax_verdict(softmax: Mapping[str, Figures]) -> str:
    """Ours beside the fastest other form of each loss."""
    said = []
    for case, forms in softmax.items():
        timed = {name: numbers for name, numbers in forms.items() if "ms" in numbers}
        ours = [name for name in timed if name.startswith("ours")]
        # chunked PyTorch is ours too, where the kernel does not run
        others = [name for name in timed if not name.startswith(("ours", "chunked"))]
        if case == "machine" or not ours or not others:
            continue
        best, peer = (min(names, key=lambda name: timed[name]["ms"]) for names in (ours, others))
        faster = timed[peer]["ms"] / timed[best]["ms"]
        line = f"{case}: `{best}` is {faster:.2f}x as fast as `{peer}`"
        if "PyTorch" in timed:
            share = timed[best]["peak_gb"] / timed["PyTorch"]["peak_gb"]
            line += f", with {share:.1%} of PyTorch's memory"
        said.append(f"- {line}.")
    return "\n".join(said)


def _softmax_table(softmax: Mapping[str, Figures]) -> str:
    rows = []
    for case, forms in softmax.items():
        if case == "machine":
            continue
        for name, numbers in forms.items():
            timed = "ms" in numbers
            ms = f"{numbers['ms']:.2f}" if timed else "not timed"
            peak = f"{numbers['peak_gb']:.3f}" if timed else ""
            rows.append((case, name, ms, peak, f"{numbers['error']:.0e}"))
    return table(("loss", "form", "ms", "peak, GB", "error"), rows)


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
