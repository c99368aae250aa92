"""Settings for the next items of KuaiRand, chosen on the validation period: the same draws, and as
many trainings, for each encoder.

    python -m benchmarks.quality.retrieval_choice --runs-dir runs --processes 10 --device cuda \
        --set train.precision=bf16 --out choice.jsonl
    python -m benchmarks.quality.retrieval_kuairand --runs-dir runs --processes 10 --device cuda \
        --set train.precision=bf16 --choice choice.jsonl --split test --seeds 0 1 2 --out test.jsonl

An encoder is trained with each of `DRAWS` and seed 0, and with the two that were best and seed 1.
Of these two the one with the better mean is chosen. What the file has already is not trained again.
"""

import argparse
import time
from collections.abc import Sequence

from benchmarks.quality.retrieval_draws import DRAWS, SEEDS, finalists, read_choice, tried_draws
from benchmarks.quality.retrieval_kuairand import ENCODERS, add_arguments, command_of
from benchmarks.quality.side_by_side import run_side_by_side
from pipeline.figures import Figures, read_runs


def first_commands(options: argparse.Namespace, runs: Sequence[Figures]) -> list[list[str]]:
    """Draw by draw: cut off by the time, each encoder has had as many."""
    commands = []
    for draw in DRAWS:
        for name in options.names:
            if draw not in tried_draws(runs, name):
                commands.append(command_of(options, name, SEEDS[0], draw))
    return commands


def second_commands(options: argparse.Namespace, runs: Sequence[Figures]) -> list[list[str]]:
    commands = []
    for name in options.names:
        tried = tried_draws(runs, name)
        for draw in finalists(tried):
            if SEEDS[1] not in tried[draw]:
                commands.append(command_of(options, name, SEEDS[1], draw))
    return commands


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--names", nargs="+", choices=ENCODERS, default=ENCODERS)
    options = parser.parse_args()
    options.split = "val"

    begin = time.monotonic()
    for commands_of in (first_commands, second_commands):
        runs = read_runs(options.out) if options.out.exists() else []
        left = options.budget - (time.monotonic() - begin)
        run_side_by_side(commands_of(options, runs), options.out, options.processes, left)

    for name, draw in read_choice(options.out, options.names).items():
        print(f"{name}: {' '.join(draw) or 'as it was'}", flush=True)


if __name__ == "__main__":
    main()
