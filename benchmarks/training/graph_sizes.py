"""Sizes of batches that the real loader's steps come in, of which each takes a CUDA graph of its
own, and the work that filling them up adds. No GPU, and no batch is made: lengths decide.

    python -m benchmarks.training.graph_sizes        # half a minute

Steps are cut from the shuffled examples as they come, or dealt
(`train.stochastic_length.balance`). Recording takes about as long as two launched steps.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import environment
from benchmarks.report import RUNS, table, write_run, write_section
from benchmarks.training.feeding import publish
from benchmarks.training.load_balance import zipf_lengths
from benchmarks.training.real_loop import loop_config, plain_maps
from pipeline.batches.collate import Filling
from pipeline.batches.examples import shared_end
from pipeline.batches.filling import BatchFiller
from pipeline.batches.loader import Share, TrainLoader
from pipeline.batches.steps import step_plan
from pipeline.config import RunConfig
from pipeline.figures import Figures

BUCKETS = 2  # files of the store
SIZES = 16, 32, 64  # train.graph_sizes
WAYS = {"none": "as they come", "dealing": "dealt"}

Lengths = tuple[Tensor, Tensor, Tensor]  # of a step's sequences, as `BatchFiller.next_sizes`


@dataclass(frozen=True, slots=True)
class Case:
    lengths: str
    tokens: int  # of a step


def users_of(lengths: str) -> np.ndarray:
    """The numbers of events of users."""
    if lengths == "up to 16,384":  # passes of 64 targets over whole histories
        return np.full(2, 16_384)
    return zipf_lengths(6000, 1.2, 20, 8192, np.random.default_rng(0))


CASES = Case("up to 16,384", 65_536), Case("up to 16,384", 196_608), Case("Zipf", 65_536)


def steps_of(cfg: RunConfig, steps: int) -> Iterator[Lengths]:
    """The lengths of so many steps, over as many epochs as they take."""
    epochs = -(-steps // step_plan(cfg).steps_per_epoch)
    cfg = replace(cfg, train=replace(cfg.train, epochs=epochs))
    loader = TrainLoader(cfg, plain_maps(cfg), step_plan(cfg))

    number = 0
    for epoch in range(epochs):
        for share in loader.epoch_shares(epoch):
            if number < steps:
                yield share_lengths(share)
            number += 1


def share_lengths(share: Share) -> Lengths:
    examples = share.examples
    targets = examples.target_end - examples.target_begin
    first_sees = np.maximum(shared_end(share.users, examples), examples.history_begin)
    columns = examples.num_tokens, targets, examples.history_end - first_sees
    tokens, targets, span = map(torch.from_numpy, columns)
    return tokens, targets, span


def count_sizes(cfg: RunConfig, steps: list[Lengths], graph_sizes: int) -> dict[str, float]:
    """How often sizes come, and the layers' work on tokens that only fill up."""
    filler = BatchFiller.of_run(cfg, graph_sizes)
    whole = cfg.model.truncate_after_layer or 0
    cut = cfg.model.num_layers - whole

    came: Counter[Filling] = Counter()
    late: list[int] = []  # how often the size of each step of the second half had come before
    own_work = filled_work = 0
    for number, (lengths, targets, span) in enumerate(steps):
        filling, _ = filler.next_sizes(lengths, targets, span)
        if number >= len(steps) // 2:
            late.append(came[filling.sizes])
        came[filling.sizes] += 1

        kept = int(filler.kept_lengths(lengths, targets, span).sum())
        own_work += whole * filling.own_tokens + cut * kept
        filled_work += whole * filling.num_tokens + cut * filling.kept_tokens

    times = np.array(list(came.values()))
    return {
        "sizes": len(times),
        "recorded": int((times > 1).sum()),
        "launched_late": late.count(0),
        "recorded_late": late.count(1),
        "more_work": filled_work / own_work - 1,
    }


def measure(case: Case, balance: str, num_steps: int) -> Iterator[dict[str, float | str]]:
    with tempfile.TemporaryDirectory() as folder:
        cfg = loop_config(folder, case.tokens, {})
        lengths = replace(cfg.train.stochastic_length, balance=balance)
        cfg = replace(cfg, train=replace(cfg.train, stochastic_length=lengths))
        publish(cfg.sequence_dir, cfg, users_of(case.lengths), BUCKETS)

        steps = list(steps_of(cfg, num_steps))
        totals = [int(tokens.sum()) for tokens, _, _ in steps]
        for graph_sizes in SIZES:
            yield {
                "lengths": case.lengths,
                "tokens": case.tokens,
                "way": WAYS[balance],
                "spread": float(np.std(totals) / np.mean(totals)),
                "graph_sizes": graph_sizes,
                **count_sizes(cfg, steps, graph_sizes),
            }


def section(run: Figures) -> str:
    rows = []
    for row in run["rows"]:
        rows.append(
            [
                row["lengths"],
                f"{row['tokens']:,}",
                f"{row['way']}, ± {row['spread']:.1%}",
                str(row["graph_sizes"]),
                f"{row['sizes']:,}",
                f"{row['recorded']:,}",
                f"{row['launched_late']}, {row['recorded_late']}",
                f"{row['more_work']:.1%}",
            ]
        )
    header = ["lengths", "tokens of a step", "steps, spread of their tokens", "train.graph_sizes"]
    header += ["sizes", "recorded", "second half: launched, recorded", "work that fills up"]
    return f"""## Sizes of batches

`{run["command"]}`: sizes that {run["steps"]:,} steps of the training loader come in, counted from
their lengths; ULTRA-HSTU of 12 layers keeps 1,024 events after 4. Lengths: passes of at most 64
targets over users of 16,384 events, or users of 20 to 8,192 events by Zipf's law. A size is
recorded as a CUDA graph when it comes for the second time, and replayed from then on.

{table(header, rows)}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()

    torch.set_num_threads(1)
    rows: list[dict[str, float | str]] = []
    for case in CASES:
        for balance in WAYS:
            rows += measure(case, balance, options.steps)
            print(rows[-len(SIZES) :], flush=True)
    run = {
        "command": "python -m benchmarks.training.graph_sizes",
        "environment": environment("cpu"),
        "steps": options.steps,
        "rows": rows,
    }
    write_run(RUNS / "graph_sizes.json", run)
    write_section("graph_sizes", section(run))


if __name__ == "__main__":
    main()
