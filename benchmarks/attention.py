"""Semi-local attention on one GPU: parity first, then times, beside PyTorch's own attention in the same run.

    python -m benchmarks.attention                       # parity and times, writes benchmarks/runs/attention.json
    python -m benchmarks.attention --cpu                 # the blocked form against the dense one, attention_cpu.json
    python -m benchmarks.attention --report FILE ...     # tables and plots into benchmarks/RESULTS.md

Inputs are normal with unit scale. A time is the median of `REPEATS` runs by device events; before each, L2 is flushed
several times over, so that the host is ahead and its work does not show.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor

from kernels.semi_local_attention.op import Backend, cached_attention, semi_local_attention
from kernels.semi_local_attention.reference import RelativeBias

ROOT = Path(__file__).parent
TOKENS = 65_536
REPEATS = 30
FLUSH_BYTES = 256 * 2**20  # five times the L2 of an H100
SEMI_LOCAL = {"window": 256, "full_rows": 256}
CAUSAL: dict[str, int] = {}


@dataclass(frozen=True)
class Case:
    """A batch and a mask."""

    lengths: tuple[int, ...]
    num_targets: tuple[int, ...] | None = None
    mask: dict[str, int] = field(default_factory=dict)
    visible: str = ""  # each candidate its own visible length: "random", or "sorted" as in training
    heads: int = 4
    d_qk: int = 128
    d_v: int = 128
    bias: bool = False
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        shown = f"{len(self.lengths)} sequences" if len(self.lengths) > 4 else str(list(self.lengths))
        extra = f"{' visible ' + self.visible if self.visible else ''}{' bias' if self.bias else ''}"
        return f"{self.dtype} {shown} targets {self.num_targets} {self.mask} {self.heads}x{self.d_qk}x{self.d_v}{extra}"


@dataclass
class Batch:
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    offsets: Tensor
    options: dict
    bias: RelativeBias | None


def make_batch(case: Case, seed: int = 0) -> Batch:
    """Tensors in float64, of values that the case's type holds exactly."""
    generator = torch.Generator("cuda").manual_seed(seed)
    total, heads = sum(case.lengths), case.heads
    widths = case.d_qk, case.d_qk, case.d_v, case.d_v
    dtype = getattr(torch, case.dtype)
    tensors = [torch.randn(total, heads, d, generator=generator, device="cuda").to(dtype).double() for d in widths]
    offsets = torch.tensor([0, *case.lengths]).cumsum(0).cuda()
    options = {**case.mask, "max_seq_len": max(case.lengths), "attn_alpha": case.d_qk**-0.5, "scaling_seq_len": 64}
    if case.num_targets is not None:
        options["num_targets"] = torch.tensor(case.num_targets, dtype=torch.int32).cuda()
        if case.visible:
            host = torch.Generator().manual_seed(seed)
            pairs = zip(case.lengths, case.num_targets, strict=True)
            rows = [torch.randint(0, n - c + 1, (c,), generator=host) for n, c in pairs]
            rows = rows if case.visible == "random" else [row.sort().values for row in rows]
            options["target_visible"] = torch.cat(rows).to(torch.int32).cuda()
    bias = None
    if case.bias:
        tables = (torch.randn(n, generator=generator, device="cuda", dtype=torch.float64) for n in (500, 129))
        times = torch.randint(0, 7_200_000, (total,), generator=generator, device="cuda").cumsum(0)
        bias = RelativeBias(*tables, times)
    return Batch(*tensors, offsets, options, bias)


def run(batch: Batch, dtype: torch.dtype, backend: Backend) -> list[Tensor]:
    """Output and all gradients, in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in (batch.q, batch.k, batch.v)]
    bias = batch.bias
    if bias is not None:
        wide = torch.promote_types(dtype, torch.float32)
        tables = [x.to(wide).requires_grad_() for x in (bias.position_table, bias.time_table)]
        bias = RelativeBias(*tables, bias.event_time_T, bias.query_time_T)
        leaves += tables
    out = semi_local_attention(*leaves[:3], batch.offsets, bias=bias, backend=backend, **batch.options)
    grads = torch.autograd.grad(out, leaves, batch.grad.to(dtype))
    return [x.detach().double() for x in (out, *grads)]


def parity_cases() -> list[Case]:
    """Lengths that break tiles, every kind of mask, every width and type, and real sizes."""
    semi, prefixed = {"window": 100, "full_rows": 50}, {"window": 100, "full_rows": 50, "prefix": 3}
    cases = [
        Case((1,)),
        Case((63, 0, 130)),
        Case((257, 64), (0, 64), {"window": 40, "full_rows": 30}, heads=2),
        Case((1000, 77, 512), None, SEMI_LOCAL, heads=2),
        Case((1000, 77, 512), (100, 7, 0), semi, heads=2),
        Case((1000, 77, 512), (100, 7, 0), prefixed, "random", heads=2),
        Case((3000, 200), (300, 0), {"window": 0, "full_rows": 70, "prefix": 70}, "random", heads=2),
        Case((2500, 300), (500, 3), heads=2),
        Case((1030,) * 3, heads=2),
        Case((200,) * 20, (50,) * 20, {"window": 64, "prefix": 2}, "sorted", heads=2),
        Case((3584 + 512, 4096), (512, 512), SEMI_LOCAL, heads=2),
        Case((16384 + 512,), (512,), SEMI_LOCAL, heads=1),
        Case((9000,), None, heads=1),
    ]
    some = [((700, 77), (70, 7), prefixed, "random"), ((1100, 63), None, {}, "")]
    widths = [(64, 64), (32, 32), (16, 16), (256, 256), (50, 25), (25, 50), (64, 128), (128, 64)]
    for d_qk, d_v in widths:
        cases += [Case(*x, heads=2, d_qk=d_qk, d_v=d_v) for x in some]
    for dtype in ("float16", "float32"):
        cases += [Case(*x, heads=2, d_qk=d, d_v=d, dtype=dtype) for x in some for d in (128, 50)]
    cases += [Case(*x, heads=2, d_qk=64, d_v=64, bias=True) for x in some]
    cases += [Case((2500, 300), (500, 3), semi, heads=2, d_qk=50, d_v=50, bias=True)]
    return cases


def check_parity(case: Case) -> str | None:
    """What is wrong with the Triton backend on a case: errors beyond twice those of dense PyTorch in the same type,
    or two runs that differ. Outputs start as NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN; the kernels do not depend on it
    batch, dtype = make_batch(case), getattr(torch, case.dtype)
    truth = run(batch, torch.float64, "torch" if max(case.lengths) > 8192 else "reference")
    plain = run(batch, dtype, "reference")
    fast, again = run(batch, dtype, "triton"), run(batch, dtype, "triton")
    worst = [[(x - t).abs().max().item() for x, t in zip(xs, truth, strict=True)] for xs in (fast, plain)]
    floor = [1e-6 * t.abs().mean().item() for t in truth]
    ratios = [f / (p + z) if p + z else f for f, p, z in zip(*worst, floor, strict=True)]
    if not all(r <= 2 for r in ratios):  # NaN is not
        return f"{case}: error over PyTorch's {[round(r, 2) for r in ratios]}"
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return f"{case}: two runs differ"
    return None


def check_cached(dtype: torch.dtype = torch.bfloat16) -> str | None:
    for causal in (False, True):
        for seen in (False, True):
            if causal and seen:
                continue
            args, visible = cached_inputs((3000, 0, 500), (200, 3, 70), dtype, with_visible=seen)
            options = {"visible": visible, "causal": causal, "attn_alpha": 0.1, "scaling_seq_len": 64}
            wide = [x.double() if x.is_floating_point() else x for x in args]
            truth = cached_attention(*wide, backend="reference", **options)
            plain = cached_attention(*args, backend="reference", **options).double()
            fast = cached_attention(*args, backend="triton", **options).double()
            ratio = ((fast - truth).abs().max() / (plain - truth).abs().max()).item()
            if not ratio <= 2:
                return f"cached attention, causal {causal}, visible {seen}: error over PyTorch's {ratio:.2f}"
    return None


def cached_inputs(cached: tuple[int, ...], rows: tuple[int, ...], dtype, heads=4, width=128, with_visible=False):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(count, heads, width, generator=generator, device="cuda").to(dtype)

    row_offsets, cache_offsets = (torch.tensor([0, *n]).cumsum(0).cuda() for n in (rows, cached))
    c, t = sum(rows), sum(cached)
    visible = torch.cat([torch.randint(0, n + 1, (m,)) for n, m in zip(cached, rows, strict=True)]).int().cuda()
    args = draw(c), draw(c), draw(c), row_offsets, draw(t), draw(t), cache_offsets
    return args, visible if with_visible else None


# Times ---------------------------------------------------------------------------------------------------------------


class Timer:
    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call, repeats: int = REPEATS, flushes: int = 4) -> float:
        """Milliseconds. Each flush is some 0.1 ms; together they must take longer than the host needs for the call."""
        for _ in range(3):
            call()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in events:
            for _ in range(flushes):
                self.flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sorted(begin.elapsed_time(end) for begin, end in events)[repeats // 2]


def kept_pairs(case: Case) -> int:
    """Kept (row, key) pairs of a head."""
    pairs = 0
    window = case.mask.get("window")
    for length, targets in zip(case.lengths, case.num_targets or [0] * len(case.lengths), strict=True):
        u = length - targets
        full = u if window is None else min(u, case.mask.get("full_rows", 0))
        band = u - full
        seen = band * (band + 1) // 2 if window is None or band <= window else None
        if seen is None:
            seen = (window + 1) * (window + 2) // 2 + (band - window - 1) * (window + 1)
        of_targets = targets * u // 2 if case.visible else targets * u  # random lengths see half on average
        pairs += seen + full * (full + 1) // 2 + full * band + of_targets + targets
    return pairs


def time_ours(timer: Timer, case: Case) -> dict[str, float]:
    batch = make_batch(case)
    dtype = getattr(torch, case.dtype)
    leaves = [x.to(dtype).requires_grad_() for x in (batch.q, batch.k, batch.v)]
    grad, bias = batch.grad.to(dtype), batch.bias
    if bias is not None:
        tables = [x.float().requires_grad_() for x in (bias.position_table, bias.time_table)]
        bias = RelativeBias(*tables, bias.event_time_T)
        leaves += tables
    inputs, offsets, options = leaves[:3], batch.offsets, batch.options
    batch.q = batch.k = batch.v = batch.grad = grad[:0]  # free the float64 originals

    def forward() -> Tensor:
        return semi_local_attention(*inputs, offsets, bias=bias, backend="triton", **options)

    with torch.no_grad():
        forward_ms = timer(forward)
    out = forward()
    backward_ms = timer(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    flop = 2 * case.heads * (case.d_qk + case.d_v) * kept_pairs(case)
    rates = flop / forward_ms / 1e9, 2.5 * flop / backward_ms / 1e9
    return {
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward_tflops": rates[0],
        "backward_tflops": rates[1],
    }


def time_softmax(timer: Timer, length: int, attend) -> dict[str, float]:
    """Softmax attention of PyTorch on [B, H, L, D]."""
    shape = TOKENS // length, 4, length, 128
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        forward_ms = timer(lambda: attend(*leaves))
    out = attend(*leaves)
    return {
        "forward_ms": forward_ms,
        "backward_ms": timer(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)),
    }


def sdpa(backend: str):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def flex(length: int):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, full_rows = SEMI_LOCAL["window"], SEMI_LOCAL["full_rows"]

    def mask(b, h, q, k):
        return (q >= k) & ((q - k <= window) | (q >= length - full_rows))

    block_mask = create_block_mask(mask, None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def zipf_lengths() -> tuple[int, ...]:
    """16,384 / rank, shuffled, 65,536 tokens in all."""
    lengths, total, rank = [], 0, 1
    while total < TOKENS:
        lengths.append(min(max(1, 16_384 // rank), TOKENS - total))
        total += lengths[-1]
        rank += 1
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    return tuple(lengths[i] for i in order)


def even(length: int, mask: dict, **options) -> Case:
    return Case((length,) * (TOKENS // length), mask=mask, **options)


def timed_cases() -> dict[str, Case]:
    lengths = (1024, 4096, 8192, 16384)
    cases = {f"semi-local {n}": even(n, SEMI_LOCAL) for n in lengths}
    cases |= {f"causal {n}": even(n, CAUSAL) for n in lengths}
    cases |= {f"semi-local {n}": even(n, SEMI_LOCAL) for n in (2048, 32768)}
    cases |= {f"window only {n}": even(n, {"window": 256}) for n in (1024, 16384)}
    cases |= {f"prefix of 8, {n}": even(n, {**SEMI_LOCAL, "prefix": 8}) for n in (1024, 16384)}
    for n in (4096, 16384):
        cases[f"512 candidates {n}"] = even(n, SEMI_LOCAL, num_targets=(512,) * (TOKENS // n))
        half = (n // 2,) * (TOKENS // n)
        cases[f"half candidates, each its own visible length, {n}"] = even(
            n, SEMI_LOCAL, num_targets=half, visible="sorted"
        )
    cases["Zipf semi-local"] = Case(zipf_lengths(), mask=SEMI_LOCAL)
    cases["Zipf causal"] = Case(zipf_lengths())
    targets = tuple(min(256, n // 2) for n in zipf_lengths())
    cases["Zipf semi-local, min(256, half) candidates"] = Case(zipf_lengths(), targets, SEMI_LOCAL)
    for d in (64, 32, 256):
        cases[f"d={d} semi-local 16384"] = even(16384, SEMI_LOCAL, d_qk=d, d_v=d)
        cases[f"d={d} causal 4096"] = even(4096, CAUSAL, d_qk=d, d_v=d)
    cases["d=50 causal 4096"] = even(4096, CAUSAL, d_qk=50, d_v=50)
    cases["float16 semi-local 16384"] = even(16384, SEMI_LOCAL, dtype="float16")
    cases["bias causal 1024"] = even(1024, CAUSAL, bias=True)
    cases["bias causal 4096"] = even(4096, CAUSAL, bias=True)
    cases["bias semi-local 16384"] = even(16384, SEMI_LOCAL, bias=True)
    return cases


def time_cached(timer: Timer) -> dict[str, float]:
    users, keys, rows, heads, width = 32, 16_384, 1_024, 4, 128
    args, _ = cached_inputs((keys,) * users, (rows,) * users, torch.bfloat16)
    ms = timer(lambda: cached_attention(*args, attn_alpha=0.1, scaling_seq_len=64, backend="triton"))
    tflops = 4 * heads * width * users * rows * (keys + 1) / ms / 1e9
    few, _ = cached_inputs((keys,), (100,), torch.bfloat16)
    one = timer(lambda: cached_attention(*few, attn_alpha=0.1, scaling_seq_len=64, backend="triton"))
    return {"ms": ms, "tflops": tflops, "one user, 100 candidates, ms": one}


def time_lists(timer: Timer) -> dict[str, float]:
    """Building the tile lists of 4,096 sequences, for rows and for keys."""
    from kernels.semi_local_attention.triton_launch import Tile, TritonPlan

    offsets = torch.arange(0, 4096 * 16 + 1, 16, device="cuda")
    targets = torch.full((4096,), 4, dtype=torch.int32, device="cuda")

    def build(keys: bool, lengths: Tensor = offsets, targets: Tensor | None = targets) -> None:
        plan = TritonPlan(lengths, targets, None, TOKENS, 16_384, 256, 256, 0)
        plan.tile_list(keys, Tile(64, 64, 4, 3), 4)

    long = torch.arange(0, TOKENS + 1, 16_384, device="cuda")
    return {
        "rows, 4,096 sequences": timer(lambda: build(False)),
        "keys, 4,096 sequences": timer(lambda: build(True)),
        "rows, 4 sequences of 16,384": timer(lambda: build(False, long, None)),
        "keys, 4 sequences of 16,384": timer(lambda: build(True, long, None)),
    }


def host_times() -> dict[str, float]:
    """Microseconds of host work a call, on a batch so small that the device is never behind; a backward has two
    launches."""
    batch = make_batch(Case((300, 200), mask=SEMI_LOCAL))
    leaves = [x.bfloat16().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    grad = batch.grad.bfloat16()

    def forward() -> Tensor:
        return semi_local_attention(*leaves, batch.offsets, backend="triton", **batch.options)

    out = forward()

    def measure(call, count: int = 300) -> float:
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        spent = time.perf_counter() - begin
        torch.cuda.synchronize()
        return spent / count * 1e6

    with torch.no_grad():
        found = {"forward, no grad": measure(forward)}
    found["forward"] = measure(forward)
    found["backward (two launches)"] = measure(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    x = torch.zeros(8, device="cuda")
    found["an empty torch op, for scale"] = measure(lambda: x.add_(1))
    return found


def compile_case(case: Case) -> None:
    """Runs a case once, which leaves its kernels in Triton's cache."""
    time_ours(lambda call, repeats=1: (call(), 1.0)[1], case)  # type: ignore[arg-type]


def _check(case: Case) -> str | None:
    try:
        return check_parity(case)
    except Exception as error:  # the report must name the case, whatever went wrong in its process
        return f"{case}: {type(error).__name__}: {str(error)[:300]}"


def measure_cpu() -> dict[str, dict[str, float]]:
    """Forward and backward on one thread, 2 heads of 32, float32: events per second of processor time."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    found = {}
    even_lengths = {f"L={n:,}": (n,) * (4096 // n) for n in (256, 1024, 4096)}
    uneven = tuple(torch.randint(40, 200, (32,), generator=generator).tolist())
    for name, lengths in {**even_lengths, "32 users of 40 to 200, half candidates": uneven}.items():
        total = sum(lengths)
        leaves = [torch.randn(total, 2, 32, generator=generator).requires_grad_() for _ in range(3)]
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        options: dict = {**SEMI_LOCAL, "max_seq_len": max(lengths), "attn_alpha": 1 / 32, "scaling_seq_len": 256}
        if "candidates" in name:
            options["num_targets"] = torch.tensor([n // 2 for n in lengths])
            rows = [torch.randint(0, n - n // 2 + 1, (n // 2,), generator=generator).sort().values for n in lengths]
            options["target_visible"] = torch.cat(rows).to(torch.int32)
        found[name] = {}
        for backend in ("torch", "reference"):
            spent = []
            for _ in range(7):
                begin = time.process_time()
                semi_local_attention(*leaves, offsets, backend=backend, **options).sum().backward()
                spent.append(time.process_time() - begin)
            found[name][backend] = total / sorted(spent)[len(spent) // 2]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "attention.json")
    parser.add_argument("--parity-only", action="store_true")
    parser.add_argument("--no-softmax", action="store_true", help="leave PyTorch's attention out")
    parser.add_argument("--cpu", action="store_true", help="time the CPU's blocked form, and do nothing else")
    parser.add_argument("--report", type=Path, nargs="+", help="write RESULTS.md from these runs, and do nothing else")
    arguments = parser.parse_args()
    if arguments.report:
        from benchmarks.attention_report import write_report

        write_report([json.loads(path.read_text()) for path in arguments.report])
        return
    if arguments.cpu:
        found = {"cpu": measure_cpu()}
        (ROOT / "runs" / "attention_cpu.json").write_text(json.dumps(found, indent=1))
        print(json.dumps(found, indent=1))
        return
    begin = time.perf_counter()
    workers = min(14, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # compiling takes most of the time
        compiled = [] if arguments.parity_only else [pool.submit(compile_case, c) for c in timed_cases().values()]
        problems = [p for p in pool.map(_check, parity_cases()) if p]
        for done in compiled:
            done.result()
    problems += [p for p in [check_cached()] if p]
    print(
        f"parity: {len(parity_cases())} cases, {len(problems)} wrong, {time.perf_counter() - begin:.0f} s", flush=True
    )
    print(*problems, sep="\n")
    if arguments.parity_only:
        raise SystemExit(bool(problems))
    versions = {"torch": torch.__version__, "triton": triton.__version__, "device": torch.cuda.get_device_name()}
    found: dict = {"machine": versions, "parity": {"cases": len(parity_cases()), "wrong": problems}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for section, numbers in measure(arguments.no_softmax):
        found[section] = numbers
        arguments.out.write_text(json.dumps(found, indent=1))  # what is measured stays, whatever comes after
        print(section, json.dumps(numbers), flush=True)
    raise SystemExit(bool(problems))


def measure(no_softmax: bool) -> Iterator[tuple[str, dict]]:
    """Section by section, name and numbers."""
    timer = Timer()
    ours = {name: time_ours(timer, case) for name, case in timed_cases().items()}
    yield "ours", ours
    yield "cached", time_cached(timer)
    yield "lists", time_lists(timer)
    yield "host_us", host_times()
    ways = "forward_ms", "backward_ms"
    longest, shortest = ours["semi-local 16384"], ours["semi-local 1024"]
    yield "per_user_slope", {way: math.log(16 * longest[way] / shortest[way]) / math.log(16) for way in ways}
    copied = torch.empty(2**30, dtype=torch.int8, device="cuda")
    a, b = (torch.randn(n, 512, device="cuda", dtype=torch.bfloat16) for n in (TOKENS, 2048))
    copy_ms, gemm_ms = timer(lambda: copied[: 2**29].copy_(copied[2**29 :])), timer(lambda: a @ b.T)
    yield "ceilings", {"copy_tb_s": 2**30 / copy_ms / 1e9, "gemm_tflops": 2 * TOKENS * 512 * 2048 / gemm_ms / 1e9}
    if no_softmax:
        return
    softmax = {}
    for n in (16384, 8192, 4096, 1024):
        softmax[f"cuDNN causal {n}"] = time_softmax(timer, n, sdpa("CUDNN_ATTENTION"))
        softmax[f"flash causal {n}"] = time_softmax(timer, n, sdpa("FLASH_ATTENTION"))
    yield "softmax", softmax
    cudnn = softmax["cuDNN causal 16384"]
    cases = [(kind, way) for kind in ("semi-local", "causal") for way in ways]
    yield "over_cudnn", {f"{kind} {way}": ours[f"{kind} 16384"][way] / cudnn[way] for kind, way in cases}
    yield "flex", {f"flex semi-local {n}": time_softmax(timer, n, flex(n)) for n in (16384, 4096)}


if __name__ == "__main__":
    main()
