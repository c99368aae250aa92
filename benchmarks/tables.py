"""Kernels of tables and jagged rows on one GPU: parity first, then times beside copies, gathers and plain PyTorch.

    python -m benchmarks.tables                 # parity and times, writes benchmarks/runs/tables.json
    python -m benchmarks.tables --report FILE ...   # its section of benchmarks/RESULTS.md

A time is the median of runs by device events, with the L2 flushed before each (see benchmarks.attention).
"""

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.attention import Timer
from kernels.backend import Backend
from kernels.int4_embedding.op import look_up, packed_words, quantize
from kernels.int4_embedding.reference import quantize_reference
from kernels.jagged.op import concatenate, split, truncate_tail
from kernels.rowwise_adamw.op import rowwise_adamw
from kernels.rowwise_adamw.reference import Hyper
from kernels.sampled_softmax.op import draw_negatives, sampled_softmax

ROOT = Path(__file__).parent


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(high, shape, generator=generator, device="cuda")


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).cuda()


# Parity --------------------------------------------------------------------------------------------------------------


def too_far(fast: list[Tensor], plain: list[Tensor], truth: list[Tensor], floor: float = 1e-12) -> str | None:
    """What strays from `truth`, float64, by more than twice plain PyTorch's error, 1e-6 of its size and `floor`."""
    for i, (got, there, expected) in enumerate(zip(fast, plain, truth, strict=True)):
        worst = (got.double() - expected).abs().max().item() if got.numel() else 0.0
        allowed = 2 * (there.double() - expected).abs().max().item() if got.numel() else 0.0
        allowed += 1e-6 * expected.abs().max().item() + floor if got.numel() else 0.0
        if not worst <= allowed:  # NaN is not
            return f"output {i}: error {worst:.2e}, allowed {allowed:.2e}"
    return None


def check_jagged(lengths: tuple[list[int], list[int]], width: int, dtype: torch.dtype) -> str | None:
    left_offsets, right_offsets = map(offsets_of, lengths)
    left, right = (randn(sum(n), width, dtype=dtype).requires_grad_() for n in lengths)
    whole_grad = randn(len(left) + len(right), width, dtype=dtype, seed=1)
    tail = randint(70, len(lengths[0])).int()
    kept = sum(torch.minimum(torch.tensor(lengths[0]), tail.cpu() + 2).tolist())
    results = []
    for backend in ("triton", "torch"):
        torch.cuda.set_sync_debug_mode("error" if backend == "triton" else "default")  # what waits for it raises
        whole = concatenate(left, left_offsets, right, right_offsets, backend=backend)
        parts = split(whole, left_offsets, right_offsets, num_left=len(left), backend=backend)
        short, offsets = truncate_tail(left, left_offsets, tail, num_context=2, num_rows=kept, backend=backend)
        grads = torch.autograd.grad(whole, (left, right), whole_grad, retain_graph=True)
        back = torch.autograd.grad(short, left, whole_grad[: len(short)])
        torch.cuda.set_sync_debug_mode("default")
        results.append([whole, *parts, short, offsets, *grads, *back])
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return None if same else "rows differ from plain PyTorch's"


def check_int4(num_rows: int, dim: int, dtype: torch.dtype) -> str | None:
    table = randn(num_rows, dim) * torch.logspace(-3, 2, num_rows, device="cuda")[:, None] + 0.3
    packed, ids = quantize(table.cpu()).cuda(), randint(num_rows, 701, 3)[:, 1]
    codes, scale, bias = (x.double() for x in quantize_reference(table.cpu()))
    truth = (codes * scale + bias).cuda()[ids]
    fast, plain = (look_up(packed, ids, dim=dim, dtype=dtype, backend=backend) for backend in ("triton", "torch"))
    return too_far([fast], [plain], [truth])


def check_adamw(ids: Tensor, num_rows: int, dim: int, momentum: bool) -> str | None:
    hyper = Hyper(3, 0.01, (0.9 if momentum else 0.0, 0.999), 1e-8, 0.01)
    weight, grads, scale = randn(num_rows, dim), randn(len(ids), dim, seed=1), torch.tensor(3.7, device="cuda")
    m, v = randn(num_rows, dim, seed=2) if momentum else None, randn(num_rows, seed=3).abs()

    def step(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        state = [None if x is None else x.to(dtype, copy=True) for x in (weight, m, v)]
        torch.cuda.set_sync_debug_mode("error" if backend == "triton" else "default")
        rowwise_adamw(*state, ids, grads.to(dtype), hyper, grad_scale=scale.to(dtype), backend=backend)
        torch.cuda.set_sync_debug_mode("default")
        return [x for x in state if x is not None]

    fast, again = step(torch.float32, "triton"), step(torch.float32, "triton")
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return "two runs differ"
    return too_far(fast, step(torch.float32, "torch"), step(torch.float64, "torch"))


def check_bfloat16_rows() -> str | None:
    """Equal to plain PyTorch but where a difference in the last bit of float32 turned the chance of a rounding."""
    rows = randn(5000, 128, dtype=torch.bfloat16)
    ids, grads, hyper = randint(5000, 3000), randn(3000, 128, seed=1), Hyper(3, 0.01, (0.9, 0.999), 1e-8, 0.01)
    tables = []
    backends: tuple[Backend, ...] = "triton", "torch"
    for backend in backends:
        weight, m, v = rows.clone(), torch.zeros(5000, 128, device="cuda"), torch.zeros(5000, device="cuda")
        rowwise_adamw(weight, m, v, ids, grads, hyper, backend=backend)
        tables.append(weight)
    share = (tables[0] != tables[1]).float().mean().item()
    return f"{share:.1%} of the numbers differ" if share > 1e-3 else None


def check_softmax(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> str | None:
    num_positions, num_items, num_negatives, dim = sizes
    users, items = randn(num_positions, dim, dtype=dtype), randn(num_items, dim, dtype=dtype, seed=1)
    positives = randint(num_items, num_positions)
    negatives = draw_negatives(num_items, num_positions, num_negatives, device="cuda")
    weights = randn(num_positions, seed=2).abs()
    weights[1:2] = 0

    def run(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (users, items)]
        torch.cuda.set_sync_debug_mode("error" if backend == "triton" else "default")
        loss = sampled_softmax(*leaves, positives, negatives, weights=weights, backend=backend)
        grads = torch.autograd.grad(loss, leaves)
        torch.cuda.set_sync_debug_mode("default")
        return [loss.detach(), *grads]

    fast, again = run(dtype, "triton"), run(dtype, "triton")
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return "two runs differ"
    # A loss is a difference of scores of up to 1 / 0.05, whose last bit shows where the loss is exactly 0.
    return too_far(fast, run(dtype, "reference"), run(torch.float64, "reference"), floor=2**-23 / 0.05)


def parity_checks() -> dict[str, Callable[[], str | None]]:
    checks: dict[str, Callable[[], str | None]] = {}
    many = [3, 0, 1, 200, 64] * 50
    for lengths in (([1], [1]), ([63, 0, 130], [0, 0, 70]), ([0, 0], [0, 3]), (many, many[::-1])):
        for width, dtype in ((1, torch.float32), (50, torch.bfloat16), (512, torch.bfloat16)):
            name = f"jagged {lengths if len(lengths[0]) < 4 else 'many'} {width} {dtype}"
            checks[name] = lambda x=lengths, w=width, t=dtype: check_jagged(x, w, t)
    for dim in (1, 32, 50, 128):
        for dtype in (torch.float32, torch.bfloat16):
            checks[f"int4 {dim} {dtype}"] = lambda d=dim, t=dtype: check_int4(1000, d, t)
    kinds = {
        "distinct": lambda: torch.randperm(5000, device="cuda")[:3001],
        "repeats": lambda: randint(700, 5000),
        "16 rows": lambda: randint(16, 20_000),
        "one row": lambda: torch.full((70_001,), 3, device="cuda"),
        "nothing": lambda: torch.empty(0, dtype=torch.int64, device="cuda"),
    }
    for kind, ids in kinds.items():
        for dim in (1, 50, 128):
            for momentum in (True, False) if dim == 128 else (True,):
                checks[f"adamw {kind} {dim} {momentum}"] = lambda i=ids, d=dim, m=momentum: check_adamw(i(), 5000, d, m)
    checks["adamw bfloat16 rows"] = check_bfloat16_rows
    for sizes in ((1, 1, 1, 1), (63, 5, 20, 50), (257, 1000, 128, 64), (1000, 40_000, 512, 64), (300, 77, 33, 256)):
        for dtype in (torch.float32, torch.bfloat16):
            checks[f"sampled softmax {sizes} {dtype}"] = lambda s=sizes, t=dtype: check_softmax(s, t)
    return checks


def parity() -> dict:
    """What is wrong, by check. Outputs start as NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)
    problems, checks = [], parity_checks()
    for name, check in checks.items():
        try:
            found = check()
        except Exception as error:  # the report must name the case, whatever went wrong in it
            found = f"{type(error).__name__}: {str(error)[:300]}"
            torch.cuda.set_sync_debug_mode("default")
        if found:
            problems.append(f"{name}: {found}")
            print(problems[-1], flush=True)
    torch.use_deterministic_algorithms(False)
    return {"cases": len(checks), "wrong": problems}


# Times ---------------------------------------------------------------------------------------------------------------


@triton.jit
def copy_packed_rows(packed, ids, out, num_ids, WORDS: tl.constexpr, CODE_WORDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The look-up's bytes without its arithmetic: every code word written four times over."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = packed + tl.load(ids + n, mask=n < num_ids, other=0) * WORDS
    word = tl.arange(0, CODE_WORDS)
    mask = (n < num_ids)[:, None] & (word < WORDS - 1)
    codes = tl.load(row[:, None] + 1 + word, mask=mask, other=0) + tl.load(row, mask=n < num_ids, other=0)[:, None]
    four = tl.reshape(codes[:, :, None] + tl.zeros((1, 1, 4), tl.int32), (BLOCK_N, CODE_WORDS * 4))
    col = tl.arange(0, CODE_WORDS * 4)
    tl.store(out + n[:, None] * (WORDS - 1) * 4 + col, four, mask=(n < num_ids)[:, None] & (col < (WORDS - 1) * 4))


def time_int4(timer: Timer, num_rows: int, dim: int) -> dict:
    """1M random rows; the table is ten times the L2 or more."""
    num_ids, words = 2**20, packed_words(dim)
    packed = randint(2**31, num_rows, words).int()
    packed[:, 0] = 0x3C003C00  # any finite scale and bias
    ids = randint(num_rows, num_ids, seed=1)
    floats = torch.empty(num_rows, dim, dtype=torch.bfloat16, device="cuda").normal_()
    out = torch.empty(num_ids, (words - 1) * 4, dtype=torch.int32, device="cuda")
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
        "plain PyTorch": (lambda: look_up(packed, ids, **options, backend="torch"), 4 * words + 2 * dim),
    }
    times = {name: (timer(call), size * num_ids) for name, (call, size) in calls.items()}
    return {
        "bytes_per_row": 4 * words,
        "table_mb": num_rows * words * 4 / 2**20,
        "ms": {name: ms for name, (ms, _) in times.items()},
        "gb_s": {name: size / ms / 1e6 for name, (ms, size) in times.items()},
    }


def time_adamw(timer: Timer) -> dict[str, dict]:
    """1M places of a table of 4M rows; bytes are each gradient, and each touched row's state in and out, once."""
    num_ids, num_rows, dim = 2**20, 2**22, 128
    weight, m, v = randn(num_rows, dim), randn(num_rows, dim, seed=1), randn(num_rows, seed=2).abs()
    grads = randn(num_ids, dim, seed=3)
    zipf = (num_rows ** torch.rand(num_ids, device="cuda", generator=torch.Generator("cuda").manual_seed(4))).long()
    kinds = {
        "distinct": torch.randperm(num_rows, device="cuda", generator=torch.Generator("cuda").manual_seed(5))[:num_ids],
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
    negatives = draw_negatives(num_items, num_positions, num_negatives, device="cuda")
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


def time_jagged(timer: Timer) -> dict[str, dict]:
    """Rows of 512 bfloat16; bytes are what is kept, read and written."""
    width, found = 512, {}
    for name, count, length in (("64 of 4,096", 64, 4096), ("4,096 of 64", 4096, 64)):
        offsets = offsets_of([length] * count)
        short = offsets_of([length // 4] * count)
        x, y = randn(int(offsets[-1]), width, dtype=torch.bfloat16), randn(int(short[-1]), width, dtype=torch.bfloat16)
        x.requires_grad_()
        tail = torch.full((count,), length // 2, dtype=torch.int32, device="cuda")
        kept = count * (length // 2 + 2)

        def cut(backend: Backend, x=x, offsets=offsets, tail=tail, kept=kept) -> Tensor:
            return truncate_tail(x, offsets, tail, num_context=2, num_rows=kept, backend=backend)[0]

        calls: dict[str, tuple[Callable[[Backend], object], int]] = {
            "concatenate": (
                lambda backend, x=x, y=y, a=offsets, b=short: concatenate(x, a, y, b, backend=backend),
                2 * (len(x) + len(y)),
            ),
            "split": (
                lambda backend, x=x, a=short, b=offsets - short: split(x, a, b, num_left=len(x) // 4, backend=backend),
                2 * len(x),
            ),
            "truncate": (cut, 2 * kept),
        }
        with torch.no_grad():
            for op, (call, rows) in calls.items():
                for backend in ("triton", "torch"):
                    ms = timer(lambda call=call, backend=backend: call(backend))
                    found[f"{op}, {name}, {backend}"] = {"ms": ms, "tb_s": rows * width * 2 / ms / 1e9}
        for backend in ("triton", "torch"):
            out = cut(backend)
            grad = torch.ones_like(out)
            ms = timer(lambda out=out, x=x, grad=grad: torch.autograd.grad(out, x, grad, retain_graph=True))
            size = (kept + len(x)) * width * 2
            found[f"truncate backward, {name}, {backend}"] = {"ms": ms, "tb_s": size / ms / 1e9}
    return found


def time_copy(timer: Timer) -> dict[str, float]:
    copied = torch.empty(2**30, dtype=torch.int8, device="cuda")
    return {"copy_tb_s": 2**30 / timer(lambda: copied[: 2**29].copy_(copied[2**29 :])) / 1e9}


def measure() -> Iterator[tuple[str, str, dict]]:
    """Section, case and numbers, one case after another."""
    timer = Timer()
    cases: list[tuple[str, str, Callable[[], dict]]] = [("ceilings", "copy", lambda: time_copy(timer))]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "tables.json")
    parser.add_argument("--parity-only", action="store_true")
    parser.add_argument("--report", type=Path, nargs="+", help="write RESULTS.md from these runs, and do nothing else")
    arguments = parser.parse_args()
    if arguments.report:
        from benchmarks.tables_report import write_report

        write_report([json.loads(path.read_text()) for path in arguments.report])
        return
    begin = time.perf_counter()
    checked = parity()
    spent = time.perf_counter() - begin
    print(f"parity: {checked['cases']} cases, {len(checked['wrong'])} wrong, {spent:.0f} s", flush=True)
    if not arguments.parity_only:
        versions = {"torch": torch.__version__, "triton": triton.__version__, "device": torch.cuda.get_device_name()}
        found: dict = {"machine": versions, "parity": checked}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        for section, case, numbers in measure():
            found.setdefault(section, {})[case] = numbers
            arguments.out.write_text(json.dumps(found, indent=1))  # what is measured stays, whatever comes after
            print(section, case, json.dumps(numbers), flush=True)
    raise SystemExit(bool(checked["wrong"]))


if __name__ == "__main__":
    main()
