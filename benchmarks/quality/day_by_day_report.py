"""The section "Day by day from the champion" of RESULTS.md, its plot, and its intervals.

    python -m benchmarks.quality.day_by_day_report --predictions runs/predictions

reads the rows that `benchmarks.quality.day_by_day` has scored, and writes the differences to
training from nothing with their intervals, by paired bootstrap over users, and the plot. Rows are
not kept with the figures: intervals of other seeds, whose rows are gone, stay as they were written.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.quality.day_by_day import DAYS, FROM_NOTHING, SHOWN, STALE, VALIDATION_DAYS, WAYS
from benchmarks.quality.report import Ranked, read_ours, spread
from benchmarks.report import RUNS, read_run, table, write_run
from pipeline.figures import Figures, read_runs

RUNS_FILE = RUNS / "day_by_day.jsonl"
DIFFERENCES = RUNS / "day_by_day_differences.json"
PLOT = Path(__file__).parents[1] / "plots" / "day_by_day.png"

# the days on which the ways differ: the first model is one for all
LATER_DAYS = DAYS[1:]
PERIODS = {
    "validation days": VALIDATION_DAYS[1:],
    "test days": DAYS[len(VALIDATION_DAYS) :],
    "all days": LATER_DAYS,
}
NAMES = {
    FROM_NOTHING: "from nothing, on all rows so far",
    "replay": "from the day before, newest day + 10 % replay",
    "newest": "from the day before, newest day only",
    "half_replay_short_slow": "from the day before, newest day + 5 % replay, long histories cut, "
    "128 sequences a step, half the learning rate",
    STALE: "the model of 28 April, never trained again",
    "replay_short": "10 % replay, long histories cut",
    "half_replay_short": "5 % replay, long histories cut",
    "newest_short": "no replay, long histories cut",
    "half_replay_128": "5 % replay, 128 sequences a step",
    "half_replay_short_128": "5 % replay, long histories cut, 128 sequences a step",
}
assert NAMES.keys() == WAYS.keys()

ByDay = dict[tuple[str, str, int], Figures]  # way, day, seed


def read_days(path: Path) -> ByDay:
    return {(run["name"], run["day"], run["seed"]): run for run in read_runs(path)}


def whole_seeds(runs: ByDay, way: str, days: Sequence[str] = LATER_DAYS) -> list[int]:
    """The seeds of which a way has all of these days, and training from nothing too."""
    found = []
    for seed in sorted({seed for _, _, seed in runs}):
        needed = [(name, day, seed) for name in (way, FROM_NOTHING) for day in days]
        if all(key in runs for key in needed):
            found.append(seed)
    return found


def mean_metric(run: Figures, metric: str) -> float:
    """Over the tasks."""
    tasks = run["config"]["tasks"]
    return float(np.mean([run["metrics"][f"val/{metric}/{task}"] for task in tasks]))


def training_seconds(run: Figures, clock: str = "cpu_seconds") -> float:
    """What the day's training took, with what is fitted before it; scoring is left out."""
    return sum(run[clock].get(part, 0.0) for part in ("prepare", "train"))


def measure_differences(runs: ByDay, predictions: Path, samples: int) -> Figures:
    """What each way gains over training from nothing, as a mean over tasks, days and seeds, of the
    days whose rows are in `predictions`.

    Returns:
        `ways[way][period]` is a list of one: its `seeds`, and `auc` and `ne` as (difference, low,
        high). Users are drawn with replacement, on all days the same ones.
    """
    at_hand = {key: run for key, run in runs.items() if rows_path(predictions, *key).exists()}
    draws = UserDraws(predictions, list(at_hand), samples)
    ways: Figures = {}
    for way in WAYS:
        for period, days in PERIODS.items():
            seeds = whole_seeds(at_hand, way, days)
            if way == FROM_NOTHING or not seeds:
                continue
            found = difference(draws, way, days, seeds)
            ways.setdefault(way, {})[period] = [{"seeds": seeds} | found]
    return {"samples": samples, "ways": ways}


def join_differences(kept: Figures, fresh: Figures) -> Figures:
    """Both, where `fresh` stands for those of `kept` that share a seed with it.

    kept     replay, test days: seeds 0 1
    fresh    replay, test days: seeds 2          both stay
    """
    ways = {}
    for way in WAYS:
        periods = {}
        for period in PERIODS:
            new = fresh["ways"].get(way, {}).get(period, [])
            measured = {seed for entry in new for seed in entry["seeds"]}
            old = kept["ways"].get(way, {}).get(period, [])
            others = [entry for entry in old if measured.isdisjoint(entry["seeds"])]
            if others or new:
                periods[period] = sorted([*others, *new], key=lambda entry: entry["seeds"])
        if periods:
            ways[way] = periods
    return {"samples": fresh["samples"], "ways": ways}


def rows_path(predictions: Path, way: str, day: str, seed: int) -> Path:
    return predictions / f"{way}-{day}-{seed}.parquet"


class UserDraws:
    """Samples of the users of all days, and the metrics of scored rows under each of them."""

    def __init__(self, predictions: Path, keys: Sequence[tuple[str, str, int]], samples: int):
        self.predictions = predictions
        ids = [self.read(*key)["user_id"].to_numpy() for key in keys]
        self.users = np.unique(np.concatenate(ids))

        # the first one is everybody once
        rng, num_users = np.random.default_rng(0), len(self.users)
        share = np.full(num_users, 1 / num_users)
        self.weights = [np.ones(num_users)]
        for _ in range(samples):
            self.weights.append(rng.multinomial(num_users, share).astype(float))
        self.known: dict[tuple[str, str, int], dict[str, np.ndarray]] = {}

    def read(self, way: str, day: str, seed: int) -> pa.Table:
        return read_ours(rows_path(self.predictions, way, day, seed))

    def metrics(self, way: str, day: str, seed: int) -> dict[str, np.ndarray]:
        """`auc` and `ne`, a mean over the tasks, of each sample, float64 [samples + 1]."""
        key = way, day, seed
        if key not in self.known:
            self.known[key] = self._measure(self.read(*key))
        return self.known[key]

    def _measure(self, rows: pa.Table) -> dict[str, np.ndarray]:
        found = {"auc": np.zeros(len(self.weights)), "ne": np.zeros(len(self.weights))}
        tasks = [name[6:] for name in rows.column_names if name.startswith("label.")]
        for task in tasks:
            known = rows[f"label.{task}"].is_valid().to_numpy()
            labels = rows[f"label.{task}"].fill_null(0).to_numpy()[known].astype(bool)
            user = np.searchsorted(self.users, rows["user_id"].to_numpy()[known])
            ranked = Ranked.of(rows[f"logit.{task}"].to_numpy()[known], labels)
            for number, weights in enumerate(self.weights):
                weight = weights[user]
                found["auc"][number] += ranked.auc(labels, weight) / len(tasks)
                found["ne"][number] += ranked.ne(labels, weight) / len(tasks)
        return found


def difference(draws: UserDraws, way: str, days: Sequence[str], seeds: Sequence[int]) -> Figures:
    """`auc` and `ne` of a way less those of training from nothing, with 95 % intervals."""
    found = {}
    for metric in ("auc", "ne"):
        parts = []
        for day in days:
            for seed in seeds:
                theirs = draws.metrics(FROM_NOTHING, day, seed)
                parts.append(draws.metrics(way, day, seed)[metric] - theirs[metric])

        mean = np.mean(parts, axis=0)
        low, high = np.quantile(mean[1:], [0.025, 0.975])
        found[metric] = [float(mean[0]), float(low), float(high)]
    return found


def section(runs: ByDay, differences: Figures) -> str:
    shown = [way for way in SHOWN if whole_seeds(runs, way)]
    seeds = whole_seeds(runs, FROM_NOTHING)
    tried = [way for way in WAYS if way not in SHOWN and way in differences["ways"]]
    machine = runs[(FROM_NOTHING, DAYS[0], seeds[0])]["environment"]
    return f"""## Day by day from the model of the day before

`python -m benchmarks.quality.day_by_day --seeds {" ".join(map(str, seeds))}`
(`configs/demo.yaml`, one thread, without Ray), {machine["device"]}, {machine["cores"]} cores with
other work on them: seconds are those of processors, with preparation and without scoring; the
clock's are in the file. Seeds were trained by the code of different days, some of it faster: their
share of training from nothing is what counts. Each day's model is trained on what lies before the
day and scored on all of the day's requests; the first one, of 28 April, is the same for all ways.
Means over four tasks and over seeds. Figures in `benchmarks/runs/day_by_day.jsonl` and
`day_by_day_differences.json`. "Long histories cut" is `train.stochastic_length` with
`max_len: 256, alpha: 1.1`, in training alone.

{costs_table(runs, shown)}

Differences are to training from nothing on the same rows and seeds, AUC / NE. What was chosen was
chosen on the validation days, 29 April to 2 May; test days are 3 to 5 May. In brackets: share of
training from nothing. With 95 % intervals of {differences["samples"]} samples of users, of the
seeds whose scored rows were at hand together:

{intervals_table(differences, shown)}

AUC of each day:

{days_table(runs, shown, "auc")}

NE of each day:

{days_table(runs, shown, "ne")}

![AUC and NE by day](plots/day_by_day.png)

Tried on the way, on the validation days of seed 0:

{tried_table(runs, differences, tried)}"""


def costs_table(runs: ByDay, ways: Sequence[str]) -> str:
    rows = []
    for way in ways:
        seeds = whole_seeds(runs, way)
        row = [NAMES[way], str(len(seeds)), seconds_text(runs, way, LATER_DAYS)]
        for days in PERIODS.values():
            row.append("" if way == FROM_NOTHING else gain_text(runs, way, days))
        rows.append(row)
    return table(["", "seeds", "CPU seconds a day", *PERIODS], rows)


def gain_text(runs: ByDay, way: str, days: Sequence[str]) -> str:
    """AUC / NE less those of training from nothing, means over days and seeds."""
    parts = []
    for metric in ("auc", "ne"):
        gains = []
        for seed in whole_seeds(runs, way, days):
            for day in days:
                ours = mean_metric(runs[(way, day, seed)], metric)
                gains.append(ours - mean_metric(runs[(FROM_NOTHING, day, seed)], metric))
        parts.append(f"{np.mean(gains):+.4f}")
    return " / ".join(parts)


def intervals_table(differences: Figures, ways: Sequence[str]) -> str:
    rows = []
    for way in ways:
        by_period = differences["ways"].get(way, {})
        groups = {tuple(entry["seeds"]) for entries in by_period.values() for entry in entries}
        for seeds in sorted(groups):
            row = [NAMES[way], ", ".join(map(str, seeds))]
            for period in PERIODS:
                row.append(difference_text(differences, way, period, seeds))
            rows.append(row)
    return table(["", "seeds", *PERIODS], rows)


def tried_table(runs: ByDay, differences: Figures, ways: Sequence[str]) -> str:
    period = "validation days"
    rows = []
    for way in ways:
        seeds = whole_seeds(runs, way, PERIODS[period])
        seconds = seconds_text(runs, way, PERIODS[period])
        found = difference_text(differences, way, period, tuple(seeds))
        rows.append([NAMES[way], str(len(seeds)), seconds, found])
    return table(["", "seeds", "CPU seconds a day", period], rows)


def seconds_text(runs: ByDay, way: str, days: Sequence[str]) -> str:
    """Mean over days and seeds, and its share of training from nothing on the same ones."""
    ours, theirs = [], []
    for seed in whole_seeds(runs, way, days):
        for day in days:
            ours.append(training_seconds(runs[(way, day, seed)]))
            theirs.append(training_seconds(runs[(FROM_NOTHING, day, seed)]))
    return f"{np.mean(ours):.1f} ({np.mean(ours) / np.mean(theirs):.2f})"


def difference_text(differences: Figures, way: str, period: str, seeds: tuple[int, ...]) -> str:
    """AUC / NE with their intervals, of these seeds; nothing where they were not measured."""
    for entry in differences["ways"].get(way, {}).get(period, []):
        if tuple(entry["seeds"]) == seeds:
            parts = []
            for metric in ("auc", "ne"):
                mean, low, high = entry[metric]
                parts.append(f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]")
            return " / ".join(parts)
    return ""


def days_table(runs: ByDay, ways: Sequence[str], metric: str) -> str:
    rows = []
    for way in ways:
        row = [NAMES[way]]
        for day in LATER_DAYS:
            row.append(f"{np.mean(metric_by_seed(runs, way, day, metric)):.4f}")
        means = []
        for seed in whole_seeds(runs, way):
            of_days = [mean_metric(runs[(way, day, seed)], metric) for day in LATER_DAYS]
            means.append(float(np.mean(of_days)))
        rows.append([*row, spread(means)])
    return table(["", *[day.removeprefix("2022-") for day in LATER_DAYS], "mean"], rows)


def metric_by_seed(runs: ByDay, way: str, day: str, metric: str) -> list[float]:
    return [mean_metric(runs[(way, day, seed)], metric) for seed in whole_seeds(runs, way)]


def draw_plot(runs: ByDay, path: Path) -> None:
    """AUC and NE by day, a line for each way: means over tasks and seeds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Mapping[str, str] = {"auc": "AUC", "ne": "NE"}
    for axes, (metric, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for way in SHOWN:
            if not whole_seeds(runs, way):
                continue
            values = [np.mean(metric_by_seed(runs, way, day, metric)) for day in LATER_DAYS]
            axes.plot([day[5:] for day in LATER_DAYS], values, "o-", markersize=3, label=NAMES[way])
        axes.set(ylabel=f"{label}, mean over tasks", xlabel="day that is scored")
        axes.tick_params(axis="x", labelrotation=45)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=RUNS_FILE, help="JSON Lines of the figures")
    parser.add_argument("--predictions", type=Path, required=True, help="folder of the scored rows")
    parser.add_argument("--samples", type=int, default=200, help="samples of users")
    options = parser.parse_args()

    runs = read_days(options.runs)
    fresh = measure_differences(runs, options.predictions, options.samples)
    kept = read_run(DIFFERENCES) if DIFFERENCES.exists() else {"ways": {}}
    write_run(DIFFERENCES, join_differences(kept, fresh))
    draw_plot(runs, PLOT)
    print(section(runs, read_run(DIFFERENCES)))


if __name__ == "__main__":
    main()
