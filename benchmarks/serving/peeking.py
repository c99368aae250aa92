"""Trials of a canary that are read every day: how often `jobs.verdict` raises a false alarm, and
how long it takes to see a difference that is there.

    python -m benchmarks.serving.peeking        # minutes on one core; writes its section of
    benchmarks/RESULTS.md

Simulated users come back and differ in how often they come and how much they click; a fifth has the
canary, of one crowd a twentieth, whose outcome is rare. A trial is read on every one of its days,
and stops at the first that says anything but `undecided`. Beside it stands the interval that one
would compute for a single look (1.96 standard errors), read the same way.
"""

import argparse
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.report import RUNS, table, write_run, write_section
from pipeline.figures import Figures
from serve_app.feedback.verdict import FEWEST_UNITS, UnitCounts, compare_counts

NUM_DAYS = 1000
RARE = 0.005  # of the taste for clicks, which is .2: 1 in 1,000 answers
STAYS = 30  # days that a new user comes back
SINGLE_LOOK = 1.96  # standard errors of an interval of 95 % that is read once


@dataclass(frozen=True, slots=True)
class Crowd:
    """Who visits: `first` users from the beginning, `new_a_day` more every day."""

    name: str
    first: int
    new_a_day: int
    share: float = 0.2  # of the users, for the canary
    taste: float = 1.0  # for the outcome, beside that for a click


CROWDS = (
    Crowd("the same 400 users", 400, 0),
    Crowd("20 new users a day, each for 30 days", 100, 20),
    Crowd("the same, an outcome of 1 in 1,000 answers, canary of 5 %", 100, 20, 0.05, RARE),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """The first day on which it said something, None for never."""

    sequence: int | None  # the confidence sequence of jobs.verdict
    single: int | None  # the interval for a single look


def count_days(
    crowd: Crowd, gain: float, num_days: int, rng: np.random.Generator
) -> Iterator[tuple[UnitCounts, UnitCounts]]:
    """Champion's and canary's counts by the end of each day; the canary's click `gain` more."""
    num = crowd.first + crowd.new_a_day * num_days
    tastes = crowd.taste * rng.beta(2, 8, num)
    habits = rng.gamma(1.0, 1.0, num)
    has_canary = rng.random(num) < crowd.share
    rates = np.minimum(np.where(has_canary, tastes * (1 + gain), tastes), 1.0)
    answers, clicks = np.zeros(num), np.zeros(num)

    for day in range(num_days):
        # those who come today
        end = crowd.first + crowd.new_a_day * (day + 1)
        begin = max(0, end - crowd.new_a_day * STAYS) if crowd.new_a_day else 0
        today = rng.poisson(habits[begin:end])
        answers[begin:end] += today
        clicks[begin:end] += rng.binomial(today, rates[begin:end])

        known = answers[:end] > 0
        champion, canary = known & ~has_canary[:end], known & has_canary[:end]
        yield (
            UnitCounts(answers[:end][champion], clicks[:end][champion]),
            UnitCounts(answers[:end][canary], clicks[:end][canary]),
        )


def read_trial(crowd: Crowd, gain: float, num_days: int, rng: np.random.Generator) -> Trial:
    """One trial, read every day by both intervals until both have said something."""
    sequence, single = None, None
    for day, (champion, canary) in enumerate(count_days(crowd, gain, num_days, rng), 1):
        if min(len(champion.answers), len(canary.answers)) < FEWEST_UNITS:
            continue
        verdict = compare_counts("click", champion, canary)
        if sequence is None and verdict.says != "undecided":
            sequence = day

        half = SINGLE_LOOK * math.sqrt(champion.variance + canary.variance)
        if single is None and abs(verdict.difference) > half:
            single = day
        if sequence is not None and single is not None:
            break
    return Trial(sequence, single)


def measure_alarms(num_trials: int, num_days: int, seed: int) -> list[Figures]:
    """Share of the trials without a difference that raise an alarm on some day."""
    rows: list[Figures] = []
    for crowd in CROWDS:
        rng = np.random.default_rng(seed)
        trials = [read_trial(crowd, 0.0, num_days, rng) for _ in range(num_trials)]
        rows.append(
            {
                "crowd": crowd.name,
                "sequence": sum(trial.sequence is not None for trial in trials),
                "single": sum(trial.single is not None for trial in trials),
            }
        )
    return rows


def measure_patience(num_trials: int, gains: tuple[float, ...], seed: int) -> list[Figures]:
    """Days until a planted difference is seen, within a hundred, by new users every day."""
    rows: list[Figures] = []
    for gain in gains:
        rng = np.random.default_rng(seed)
        trials = [read_trial(CROWDS[1], gain, 100, rng) for _ in range(num_trials)]
        days = [trial.sequence or math.inf for trial in trials]
        median = float(np.median(days))
        rows.append(
            {
                "gain": gain,
                "seen": sum(math.isfinite(day) for day in days),
                "median_days": median if math.isfinite(median) else None,
            }
        )
    return rows


def section(run: Figures) -> str:
    """Markdown of a run."""
    trials, days = run["trials"], run["days"]
    alarms = []
    for row in run["alarms"]:
        shares = [f"{row[name]} ({row[name] / trials:.1%})" for name in ("sequence", "single")]
        alarms.append([row["crowd"], *shares])

    seen = []
    for row in run["patience"]:
        median = "more than 100" if row["median_days"] is None else f"{row['median_days']:.0f}"
        seen.append([f"{row['gain']:+.0%}", f"{row['seen']} of {run['planted_trials']}", median])

    return f"""## A canary that is judged every day

`python -m benchmarks.serving.peeking`: {trials} simulated trials of {days:,} days without any
difference, read every day; a fifth of the users has the canary where nothing else is said. Trials
that raise an alarm on any day, which 5 % may. Counted, not timed; numpy {run["numpy"]},
Python {run["python"]}.

{table(["users", "`jobs.verdict`", "an interval for a single look, read every day"], alarms)}

With a difference, {CROWDS[1].name}, within a hundred days:

{table(["clicks per answer", "seen in", "median days until then"], seen)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--planted-trials", type=int, default=50)
    options = parser.parse_args()

    run: Figures = {
        "trials": options.trials,
        "planted_trials": options.planted_trials,
        "days": NUM_DAYS,
        "alarms": measure_alarms(options.trials, NUM_DAYS, 0),
        "patience": measure_patience(options.planted_trials, (0.5, 0.25, 0.1, -0.25), 1),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    write_run(RUNS / "peeking.json", run)
    write_section("peeking", section(run))


if __name__ == "__main__":
    main()
