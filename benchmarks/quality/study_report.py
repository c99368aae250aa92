"""The section "Scaling studies" of RESULTS.md, from the figures of each study.

    python -m benchmarks.quality.study_report runs/drifting-study/figures.json --name drifting \\
        --machine "NVIDIA H200, 14 processes"       # → benchmarks/runs/study_drifting.json
    python docs/images/study.py                     # its pictures

With `--earlier benchmarks/runs/study_drifting.json` points, laws and predictions that the new
figures lack are those of a run before.

    python -m benchmarks.results "scaling studies"
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.report import spread
from benchmarks.report import RUNS, read_run, table, write_run
from pipeline.evaluate.page_parts import number_text
from pipeline.study.figures import share_reached
from pipeline.study.laws import pareto_front
from pipeline.study.measured import COSTS
from pipeline.study.page import PAPER, interval_text, seeds_text

Figures = dict[str, Any]
FULL_SIZE = ("drifting", "ml_1m", "chains")
WORDS = "`python -m jobs.scaling_study` and `python -m benchmarks.quality.study_points`"


def join_earlier(new: Figures, earlier: Figures) -> Figures:
    """The figures of a study with what they lack of an earlier run: points, laws and predictions.
    `earlier_points` is the number of such points; the fronts are those of all together.

    Raises:
        SystemExit: they are of other rows.
    """
    for name in ("name", "split", "task", "rows", "users", "lengths"):
        if new[name] != earlier[name]:
            raise SystemExit(f"error: --earlier has {name} {earlier[name]}, not {new[name]}")

    known = {_point_key(point): point for point in new["points"]}
    before = {_point_key(point): point for point in earlier["points"]}
    kept = [key for key in before if key not in known]
    in_order = [*before, *(key for key in known if key not in before)]
    points = [(before | known)[key] for key in in_order]
    return new | {
        "points": points,
        "earlier_points": len(kept),
        "fronts": _fronts([point for point in points if point["data_share"] == 1.0]),
        "laws": new["laws"] or earlier["laws"],
        "predictions": new["predictions"] or earlier["predictions"],
    }


def _point_key(point: Figures) -> tuple[str, str, int, float]:
    return point["encoder"], point["size"], point["length"], point["data_share"]


def _fronts(points: Sequence[Figures]) -> dict[str, list[list[Any]]]:
    """As `pipeline.study.figures` has them: by cost the points that no other beats, the worst
    first.
    """
    aucs = np.array([point["auc"] for point in points])
    fronts = {}
    for cost in COSTS:
        costs = np.array([point[cost] for point in points])
        chosen = np.flatnonzero(pareto_front(costs, aucs))
        by_auc = chosen[np.argsort(aucs[chosen], kind="stable")]
        fronts[cost] = [list(_point_key(points[number])[:3]) for number in by_auc]
    return fronts


def section(studies: Sequence[Figures]) -> str:
    """Of the runs that `main` has written, in the order in which they are to stand."""
    parts = [
        f"""## Scaling studies

{WORDS}:
encoders, sizes and lengths of history, each a training ([guide](../docs/guide/scaling.md)).
Intervals hold 95 % of the draws of users, and of seeds where there are several. FLOP are
analytic. AUC: mean ± standard deviation over seeds. Bold: no other point of the study beats it in
AUC and inference FLOP."""
    ]
    parts += [_study_part(study) for study in studies]
    return "\n\n".join(parts)


def _study_part(study: Figures) -> str:
    figures = study["figures"]
    title = f"### {figures['name']}: {seeds_text(figures)} a point"
    rows = f"{figures['rows']:,} rows of {figures['users']:,} users, {figures['split']}"
    machine = study["environment"]["device"]
    text = [title, f"`{study['command']}`, {machine}. {rows}, task {figures['task']}."]
    if figures.get("earlier_points"):
        text.append(
            f"{figures['earlier_points']} of the points are those of an earlier run, and so are "
            "laws and predictions."
        )
    if figures["reachable"] is not None:
        text.append(_reachable_words(figures["reachable"]))
    text += [_point_table(figures), _front_words(figures)]
    if few := one_seed_words(figures):
        text.append(few)
    text.append(_slope_table(figures))
    if figures["predictions"]:
        text.append(_prediction_table(figures))
    return "\n\n".join(text)


def _reachable_words(reachable: dict[str, Figures]) -> str:
    parts = []
    for length, best in reachable.items():
        rows = "the whole history" if length == "all" else f"{length} rows"
        parts.append(f"{best['auc']:.4f} from {rows}")
    return f"The best AUC that anybody could have: {', '.join(parts)}."


def _point_table(figures: Figures) -> str:
    front = [tuple(key) for key in figures["fronts"]["infer_gflop"]]
    rows = []
    for point in figures["points"]:
        key = point["encoder"], point["size"], point["length"]
        share = point["data_share"]
        auc = spread(point["auc_by_seed"])
        if share == 1.0 and key in front:
            auc = f"**{auc}**"
        size = point["size"] if share == 1.0 else f"{point['size']}, {share:.0%} of the data"
        rows.append(
            [
                f"{point['encoder']} {size}",
                f"{point['length']}",
                f"{point['seeds']}",
                interval_text(point["ne"], ".4f"),
                auc,
                number_text(share_reached(figures, point), ".0%"),
                f"{1000 * point['train_gflop']:.3g} / {1000 * point['infer_gflop']:.3g}",
            ]
        )
    head = ["", "length", "seeds", "NE", "AUC", "of the reachable"]
    return table([*head, "MFLOP an item, training / inference"], rows)


def _front_words(figures: Figures) -> str:
    """By length, the points that no other of the same length beats, the cheapest first."""
    parts = []
    for length in figures["lengths"]:
        parts.append(f"{length} rows: {', '.join(front_at(figures, length))}")
    return f"Beaten in AUC and inference FLOP by no point of their own length: {'; '.join(parts)}."


def front_at(figures: Figures, length: int) -> list[str]:
    """Encoder and size of these points, the cheapest first."""
    found = []
    for point in figures["points"]:
        if point["length"] == length and point["data_share"] == 1.0:
            found.append(point)
    if not found:
        return []

    costs = np.array([point["infer_gflop"] for point in found])
    aucs = np.array([point["auc"] for point in found])
    chosen = np.flatnonzero(pareto_front(costs, aucs))
    in_order = chosen[np.argsort(costs[chosen], kind="stable")]
    return [f"{found[number]['encoder']} {found[number]['size']}" for number in in_order]


def one_seed_words(figures: Figures) -> str:
    """Which points have one seed, whose intervals say nothing of what another would change; ""
    where all have more.
    """
    alone = []
    for point in figures["points"]:
        if point["seeds"] == 1:
            alone.append(f"{point['encoder']} {point['size']} at {point['length']}")
    if not alone:
        return ""
    which = "all points" if len(alone) == len(figures["points"]) else ", ".join(alone)
    return (
        f"One seed, so that the intervals, and those of slopes and laws through them, are of users "
        f"alone: {which}."
    )


def _slope_table(figures: Figures) -> str:
    """NE gain per GFLOP, and over the baseline's."""
    rows = []
    for cost in PAPER:
        for encoder, entry in figures["slopes"][cost].items():
            is_base = encoder == figures["baseline"]
            ratio = "1" if is_base else interval_text(entry["ratio"], ".1f")
            rows.append([COSTS[cost], encoder, interval_text(entry["slope"], ".3g"), ratio])
    head = ["", "encoder", "NE gain per unit", f"over {figures['baseline']}"]
    return table(head, rows)


def _prediction_table(figures: Figures) -> str:
    rows = []
    for name, entry in figures["predictions"].items():
        rows.append(
            [
                name,
                interval_text(entry["log"], ".4f"),
                interval_text(entry["power"], ".4f"),
                interval_text(entry["measured"], ".4f"),
                number_text(entry.get("log_error"), "+.4f"),
                number_text(entry.get("power_error"), "+.4f"),
            ]
        )
    head = [f"NE of {figures['sizes'][-1]}", "a + b ln C", "a + b C^-c", "measured"]
    return table([*head, "error of ln", "error of the power"], rows)


def read_studies() -> list[Figures]:
    """Runs of the studies at full size; where there is none, of the smallest form."""
    paths = [RUNS / f"study_{name}.json" for name in FULL_SIZE]
    measured = [path for path in paths if path.exists()]
    return [read_run(path) for path in measured or [RUNS / "study_smallest.json"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("figures", type=Path, help="figures.json of a study's folder")
    parser.add_argument("--name", required=True, help="of the run: benchmarks/runs/study_NAME.json")
    parser.add_argument("--machine", required=True, help="on which the points were run")
    parser.add_argument(
        "--command", default="python -m benchmarks.quality.study_points", help="that ran the points"
    )
    parser.add_argument(
        "--earlier", type=Path, help="a run whose figures stand where there are none"
    )
    options = parser.parse_args()
    figures = json.loads(options.figures.read_text())
    if options.earlier:
        figures = join_earlier(figures, read_run(options.earlier)["figures"])
    run = {
        "command": options.command,
        "environment": {"device": options.machine},
        "figures": figures,
    }
    path = RUNS / f"study_{options.name}.json"
    write_run(path, run)
    print(f"written={path}")


if __name__ == "__main__":
    main()
