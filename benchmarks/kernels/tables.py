"""Kernels of tables and jagged rows on one GPU: parity first, then times beside copies, gathers and
plain PyTorch.

    # parity and times, into benchmarks/runs/tables.json
    python -m benchmarks.kernels.tables
    python -m benchmarks.kernels.tables --parity-only
    # parity as `benchmarks.gpu_check --out FILE` has just found it
    python -m benchmarks.kernels.tables --checked FILE
    # without a GPU: tiny calls and no times
    TRITON_INTERPRET=1 python -m benchmarks.kernels.tables --smoke
    # its section of benchmarks/RESULTS.md
    python -m benchmarks.kernels.tables --report FILE ...

A time is the median of 30 runs, 20 with the sampled softmax, by device events, with the L2 flushed
before each (`benchmarks.gpu.Timer`), and what 10 and 90 % of them do not pass. What is compared
takes turns.
"""

import argparse
import gc
import json
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu import (
    DEVICE,
    Check,
    Timer,
    copy_ms,
    found_in,
    generator,
    offsets_of,
    parity,
    randint,
    randn,
    versions,
)
from benchmarks.kernels.tables_parity import parity_checks
from benchmarks.report import write_run
from kernels.backend import Backend
from kernels.int4_embedding.op import look_up, packed_words
from kernels.jagged.op import concatenate_sequences, split_sequences, truncate_tail
from kernels.rowwise_adamw.op import rowwise_adamw
from kernels.rowwise_adamw.types import Hyper
from kernels.sampled_softmax.op import draw_negatives, sampled_softmax

ROOT = Path(__file__).parents[1]
LEAST_REPEATS = 20


@triton.jit
def copy_packed_rows(
    packed, ids, out, num_ids, WORDS: tl.constexpr, CODE_WORDS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The look-up's bytes without its arithmetic: every code word written four times over."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = packed + tl.load(ids + n, mask=n < num_ids, other=0) * WORDS
    word = tl.arange(0, CODE_WORDS)
    mask = (n < num_ids)[:, None] & (word < WORDS - 1)
    codes = (
        tl.load(row[:, None] + 1 + word, mask=mask, other=0)
        + tl.load(row, mask=n < num_ids, other=0)[:, None]
    )
    four = tl.reshape(codes[:, :, None] + tl.zeros((1, 1, 4), tl.int32), (BLOCK_N, CODE_WORDS * 4))
    col = tl.arange(0, CODE_WORDS * 4)
    tl.store(
        out + n[:, None] * (WORDS - 1) * 4 + col,
        four,
        mask=(n < num_ids)[:, None] & (col < (WORDS - 1) * 4),
    )


def time_int4(timer: Timer, num_rows: int, dim: int, num_ids: int = 2**20) -> dict[str, Any]:
    """1M random rows; the table is ten times the L2 or more."""
    words = packed_words(dim)
    packed = randint(2**31, num_rows, words).int()
    packed[:, 0] = 0x3C003C00  # any finite scale and bias
    ids = randint(num_rows, num_ids, seed=1)
    floats = torch.empty(num_rows, dim, dtype=torch.bfloat16, device=DEVICE).normal_()
    out = torch.empty(num_ids, (words - 1) * 4, dtype=torch.int32, device=DEVICE)
    block = 2048 // dim
    grid = (triton.cdiv(num_ids, block),)
    sizes = {"WORDS": words, "CODE_WORDS": words - 1, "BLOCK_N": block}
    options = {"dim": dim, "dtype": torch.bfloat16}
    calls = {
        "look-up": (lambda: look_up(packed, ids, **options), 4 * words + 2 * dim),
        "gather of the same bytes": (
            lambda: copy_packed_rows[grid](packed, ids, out, num_ids, **sizes),
            4 * words + 2 * dim,
        ),
        "index_select of packed rows": (lambda: packed.index_select(0, ids), 8 * words),
        "index_select of bfloat16 rows": (lambda: floats.index_select(0, ids), 4 * dim),
        "plain PyTorch": (
            lambda: look_up(packed, ids, **options, backend="torch"),
            4 * words + 2 * dim,
        ),
    }
    timings = timer.in_turns({name: call for name, (call, _) in calls.items()})
    rates = {}
    for name, (_, size) in calls.items():
        rates[name] = size * num_ids / timings[name].median / 1e6
    return {
        "bytes_per_row": 4 * words,
        "table_mb": num_rows * words * 4 / 2**20,
        "times": {name: timing.as_numbers() for name, timing in timings.items()},
        "gb_s": rates,
    }


def time_adamw(
    timer: Timer, num_ids: int = 2**20, num_rows: int = 2**22, dim: int = 128
) -> dict[str, dict]:
    """1M places of a table of 4M rows; bytes are each gradient, and each touched row's state in and
    out, once.
    """
    weight, m, v = randn(num_rows, dim), randn(num_rows, dim, seed=1), randn(num_rows, seed=2).abs()
    grads = randn(num_ids, dim, seed=3)
    zipf = (num_rows ** torch.rand(num_ids, device=DEVICE, generator=generator(4))).long()
    kinds = {
        "distinct": torch.randperm(num_rows, device=DEVICE, generator=generator(5))[:num_ids],
        "Zipf": zipf - 1,
        "16 rows": randint(16, num_ids),
    }

    def step(table: Tensor, moment: Tensor | None, ids: Tensor) -> dict[str, Any]:
        hyper = Hyper(3, 0.01, (0.0 if moment is None else 0.9, 0.999), 1e-8, 0.01)
        touched = ids.unique().numel()
        per_row = 2 * dim * (table.element_size() + (0 if moment is None else 4)) + 8
        size = num_ids * (4 * dim + 8) + touched * per_row

        def call(backend: Backend) -> None:
            rowwise_adamw(table, moment, v, ids, grads, hyper, backend=backend)

        both = timer.in_turns({"ours": lambda: call("triton"), "plain": lambda: call("torch")})
        ours, plain = both["ours"], both["plain"]
        return {
            **ours.as_numbers(),
            "tb_s": size / ours.median / 1e9,
            "touched": touched,
            "plain_ms": plain.median,
            "plain_range_ms": [plain.low, plain.high],
            "state_bytes_per_float": (0 if moment is None else 4) + 4 / dim,
        }

    found = {kind: step(weight, m, ids) for kind, ids in kinds.items()}
    found["distinct, β1 = 0"] = step(weight, None, kinds["distinct"])
    found["distinct, bfloat16 rows"] = step(weight.bfloat16(), m, kinds["distinct"])
    sort = timer.in_turns({"sort": lambda: torch.sort(kinds["distinct"].int(), stable=True)})
    found["sort alone"] = sort["sort"].as_numbers()
    return found


def time_softmax(timer: Timer, num_items: int, dtype: torch.dtype) -> dict:
    num_positions, num_negatives, dim = 65_536, 512, 64
    positives = randint(num_items, num_positions)
    negatives = draw_negatives(num_items, num_positions, num_negatives, device=DEVICE)
    leaves = [randn(n, dim, dtype=dtype).requires_grad_() for n in (num_positions, num_items)]

    def forward(backend: Backend) -> Tensor:
        return sampled_softmax(*leaves, positives, negatives, backend=backend)

    def forward_alone(backend: Backend) -> Tensor:
        with torch.no_grad():
            return forward(backend)

    def both(backend: Backend) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(backend), leaves)

    numbers: dict = {}
    calls: dict[tuple[Backend, str], Callable[[], object]] = {}
    backends: tuple[Backend, ...] = "triton", "reference"
    for backend in backends:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(backend)
        peak = torch.cuda.max_memory_allocated() - before
        numbers[backend] = {"peak_gb": peak / 1e9}
        calls[backend, "forward"] = partial(forward_alone, backend)
        calls[backend, "both"] = partial(both, backend)

    for (backend, way), timing in timer.in_turns(calls, LEAST_REPEATS).items():
        numbers[backend][f"{way}_ms"] = timing.median
        numbers[backend][f"{way}_range_ms"] = [timing.low, timing.high]
    ours, plain = numbers["triton"], numbers["reference"]
    numbers["faster"] = plain["both_ms"] / ours["both_ms"]
    numbers["memory_share"] = ours["peak_gb"] / plain["peak_gb"]
    return numbers


SEQUENCES = ("64 of 4,096", 64, 4096), ("4,096 of 64", 4096, 64)


def time_jagged(
    timer: Timer, sequences: tuple[tuple[str, int, int], ...] = SEQUENCES
) -> dict[str, dict]:
    """Rows of 512 bfloat16; bytes are what is kept, read and written."""
    width, found = 512, {}
    for name, count, length in sequences:
        offsets = offsets_of([length] * count)
        short = offsets_of([length // 4] * count)
        x, y = (
            randn(int(offsets[-1]), width, dtype=torch.bfloat16),
            randn(int(short[-1]), width, dtype=torch.bfloat16),
        )
        x.requires_grad_()
        tail = torch.full((count,), length // 2, dtype=torch.int32, device=DEVICE)
        kept = count * (length // 2 + 2)

        def cut(backend: Backend, x=x, offsets=offsets, tail=tail, kept=kept) -> Tensor:
            return truncate_tail(x, offsets, tail, num_context=2, num_rows=kept, backend=backend)[0]

        calls: dict[str, tuple[Callable[[Backend], object], int]] = {
            "concatenate": (
                lambda backend, x=x, y=y, a=offsets, b=short: concatenate_sequences(
                    x, a, y, b, backend=backend
                ),
                2 * (len(x) + len(y)),
            ),
            "split": (
                lambda backend, x=x, a=short, b=offsets - short: split_sequences(
                    x, a, b, num_left=len(x) // 4, backend=backend
                ),
                2 * len(x),
            ),
            "truncate": (cut, 2 * kept),
        }
        backends: tuple[Backend, ...] = "triton", "torch"
        with torch.no_grad():
            for op, (call, rows) in calls.items():
                timings = timer.in_turns({to: partial(call, to) for to in backends})
                for to, timing in timings.items():
                    rate = {"tb_s": rows * width * 2 / timing.median / 1e9}
                    found[f"{op}, {name}, {to}"] = timing.as_numbers() | rate

        backward = {}
        for to in backends:
            out = cut(to)
            grads = partial(torch.autograd.grad, out, x, torch.ones_like(out), retain_graph=True)
            backward[to] = grads
        size = (kept + len(x)) * width * 2
        for to, timing in timer.in_turns(backward).items():
            rate = {"tb_s": size / timing.median / 1e9}
            found[f"truncate backward, {name}, {to}"] = timing.as_numbers() | rate
    return found


def compile_adamw() -> None:
    torch.use_deterministic_algorithms(False)  # here and below: not of all that stands beside ours
    time_adamw(Timer(repeats=1), 2**12, 2**14)


def compile_int4(dim: int) -> None:
    torch.use_deterministic_algorithms(False)
    time_int4(Timer(repeats=1), 2**12, dim, 2**12)


def compile_jagged() -> None:
    torch.use_deterministic_algorithms(False)
    time_jagged(Timer(repeats=1))


def compile_checks() -> list[Check]:
    """What leaves this benchmark's kernels in Triton's cache; parity leaves the softmax's."""
    widths: list[Check] = [(compile_int4, dim) for dim in (128, 64, 32)]
    return [(compile_adamw,), *widths, (compile_jagged,)]


def measure() -> Iterator[tuple[str, str, dict]]:
    """Section, case and numbers, one case after another."""
    timer = Timer()
    cases: list[tuple[str, str, Callable[[], dict]]] = [
        ("ceilings", "copy", lambda: {"copy_tb_s": 2**30 / copy_ms(timer, 2**30) / 1e9})
    ]
    for rows, dim in ((2**23, 128), (2**24, 64), (2**24, 32)):
        cases.append(("int4", str(dim), lambda rows=rows, dim=dim: time_int4(timer, rows, dim)))
    cases.append(("adamw", "1M gradients of 128", lambda: time_adamw(timer)))
    cases.append(("jagged", "rows of 512", lambda: time_jagged(timer)))
    for num_items in (27_000, 700_000):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{num_items:,} items, {str(dtype).removeprefix('torch.')}"
            cases.append(("softmax", name, lambda n=num_items, t=dtype: time_softmax(timer, n, t)))
    for section, case, call in cases:
        try:
            numbers = call()
        except Exception:  # the other cases are still worth having
            numbers = {"failed": traceback.format_exc()}
        yield section, case, numbers
        gc.collect()
        torch.cuda.empty_cache()


def smoke() -> None:
    """Calls at tiny sizes, for a machine without a GPU."""
    time_int4(Timer(), 64, 32, 64)
    time_adamw(Timer(), 32, 64, 16)
    time_jagged(Timer(), (("2 of 8", 2, 8),))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "tables.json")
    parser.add_argument("--parity-only", action="store_true")
    parser.add_argument(
        "--checked",
        type=Path,
        metavar="FILE",
        help="parity as `benchmarks.gpu_check --out` found it",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny calls, in Triton's interpreter too"
    )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        help="write RESULTS.md from these runs, and do nothing else",
    )
    arguments = parser.parse_args()
    if arguments.report:
        from benchmarks.kernels.tables_report import write_report

        write_report([json.loads(path.read_text()) for path in arguments.report])
        return
    if arguments.smoke:
        smoke()
        return
    problems, checked = [], {}
    if arguments.checked:
        checked = found_in(arguments.checked, "tables")
    else:
        problems = parity(parity_checks())
        checked = {"cases": len(parity_checks()), "wrong": problems}
    if not arguments.parity_only:
        found: dict = {"machine": versions(), "parity": checked}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        for section, case, numbers in measure():
            found.setdefault(section, {})[case] = numbers
            # what is measured stays, whatever comes after
            write_run(arguments.out, found)
            print(section, case, json.dumps(numbers), flush=True)
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
