"""How unequal the ranks of a training step are under stochastic length, and what evens them out.

    python -m benchmarks.load_balance           # a minute on one core; writes its section of benchmarks/RESULTS.md

A simulation of the plan that `TrainLoader` follows, without data or model: histories of Zipf lengths, their stochastic
cuts, steps of the same number of histories a rank. The load of a rank is its tokens (exponent 1, semi-local attention)
or their squares summed over histories (exponent 2, full attention). A step takes as long as its heaviest rank, so
max / mean is the factor that imbalance costs.
"""

import argparse
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import StochasticLengthConfig
from pipeline.data.sampling import LoadPlan, stochastic_cuts, threshold

RESULTS = Path(__file__).parent / "RESULTS.md"
BEGIN, END = "<!-- load balance: begin -->", "<!-- load balance: end -->"
METHODS = {
    "none": "plain stochastic length",
    "sampling": "load-balanced stochastic length",
    "dealing": "plain stochastic length, dealt by load",
}


@dataclass(frozen=True, slots=True)
class Imbalance:
    worst: float  # max / mean over ranks, mean over steps
    mean_length: float  # tokens of a history


def zipf_lengths(num: int, exponent: float, shortest: int, longest: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths from `shortest` to `longest`, n with a probability proportional to n**-exponent, int64."""
    values = np.arange(shortest, longest + 1)
    weight = values.astype(np.float64) ** -exponent
    return rng.choice(values, num, p=weight / weight.sum())


def simulate(
    lengths: np.ndarray, cfg: StochasticLengthConfig, num_ranks: int, per_rank: int, seed: int = 0
) -> Imbalance:
    """One pool of histories of these `lengths`, each rank `per_rank` of them a step."""
    rng = np.random.default_rng([seed, 1])  # not the stream that the lengths came from
    cut = stochastic_cuts(lengths, cfg, rng)
    short = np.minimum(lengths, threshold(cfg))
    plan = LoadPlan(cut, lengths.astype(np.float64) ** cfg.load_exponent, short.astype(np.float64) ** cfg.load_exponent)
    num_steps = len(lengths) // (num_ranks * per_rank)
    steps = np.array_split(rng.permutation(len(lengths)), num_steps)
    target = plan.drawn.sum() / num_steps
    ratios, tokens = [], 0
    for number, step in enumerate(steps):
        shares, cut = plan.shares(step, num_ranks, target, cfg.balance, [seed, number])
        load = np.where(cut, plan.short[step], plan.whole[step])
        tokens += int(np.where(cut, short[step], lengths[step]).sum())
        loads = [load[mine].sum() for mine in shares]
        ratios.append(max(loads) / np.mean(loads))
    return Imbalance(worst=float(np.mean(ratios)), mean_length=tokens / len(lengths))


def section(num_ranks: int, num_steps: int) -> str:
    rng = np.random.default_rng(0)
    lines = [
        BEGIN,
        "## Load balance of stochastic length",
        "",
        f"`python -m benchmarks.load_balance`: a simulation with {num_ranks} ranks, {num_steps} steps, alpha 1.6 and",
        "max_len 16,384 (threshold 2,352), Zipf lengths n^-s from the shortest given up to 16,384. max / mean: load of",
        "a step's heaviest rank over the mean rank, averaged over steps; beside it by how much the mean length moved",
        f"against the plain draws. Counted, not timed; numpy {np.__version__}, Python {platform.python_version()}.",
        "",
        "| lengths | histories a rank | load | " + " | ".join(METHODS.values()) + " |",
        "|---" * (3 + len(METHODS)) + "|",
    ]
    for exponent, shortest in ((1.0, 256), (1.2, 64)):
        for per_rank in (32, 128):
            lengths = zipf_lengths(num_ranks * per_rank * num_steps, exponent, shortest, 16_384, rng)
            for power in (1.0, 2.0):
                cells, plain = [], 0.0
                for method in METHODS:
                    cfg = StochasticLengthConfig(alpha=1.6, max_len=16_384, balance=method, load_exponent=power)
                    found = simulate(lengths, cfg, num_ranks, per_rank)
                    plain = plain or found.mean_length
                    moved = "" if method == "none" else f" ({found.mean_length / plain - 1:+.1%})"
                    cells.append(f"{found.worst:.3f}{moved}")
                row = f"| n^-{exponent} from {shortest} | {per_rank} | n^{power:.0f} | " + " | ".join(cells) + " |"
                lines.append(row)
    lines += [
        "",
        "A rank's own draws can only even out what lies above the threshold, so balanced sampling needs many histories",
        "a rank; dealing needs none of that and moves no draw, but a rank must know the whole step, as it does here.",
        "One history that outweighs the mean rank (squares, few histories) nothing can hide.",
        END,
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    text, page = section(options.ranks, options.steps), RESULTS.read_text()
    if BEGIN in page:
        before, rest = page.split(BEGIN)
        page = before + text + rest.split(END)[1]
    else:
        page = f"{page.rstrip()}\n\n{text}\n"
    RESULTS.write_text(page)
    print(text)


if __name__ == "__main__":
    main()
