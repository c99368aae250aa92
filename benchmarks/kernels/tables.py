"""Kernels of tables and jagged rows on one GPU: parity first, then times beside copies, gathers and
plain PyTorch.

    python -m benchmarks.kernels.tables                 # parity and times, writes
    benchmarks/runs/tables.json
    python -m benchmarks.kernels.tables --parity-only
    TRITON_INTERPRET=1 python -m benchmarks.kernels.tables --smoke   # without a GPU: tiny calls, no
    times
    python -m benchmarks.kernels.tables --report FILE ...   # its section of benchmarks/RESULTS.md

A time is the median of runs by device events, with the L2 flushed before each
(`benchmarks.gpu.Timer`).
"""

import argparse
import gc
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu import (
    DEVICE,
    Timer,
    copy_ms,
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


def time_int4(timer: Timer, num_rows: int, dim: int, num_ids: int = 2**20) -> dict:
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
    times = {name: (timer(call), size * num_ids) for name, (call, size) in calls.items()}
    return {
        "bytes_per_row": 4 * words,
        "table_mb": num_rows * words * 4 / 2**20,
        "ms": {name: ms for name, (ms, _) in times.items()},
        "gb_s": {name: size / ms / 1e6 for name, (ms, size) in times.items()},
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

    def step(table: Tensor, moment: Tensor | None, ids: Tensor) -> dict[str, float]:
        hyper = Hyper(3, 0.01, (0.0 if moment is None else 0.9, 0.999), 1e-8, 0.01)
        touched = ids.unique().numel()
        per_row = 2 * dim * (table.element_size() + (0 if moment is None else 4)) + 8
        size = num_ids * (4 * dim + 8) + touched * per_row

        def call(backend: Backend) -> None:
            rowwise_adamw(table, moment, v, ids, grads, hyper, backend=backend)

        ms = timer(lambda: call("triton"))
        return {
            "ms": ms,
            "tb_s": size / ms / 1e9,
            "touched": touched,
            "plain_ms": timer(lambda: call("torch"), 5),
            "state_bytes_per_float": (0 if moment is None else 4) + 4 / dim,
        }

    found = {kind: step(weight, m, ids) for kind, ids in kinds.items()}
    found["distinct, β1 = 0"] = step(weight, None, kinds["distinct"])
    found["distinct, bfloat16 rows"] = step(weight.bfloat16(), m, kinds["distinct"])
    found["sort alone"] = {"ms": timer(lambda: torch.sort(kinds["distinct"].int(), stable=True))}
    return found


def time_softmax(timer: Timer, num_items: int, dtype: torch.dtype) -> dict:
    num_positions, num_negatives, dim = 65_536, 512, 64
    positives = randint(num_items, num_positions)
    negatives = draw_negatives(num_items, num_positions, num_negatives, device=DEVICE)
    leaves = [randn(n, dim, dtype=dtype).requires_grad_() for n in (num_positions, num_items)]

    def forward(backend: Backend) -> Tensor:
        return sampled_softmax(*leaves, positives, negatives, backend=backend)

    def both(backend: Backend) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(backend), leaves)

    numbers: dict = {}
    runs: tuple[tuple[Backend, int], ...] = ("triton", 15), ("reference", 3)
    for backend, repeats in runs:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(backend)
        peak = torch.cuda.max_memory_allocated() - before
        with torch.no_grad():
            forward_ms = timer(lambda backend=backend: forward(backend), repeats)
        both_ms = timer(lambda backend=backend: both(backend), repeats)
        numbers[backend] = {"forward_ms": forward_ms, "both_ms": both_ms, "peak_gb": peak / 1e9}
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
        with torch.no_grad():
            for op, (call, rows) in calls.items():
                for backend in ("triton", "torch"):
                    ms = timer(lambda call=call, backend=backend: call(backend))
                    found[f"{op}, {name}, {backend}"] = {
                        "ms": ms,
                        "tb_s": rows * width * 2 / ms / 1e9,
                    }
        for backend in ("triton", "torch"):
            out = cut(backend)
            grad = torch.ones_like(out)
            ms = timer(
                lambda out=out, x=x, grad=grad: torch.autograd.grad(out, x, grad, retain_graph=True)
            )
            size = (kept + len(x)) * width * 2
            found[f"truncate backward, {name}, {backend}"] = {"ms": ms, "tb_s": size / ms / 1e9}
    return found


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
    problems = parity(parity_checks())
    if not arguments.parity_only:
        found: dict = {
            "machine": versions(),
            "parity": {"cases": len(parity_checks()), "wrong": problems},
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        for section, case, numbers in measure():
            found.setdefault(section, {})[case] = numbers
            # what is measured stays, whatever comes after
            write_run(arguments.out, found)
            print(section, case, json.dumps(numbers), flush=True)
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
