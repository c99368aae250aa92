"""How unequal the ranks of a training step are under stochastic length, and what evens them out.

    python -m benchmarks.training.load_balance           # two minutes on one core; writes its
    section of benchmarks/RESULTS.md

A simulation of the plan that `TrainLoader` follows, without data or model: histories of Zipf
lengths, their stochastic cuts, steps of the same number of histories. The load of a rank is its
tokens (exponent 1, semi-local attention) or their squares summed over histories (exponent 2, full
attention). A step takes as long as its heaviest rank, so
max / mean is the factor that imbalance costs. Beside the loader's ways stands load-balanced
stochastic length as published (ULTRA-HSTU, arXiv:2602.16986, section 4.1), where each rank knows
its own histories alone.
"""

import argparse
import platform
from dataclasses import dataclass

import numpy as np

from benchmarks.report import RUNS, table, write_run, write_section
from pipeline.batches.stochastic_length import (
    LoadPlan,
    balanced_cuts,
    cut_threshold,
    example_loads,
    stochastic_cuts,
)
from pipeline.config import StochasticLengthConfig
from pipeline.figures import Figures

METHODS = {
    "none": "plain",
    "published": "as published",
    "sampling": "`sampling`",
    "dealing": "`dealing`",
}
# steps of plain draws in which the published form estimates the mean load; no method is judged by
# them
WARM_UP = 5
RECALIBRATE = 10  # steps between two messages of the published form
DECAY = 0.9  # of each rank's moving average of its load


@dataclass(frozen=True, slots=True)
class Imbalance:
    worst: float  # max / mean over ranks, mean over steps
    heaviest: float  # the heaviest rank of all steps / the mean
    mean_length: float  # tokens of a history


def zipf_lengths(
    num: int, exponent: float, shortest: int, longest: int, rng: np.random.Generator
) -> np.ndarray:
    """Lengths from `shortest` to `longest`, n with a probability proportional to n**-exponent,
    int64.
    """
    values = np.arange(shortest, longest + 1)
    weight = values.astype(np.float64) ** -exponent
    return rng.choice(values, num, p=weight / weight.sum())


class Published:
    """Each rank brings its own draws to a mean load that the ranks tell each other every
    `RECALIBRATE` steps.
    """

    def __init__(self, plan: LoadPlan, num_ranks: int, seed: int) -> None:
        self.plan, self.seed = plan, seed
        self.average = np.zeros(num_ranks)  # of the loads as drawn, before they are balanced
        self.target = 0.0

    def shares(self, step: np.ndarray, number: int) -> tuple[list[np.ndarray], np.ndarray]:
        shares = np.array_split(np.arange(len(step)), len(self.average))
        cut = self.plan.cut[step]
        drawn = np.array([self.plan.drawn_loads[step[mine]].sum() for mine in shares])
        self.average = drawn if number == 0 else DECAY * self.average + (1 - DECAY) * drawn
        if number < WARM_UP:
            return shares, cut
        if (number - WARM_UP) % RECALIBRATE == 0:
            self.target = self.average.mean()
        for rank, mine in enumerate(shares):
            order = np.random.default_rng([self.seed, rank, number]).permutation(len(mine))
            rows = step[mine]
            cut[mine] = balanced_cuts(
                cut[mine], self.plan.whole[rows], self.plan.short[rows], self.target, order
            )
        return shares, cut


def simulate(
    lengths: np.ndarray,
    cfg: StochasticLengthConfig,
    num_ranks: int,
    per_rank: int,
    seed: int = 0,
    *,
    published: bool,
) -> Imbalance:
    """One pool of histories of these `lengths`, `num_ranks * per_rank` of them a step; `published`:
    not by `cfg`.
    """
    rng = np.random.default_rng([seed, 1])  # not the stream that the lengths came from
    cut = stochastic_cuts(lengths, cfg, rng)
    short = np.minimum(lengths, cut_threshold(cfg))
    plan = LoadPlan(
        cut,
        example_loads(lengths, cfg),
        example_loads(short, cfg),
    )
    num_steps = len(lengths) // (num_ranks * per_rank)
    steps = np.array_split(rng.permutation(len(lengths)), num_steps)
    target = plan.drawn_loads.sum() / num_steps
    alone = Published(plan, num_ranks, seed)
    loads, tokens, num = [], 0, 0
    for number, step in enumerate(steps):
        if published:
            shares, cut = alone.shares(step, number)
        else:
            shares, cut = plan.share_step(step, num_ranks, target, cfg.balance, [seed, number])
        if number >= WARM_UP:
            load = np.where(cut, plan.short[step], plan.whole[step])
            loads.append([load[mine].sum() for mine in shares])
            tokens, num = (
                tokens + int(np.where(cut, short[step], lengths[step]).sum()),
                num + len(step),
            )
    each = np.array(loads)  # [steps, ranks]
    return Imbalance(
        worst=float((each.max(1) / each.mean(1)).mean()),
        heaviest=float(each.max() / each.mean()),
        mean_length=tokens / num,
    )


def row(
    num_ranks: int, per_rank: int, num_steps: int, exponent: float, shortest: int, power: float
) -> list[str]:
    rng = np.random.default_rng([num_ranks, per_rank])
    lengths = zipf_lengths(
        num_ranks * per_rank * (num_steps + WARM_UP), exponent, shortest, 16_384, rng
    )
    cells, plain = [], 0.0
    for method in METHODS:
        balance = "none" if method == "published" else method
        cfg = StochasticLengthConfig(
            alpha=1.6, max_len=16_384, balance=balance, load_exponent=power
        )  # pyright: ignore[reportArgumentType]
        found = simulate(lengths, cfg, num_ranks, per_rank, published=method == "published")
        plain = plain or found.mean_length
        moved = (
            f" ({found.mean_length / plain - 1:+.1%})"
            if method in ("published", "sampling")
            else ""
        )
        cells.append(f"{found.worst:.3f} / {found.heaviest:.2f}{moved}")
    return [
        f"n^-{exponent} from {shortest}",
        str(num_ranks),
        str(per_rank),
        f"n^{power:.0f}",
        *cells,
    ]


def measure(num_steps: int) -> Figures:
    rows = []
    for lengths in ((1.0, 256), (1.2, 64)):
        for num_ranks, per_rank in ((8, 32), (64, 32), (64, 128), (512, 32)):
            for power in (1.0, 2.0):
                rows.append(row(num_ranks, per_rank, num_steps, *lengths, power))

    return {
        "command": "python -m benchmarks.training.load_balance",
        "versions": {"numpy": np.__version__, "python": platform.python_version()},
        "steps": num_steps,
        "rows": rows,
    }


def section(run: Figures) -> str:
    """The section of RESULTS.md from what `measure` gave."""
    versions = run["versions"]
    header = ["lengths", "ranks", "histories a rank", "load", *METHODS.values()]
    return f"""## Load balance of stochastic length

`{run["command"]}`: a simulation of {run["steps"]} steps, alpha 1.6 and max_len 16,384
(threshold 2,352), Zipf lengths n^-s from the shortest given up to 16,384. First figure: load of a
step's heaviest rank over the mean rank, averaged over steps, which is what waiting costs. Second:
the heaviest rank of all steps over the mean of all, which is what memory must hold. In brackets by
how much the mean length moved against the plain draws. As published: {WARM_UP} warm-up steps, the
mean load told anew every {RECALIBRATE} steps. Counted, not timed; numpy {versions["numpy"]}, Python
{versions["python"]}.

{table(header, run["rows"])}

As published, a rank can only flip draws of its own that lie above the threshold: it needs many
histories a rank, and moves the mean length with few. `dealing` moves no draw and needs no message,
because every rank knows the whole step. `sampling` also brings each step to the mean load before it
is dealt, for steps of equal memory. Where one whole history outweighs the mean rank (squares, 32
histories a rank) neither can hide it; the published form does, by cutting just these every time."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    run = measure(options.steps)
    write_run(RUNS / "load_balance.json", run)
    write_section("load balance", section(run))
    print(section(run))


if __name__ == "__main__":
    main()
