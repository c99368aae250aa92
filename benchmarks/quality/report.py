"""The quality section of RESULTS.md: runs of `benchmarks.quality.train_plan` over seeds, beside
LightGBM, by paired bootstrap.

    python -m benchmarks.quality.report NAME … --runs FOLDER --predictions FOLDER [--anchor GLOB]

A model's figure is the mean over its seeds. Its difference to LightGBM is taken on the same rows;
the interval is that of 1,000 samples of users with replacement, in each of which both sides see the
same users.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import table, write_section
from pipeline.evaluate.metrics import log_loss

ROOT = Path(__file__).parents[1]
KEYS = ["user_id", "item_id", "event_time"]


@dataclass(frozen=True)
class Ranked:
    """One model's scores of the rows, prepared so that a sample of users costs one pass."""

    order: np.ndarray  # rows by falling score
    last: np.ndarray  # in that order, the last row of each run of equal scores
    loss: np.ndarray  # log loss per row

    @staticmethod
    def of(logits: np.ndarray, labels: np.ndarray) -> "Ranked":
        order = np.argsort(-logits, kind="stable")
        falling = logits[order]
        last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
        return Ranked(order, last, log_loss(logits, labels))

    def auc(self, labels: np.ndarray, weight: np.ndarray) -> float:
        """Of rows that count `weight` times: the trapezoids under the curve, a tie counting one
        half.
        """
        weight, labels = weight[self.order], labels[self.order]
        positive = np.append(0, np.cumsum(weight * labels)[self.last])
        negative = np.append(0, np.cumsum(weight * ~labels)[self.last])
        area = np.sum(np.diff(negative) * (positive[1:] + positive[:-1]) / 2)
        return float(area / (positive[-1] * negative[-1]))

    def ne(self, labels: np.ndarray, weight: np.ndarray) -> float:
        rate = np.average(labels, weights=weight)
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        return float(np.average(self.loss, weights=weight) / entropy)


def logits_of(scores: np.ndarray) -> np.ndarray:
    scores = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.log(scores) - np.log1p(-scores)


def read_ours(path: Path) -> pa.Table:
    """The rows in a fixed order: key, and per task label (null where unknown) and logit."""
    return pq.read_table(path).sort_by([(key, "ascending") for key in KEYS])


def read_anchor(path: Path, tasks: Sequence[str]) -> pa.Table:
    found = pq.read_table(path).sort_by([(key, "ascending") for key in KEYS])
    columns = {key: found[key] for key in KEYS}
    columns |= {f"logit.{task}": logits_of(found[f"score_{task}"].to_numpy()) for task in tasks}
    return pa.table(columns)


def same_rows(first: pa.Table, other: pa.Table, what: str) -> None:
    """Raises ValueError where two predictions are not of the same rows."""
    for key in KEYS:
        if not np.array_equal(first[key].to_numpy(), other[key].to_numpy()):
            raise ValueError(f"{what}: {len(other)} rows, not the same {len(first)} (by {key})")


def paired_bootstrap(
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    labels: np.ndarray,
    users: np.ndarray,
    samples: int,
) -> dict[str, tuple[float, float, float]]:
    """Ours minus theirs, `auc` and `ne`: the difference, and the 95 % interval over samples of
    users.

    Args:
        ours, theirs: logits [n] per seed; a side's value is the mean over its seeds.
        labels: bool [n]. users: int [n].
    """
    sides = [[Ranked.of(logits, labels) for logits in side] for side in (ours, theirs)]
    _, user = np.unique(users, return_inverse=True)
    rng = np.random.default_rng(0)
    draws = [np.ones(len(labels))]
    for _ in range(samples):
        draws.append(
            rng.multinomial(user.max() + 1, np.full(user.max() + 1, 1 / (user.max() + 1)))[
                user
            ].astype(float)
        )
    found = {}
    for metric in ("auc", "ne"):
        values = [
            [np.mean([getattr(r, metric)(labels, weight) for r in side]) for side in sides]
            for weight in draws
        ]
        differences = np.array([a - b for a, b in values])
        low, high = np.quantile(differences[1:], [0.025, 0.975])
        found[metric] = (float(differences[0]), float(low), float(high))
    return found


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation over seeds."""
    deviation = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.4f}{deviation}"


def read_runs(folder: Path, name: str) -> list[dict]:
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]
    runs = sorted((run for run in runs if run["name"] == name), key=lambda run: run["seed"])
    if not runs:
        raise SystemExit(f"error: no runs of {name!r} in {folder}")
    return runs


def metrics_table(folder: Path, names: Sequence[str], split: str) -> str:
    """A row per name: metrics over seeds, the first name's mean AUC and NE taken off seed by seed,
    and the costs.
    """
    rows = []
    whole = read_runs(folder, names[0])
    tasks = whole[0]["config"]["tasks"]  # another model may have more
    first = {run["seed"]: means(run, split, tasks) for run in whole}
    for name in names:
        runs = read_runs(folder, name)
        found = {key: [float(run["metrics"][key]) for run in runs] for key in runs[0]["metrics"]}
        cells = [
            f"{spread(found[f'{split}/auc/{task}'])} / {spread(found[f'{split}/ne/{task}'])}"
            for task in tasks
        ]
        cells.append(
            " / ".join(
                spread(values)
                for values in zip(*(means(run, split, tasks) for run in runs), strict=True)
            )
        )
        both = [
            np.subtract(means(run, split, tasks), first[run["seed"]])
            for run in runs
            if run["seed"] in first
        ]
        cells.append(" / ".join(spread(values, sign="+") for values in zip(*both, strict=True)))
        costs = [
            f"{1e3 * np.mean(found[key]):.2f}"
            for key in ("train/gflop_per_example", "forward_gflop_per_candidate")
        ]
        shares = [
            f"{np.mean(found[key]):.0%}" for key in ("masked_pair_share", "truncated_token_share")
        ]
        step = f"{np.median(found['train/step_ms']):.0f}"
        rows.append([name, *cells, " / ".join(costs), step, " / ".join(shares), str(len(runs))])
    less = f"less {names[0]}'s"
    costs = [
        "MFLOP an example, training / inference",
        "ms a step",
        "pairs masked / tokens cut",
        "seeds",
    ]
    return table(["AUC / NE", *tasks, "mean", less, *costs], rows)


def means(run: dict, split: str, tasks: Sequence[str]) -> tuple[float, float]:
    """AUC and NE, over the tasks."""
    auc, ne = (
        float(np.mean([run["metrics"][f"{split}/{metric}/{task}"] for task in tasks]))
        for metric in ("auc", "ne")
    )
    return auc, ne


def difference_table(
    names: Sequence[str],
    runs: Path,
    predictions: Path,
    anchors: Sequence[Path],
    split: str,
    samples: int,
) -> str:
    rows = []
    for name in names:
        found = read_runs(runs, name)
        tasks = found[0]["config"]["tasks"]
        ours = [read_ours(predictions / f"{name}-{run['seed']}-{split}.parquet") for run in found]
        theirs = [read_anchor(path, tasks) for path in anchors]
        for other in (*ours[1:], *theirs):
            same_rows(ours[0], other, name)
        cells = []
        for task in tasks:
            known = ours[0][f"label.{task}"].is_valid().to_numpy()
            labels = ours[0][f"label.{task}"].fill_null(0).to_numpy()[known].astype(bool)
            first, second = (
                [side[f"logit.{task}"].to_numpy()[known] for side in both]
                for both in (ours, theirs)
            )
            gained = paired_bootstrap(
                first, second, labels, ours[0]["user_id"].to_numpy()[known], samples
            )
            cells.append(
                "; ".join(
                    f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
                    for value, low, high in gained.values()
                )
            )
        rows.append([name, *cells])
    return table(["ΔAUC; ΔNE [95 %]", *tasks], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("names", nargs="+", help="runs of the table, in its order")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "quality", help="folder of the figures"
    )
    parser.add_argument(
        "--predictions",
        type=Path,
        default=None,
        help="folder of the predictions: adds the bootstrap",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=None,
        help="names with a bootstrap; the first name if absent",
    )
    parser.add_argument(
        "--anchor",
        default="runs/anchor/lightgbm_history_seed*.parquet",
        help="of make bench-anchor",
    )
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--section", default="quality", help="name of the section of RESULTS.md")
    parser.add_argument("--title", default="Quality on the KuaiRand subset")
    parser.add_argument("--print", action="store_true", help="print it and leave RESULTS.md alone")
    options = parser.parse_args()
    runs = read_runs(options.runs, options.names[0])
    machines = {
        run["environment"]["device"]
        for name in options.names
        for run in read_runs(options.runs, name)
    }
    folder = os.path.relpath(options.runs, ROOT.parent)
    text = [
        f"## {options.title}",
        f"`{runs[0]['command']}` on {', '.join(sorted(machines))}; figures in `{folder}`. "
        f"{options.split.capitalize()} rows, mean ± standard deviation over seeds. An example is "
        "a labelled row; "
        "training FLOP are three times those of a forward pass at the lengths that stochastic "
        "length drew; a step's "
        "time is that of one of several runs that shared the device and its host, no more than a "
        "hint. Differences are "
        "of the same seed.",
        metrics_table(options.runs, options.names, options.split),
    ]
    if options.predictions:
        anchors = sorted(Path().glob(options.anchor))
        if not anchors:
            raise SystemExit(f"error: no {options.anchor}: run make bench-anchor first")
        against = options.against or options.names[:1]
        text += [
            f"Against LightGBM with history features ({len(anchors)} seeds, `make bench-anchor`), "
            "paired bootstrap of "
            f"{options.samples:,} samples over users, mean over seeds on both sides:",
            difference_table(
                against, options.runs, options.predictions, anchors, options.split, options.samples
            ),
        ]
    if options.print:
        print("\n\n".join(text))
    else:
        write_section(options.section, "\n\n".join(text))


if __name__ == "__main__":
    main()
