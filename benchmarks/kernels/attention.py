"""Semi-local attention on one GPU: parity first, then times, beside PyTorch's own attention in the
same run.

    # parity and times, into benchmarks/runs/attention.json
    python -m benchmarks.kernels.attention
    python -m benchmarks.kernels.attention --parity-only
    # parity as `benchmarks.gpu_check --out FILE` has just found it
    python -m benchmarks.kernels.attention --checked FILE
    # without a GPU: tiny calls and no times; the blocked form against the dense one
    TRITON_INTERPRET=1 python -m benchmarks.kernels.attention --smoke
    python -m benchmarks.kernels.attention --cpu
    # tables and plots in benchmarks/RESULTS.md
    python -m benchmarks.kernels.attention --report FILE ...

Inputs are normal with unit scale. A time is the median of 30 runs by device events
(`benchmarks.gpu.Timer`), with what 10 and 90 % of them do not pass. At lengths where PyTorch's
attention is timed too, all take turns.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import (
    DEVICE,
    TOKENS,
    Check,
    Timer,
    found_in,
    host_us,
    parity,
    time_ceilings,
    versions,
)
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
LENGTHS = (16384, 8192, 4096, 2048, 1024)
FLEX_LENGTHS = (16384, 4096)  # compiling takes most of its time

Calls = dict[str, Callable[[], object]]  # forward and backward


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


def our_calls(case: Case) -> Calls:
    """Forward, and backward of one forward, of a case."""
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

    def attend() -> Tensor:
        return semi_local_attention(*inputs, offsets, bias=bias, backend="triton", **options)

    return calls_of(attend, leaves, grad)


def softmax_calls(length: int, attend: Callable[..., Tensor]) -> Calls:
    """The same of PyTorch's softmax attention on [B, H, L, D]."""
    shape = TOKENS // length, 4, length, 128
    q, k, v, grad = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return calls_of(lambda: attend(*leaves), leaves, grad)


def calls_of(attend: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Calls:
    def forward() -> Tensor:
        with torch.no_grad():
            return attend()

    out = attend()
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
    }


def time_in_turns(timer: Timer, contestants: dict[str, Calls]) -> dict[str, dict[str, Any]]:
    """For each contestant forward_ms, backward_ms, and in `forward_range_ms`, `backward_range_ms`
    what 10 and 90 % of the runs do not pass. All of their calls take turns.
    """
    calls = {}
    for name, ways in contestants.items():
        for way, call in ways.items():
            calls[f"{name}: {way}"] = call
    timings = timer.in_turns(calls)

    found: dict[str, dict[str, Any]] = {}
    for name, ways in contestants.items():
        found[name] = {}
        for way in ways:
            timing = timings[f"{name}: {way}"]
            found[name][f"{way}_ms"] = timing.median
            found[name][f"{way}_range_ms"] = [timing.low, timing.high]
    return found


def with_rates(case: Case, times: dict[str, Any]) -> dict[str, Any]:
    """Times of a case, and what they are in TFLOP/s over kept pairs."""
    flop = 2 * case.heads * (case.d_qk + case.d_v) * kept_pairs(case)
    rates = {
        "forward_tflops": flop / times["forward_ms"] / 1e9,
        "backward_tflops": 2.5 * flop / times["backward_ms"] / 1e9,
    }
    return times | rates


def sdpa(backend: str):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def flex(length: int):
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # for one kernel each way
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


def compared_cases(length: int) -> dict[str, Case]:
    """What is timed beside PyTorch's attention, in turns with it."""
    return {
        f"semi-local {length}": even(length, SEMI_LOCAL),
        f"semi-local, prefix of 4 {length}": even(length, {**SEMI_LOCAL, "prefix": 4}),
        f"causal {length}": even(length, CAUSAL),
    }


def other_cases() -> dict[str, Case]:
    cases = {"semi-local 32768": even(32768, SEMI_LOCAL)}
    cases |= {f"window only {n}": even(n, {"window": 256}) for n in (1024, 16384)}
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
    for call in our_calls(case).values():
        call()


def compile_flex(length: int) -> None:
    """Leaves the code of flex_attention in PyTorch's cache."""
    torch.use_deterministic_algorithms(False)
    for call in softmax_calls(length, flex(length)).values():
        call()


def compile_checks(names: Iterable[str] | None = None, with_flex: bool = True) -> list[Check]:
    """What leaves this benchmark's kernels in the caches, the slowest first; of the other cases
    those of these names, or all.
    """
    others = other_cases()
    cases = {name: others[name] for name in (others if names is None else names)}
    for length in LENGTHS:
        cases |= compared_cases(length)
    flexible: list[Check] = [(compile_flex, length) for length in FLEX_LENGTHS]
    compiled: list[Check] = [(compile_case, case) for case in cases.values()]
    return flexible + compiled if with_flex else compiled


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
    with_rates(tiny, time_in_turns(Timer(), {"tiny": our_calls(tiny)})["tiny"])
    time_lists(Timer(), 64)
    time_cached(Timer(), users=1, keys=40, rows=3)
    other_cases()


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
    parser.add_argument("--no-flex", action="store_true", help="leave flex_attention out")
    parser.add_argument(
        "--cases",
        nargs="*",
        metavar="CASE",
        choices=list(other_cases()),
        help="beside the lengths these cases alone; the file keeps what it has of the others",
    )
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
    if arguments.checked:
        checked = found_in(arguments.checked, "attention")
        checks = []
    else:
        checks = parity_checks()
        checked = {"cases": len(checks), "wrong": [], "compiled": False}
    if not (arguments.parity_only or checked["compiled"]):
        checks += compile_checks(arguments.cases, not arguments.no_flex)
    problems = parity(checks) if checks else []
    if arguments.parity_only:
        raise SystemExit(bool(problems))
    partial = arguments.cases is not None and arguments.out.exists()
    found: dict = json.loads(arguments.out.read_text()) if partial else {}
    found["machine"] = versions()
    found["parity"] = checked | {"wrong": checked["wrong"] + problems}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    names = list(other_cases()) if arguments.cases is None else arguments.cases
    for section, numbers in measure(names, arguments.no_softmax, arguments.no_flex):
        found.setdefault(section, {}).update(numbers)
        # what is measured stays, whatever comes after
        write_run(arguments.out, found)
        print(section, json.dumps(numbers), flush=True)
    raise SystemExit(bool(problems))


def measure(names: Iterable[str], no_softmax: bool, no_flex: bool) -> Iterator[tuple[str, dict]]:
    """Names of sections, and numbers of theirs, as they come; `names` are of `other_cases`."""
    timer = Timer()
    everything: dict[str, dict[str, Any]] = {}
    for length in LENGTHS:
        for section, numbers in compare(timer, length, no_softmax, no_flex):
            everything |= numbers
            yield section, numbers
    others = other_cases()
    for name in names:
        case = others[name]
        times = time_in_turns(timer, {name: our_calls(case)})
        yield "ours", {name: with_rates(case, times[name])}

    ways = "forward_ms", "backward_ms"
    longest, shortest = everything["semi-local 16384"], everything["semi-local 1024"]
    yield (
        "per_user_slope",
        {way: math.log(16 * longest[way] / shortest[way]) / math.log(16) for way in ways},
    )
    cudnn = everything.get("cuDNN causal 16384")
    if cudnn is not None:
        kinds = "semi-local", "semi-local, prefix of 4", "causal"
        cases = [(kind, way) for kind in kinds for way in ways]
        yield (
            "over_cudnn",
            {f"{kind} {way}": everything[f"{kind} 16384"][way] / cudnn[way] for kind, way in cases},
        )
    yield "cached", time_cached(timer)
    yield "lists", time_lists(timer)
    yield "host_us", host_times()
    yield "ceilings", time_ceilings(timer)


def compare(
    timer: Timer, length: int, no_softmax: bool, no_flex: bool
) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Sections of one length: ours, and PyTorch's softmax attention, in turns."""
    cases = compared_cases(length)
    contestants = {name: our_calls(case) for name, case in cases.items()}
    softmax, flexible = [], []
    if not no_softmax:
        for name, backend in (("cuDNN", "CUDNN_ATTENTION"), ("flash", "FLASH_ATTENTION")):
            softmax.append(f"{name} causal {length}")
            contestants[softmax[-1]] = softmax_calls(length, sdpa(backend))
        if length in FLEX_LENGTHS and not no_flex:
            flexible.append(f"flex semi-local {length}")
            contestants[flexible[-1]] = softmax_calls(length, flex(length))

    times = time_in_turns(timer, contestants)
    yield "ours", {name: with_rates(case, times[name]) for name, case in cases.items()}
    yield "softmax", {name: times[name] for name in softmax}
    yield "flex", {name: times[name] for name in flexible}


if __name__ == "__main__":
    main()
