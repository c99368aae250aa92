"""The quality section of RESULTS.md: runs of `benchmarks.quality.train_plan` over seeds, beside
LightGBM, by paired bootstrap.

    python -m benchmarks.quality.report NAME … --runs FILE --predictions FOLDER [--anchor GLOB]
        [--beside NAME]

A model's figure is the mean over its seeds. Its difference to LightGBM is taken on the same rows;
the interval is that of 1,000 samples of users with replacement, in each of which both sides see the
same users. With `--beside` it is another run of the file that stands in LightGBM's place.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import RUNS, table, write_run, write_section
from pipeline.evaluate.metrics import log_loss
from pipeline.figures import Figures, read_runs

ROOT = Path(__file__).parents[2]
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


def spread(values: Sequence[float], sign: str = "", digits: int = 4) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{deviation}"


def read_seeds(path: Path, name: str) -> list[Figures]:
    """The runs of one name, by seed."""
    named = [run for run in read_runs(path) if run["name"] == name]
    if not named:
        raise SystemExit(f"error: no runs of {name!r} in {path}")
    return sorted(named, key=lambda run: run["seed"])


def metrics_table(runs_file: Path, names: Sequence[str], split: str) -> str:
    """A row per name: metrics over seeds, the first name's mean AUC and NE taken off seed by seed,
    and the costs.
    """
    rows = []
    whole = read_seeds(runs_file, names[0])
    tasks = whole[0]["config"]["tasks"]  # another model may have more
    first = {run["seed"]: means(run, split, tasks) for run in whole}
    for name in names:
        runs = read_seeds(runs_file, name)
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


def measure_differences(
    names: Sequence[str],
    runs_file: Path,
    predictions: Path,
    others: Sequence[Path] | str,
    split: str,
    samples: int,
) -> Figures:
    """What each model gains over `others` on the same rows, by task and metric: files of LightGBM's
    predictions, or the name of another run.

    Returns:
        `models[name][task]["auc" | "ne"]` is (difference, low, high) of `paired_bootstrap`.
    """

    def read_run(name: str) -> list[pa.Table]:
        seeds = [run["seed"] for run in read_seeds(runs_file, name)]
        return [read_ours(predictions / f"{name}-{seed}-{split}.parquet") for seed in seeds]

    models: Figures = {}
    for name in names:
        tasks = read_seeds(runs_file, name)[0]["config"]["tasks"]
        ours = read_run(name)
        if isinstance(others, str):
            theirs = read_run(others)
        else:
            theirs = [read_anchor(path, tasks) for path in others]
        for other in (*ours[1:], *theirs):
            same_rows(ours[0], other, name)

        users = ours[0]["user_id"].to_numpy()
        models[name] = {}
        for task in tasks:
            known = ours[0][f"label.{task}"].is_valid().to_numpy()
            labels = ours[0][f"label.{task}"].fill_null(0).to_numpy()[known].astype(bool)
            first = [side[f"logit.{task}"].to_numpy()[known] for side in ours]
            second = [side[f"logit.{task}"].to_numpy()[known] for side in theirs]
            models[name][task] = paired_bootstrap(first, second, labels, users[known], samples)

    found: Figures = {"split": split, "samples": samples, "models": models}
    if isinstance(others, str):
        return found | {"beside": others}
    return found | {"anchors": len(others)}


def difference_text(differences: Figures) -> list[str]:
    """What `measure_differences` found, as a paragraph and a table."""
    rows = []
    for name, tasks in differences["models"].items():
        cells = []
        for metrics in tasks.values():
            intervals = [f"{d:+.4f} [{low:+.4f}, {high:+.4f}]" for d, low, high in metrics.values()]
            cells.append("; ".join(intervals))
        rows.append([name, *cells])

    first = next(iter(differences["models"].values()))
    if "beside" in differences:
        against = differences["beside"]
    else:
        seeds = differences["anchors"]
        against = f"LightGBM with history features ({seeds} seeds, `make bench-anchor`)"
    return [
        f"Against {against}, paired bootstrap of {differences['samples']:,} samples over users, "
        "mean over seeds on both sides:",
        table(["ΔAUC; ΔNE [95 %]", *first], rows),
    ]


def section(
    runs_file: Path,
    names: Sequence[str],
    *,
    split: str,
    title: str,
    differences: Figures | None = None,
) -> str:
    """A section of RESULTS.md: the runs of these names in a table, and what they gain."""
    by_name = [run for name in names for run in read_seeds(runs_file, name)]
    machines = {run["environment"]["device"] for run in by_name}
    where = os.path.relpath(runs_file, ROOT)
    text = [
        f"## {title}",
        f"`{by_name[0]['command']}` on {', '.join(sorted(machines))}; figures in `{where}`. "
        f"{split.capitalize()} rows, mean ± standard deviation over seeds. An example is a "
        "labelled row; training FLOP are three times those of a forward pass at the lengths that "
        "stochastic length drew; a step's time is that of one of several runs that shared the "
        "device and its host, no more than a hint. Differences are of the same seed.",
        metrics_table(runs_file, names, split),
    ]
    if differences is not None:
        text += difference_text(differences)
    return "\n\n".join(text)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("names", nargs="+", help="runs of the table, in its order")
    parser.add_argument(
        "--runs", type=Path, default=RUNS / "quality.jsonl", help="JSON Lines file of the figures"
    )
    parser.add_argument(
        "--predictions",
        type=Path,
        default=None,
        help="folder of the predictions: measures the differences anew",
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
    parser.add_argument("--beside", metavar="NAME", help="a run to compare with, not LightGBM")
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--section", default="quality", help="name of the section of RESULTS.md")
    parser.add_argument("--title", default="Quality on the KuaiRand subset")
    parser.add_argument("--print", action="store_true", help="print it and leave RESULTS.md alone")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    differences = None
    if options.predictions:
        anchors = options.beside or sorted(Path().glob(options.anchor))
        if not anchors:
            raise SystemExit(f"error: no {options.anchor}: run make bench-anchor first")
        differences = measure_differences(
            options.against or options.names[:1],
            options.runs,
            options.predictions,
            anchors,
            options.split,
            options.samples,
        )
        if not options.print:
            write_run(options.runs.with_name(f"{options.runs.stem}_differences.json"), differences)

    text = section(
        options.runs,
        options.names,
        split=options.split,
        title=options.title,
        differences=differences,
    )
    if options.print:
        print(text)
    else:
        write_section(options.section, text)


if __name__ == "__main__":
    main()
