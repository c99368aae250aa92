"""The STU layer on one GPU: parity first, then times of the layer, its products and its row kernels.

    python -m benchmarks.layer                           # parity and times, writes benchmarks/runs/layer.json
    python -m benchmarks.layer --parity-only
    python -m benchmarks.layer --report FILE             # its section of benchmarks/RESULTS.md

d = 512, 4 heads of 128, 65,536 tokens in bfloat16 unless said; inputs are normal with unit scale. Times as in
`benchmarks.attention`: medians by device events, L2 flushed before each.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from benchmarks.attention import TOKENS, Timer
from kernels.backend import Backend
from kernels.layer_norm.reference import quantize_rows_reference
from kernels.layer_norm.triton_launch import launch_layer_norm, launch_layer_norm_backward, launch_quantize
from kernels.linear.reference import linear_reference
from kernels.linear.triton_launch import launch_linear
from kernels.norm_gate.triton_launch import launch_norm_gate, launch_norm_gate_backward
from kernels.stu.op import RECOMPUTABLE, Sequences, stu_layer
from kernels.stu.reference import STUShape, STUWeights

ROOT = Path(__file__).parent
LAYER = STUShape(
    num_heads=4,
    d_qk=128,
    d_v=128,
    norm_eps=1e-6,
    attn_alpha=128**-0.5,
    scaling_seq_len=64,
    window=256,
    full_rows=256,
    prefix=0,
)
CAUSAL = {"window": None, "full_rows": 0}


# Parity --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A layer and a batch."""

    shape: STUShape
    width: int = 512
    lengths: tuple[int, ...] = (700, 0, 333)
    num_targets: tuple[int, ...] = (30, 0, 333)
    p: float = 0.0
    dtype: torch.dtype = torch.bfloat16


def parity_cases() -> list[Case]:
    small = replace(LAYER, num_heads=2, d_qk=64, d_v=32, window=100, full_rows=50, prefix=2)
    odd = replace(small, d_qk=50, d_v=25)
    return [
        Case(LAYER, p=0.2),
        Case(replace(LAYER, recompute=RECOMPUTABLE), p=0.2),
        Case(replace(LAYER, silu_qkv=False, recompute=("uvqk",))),
        Case(replace(LAYER, concat_ua=True, recompute=("y", "normed_x")), p=0.1),
        Case(replace(small, silu_qkv=False, concat_ua=True), width=96, p=0.5),
        Case(replace(odd, recompute=RECOMPUTABLE), width=72),
        Case(replace(odd, concat_ua=True, **CAUSAL), width=50, p=0.1),
        Case(small, width=96, lengths=(1,), num_targets=(0,)),
        Case(replace(small, recompute=("uvqk",)), width=96, lengths=(65, 64), num_targets=(65, 64)),
        Case(replace(LAYER, recompute=RECOMPUTABLE), lengths=(4096, 1000), num_targets=(512, 1)),
        Case(replace(small, recompute=RECOMPUTABLE), width=96, dtype=torch.float16),
    ]


def make_layer(shape: STUShape, width: int, seed: int = 0) -> list[Tensor]:
    """Weights in float64, of values that bfloat16 holds."""
    generator = torch.Generator("cuda").manual_seed(seed)
    attended, projected = shape.split[0], sum(shape.split)
    gated = attended * (3 if shape.concat_ua else 1)
    sizes = [(width,), (width,), (projected, width), (projected,), (attended,), (attended,), (width, gated), (width,)]
    weights = [
        torch.randn(size, generator=generator, device="cuda") * (size[-1] ** -0.5 if len(size) > 1 else 0.3)
        for size in sizes
    ]
    weights[0], weights[4] = weights[0] + 1, weights[4] + 1
    return [w.bfloat16().double() for w in weights]


def make_sequences(lengths: tuple[int, ...], num_targets: tuple[int, ...] | None = None) -> Sequences:
    targets = None if num_targets is None else torch.tensor(num_targets, dtype=torch.int32).cuda()
    return Sequences(torch.tensor([0, *lengths]).cumsum(0).cuda(), max(lengths), targets)


def run(case: Case, dtype: torch.dtype, backend: Backend, recompute: tuple[str, ...] | None = None) -> list[Tensor]:
    """Output and all gradients."""
    shape = case.shape if recompute is None else replace(case.shape, recompute=recompute)
    rows = sum(case.lengths), case.width
    generator = torch.Generator("cuda").manual_seed(1)
    x, grad = (torch.randn(rows, generator=generator, device="cuda").bfloat16() for _ in range(2))
    leaves = [t.to(dtype).requires_grad_() for t in (x, *make_layer(shape, case.width))]
    sequences = make_sequences(case.lengths, case.num_targets)
    out = stu_layer(leaves[0], STUWeights(*leaves[1:]), shape, sequences, p=case.p, seed=77, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def check_layer(case: Case) -> str | None:
    """What is wrong with the fused layer on a case: errors beyond twice those of PyTorch in the same type, two runs
    that differ, or a result that depends on what was kept. Outputs start as NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN; the kernels do not depend on it
    truth, plain = run(case, torch.float64, "reference"), run(case, case.dtype, "reference")
    fast, again = run(case, case.dtype, "triton"), run(case, case.dtype, "triton")
    torch.use_deterministic_algorithms(False)
    ratios = []
    for f, p, t in zip(fast, plain, truth, strict=True):
        worst = [(x.double() - t).abs().max().item() for x in (f, p)]
        ratios.append(worst[0] / max(worst[1], 1e-6 * t.abs().max().item(), 1e-30))
    if not all(r <= 2 for r in ratios):  # NaN is not
        return f"{case}: error over PyTorch's {[round(r, 2) for r in ratios]}"
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return f"{case}: two runs differ"
    for recompute in ((), RECOMPUTABLE):
        other = run(case, case.dtype, "triton", recompute)
        if not all(torch.equal(a, b) for a, b in zip(fast, other, strict=True)):
            return f"{case}: recompute={recompute} changes the result"
    return None


def check_fp8(width: int, rows: int) -> str | None:
    """Codes and scales equal PyTorch's; the product over them strays no further than PyTorch's in bfloat16."""
    x, w, bias, residual = product_inputs(rows, width)
    for tensor in (x, w):
        codes, scale = launch_quantize(tensor)
        expected, expected_scale = quantize_rows_reference(tensor)
        if not torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)) or not torch.equal(
            scale, expected_scale
        ):
            return f"quantised rows differ from PyTorch's at [{len(tensor)}, {width}]"
    truth = linear_reference(x.double(), w.double(), bias.double(), residual=residual.double(), fp8=True)
    plain = linear_reference(x, w, bias, residual=residual, fp8=True).double()
    fast = fp8_product(x, w, bias, residual)().double()
    ratio = ((fast - truth).abs().max() / (plain - truth).abs().max()).item()
    return None if ratio <= 2 else f"FP8 product [{rows}, {width}]: error over PyTorch's {ratio:.2f}"


def check_fused_fp8() -> str | None:
    """The FP8 layer computes what its emulation in PyTorch does: as near as two orders of rounding can be."""
    case = Case(replace(LAYER, fp8=True, recompute=RECOMPUTABLE), p=0.2)
    exact, emulated = run(replace(case, shape=LAYER), torch.float64, "reference"), run(case, torch.float64, "reference")
    fast = run(case, torch.bfloat16, "triton")
    for i, (f, e, t) in enumerate(zip(fast, emulated, exact, strict=True)):
        to_emulated, of_fp8 = ((a.double() - b).norm() / t.norm() for a, b in ((f, e), (e, t)))
        if not to_emulated <= 0.5 * of_fp8 + 0.01:
            return f"FP8 layer, result {i}: {to_emulated:.4f} from its emulation, which is {of_fp8:.4f} from float64"
    kept = run(case, torch.bfloat16, "triton", ())
    return None if all(torch.equal(a, b) for a, b in zip(fast, kept, strict=True)) else "FP8: recompute changes bits"


def parity_checks() -> list[tuple]:
    """Functions and what they are called with."""
    checks = [(check_layer, case) for case in parity_cases()]
    return [*checks, *((check_fp8, d, n) for d in (512, 1024, 80) for n in (1, 1000)), (check_fused_fp8,)]


def _check(check: tuple) -> str | None:
    function, *arguments = check
    try:
        return function(*arguments)
    except Exception as error:  # the report must name the case, whatever went wrong in its process
        return f"{function.__name__} {arguments}: {type(error).__name__}: {str(error)[:300]}"


def parity() -> list[str]:
    """Each check in one of several processes: compiling takes most of the time."""
    begin = time.perf_counter()
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), get_context("spawn")) as pool:
        found = [p for p in pool.map(_check, parity_checks()) if p]
    spent = time.perf_counter() - begin
    print(f"parity: {len(parity_checks())} cases, {len(found)} wrong, {spent:.0f} s", *found, sep="\n", flush=True)
    return found


# Times ---------------------------------------------------------------------------------------------------------------


def time_layer(timer: Timer, shape: STUShape, length: int) -> dict[str, float]:
    """Inference, forward + backward, and what a layer keeps for backward beside its input and output, in MB."""
    sequences = make_sequences((length,) * (TOKENS // length))
    weights = [torch.nn.Parameter(w.bfloat16()) for w in make_layer(shape, 512)]
    x, grad = (torch.randn(TOKENS, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    leaves = [x.requires_grad_(), *weights]

    frozen = STUWeights(*(w.detach() for w in weights))

    def forward() -> Tensor:
        return stu_layer(x, STUWeights(*weights), shape, sequences)

    def infer() -> None:
        with torch.no_grad():
            stu_layer(x, frozen, shape, sequences)

    def train() -> None:
        torch.autograd.grad(forward(), leaves, grad)

    infer_ms, train_ms = timer(infer, flushes=8), timer(train, flushes=20)
    before = torch.cuda.memory_allocated()
    out = forward()
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    return {"inference_ms": infer_ms, "forward_backward_ms": train_ms, "kept_mb": (kept + x.nbytes) / 1e6}


def product_inputs(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = (rows, width), (width, width), (width,), (rows, width)
    x, w, bias, residual = (torch.randn(size, generator=generator, device="cuda") for size in sizes)
    return x.bfloat16(), (w * width**-0.5).bfloat16(), bias.bfloat16(), residual.bfloat16()


def fp8_product(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Callable[[], Tensor]:
    """x wᵀ + bias + residual over x and w quantised once, outside of the call."""
    (codes, scale), (w_codes, w_scale) = launch_quantize(x), launch_quantize(w)
    options: dict[str, Any] = {"residual": residual, "scales": (scale, w_scale), "dtype": torch.bfloat16}
    return lambda: launch_linear(codes, w_codes, bias, **options)[0]


def time_fp8(timer: Timer, width: int) -> dict[str, float]:
    """The output layer with its residual, and the row kernel before it, which in one case also quantises."""
    x, w, bias, residual = product_inputs(TOKENS, width)
    u = torch.randn(TOKENS, 4 * width, device="cuda", dtype=torch.bfloat16)[:, :width]
    norm, shift = (torch.randn(width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gate: dict[str, Any] = {"eps": 1e-6, "concat_ua": False, "p": 0.0, "seed": 0}
    w_codes, w_scale = launch_quantize(w)

    def gated_bf16() -> Tensor:
        y, _, _ = launch_norm_gate(x, u, norm, shift, **gate)
        assert y is not None
        return torch.addmm(residual, y, w.T)

    def gated_fp8() -> Tensor:
        _, codes, scale = launch_norm_gate(x, u, norm, shift, **gate, out=False, fp8=True)
        assert codes is not None and scale is not None
        return launch_linear(codes, w_codes, bias, residual=residual, scales=(scale, w_scale), dtype=x.dtype)[0]

    def quantised_apart() -> Tensor:
        codes, scale = launch_quantize(x)
        return launch_linear(codes, w_codes, bias, residual=residual, scales=(scale, w_scale), dtype=x.dtype)[0]

    found = {"addmm_ms": timer(lambda: torch.addmm(residual, x, w.T))}
    found["triton_bf16_ms"] = timer(lambda: launch_linear(x, w, bias, residual=residual))
    found["fp8_ms"] = timer(fp8_product(x, w, bias, residual))
    found["fp8_quantise_apart_ms"] = timer(quantised_apart)
    found["gate_addmm_ms"], found["gate_fp8_ms"] = timer(gated_bf16), timer(gated_fp8)
    gate_ms = timer(lambda: launch_norm_gate(x, u, norm, shift, **gate))
    gate8_ms = timer(lambda: launch_norm_gate(x, u, norm, shift, **gate, out=False, fp8=True))
    found["fp8_with_quantise_ms"] = found["fp8_ms"] + gate8_ms - gate_ms
    (codes, scale), options = launch_quantize(x), {"out_dtype": torch.bfloat16, "use_fast_accum": True}

    def scaled_mm() -> Tensor:  # takes no matrix as bias: the residual is a pass of its own
        return torch._scaled_mm(codes, w_codes.T, scale[:, None], w_scale[None, :], bias=bias, **options) + residual

    found["scaled_mm_and_add_ms"] = timer(scaled_mm)
    exact = residual.double() + x.double() @ w.double().T + bias.double()
    product = exact - residual.double() - bias.double()
    error = fp8_product(x, w, bias, residual)().double() - exact
    found["relative_error"] = (error.norm() / exact.norm()).item()
    found["relative_error_of_product"] = (error.norm() / product.norm()).item()
    return found


def time_rows(timer: Timer) -> dict[str, dict[str, float]]:
    """ms and TB/s of the row kernels, each input read and each output written once, beside copies of as many bytes."""
    x, u, norm, d = (torch.randn(TOKENS, 512, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    uvqk, w, b = torch.randn(TOKENS, 2048, device="cuda", dtype=torch.bfloat16), norm[0], norm[1]
    u, du = uvqk[:, :512], torch.empty_like(uvqk)[:, :512]
    gate: dict[str, Any] = {"eps": 1e-6, "concat_ua": False, "seed": 0}
    one = x.nbytes
    calls = {
        "norm": (2 * one, lambda: launch_layer_norm(x, w, b, 1e-6, x.dtype)),
        "norm + quantise": (1.5 * one, lambda: launch_layer_norm(x, w, b, 1e-6, x.dtype, out=False, fp8=True)),
        "norm + gate": (3 * one, lambda: launch_norm_gate(x, u, w, b, **gate, p=0.0)),
        "norm + gate, dropout": (3 * one, lambda: launch_norm_gate(x, u, w, b, **gate, p=0.1)),
        "norm + gate + quantise": (2.5 * one, lambda: launch_norm_gate(x, u, w, b, **gate, p=0.0, out=False, fp8=True)),
        "norm backward + residual": (4 * one, lambda: launch_layer_norm_backward(d, x, d, w, 1e-6)),
        "norm + gate backward, Y again": (
            6 * one,
            lambda: launch_norm_gate_backward(d, x, u, w, b, du, **gate, p=0.1, out=True),
        ),
    }
    found = {}
    for name, (moved, call) in calls.items():
        source = torch.empty(int(moved) // 2, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        ms, copy_ms = timer(call), timer(lambda source=source, target=target: target.copy_(source))
        found[name] = {"ms": ms, "tb_s": moved / ms / 1e9, "of_copy": copy_ms / ms, "mb": moved / 1e6}
    return found


def time_products(timer: Timer) -> dict[str, float]:
    """The layer's products: ours with what is fused into them, and the library's beside them."""
    x, w, bias, residual = product_inputs(TOKENS, 512)
    w4, bias4 = torch.randn(2048, 512, device="cuda", dtype=torch.bfloat16) * 512**-0.5, bias.repeat(4)
    grad = torch.randn(TOKENS, 2048, device="cuda", dtype=torch.bfloat16)
    (codes, scale), (codes4, scale4) = launch_quantize(x), launch_quantize(w4)
    fp8: dict[str, Any] = {"silu_from": 512, "scales": (scale, scale4), "dtype": torch.bfloat16}
    calls = {
        "f1: bias, SiLU": lambda: launch_linear(x, w4, bias4, silu_from=512),
        "f1: bias, SiLU, its derivative too": lambda: launch_linear(x, w4, bias4, silu_from=512, keep_slope=True),
        "f1: FP8, bias, SiLU": lambda: launch_linear(codes, codes4, bias4, **fp8),
        "f1: cuBLAS with bias, no SiLU": lambda: F.linear(x, w4, bias4),
        "f1: cuBLAS with bias, then SiLU": lambda: F.silu(F.linear(x, w4, bias4)),
        "f2: bias, residual": lambda: launch_linear(x, w, bias, residual=residual),
        "f2: torch.addmm(residual, ...), no bias": lambda: torch.addmm(residual, x, w.T),
        "backward of f1, to X (cuBLAS)": lambda: grad @ w4,
        "backward of f1, to its weight (cuBLAS)": lambda: grad.T @ x,
        "backward of f2, to Y (cuBLAS)": lambda: residual @ w,
        "backward of f2, to its weight (cuBLAS)": lambda: residual.T @ x,
    }
    return {name: timer(call) for name, call in calls.items()}


def time_five_layers(timer: Timer) -> dict[str, float]:
    """32 users of 1,024 history rows and 2,048 candidates, 5 layers, inference; and the host's work for it."""
    sequences = make_sequences((3072,) * 32, (2048,) * 32)
    x = torch.randn(32 * 3072, 512, device="cuda", dtype=torch.bfloat16)
    found = {}
    shapes = {"semi-local": LAYER, "semi-local, FP8": replace(LAYER, fp8=True), "causal": replace(LAYER, **CAUSAL)}
    for name, shape in shapes.items():
        layers = [STUWeights(*(w.bfloat16() for w in make_layer(shape, 512, seed))) for seed in range(5)]

        def infer(layers=layers, shape=shape) -> None:
            rows = x
            with torch.no_grad():
                for weights in layers:
                    rows = stu_layer(rows, weights, shape, sequences)

        found[name] = timer(infer, flushes=20)
    return found


def host_times() -> dict[str, float]:
    """Microseconds of host work a layer, on a batch so small that the device is never behind."""
    sequences, shape = make_sequences((300, 200)), replace(LAYER, recompute=RECOMPUTABLE)
    weights = [torch.nn.Parameter(w.bfloat16()) for w in make_layer(shape, 512)]
    x = torch.randn(500, 512, device="cuda", dtype=torch.bfloat16).requires_grad_()
    found = {}

    def measure(call: Callable[[], object], count: int = 200) -> float:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        spent = time.perf_counter() - begin
        torch.cuda.synchronize()
        return spent / count * 1e6

    with torch.no_grad():
        found["inference, 5 kernels"] = measure(lambda: stu_layer(x, STUWeights(*weights), shape, sequences))
    found["forward, 5 kernels"] = measure(lambda: stu_layer(x, STUWeights(*weights), shape, sequences))
    out, leaves = stu_layer(x, STUWeights(*weights), shape, sequences), [x, *weights]
    found["backward"] = measure(lambda: torch.autograd.grad(out, leaves, x.detach(), retain_graph=True))
    return found


# A training step -----------------------------------------------------------------------------------------------------


def training_step(users: int = 16, length: int = 4096, layers: int = 6, device: str = "cuda") -> dict[str, Any]:
    """The kernels of one step of the whole model, by name, as a profiler saw them."""
    from torch.profiler import ProfilerActivity, profile

    from pipeline import config
    from pipeline.data.batch import SequenceBatch
    from pipeline.train.loop import Trainee

    cfg = config.from_dict(
        {
            "source": {"kind": "synthetic", "actions": ["is_click", "is_like"], "request_columns": ["tab"]},
            "tasks": ["is_click", "is_like"],
            "features": {
                "item_id_dim": 64,
                "item": {"tag": {"dim": 16}},
                "user": {"age": {"dim": 16}},
                "user_tokens": {"who": ["age"]},
                "request": {"tab": {"dim": 8}},
            },
            "model": {
                "d_model": 512,
                "num_layers": layers,
                "num_heads": 4,
                "d_qk": 128,
                "d_v": 128,
                "attention": {"window": 256, "full_rows": 256, "scaling_seq_len": 4096},
                "recompute": list(RECOMPUTABLE),
            },
            "train": {"precision": "bf16"},
        }
    )
    sizes = {"item_id": 100_000, "item.tag": 100, "user.age": 10, "request.tab": 5}
    maps: Any = SimpleNamespace(vocab_sizes=sizes, base_rates={"is_click": 0.4, "is_like": 0.02})
    trainee = Trainee(cfg, maps, device, 0, 1)
    rows, targets = users * length, length // 16

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, device=device, dtype=torch.int32)

    batch = SequenceBatch(
        seq_offsets=torch.arange(0, rows + 1, length, device=device),
        num_targets=torch.full((users,), targets, dtype=torch.int32, device=device),
        item_codes=torch.stack([draw(100_000, rows), draw(100, rows)], dim=1),
        request_codes=draw(5, rows, 1),
        action_mask=draw(4, rows),
        known_mask=draw(4, rows),
        position=torch.arange(length, device=device).repeat(users),
        gap_ms=draw(10**6, rows).long(),
        user_codes=draw(10, users, 1),
        max_seq_len=length,
        labels=draw(2, users * targets, 2).float(),
        label_weight=torch.ones(users * targets, 2, device=device),
    )
    for step in range(3):
        trainee.step(batch, step, 100)
    torch.cuda.synchronize()
    steps = 3
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for step in range(steps):
            trainee.step(batch, step, 100)
        torch.cuda.synchronize()
    wall_ms = (time.perf_counter() - begin) / steps * 1e3
    kernels = {}
    for event in seen.key_averages():
        if event.self_device_time_total > 0:
            kernels[event.key] = (event.self_device_time_total / 1e3 / steps, event.count / steps)
    total = sum(ms for ms, _ in kernels.values())
    groups: dict[str, float] = {}
    for name, (ms, _) in kernels.items():
        groups[kernel_group(name)] = groups.get(kernel_group(name), 0.0) + ms
    largest = sorted(kernels.items(), key=lambda item: -item[1][0])[:30]
    return {
        "tokens": rows,
        "layers": layers,
        "device_ms": total,
        "wall_ms_profiled": wall_ms,
        "groups": {name: ms / total for name, ms in sorted(groups.items(), key=lambda item: -item[1])},
        "kernels": [{"name": name[:100], "ms": ms, "calls": calls} for name, (ms, calls) in largest],
    }


OURS = {
    "attention": ("forward", "backward_queries", "backward_keys", "count_tiles", "write_row_tiles", "write_key_tiles"),
    "the layer's products": ("linear",),
    "the layer's row kernels": ("norm_forward", "norm_backward", "gate_forward", "gate_backward", "quantize"),
    "table optimizer": ("update_rows", "finish_rows"),
}


def kernel_group(name: str) -> str:
    """What a kernel of the listing is, by its name."""
    for group, names in OURS.items():
        if name in names:
            return f"ours: {group}"
    lower = name.lower()
    if any(word in lower for word in ("gemm", "cutlass", "nvjet", "xmma", "splitk", "gemv")):
        return "library products"
    if "elementwise" in lower or "foreach" in lower or "multi_tensor" in lower:
        return "elementwise"
    if "memcpy" in lower or "memset" in lower:
        return "copies"
    return "other of PyTorch: norms, sums, sorts, gathers"


def time_ceilings(timer: Timer) -> dict[str, float]:
    copied = torch.empty(2**30, dtype=torch.int8, device="cuda")
    a, b = (torch.randn(n, 512, device="cuda", dtype=torch.bfloat16) for n in (TOKENS, 2048))
    copy_ms, gemm_ms = timer(lambda: copied[: 2**29].copy_(copied[2**29 :])), timer(lambda: a @ b.T)
    return {"copy_tb_s": 2**30 / copy_ms / 1e9, "gemm_tflops": 2 * TOKENS * 512 * 2048 / gemm_ms / 1e9}


def time_layers(timer: Timer) -> dict[str, dict[str, float]]:
    everything = replace(LAYER, recompute=RECOMPUTABLE)
    shapes = {
        "bf16, all recompute": everything,
        "bf16, nothing recomputed": LAYER,
        "FP8, all recompute": replace(everything, fp8=True),
        "bf16, all recompute, silu_qkv false": replace(everything, silu_qkv=False),
        "bf16, all recompute, causal": replace(everything, **CAUSAL),
    }
    return {f"{name} {n}": time_layer(timer, s, n) for name, s in shapes.items() for n in (4096, 16384)}


SECTIONS: dict[str, Callable[[Timer], Any]] = {
    "ceilings": time_ceilings,
    "layer": time_layers,
    "products": time_products,
    "fp8": lambda timer: {str(width): time_fp8(timer, width) for width in (512, 1024)},
    "rows": time_rows,
    "five_layers": time_five_layers,
    "host_us": lambda _: host_times(),
    "training_step": lambda _: training_step(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "layer.json")
    parser.add_argument("--parity-only", action="store_true")
    parser.add_argument("--report", type=Path, help="write RESULTS.md from this run, and do nothing else")
    arguments = parser.parse_args()
    if arguments.report:
        from benchmarks.layer_report import write_report

        write_report(json.loads(arguments.report.read_text()))
        return
    problems = parity()
    if arguments.parity_only:
        raise SystemExit(bool(problems))
    versions = {"torch": torch.__version__, "triton": triton.__version__, "device": torch.cuda.get_device_name()}
    found: dict = {"machine": versions, "parity": {"cases": len(parity_checks()), "wrong": problems}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    timer = Timer()
    for section, function in SECTIONS.items():
        try:
            found[section] = function(timer)
        except Exception as error:  # the other sections are worth having
            problems.append(f"{section}: {type(error).__name__}: {str(error)[:500]}")
            print(problems[-1], flush=True)
            continue
        arguments.out.write_text(json.dumps(found, indent=1))
        print(section, json.dumps(found[section]), flush=True)
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
