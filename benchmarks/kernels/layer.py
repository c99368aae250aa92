"""The STU layer on one GPU: parity first, then times of the layer, its products and its row
kernels.

    # parity and times, into benchmarks/runs/layer.json
    python -m benchmarks.kernels.layer
    python -m benchmarks.kernels.layer --parity-only
    # parity as `benchmarks.gpu_check --out FILE` has just found it
    python -m benchmarks.kernels.layer --checked FILE
    # some sections alone, into the same file
    python -m benchmarks.kernels.layer --no-parity --only rows host_us
    # without a GPU: tiny calls and no times
    TRITON_INTERPRET=1 python -m benchmarks.kernels.layer --smoke
    # its section of benchmarks/RESULTS.md
    python -m benchmarks.kernels.layer --report FILE

d = 512, 4 heads of 128, 65,536 tokens in bfloat16 unless said; inputs are normal with unit scale.
A time is the median of 30 runs by device events (`benchmarks.gpu.Timer`), with what 10 and 90 % of
them do not pass. What is compared takes turns: all layers of one length, all products, a row kernel
and the copy beside it.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import (
    DEVICE,
    TOKENS,
    Check,
    Timer,
    copy_call,
    found_in,
    host_us,
    parity,
    time_ceilings,
    versions,
)
from benchmarks.kernels.attention import zipf_lengths
from benchmarks.kernels.layer_parity import (
    CAUSAL,
    LAYER,
    fp8_product,
    make_layer,
    make_sequences,
    parity_checks,
    product_inputs,
)
from benchmarks.kernels.layer_report import LENGTHS, ZIPF, write_report
from benchmarks.report import write_run
from benchmarks.training.training_step import training_step
from kernels.layer_norm.op import swish_layer_norm
from kernels.layer_norm.triton_launch import (
    launch_layer_norm,
    launch_layer_norm_backward,
    launch_quantize,
    launch_row_scales,
    launch_swish,
    launch_swish_backward,
)
from kernels.linear.triton_launch import launch_linear
from kernels.norm_gate.triton_launch import launch_norm_gate, launch_norm_gate_backward
from kernels.position_time.op import add_position_time
from kernels.position_time.triton_launch import find_rows, launch_add, launch_table_gradients
from kernels.stu.op import stu_layer
from kernels.stu.recompute import RECOMPUTABLE
from kernels.stu.types import Sequences, STUShape, STUWeights

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class LayerBatch:
    """What a layer is timed on; candidates see the history up to a place of their own."""

    lengths: tuple[int, ...]
    num_targets: tuple[int, ...] | None = None
    p: float = 0.0  # of dropout in training

    def sequences(self) -> Sequences:
        sequences = make_sequences(self.lengths, self.num_targets)
        if self.num_targets is None:
            return sequences
        draws = torch.Generator().manual_seed(0)
        seen = []
        for length, targets in zip(self.lengths, self.num_targets, strict=True):
            ends = torch.randint(0, length - targets + 1, (targets,), generator=draws)
            seen.append(ends.sort().values)
        return replace(sequences, target_visible=torch.cat(seen).int().to(DEVICE))


def layer_batches() -> dict[str, LayerBatch]:
    found = {str(n): LayerBatch((n,) * (TOKENS // n)) for n in LENGTHS}
    lengths = zipf_lengths()
    found[ZIPF] = LayerBatch(lengths, tuple(min(256, n // 2) for n in lengths), 0.1)
    return found


def layer_calls(
    shape: STUShape, batch: LayerBatch, width: int = 512
) -> tuple[dict[str, Callable[[], object]], float]:
    """Inference, and forward + backward; and what a layer keeps for backward beside its input and
    output, in MB.
    """
    sequences, tokens = batch.sequences(), sum(batch.lengths)
    weights = [torch.nn.Parameter(w.bfloat16()) for w in make_layer(shape, width)]
    x, grad = (torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    leaves = [x.requires_grad_(), *weights]
    frozen = STUWeights(*(w.detach() for w in weights))
    seed = 77 if batch.p else None

    def forward() -> Tensor:
        return stu_layer(x, STUWeights(*weights), shape, sequences, p=batch.p, seed=seed)

    def infer() -> None:
        with torch.no_grad():
            stu_layer(x, frozen, shape, sequences)

    def train() -> None:
        torch.autograd.grad(forward(), leaves, grad)

    infer()  # compile
    train()
    before = torch.cuda.memory_allocated()
    out = forward()
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    return {"inference": infer, "forward_backward": train}, (kept + x.nbytes) / 1e6


def compare_layers(
    timer: Timer, shapes: dict[str, STUShape], batch: LayerBatch, width: int = 512
) -> dict[str, dict[str, Any]]:
    """Times of layers on one batch, all in turns."""
    calls, found = {}, {}
    for name, shape in shapes.items():
        of_layer, kept_mb = layer_calls(shape, batch, width)
        found[name] = {"kept_mb": kept_mb}
        for way, call in of_layer.items():
            calls[name, way] = call

    for (name, way), timing in timer.in_turns(calls).items():
        found[name][f"{way}_ms"] = timing.median
        found[name][f"{way}_range_ms"] = [timing.low, timing.high]
    return found


def time_fp8(timer: Timer, width: int) -> dict[str, Any]:
    """The output layer with its residual, and the row kernel before it, which in one case also
    quantises.
    """
    x, w, bias, residual = product_inputs(TOKENS, width)
    u = torch.randn(TOKENS, 4 * width, device=DEVICE, dtype=torch.bfloat16)[:, :width]
    norm, shift = (torch.randn(width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    gate: dict[str, Any] = {"eps": 1e-6, "concat_ua": False, "p": 0.0, "seed": None}
    w_codes, w_scale = launch_quantize(w)

    def gated_bf16() -> Tensor:
        y, _, _ = launch_norm_gate(x, u, norm, shift, **gate)
        assert y is not None
        return torch.addmm(residual, y, w.T)

    def gated_fp8() -> Tensor:
        _, codes, scale = launch_norm_gate(x, u, norm, shift, **gate, out=False, fp8=True)
        assert codes is not None and scale is not None
        return launch_linear(
            codes, w_codes, bias, residual=residual, scales=(scale, w_scale), dtype=x.dtype
        )[0]

    def quantised_apart() -> Tensor:
        codes, scale = launch_quantize(x)
        return launch_linear(
            codes, w_codes, bias, residual=residual, scales=(scale, w_scale), dtype=x.dtype
        )[0]

    (codes, scale), options = (
        launch_quantize(x),
        {"out_dtype": torch.bfloat16, "use_fast_accum": True},
    )

    def scaled_mm() -> Tensor:  # takes no matrix as bias: the residual is a pass of its own
        return (
            torch._scaled_mm(
                codes, w_codes.T, scale[:, None], w_scale[None, :], bias=bias, **options
            )
            + residual
        )

    calls = {
        "addmm": lambda: torch.addmm(residual, x, w.T),
        "triton_bf16": lambda: launch_linear(x, w, bias, residual=residual),
        "fp8": fp8_product(x, w, bias, residual),
        "fp8_quantise_apart": quantised_apart,
        "gate_addmm": gated_bf16,
        "gate_fp8": gated_fp8,
        "gate": lambda: launch_norm_gate(x, u, norm, shift, **gate),
        "gate_quantise": lambda: launch_norm_gate(x, u, norm, shift, **gate, out=False, fp8=True),
        "scaled_mm_and_add": scaled_mm,
    }
    found: dict[str, Any] = {}
    for name, timing in timer.in_turns(calls).items():
        found[f"{name}_ms"] = timing.median
        found[f"{name}_range_ms"] = [timing.low, timing.high]
    quantising = found["gate_quantise_ms"] - found["gate_ms"]
    found["fp8_with_quantise_ms"] = found["fp8_ms"] + quantising
    exact = residual.double() + x.double() @ w.double().T + bias.double()
    product = exact - residual.double() - bias.double()
    error = fp8_product(x, w, bias, residual)().double() - exact
    found["relative_error"] = (error.norm() / exact.norm()).item()
    found["relative_error_of_product"] = (error.norm() / product.norm()).item()
    return found


def time_rows(timer: Timer, tokens: int = TOKENS, width: int = 512) -> dict[str, dict[str, Any]]:
    """ms and TB/s of the row kernels, each input read and each output written once, beside copies
    of as many bytes.
    """
    options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    x, d, passed = (torch.randn(tokens, width, **options) for _ in range(3))
    uvqk = torch.randn(tokens, 4 * width, **options)
    w, b = (torch.randn(width, device=DEVICE) for _ in range(2))  # float32 as in training
    u, du = uvqk[:, :width], torch.empty_like(uvqk)[:, :width]
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    gate: dict[str, Any] = {"eps": 1e-6, "concat_ua": False, "seed": seed}
    one = x.nbytes
    calls = {
        "norm": (2 * one, lambda: launch_layer_norm(x, w, b, 1e-6, x.dtype)),
        "norm's deviations": (one, lambda: launch_row_scales(x, 1e-6)),
        "norm + quantise": (
            1.5 * one,
            lambda: launch_layer_norm(x, w, b, 1e-6, x.dtype, out=False, fp8=True),
        ),
        "norm + gate": (3 * one, lambda: launch_norm_gate(x, u, w, b, **gate, p=0.0)),
        "norm + gate, dropout": (3 * one, lambda: launch_norm_gate(x, u, w, b, **gate, p=0.1)),
        "norm + gate + quantise": (
            2.5 * one,
            lambda: launch_norm_gate(x, u, w, b, **gate, p=0.0, out=False, fp8=True),
        ),
        "norm backward + residual": (
            4 * one,
            lambda: launch_layer_norm_backward(d, x, passed, w, 1e-6),
        ),
        "norm + gate backward, Y again": (
            6 * one,
            lambda: launch_norm_gate_backward(d, x, u, w, b, du, **gate, p=0.1, out=True),
        ),
    }
    calls |= encoder_calls(tokens, width)
    found = {}
    for name, (moved, call) in calls.items():
        both = timer.in_turns({"kernel": call, "copy": copy_call(moved)})
        ms = both["kernel"].median
        rates = {"tb_s": moved / ms / 1e9, "of_copy": both["copy"].median / ms, "mb": moved / 1e6}
        found[name] = both["kernel"].as_numbers() | rates
    return found


def encoder_calls(tokens: int, width: int) -> dict[str, tuple[float, Callable[[], object]]]:
    """The token encoder's row kernels and plain PyTorch in their place: bytes moved once, and the
    call.
    """
    options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    # between the content's linear maps
    wide, d_wide = (torch.randn(tokens, 2 * width, **options) for _ in range(2))
    w, b = (torch.randn(2 * width, device=DEVICE) for _ in range(2))
    x, d = wide[:, :width].contiguous(), d_wide[:, :width].contiguous()
    sizes = 8192, 64
    tables = tuple(torch.randn(rows, width, device=DEVICE) for rows in sizes)
    place = (
        torch.arange(tokens, device=DEVICE) % 16_384,
        torch.randint(0, 10**8, (tokens,), device=DEVICE),
    )
    found = find_rows(*place, None, sizes, "event")
    leaves = [t.clone().requires_grad_() for t in (wide, w, b)]
    placed = [t.clone().requires_grad_() for t in (x, *tables)]

    def plain_gate() -> object:
        return torch.autograd.grad(swish_layer_norm(*leaves, backend="torch"), leaves, d_wide)

    def plain_places() -> object:
        return torch.autograd.grad(add_position_time(*placed, *place, backend="torch"), placed, d)

    one, of_tables = wide.nbytes, sum(t.nbytes for t in tables)
    return {
        "x * sigmoid(norm(x)), twice as wide": (2 * one, lambda: launch_swish(wide, w, b, 1e-5)),
        "… backward": (3 * one, lambda: launch_swish_backward(d_wide, wide, w, b, 1e-5)),
        "… both, plain PyTorch": (5 * one, plain_gate),
        "position + time": (
            one + of_tables,
            lambda: launch_add(x, tables, find_rows(*place, None, sizes, "event")),
        ),
        "… gradients of both tables": (
            one + of_tables,
            lambda: launch_table_gradients(d, found),
        ),
        "… both, plain PyTorch (gradients by token)": (2 * one + 2 * of_tables, plain_places),
    }


def time_products(timer: Timer) -> dict[str, dict[str, Any]]:
    """The layer's products: ours with what is fused into them, and the library's beside them."""
    x, w, bias, residual = product_inputs(TOKENS, 512)
    w4, bias4 = (
        torch.randn(2048, 512, device=DEVICE, dtype=torch.bfloat16) * 512**-0.5,
        bias.repeat(4),
    )
    grad = torch.randn(TOKENS, 2048, device=DEVICE, dtype=torch.bfloat16)
    (codes, scale), (codes4, scale4) = launch_quantize(x), launch_quantize(w4)
    fp8: dict[str, Any] = {"silu_from": 512, "scales": (scale, scale4), "dtype": torch.bfloat16}
    calls = {
        "f1: bias, SiLU": lambda: launch_linear(x, w4, bias4, silu_from=512),
        "f1: bias, SiLU, its derivative too": lambda: launch_linear(
            x, w4, bias4, silu_from=512, keep_slope=True
        ),
        "f1: its norm folded in, bias, SiLU": lambda: launch_linear(
            x, w4, bias4, silu_from=512, scales=(scale, None)
        ),
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
    return {name: timing.as_numbers() for name, timing in timer.in_turns(calls).items()}


def time_five_layers(timer: Timer) -> dict[str, dict[str, Any]]:
    """32 users of 1,024 history rows and 2,048 candidates, 5 layers, inference; and the host's work
    for it.
    """
    sequences = make_sequences((3072,) * 32, (2048,) * 32)
    x = torch.randn(32 * 3072, 512, device=DEVICE, dtype=torch.bfloat16)
    calls = {}
    shapes = {
        "semi-local": LAYER,
        "semi-local, FP8": replace(LAYER, fp8=True),
        "causal": replace(LAYER, **CAUSAL),
    }
    for name, shape in shapes.items():
        layers = [
            STUWeights(*(w.bfloat16() for w in make_layer(shape, 512, seed))) for seed in range(5)
        ]

        def infer(layers=layers, shape=shape) -> None:
            rows = x
            with torch.no_grad():
                for weights in layers:
                    rows = stu_layer(rows, weights, shape, sequences)

        calls[name] = infer
    return {name: timing.as_numbers() for name, timing in timer.in_turns(calls).items()}


def host_times() -> dict[str, float]:
    """Microseconds of host work a layer."""
    sequences, shape = make_sequences((300, 200)), replace(LAYER, recompute=RECOMPUTABLE)
    weights = [torch.nn.Parameter(w.bfloat16()) for w in make_layer(shape, 512)]
    x = torch.randn(500, 512, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    found = {}
    with torch.no_grad():
        found["inference, 5 kernels"] = host_us(
            lambda: stu_layer(x, STUWeights(*weights), shape, sequences)
        )
    found["forward, 5 kernels"] = host_us(
        lambda: stu_layer(x, STUWeights(*weights), shape, sequences)
    )
    out, leaves = stu_layer(x, STUWeights(*weights), shape, sequences), [x, *weights]
    found["backward"] = host_us(
        lambda: torch.autograd.grad(out, leaves, x.detach(), retain_graph=True)
    )
    return found


def layer_shapes() -> dict[str, STUShape]:
    everything = replace(LAYER, recompute=RECOMPUTABLE)
    return {
        "bf16, all recompute": everything,
        "bf16, nothing recomputed": LAYER,
        "FP8, all recompute": replace(everything, fp8=True),
        "bf16, all recompute, silu_qkv false": replace(everything, silu_qkv=False),
        "bf16, all recompute, A in float32": replace(everything, norm_a_fp32=True),
        "bf16, all recompute, prefix of 4": replace(everything, prefix=4),
        "bf16, all recompute, causal": replace(everything, **CAUSAL),
    }


def time_layers(timer: Timer) -> dict[str, dict[str, Any]]:
    found = {}
    for of_batch, batch in layer_batches().items():
        for name, numbers in compare_layers(timer, layer_shapes(), batch).items():
            found[f"{name} {of_batch}"] = numbers
    return found


def compile_layer(name: str) -> None:
    """Runs a layer once, which leaves its kernels in Triton's cache."""
    batches = layer_batches()
    for of_batch in (ZIPF, str(LENGTHS[0])):
        layer_calls(layer_shapes()[name], batches[of_batch])


def compile_section(name: str) -> None:
    """Runs a section once."""
    torch.use_deterministic_algorithms(False)  # not of all that stands beside ours
    SECTIONS[name](Timer(repeats=1))


def compile_checks() -> list[Check]:
    """What leaves this benchmark's kernels in Triton's cache."""
    layers: list[Check] = [(compile_layer, name) for name in layer_shapes()]
    sections = "products", "fp8", "rows", "five_layers", "training_step"
    return layers + [(compile_section, name) for name in sections]


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


def smoke() -> None:
    """Calls at tiny sizes, for a machine without a GPU."""
    tiny = replace(LAYER, num_heads=1, d_qk=16, d_v=16, window=4, full_rows=3)
    compare_layers(Timer(), {"tiny": tiny}, LayerBatch((9, 7), (2, 1), 0.1), 16)
    time_rows(Timer(), tokens=3, width=16)
    training_step(users=2, length=16, layers=1, heads=1, width=16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "layer.json")
    parser.add_argument("--parity-only", action="store_true")
    parser.add_argument(
        "--no-parity",
        action="store_true",
        help="without parity, and what the file says of it stays",
    )
    parser.add_argument(
        "--checked",
        type=Path,
        metavar="FILE",
        help="parity as `benchmarks.gpu_check --out` found it",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny calls, in Triton's interpreter too"
    )
    parser.add_argument(
        "--report", type=Path, help="write RESULTS.md from this run, and do nothing else"
    )
    arguments = parser.parse_args()
    if arguments.report:
        write_report(json.loads(arguments.report.read_text()))
        return
    if arguments.smoke:
        smoke()
        return
    skipped = arguments.no_parity or arguments.checked
    problems = [] if skipped else parity(parity_checks())
    if arguments.parity_only:
        raise SystemExit(bool(problems))
    partial = len(arguments.only) < len(SECTIONS) and arguments.out.exists()
    found: dict = json.loads(arguments.out.read_text()) if partial else {}
    found["machine"] = versions()
    if arguments.checked:
        found["parity"] = found_in(arguments.checked, "tokens", "layer")
    elif not skipped:
        found["parity"] = {"cases": len(parity_checks()), "wrong": list(problems)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    timer = Timer()
    for section in arguments.only:
        try:
            found[section] = SECTIONS[section](timer)
        except Exception as error:  # the other sections are worth having
            problems.append(f"{section}: {type(error).__name__}: {str(error)[:500]}")
            print(problems[-1], flush=True)
            continue
        write_run(arguments.out, found)
        print(section, json.dumps(found[section]), flush=True)
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
