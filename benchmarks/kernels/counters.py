"""How near the attention kernels come to what the chip can do, by its hardware counters.

    ncu --set full --clock-control none --csv --page raw --print-units base \\
        --profile-from-start off python -m benchmarks.kernels.counters > counters.csv
    python -m benchmarks.kernels.counters --read counters.csv    → runs/counters_h200.json

`--cases` takes some of the cases alone, in both commands; the file keeps what it has of the others.
Nsight Compute replays every kernel once for each group of counters. What is kept: time; the bytes
a second that come from L2 to the multiprocessors; and, in per cent of their peak, how busy the
memory, that way from L2, the tensor cores, the special functions and the issue of instructions are.
Nothing reaches its peak for long: a copy keeps the memory busy for some 90 %.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import versions
from benchmarks.kernels.attention import CAUSAL, even, our_calls
from benchmarks.kernels.attention_parity import SEMI_LOCAL, Case
from benchmarks.report import write_run

ROOT = Path(__file__).parents[1]
METRICS = {  # ours → theirs
    "ns": "gpu__time_duration.sum",
    "memory_share": "dram__cycles_active.avg.pct_of_peak_sustained_elapsed",
    "l2_bytes_s": "derived__lts__lts2xbar_bytes.sum.per_second",
    "l2_share": "lts__lts2xbar_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "tensor_share": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "special_share": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "issue_share": "smsp__issue_active.avg.pct_of_peak_sustained_active",
}


def counted_cases() -> dict[str, Case]:
    return {
        "window only 16384": even(16384, {"window": 256}),
        "semi-local 16384": even(16384, SEMI_LOCAL),
        "semi-local, prefix of 4 16384": even(16384, {**SEMI_LOCAL, "prefix": 4}),
        "causal 16384": even(16384, CAUSAL),
        "bias causal 1024": even(1024, CAUSAL, bias=True),
    }


def kernels_of(case: Case) -> list[str]:
    """The kernels of a forward and a backward, in the order of their launches."""
    return ["forward", "backward_queries", "backward_keys"] + ["backward_bias"] * case.bias


def run_cases(names: list[str]) -> None:
    """Each case once forward and backward, compiled before."""
    for name in names:
        calls = our_calls(counted_cases()[name])
        for call in calls.values():
            call()
        torch.cuda.synchronize()

        torch.cuda.cudart().cudaProfilerStart()
        for call in calls.values():
            call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def read_counters(path: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """By case and kernel. Launches come in the order of the cases."""
    launches = []
    for name in names:
        launches += [(name, kernel) for kernel in kernels_of(counted_cases()[name])]
    kernels = {kernel for _, kernel in launches}
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if row["Kernel Name"] in kernels]

    found: dict[str, dict[str, Any]] = {}
    for (name, kernel), row in zip(launches, rows, strict=False):  # fewer when it was cut off
        assert row["Kernel Name"] == kernel, f"{row['Kernel Name']} where {kernel} was launched"
        numbers = {}
        for own, theirs in METRICS.items():
            if row.get(theirs):
                numbers[own] = float(row[theirs].replace(",", ""))
        found.setdefault(name, {})[kernel] = numbers
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--read", type=Path, metavar="FILE", help="ncu's table, instead of running")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "counters_h200.json")
    parser.add_argument(
        "--cases", nargs="+", choices=list(counted_cases()), default=list(counted_cases())
    )
    arguments = parser.parse_args()
    if arguments.read is None:
        run_cases(arguments.cases)
        print(json.dumps(versions()))
        return

    found = json.loads(arguments.out.read_text())["counters"] if arguments.out.exists() else {}
    found |= read_counters(arguments.read, arguments.cases)
    write_run(arguments.out, {"counters": found})
    for case in arguments.cases:
        for kernel, numbers in found.get(case, {}).items():
            print(case, kernel, json.dumps(numbers))


if __name__ == "__main__":
    main()
