"""Semi-local attention on one GPU: parity first, then times, beside PyTorch's own attention in the
same run.

    python -m benchmarks.kernels.attention                       # parity and times, writes
    benchmarks/runs/attention.json python -m benchmarks.kernels.attention --parity-only
    python -m benchmarks.kernels.attention --checked FILE        # parity as `benchmarks.gpu_check
    --out FILE` has just found it TRITON_INTERPRET=1 python -m benchmarks.kernels.attention --smoke
    # without a GPU: tiny calls, no times
    python -m benchmarks.kernels.attention --cpu                 # the blocked form against the
    dense one, attention_cpu.json python -m benchmarks.kernels.attention --report FILE ...     #
    tables and plots into benchmarks/RESULTS.md

Inputs are normal with unit scale. A time is the median of runs by device events
(`benchmarks.gpu.Timer`).
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import DEVICE, TOKENS, Timer, found_in, host_us, parity, time_ceilings, versions
from benchmarks.kernels.attention_parity import (
    SEMI_LOCAL,
    Case,
    cached_inputs,
    make_batch,
    parity_checks,
)
from benchmarks.report import write_run
from kernels.semi_local_attention.op import cached_attention, semi_local_attention
from kernels.semi_local_attention.types import RelativeBias

ROOT = Path(__file__).parents[1]
CAUSAL: dict[str, int] = {}


def kept_pairs(case: Case) -> int:
    """Kept (row, key) pairs of a head."""
    pairs = 0
    window = case.mask.get("window")
    for length, targets in zip(
        case.lengths, case.num_targets or [0] * len(case.lengths), strict=True
    ):
        u = length - targets
        full = u if window is None else min(u, case.mask.get("full_rows", 0))
        band = u - full
        seen = band * (band + 1) // 2 if window is None or band <= window else None
        if seen is None:
            seen = (window + 1) * (window + 2) // 2 + (band - window - 1) * (window + 1)
        # random lengths see half on average
        of_targets = targets * u // 2 if case.visible else targets * u
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
    q, k, v, grad = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
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

    block_mask = create_block_mask(mask, None, None, length, length, device=DEVICE)
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


def time_cached(
    timer: Timer, users: int = 32, keys: int = 16_384, rows: int = 1_024
) -> dict[str, float]:
    heads, width = 4, 128
    args, _ = cached_inputs((keys,) * users, (rows,) * users, torch.bfloat16)
    ms = timer(
        lambda: cached_attention(*args, attn_alpha=0.1, scaling_seq_len=64, backend="triton")
    )
    tflops = 4 * heads * width * users * rows * (keys + 1) / ms / 1e9
    few, _ = cached_inputs((keys,), (min(rows, 100),), torch.bfloat16)
    one = timer(
        lambda: cached_attention(*few, attn_alpha=0.1, scaling_seq_len=64, backend="triton")
    )
    return {"ms": ms, "tflops": tflops, "one user, 100 candidates, ms": one}


def time_lists(timer: Timer, tokens: int = TOKENS) -> dict[str, float]:
    """Building the tile lists of 4,096 sequences (of 16 tokens), for rows and for keys."""
    from kernels.semi_local_attention.plan import TritonPlan
    from kernels.semi_local_attention.tile_table import AttentionTile

    offsets = torch.arange(0, tokens + 1, 16, device=DEVICE)
    targets = torch.full((tokens // 16,), 4, dtype=torch.int32, device=DEVICE)

    def build(keys: bool, lengths: Tensor = offsets, targets: Tensor | None = targets) -> None:
        plan = TritonPlan(lengths, targets, None, tokens, tokens // 4, 256, 256, 0)
        plan.tile_list(keys, AttentionTile(64, 64, 4, 3), 4)

    long = torch.arange(0, tokens + 1, tokens // 4, device=DEVICE)
    return {
        "rows, 4,096 sequences": timer(lambda: build(False)),
        "keys, 4,096 sequences": timer(lambda: build(True)),
        "rows, 4 sequences of 16,384": timer(lambda: build(False, long, None)),
        "keys, 4 sequences of 16,384": timer(lambda: build(True, long, None)),
    }


def host_times() -> dict[str, float]:
    """Microseconds of host work a call; a backward has two launches."""
    batch = make_batch(Case((300, 200), mask=SEMI_LOCAL))
    leaves = [x.bfloat16().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    grad = batch.grad.bfloat16()

    def forward() -> Tensor:
        return semi_local_attention(*leaves, batch.offsets, backend="triton", **batch.options)

    out = forward()
    with torch.no_grad():
        found = {"forward, no grad": host_us(forward)}
    found["forward"] = host_us(forward)
    found["backward (two launches)"] = host_us(
        lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
    )
    x = torch.zeros(8, device=DEVICE)
    found["an empty torch op, for scale"] = host_us(lambda: x.add_(1))
    return found


def compile_case(case: Case) -> None:
    """Runs a case once, which leaves its kernels in Triton's cache."""
    time_ours(lambda call, repeats=1: (call(), 1.0)[1], case)  # type: ignore[arg-type]


def measure_cpu() -> dict[str, dict[str, float]]:
    """Forward and backward on one thread, 2 heads of 32, float32: events per second of processor
    time.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    found = {}
    even_lengths = {f"L={n:,}": (n,) * (4096 // n) for n in (256, 1024, 4096)}
    uneven = tuple(torch.randint(40, 200, (32,), generator=generator).tolist())
    for name, lengths in {**even_lengths, "32 users of 40 to 200, half candidates": uneven}.items():
        total = sum(lengths)
        leaves = [torch.randn(total, 2, 32, generator=generator).requires_grad_() for _ in range(3)]
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        options: dict = {
            **SEMI_LOCAL,
            "max_seq_len": max(lengths),
            "attn_alpha": 1 / 32,
            "scaling_seq_len": 256,
        }
        if "candidates" in name:
            options["num_targets"] = torch.tensor([n // 2 for n in lengths])
            rows = [
                torch.randint(0, n - n // 2 + 1, (n // 2,), generator=generator).sort().values
                for n in lengths
            ]
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


def smoke() -> None:
    """Calls at tiny sizes, for a machine without a GPU."""
    tiny = Case(
        (20, 9), (4, 0), {"window": 4, "full_rows": 3}, heads=1, d_qk=16, d_v=16, dtype="float32"
    )
    time_ours(Timer(), tiny)
    time_lists(Timer(), 64)
    time_cached(Timer(), users=1, keys=40, rows=3)
    timed_cases()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "attention.json")
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
    parser.add_argument("--no-softmax", action="store_true", help="leave PyTorch's attention out")
    parser.add_argument(
        "--cpu", action="store_true", help="time the CPU's blocked form, and do nothing else"
    )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        help="write RESULTS.md from these runs, and do nothing else",
    )
    arguments = parser.parse_args()
    if arguments.report:
        from benchmarks.kernels.attention_report import write_report

        write_report([json.loads(path.read_text()) for path in arguments.report])
        return
    if arguments.cpu:
        found = {"cpu": measure_cpu()}
        write_run((ROOT / "runs" / "attention_cpu.json"), found)
        print(json.dumps(found, indent=1))
        return
    if arguments.smoke:
        smoke()
        return
    compiled = (
        [] if arguments.parity_only else [(compile_case, case) for case in timed_cases().values()]
    )
    checks = [] if arguments.checked else parity_checks()
    checked = (
        found_in(arguments.checked, "attention")
        if arguments.checked
        else {"cases": len(checks), "wrong": []}
    )
    problems = parity([*checks, *compiled])
    if arguments.parity_only:
        raise SystemExit(bool(problems))
    found: dict = {
        "machine": versions(),
        "parity": checked | {"wrong": checked["wrong"] + problems},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for section, numbers in measure(arguments.no_softmax):
        found.setdefault(section, {}).update(numbers)
        # what is measured stays, whatever comes after
        write_run(arguments.out, found)
        print(section, json.dumps(numbers), flush=True)
    raise SystemExit(bool(problems))


def measure(no_softmax: bool) -> Iterator[tuple[str, dict]]:
    """Names of sections, and numbers of theirs, as they come."""
    timer, ours = Timer(), {}
    for name, case in timed_cases().items():
        ours[name] = time_ours(timer, case)
        yield "ours", {name: ours[name]}
    yield "cached", time_cached(timer)
    yield "lists", time_lists(timer)
    yield "host_us", host_times()
    ways = "forward_ms", "backward_ms"
    longest, shortest = ours["semi-local 16384"], ours["semi-local 1024"]
    yield (
        "per_user_slope",
        {way: math.log(16 * longest[way] / shortest[way]) / math.log(16) for way in ways},
    )
    yield "ceilings", time_ceilings(timer)
    if no_softmax:
        return
    softmax = {}
    for n in (16384, 8192, 4096, 1024):
        softmax[f"cuDNN causal {n}"] = time_softmax(timer, n, sdpa("CUDNN_ATTENTION"))
        softmax[f"flash causal {n}"] = time_softmax(timer, n, sdpa("FLASH_ATTENTION"))
        yield "softmax", softmax
    cudnn = softmax["cuDNN causal 16384"]
    cases = [(kind, way) for kind in ("semi-local", "causal") for way in ways]
    yield (
        "over_cudnn",
        {f"{kind} {way}": ours[f"{kind} 16384"][way] / cudnn[way] for kind, way in cases},
    )
    yield "flex", {f"flex semi-local {n}": time_softmax(timer, n, flex(n)) for n in (16384, 4096)}


if __name__ == "__main__":
    main()
